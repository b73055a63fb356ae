"""sbatch on the scripts of slurm/: command lines are made here, from values only, and never pass through a shell."""

import subprocess
from collections.abc import Sequence

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster, RunConfig
from launcher.rundir.code import SOURCE_ROOT

DATA_SCRIPT = SOURCE_ROOT / "slurm" / "data_prep.sh"


def data_array(config: RunConfig, *, overrides: Sequence[str]) -> list[str]:
    """The sbatch line that prepares the data of a run: `data.num_machines` elements of `data.num_workers` cores."""
    resources = [f"--array=0-{config.data.num_machines - 1}", f"--cpus-per-task={config.data.num_workers}"]
    return ["sbatch", "--parsable", *resources, *site_flags(config.cluster), str(DATA_SCRIPT), *overrides]


def site_flags(cluster: Cluster) -> list[str]:
    """What a site wants to know of every job."""
    given = {"partition": cluster.partition, "account": cluster.account, "time": cluster.time_limit}
    return [f"--{flag}={value}" for flag, value in given.items() if value]


def run_sbatch(command: Sequence[str]) -> str:
    """Submits; the job id. ConfigError where Slurm is not here, or refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SOURCE_ROOT)
    except FileNotFoundError as error:
        rule = "engine=slurm calls sbatch of this machine"
        raise ConfigError(
            Problem("engine", "no sbatch on the PATH", rule, "log in where jobs are submitted, or engine=local")
        ) from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            Problem("engine", f"sbatch said: {error.stderr.strip()}", "Slurm takes the job", "correct cluster.*")
        ) from error
    return done.stdout.strip().partition(";")[0]
