"""A job at work: what runs on the first node of a Slurm allocation, from the batch script. Starts the ranks, one task a GPU,
passes signals on as the stop flag, and queues the job again where the policy says so.

The job's comment holds the run directory: a requeue goes on from there without composing anything.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster, RunConfig
from launcher.jobs.graph import job_comment
from launcher.jobs.local import Ranks, rank_environment, train_stages
from launcher.jobs.policy import judge
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records

# A requeue ends this process from outside; where it does not come, the job has failed.
REQUEUE_WAIT_S = 60.0
PORTS = range(20000, 30000)


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave, from its environment variables."""

    job: str
    num_nodes: int
    tasks_per_node: int
    nodes: tuple[str, ...]
    restarts: int


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """ConfigError outside a job."""
    if "SLURM_JOB_ID" not in environment:
        rule = "it is the part of slurm/pretrain.sh that runs inside a job"
        raise ConfigError(Problem("job", "no Slurm job", rule, "sbatch slurm/pretrain.sh ..., or `phidias submit`"))
    names = slurm_says("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()
    per_node = environment.get("SLURM_NTASKS_PER_NODE", "1")
    return Allocation(
        job=environment["SLURM_JOB_ID"],
        num_nodes=len(names),
        tasks_per_node=int(per_node.partition("(")[0]),
        nodes=tuple(names),
        restarts=int(environment.get("SLURM_RESTART_COUNT", 0)),
    )


def fitted_to(config: RunConfig, allocation: Allocation, *, overrides: tuple[str, ...]) -> RunConfig:
    """The config with the nodes that Slurm gave. ConfigError where the command line says otherwise, or tasks are no ranks."""
    cluster, problems = config.cluster, []
    if cluster.kind != "slurm":
        rule = "slurm/pretrain.sh trains on a Slurm cluster"
        problems.append(Problem("cluster.kind", cluster.kind, rule, "cluster=slurm_h100, or a cluster of kind slurm"))
    said = any(word.partition("=")[0].lstrip("+") == "cluster.num_nodes" for word in overrides)
    if said and cluster.num_nodes != allocation.num_nodes:
        rule = f"the job has {allocation.num_nodes}"
        problems.append(Problem("cluster.num_nodes", str(cluster.num_nodes), rule, f"sbatch --nodes={cluster.num_nodes}"))
    if allocation.tasks_per_node != cluster.gpus_per_node:
        rule = f"a rank is a task, and cluster {cluster.name} has cluster.gpus_per_node={cluster.gpus_per_node}"
        fix = f"sbatch --ntasks-per-node={cluster.gpus_per_node}"
        problems.append(Problem("job", f"{allocation.tasks_per_node} tasks a node", rule, fix))
    if problems:
        raise ConfigError(*problems)
    return replace(config, cluster=replace(cluster, num_nodes=allocation.num_nodes))


def work(run: RunDir, config: RunConfig, *, allocation: Allocation) -> ExitClass:
    """Trains the stages, and queues the job again where its end asks for it."""
    ranks = slurm_ranks(run, config, allocation=allocation)
    about = {"job": allocation.job, "nodes": list(allocation.nodes), "restarts": allocation.restarts}
    ended, asked = train_stages(run, config, ranks=ranks, **about)
    if ended is ExitClass.INTERRUPTED and asked:
        ended = ExitClass.CHECKPOINTED  # Slurm asked, not a person
    verdict = judge(ended, events=list(read_records(run.events)))
    append_record(run.events, "job_end", job=allocation.job, exit=ended.name, after=verdict.after, reason=verdict.reason)
    if verdict.after == "end":
        print(f"{run.name}: ended as {ended.name}" + (f"; not queued again: {verdict.reason}" if verdict.reason else ""))
        return ended
    print(f"{run.name}: ended as {ended.name}; queueing job {allocation.job} again", flush=True)
    return requeue(allocation, ended=ended)


def requeue(allocation: Allocation, *, ended: ExitClass) -> ExitClass:
    """`scontrol requeue` ends this process. The exit class where it does not."""
    for kind in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_DFL)
    slurm_says("scontrol", "requeue", allocation.job)
    time.sleep(REQUEUE_WAIT_S)
    return ended


def slurm_ranks(run: RunDir, config: RunConfig, *, allocation: Allocation) -> Ranks:
    """One task a rank. Slurm keeps the second signal: what it ends it ends itself."""
    rendezvous = {"MASTER_ADDR": allocation.nodes[0], "MASTER_PORT": str(port(config.cluster, job=allocation.job))}
    return Ranks(
        command=lambda stage: srun_command(run, cluster=config.cluster, stage=stage),
        environment={**rank_environment(config.cluster), **rendezvous},
        signals=(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
        second_ends=False,
    )


def srun_command(run: RunDir, *, cluster: Cluster, stage: str) -> list[str]:
    """The first rank that fails ends all; what each of them says goes to this process, which logs it."""
    tasks = [f"--nodes={cluster.num_nodes}", f"--ntasks-per-node={cluster.gpus_per_node}"]
    options = [*tasks, "--kill-on-bad-exit=1", "--unbuffered", "--export=ALL"]
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")  # srun does not inherit it since Slurm 22.05
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    return ["srun", *options, sys.executable, "-m", "training", str(run.root.resolve()), f"--stage={stage}"]


def port(cluster: Cluster, *, job: str) -> int:
    """The same on every node without asking: from the job's number, unless the cluster names one."""
    return cluster.master_port or PORTS[int(job) % len(PORTS)]


def remember(run: RunDir, config: RunConfig, *, allocation: Allocation) -> None:
    """The job carries its run directory and its stages, through requeues too."""
    slurm_says("scontrol", "update", f"JobId={allocation.job}", f"Comment={job_comment(run, stages=config.stage_names)}")


def remembered(allocation: Allocation) -> tuple[RunDir, RunConfig] | None:
    """The run that `phidias submit` or an earlier start of the job has frozen, with the stages that are this job's; None on the
    first start of a job submitted by hand."""
    said = slurm_says("squeue", "--noheader", "--jobs", allocation.job, "--format=%k").strip()
    root, _, stages = said.rpartition(":")
    run = RunDir(Path(root))
    if not root.startswith("/") or not run.config.exists():
        return None
    config = read_config(run)
    return run, replace(config, stages=tuple(config.stage(name) for name in stages.split(",")))


def slurm_says(*command: str) -> str:
    """ConfigError where Slurm's command fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        found, fix = f"`{' '.join(command)}`: {said}", "see `sinfo` and `squeue`"
        raise ConfigError(Problem("cluster", found, "Slurm must answer", fix)) from error
