"""What Slurm gave a job, and what the job carries through requeues, in its comment: its run, its stages and its code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.jobs.slurm import insist, show_job
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json

PORTS = range(20000, 30000)


@dataclass(frozen=True)
class Allocation:
    """`job` names it to Slurm's commands, `17_2` an element of an array; `number` is its own; `element` its place in the array;
    `comment` what it carries."""

    job: str
    number: int
    element: int | None
    tasks_per_node: int
    nodes: tuple[str, ...]
    restarts: int
    comment: str = ""

    @property
    def port(self) -> int:
        """The same on every node without asking."""
        return PORTS[self.number % len(PORTS)]


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """ConfigError outside a job."""
    if "SLURM_JOB_ID" not in environment:
        rule = "it is the part of slurm/pretrain.sh that runs inside a job"
        raise ConfigError(Problem("job", "no Slurm job", rule, "sbatch slurm/pretrain.sh ..., or `phidias submit`"))
    # Asked of Slurm: variables may be those of a job that this one was submitted from.
    number = int(environment["SLURM_JOB_ID"])
    fields = show_job(number)
    array, element = fields.get("ArrayJobId"), fields.get("ArrayTaskId", "")
    return Allocation(
        job=f"{array}_{element}" if array else str(number),
        number=number,
        element=int(element) if array else None,
        tasks_per_node=int(environment.get("SLURM_NTASKS_PER_NODE", "1").partition("(")[0]),
        nodes=tuple(insist("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()),
        restarts=int(fields.get("Restarts", 0)),
        comment=fields.get("Comment", "").strip(),
    )


def said_nodes(overrides: Sequence[str]) -> bool:
    """Whether the command line itself says how many nodes there are."""
    return any(word.partition("=")[0].lstrip("+") == "cluster.num_nodes" for word in overrides)


def fitted_to(config: RunConfig, allocation: Allocation, *, overrides: Sequence[str]) -> RunConfig:
    """The config with the nodes that Slurm gave, less the spare ones. ConfigError where the command line says otherwise, or
    tasks are no ranks."""
    cluster, problems = config.cluster, []
    given, num_nodes = len(allocation.nodes), len(allocation.nodes) - config.cluster.spare_nodes
    if cluster.kind != "slurm":
        rule = "slurm/pretrain.sh trains on a Slurm cluster"
        problems.append(Problem("cluster.kind", cluster.kind, rule, "cluster=slurm_h100, or a cluster of kind slurm"))
    if num_nodes < 1:
        rule = f"the job has {given} nodes, and ranks need one"
        problems.append(
            Problem("cluster.spare_nodes", str(cluster.spare_nodes), rule, f"sbatch --nodes={1 + cluster.spare_nodes}")
        )
    elif said_nodes(overrides) and cluster.num_nodes != num_nodes:
        spare = f", {cluster.spare_nodes} of them spare" if cluster.spare_nodes else ""
        fix = f"sbatch --nodes={cluster.num_nodes + cluster.spare_nodes}"
        problems.append(Problem("cluster.num_nodes", str(cluster.num_nodes), f"the job has {given}{spare}", fix))
    if allocation.tasks_per_node != cluster.gpus_per_node:
        rule = f"a rank is a task, and cluster {cluster.name} has cluster.gpus_per_node={cluster.gpus_per_node}"
        fix = f"sbatch --ntasks-per-node={cluster.gpus_per_node}"
        problems.append(Problem("job", f"{allocation.tasks_per_node} tasks a node", rule, fix))
    if problems:
        raise ConfigError(*problems)
    return replace(config, cluster=replace(cluster, num_nodes=num_nodes))


def job_comment(run: RunDir, *, what: Sequence[str], code: Path) -> str:
    """What a job carries: its run directory, its stages, and the copy of the code it works with."""
    return f"{run.root.resolve()}:{','.join(what)}:{code.name}"


def remember(run: RunDir, config: RunConfig, *, allocation: Allocation, code: Path) -> None:
    """The job carries what it works on, through requeues too."""
    comment = job_comment(run, what=config.stage_names, code=code)
    insist("scontrol", "update", f"JobId={allocation.job}", f"Comment={comment}")


@dataclass(frozen=True)
class Remembered:
    """What a job works on: a frozen run, its stages that are the job's, the copy of the code."""

    run: RunDir
    config: RunConfig
    code: Path


def remembered(allocation: Allocation) -> Remembered | None:
    """The run that `phidias submit` or an earlier start of the job has frozen, with the stages that are this job's; None on the
    first start of a job submitted by hand. The comment of a sweep's array names a list of runs, of which the element is one."""
    rest, _, digest = allocation.comment.rpartition(":")
    root, _, stages = rest.rpartition(":")
    if not root.startswith("/") or not digest:
        return None
    path = Path(root)
    if path.is_file() and allocation.element is not None:
        row = read_json(path)["runs"][allocation.element]
        path, stages = Path(row["run"]), ",".join(row["stages"])
    run = RunDir(path)
    if not run.config.exists():
        return None
    config = read_config(run)
    return Remembered(run, replace(config, stages=tuple(map(config.stage, stages.split(",")))), run.code_copy(digest))
