"""sbatch on the scripts of slurm/: command lines are made here, from values only, and never pass through a shell."""

import subprocess
import sys
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster, RunConfig
from launcher.rundir.code import SOURCE_ROOT, child_environment

DATA_SCRIPT = SOURCE_ROOT / "slurm" / "data_prep.sh"


def data_array(config: RunConfig, *, overrides: Sequence[str]) -> list[str]:
    """The sbatch line that prepares the data of a run: `data.num_machines` elements of `data.num_workers` cores. It works where
    it is submitted, as relative paths of the overrides do."""
    resources = [f"--array=0-{config.data.num_machines - 1}", f"--cpus-per-task={config.data.num_workers}"]
    options = [*resources, *site_flags(config.cluster), f"--export=ALL,PHIDIAS_PYTHON={sys.executable}"]
    return ["sbatch", "--parsable", *options, str(DATA_SCRIPT), *search_path_words(), *overrides]


def site_flags(cluster: Cluster) -> list[str]:
    """What a site wants to know of every job."""
    given = {"partition": cluster.partition, "account": cluster.account, "time": cluster.time_limit}
    return [f"--{flag}={value}" for flag, value in given.items() if value]


def search_path_words() -> list[str]:
    """Where this call found YAML of its own: Hydra keeps --config-dir and its own keys apart from the overrides."""
    if not HydraConfig.initialized():
        return []
    settings = HydraConfig.get()
    folders = [source.path for source in settings.runtime.config_sources if source.provider == "command-line"]
    added = [word for word in settings.overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")]
    return [*(f"--config-dir={folder}" for folder in folders), *added]


def run_sbatch(command: Sequence[str]) -> str:
    """Submits; the job id. ConfigError where Slurm is not here, or refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=child_environment())
    except FileNotFoundError as error:
        rule = "jobs are submitted by sbatch of this machine"
        raise ConfigError(Problem("engine", "no sbatch on the PATH", rule, "log in where jobs are submitted")) from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            Problem("engine", f"sbatch said: {error.stderr.strip()}", "Slurm takes the job", "correct cluster.*")
        ) from error
    return done.stdout.strip().partition(";")[0]
