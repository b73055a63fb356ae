"""Lines for srun: commands on the nodes of an allocation, in the environment that the cluster says. Nothing is run here."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.schema import Cluster, RunConfig
from launcher.rundir.paths import RunDir

# Runs the setup lines, then becomes the command: its signals and its exit code are the command's.
SETUP = 'set -e\n{lines}\nexec "$@"'


@dataclass(frozen=True)
class Place:
    """Where commands of a job run: the cluster's environment, the code they import, the folders they need, and the cores of a
    node, None where Slurm does not say."""

    cluster: Cluster
    code: Path
    folders: tuple[Path, ...]
    cores: int | None


def place_of(run: RunDir, config: RunConfig, *, code: Path, environment: Mapping[str, str]) -> Place:
    local_data = [] if "://" in config.run.data_dir else [Path(config.run.data_dir).resolve()]
    wandb, data = config.monitor.wandb.key_file, config.data.cache_dir
    files = [name for name in (config.tokenizer.file, config.tokenizer.ranks_file, data, wandb) if name]
    folders = (
        Path.cwd(),
        run.root.resolve(),
        code.resolve(),
        *local_data,
        *(Path(name).expanduser().resolve() for name in files),
    )
    return Place(config.cluster, code, folders, cores_of_node(environment))


def cores_of_node(environment: Mapping[str, str]) -> int | None:
    """Of the node with the fewest: `16(x4),8` is four nodes of 16 cores and one of 8."""
    said = environment.get("SLURM_JOB_CPUS_PER_NODE", "")
    counts = [int(part.partition("(")[0]) for part in said.split(",") if part.partition("(")[0].isdigit()]
    return min(counts, default=None)


def rank_line(words: Sequence[str], *, place: Place, nodes: Sequence[str], tasks_per_node: int) -> list[str]:
    """`python words...` as so many ranks on each of the nodes: the first that fails ends all."""
    return srun_line(words, ["--kill-on-bad-exit=1", "--unbuffered"], place=place, nodes=nodes, tasks_per_node=tasks_per_node)


def check_line(words: Sequence[str], *, place: Place, nodes: Sequence[str], tasks_per_node: int) -> list[str]:
    """`python words...` on each of the nodes, which answer whatever becomes of the others. Lines come whole, as they do not
    unbuffered; a task that nobody can end holds nothing back."""
    return srun_line(words, ["--kill-on-bad-exit=0", "--overlap"], place=place, nodes=nodes, tasks_per_node=tasks_per_node)


def srun_line(
    words: Sequence[str], options: Sequence[str], *, place: Place, nodes: Sequence[str], tasks_per_node: int
) -> list[str]:
    count = len(nodes) * tasks_per_node  # said, or srun takes the job's
    tasks = [
        f"--nodes={len(nodes)}",
        f"--ntasks={count}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--nodelist={','.join(nodes)}",
    ]
    # srun does not inherit sbatch's since Slurm 22.05, and would give a task one core.
    cores = [f"--cpus-per-task={max(1, place.cores // tasks_per_node)}"] if place.cores else []
    spare = ["--no-kill"] if place.cluster.spare_nodes else []  # a node that dies takes its ranks along, not the job
    environment = [*pyxis_flags(place), *with_setup(in_container(words, place=place), setup=place.cluster.setup)]
    return ["srun", *tasks, *options, "--export=ALL", *cores, *spare, *environment]


def pyxis_flags(place: Place) -> list[str]:
    container = place.cluster.container
    if container is None or container.runtime != "pyxis":
        return []
    where = f"--container-workdir={Path.cwd()}"  # relative paths of the config mean what they meant outside
    return [f"--container-image={container.image}", f"--container-mounts={','.join(mounts(place))}", where]


def in_container(words: Sequence[str], *, place: Place) -> list[str]:
    """The command as a task starts it. An image may set PYTHONPATH itself: ours is said behind it."""
    container = place.cluster.container
    if container is None:
        return [sys.executable, *words]
    inside = ["env", f"PYTHONPATH={place.code.resolve()}", "PYTHONSAFEPATH=1", container.python, *words]
    if container.runtime == "pyxis":
        return inside
    gpus = ["--nv"] if place.cluster.gpu else []
    where = [f"--bind={','.join(mounts(place))}", f"--pwd={Path.cwd()}"]
    return ["apptainer", "exec", *gpus, *where, container.image, *inside]


def mounts(place: Place) -> list[str]:
    """`outside:inside` of what the cluster names and what the job needs; a folder inside another one comes with it."""
    container = place.cluster.container
    return [*(container.mounts if container else ()), *(f"{folder}:{folder}" for folder in outermost(place.folders))]


def outermost(folders: Iterable[Path]) -> list[Path]:
    found = list(dict.fromkeys(folders))
    return [folder for folder in found if not any(other != folder and folder.is_relative_to(other) for other in found)]


def with_setup(command: Sequence[str], *, setup: Sequence[str]) -> list[str]:
    """Shell lines of the cluster's YAML before a command whose words no shell reads."""
    return ["bash", "-c", SETUP.format(lines="\n".join(setup)), "setup", *command] if setup else list(command)


def one_process(words: Sequence[str], *, place: Place) -> list[str]:
    """`python words...` as one process: inside a job in its container, elsewhere as it is here."""
    if place.cluster.container is None or "SLURM_JOB_ID" not in os.environ:
        return [sys.executable, *words]
    head = ["srun", "--nodes=1", "--ntasks=1", "--export=ALL", *pyxis_flags(place)]
    return [*head, *with_setup(in_container(words, place=place), setup=place.cluster.setup)]
