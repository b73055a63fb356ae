"""A job at work: what runs on the first node of a Slurm allocation, from the batch script. Checks the nodes, starts the ranks,
one task a GPU, passes signals on as the stop flag, and starts again or queues the job again where the policy says so."""

import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from launcher.config.errors import ConfigError
from launcher.config.schema import RunConfig
from launcher.jobs.allocation import Allocation
from launcher.jobs.local import rank_settings
from launcher.jobs.node_rules import NodeFault
from launcher.jobs.nodes import Health, Step, check_nodes
from launcher.jobs.policy import fruitless_starts, judge
from launcher.jobs.slurm import duration_s, parse_fields, slurm_says
from launcher.jobs.stages import Ranks, lower_flag, person_asked, train_stages
from launcher.jobs.steps import Place, check_line, rank_line
from launcher.rundir.code import child_environment
from launcher.rundir.exits import ExitClass
from launcher.rundir.lock import is_live
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A file system frees the lock of a node that died when its lease ends.
LOCK_WAIT_S = 180.0
# Before a third start in vain: what broke the first two may need a moment to pass.
RESTART_WAIT_S = 15.0
# How long a controller may not answer before a job gives up queueing itself again.
INSIST_S = 600.0
# States of a node on which nothing is to be started; a star says that it does not answer.
LOST = re.compile(r"down|drain|fail|error|unknown|.*\*$")
# Of the nodes given: more than that do not fail at once, something is wrong with all.
MOST_BAD = 0.25


@dataclass(frozen=True)
class Job:
    """A run on an allocation. `asked`: the signals that came."""

    run: RunDir
    config: RunConfig
    allocation: Allocation
    place: Place
    asked: list[int]

    def note(self, kind: str, **fields: Any) -> None:
        append_record(self.run.events, kind, job=self.allocation.job, **fields)

    def events(self) -> list[dict[str, Any]]:
        return list(read_records(self.run.events))

    @property
    def bad_nodes(self) -> list[str]:
        """That this job is to avoid, from its earlier starts too."""
        rows = (row for row in self.events() if row["kind"] == "bad_node" and row["job"] == self.allocation.job)
        return list(dict.fromkeys(row["node"] for row in rows))


def work(job: Job) -> ExitClass:
    """Trains the stages, through faults that may pass and nodes that fail; queues the job again where its end asks for it."""
    if person_stopped(job):
        print(f"{job.run.name}: stopped by a person before it started again")
        return ExitClass.INTERRUPTED
    while True:
        ended = attempt(job)
        verdict = judge(ended, events=job.events())
        after = "requeue" if verdict.after == "restart" and must_requeue(job, ended=ended) else verdict.after
        job.note("job_end", exit=ended.name, after=after, reason=verdict.reason)
        if after == "end":
            why = f"; not started again: {verdict.reason}" if verdict.reason else ""
            print(f"{job.run.name}: ended as {ended.name}{why}")
            return ended
        print(f"{job.run.name}: ended as {ended.name}; {after} of job {job.allocation.job}", flush=True)
        if after == "requeue":
            if not requeue(job):
                job.note("job_end", exit=ended.name, after="end", reason="Slurm was ending the job already")
            return ended
        wait_before_restart(job)


def wait_before_restart(job: Job) -> None:
    """A signal ends the wait."""
    deadline = time.monotonic() + (RESTART_WAIT_S if fruitless_starts(job.events()) > 1 else 0.0)
    while time.monotonic() < deadline and not job.asked and not job.run.stop_flag.exists():
        time.sleep(1)


def person_stopped(job: Job) -> bool:
    """A flag that someone raised while the job waited to start again counts; one from before it was submitted does not."""
    deadline = time.monotonic() + (LOCK_WAIT_S if job.allocation.restarts else 0.0)
    while is_live(job.run) and time.monotonic() < deadline:
        time.sleep(1)
    stopped = bool(job.allocation.restarts) and person_asked(job.run)
    lower_flag(job.run)
    return stopped


def attempt(job: Job) -> ExitClass:
    """Checks the nodes and trains on those that pass, until the ranks end."""
    health = checked(job)
    sound = [node for node in health.healthy if node not in job.bad_nodes]
    if job.asked:
        return ExitClass.CHECKPOINTED  # there is nothing to save yet
    if health.problem:
        job.note("no_start", reason=health.problem)
        print(f"{job.run.name}: {health.problem}")
        return ExitClass.NEEDS_PERSON if health.figures.get("nodes") else ExitClass.RETRYABLE  # nobody answered: Slurm's fault
    wanted = job.config.cluster.num_nodes
    if len(sound) < wanted:
        job.note("no_start", reason=f"{len(sound)} sound nodes, {wanted} wanted")
        return ExitClass.BAD_NODE
    ended = train_on(job, nodes=sound[:wanted])
    for node, reason in faults_of_nodes(job.events()):
        job.note("bad_node", node=node, reason=reason)
    if ended is ExitClass.INTERRUPTED and not person_asked(job.run):
        return ExitClass.CHECKPOINTED  # Slurm asked: this process, or the ranks themselves
    return ended


def checked(job: Job) -> Health:
    """The nodes of the allocation that are not known to be bad; those that are found to be become events."""
    given = [node for node in job.allocation.nodes if node not in job.bad_nodes]
    lost = [NodeFault(node, f"Slurm says {state}") for node, state in states_of(given).items() if LOST.match(state)]
    up = [node for node in given if node not in {fault.node for fault in lost}]
    found = check_nodes(
        job.run, job.config.cluster, nodes=up, step=step_of(job), environment=environment_of(job, nodes=up or given)
    )
    health = replace(found, faults=(*lost, *found.faults))
    for fault in health.faults:
        print(f"{job.run.name}: bad node {fault.node}: {fault.reason}", flush=True)
    if len(health.faults) > max(1, MOST_BAD * len(job.allocation.nodes)):
        told = f"{len(health.faults)} of {len(job.allocation.nodes)} nodes fail their checks, {health.faults[0].node}: "
        return Health(healthy=(), faults=(), problem=told + health.faults[0].reason, figures=health.figures)
    for fault in health.faults:
        job.note("bad_node", node=fault.node, reason=fault.reason)
    job.note("nodes_checked", healthy=len(health.healthy), **health.figures)
    return health


def states_of(nodes: Sequence[str]) -> dict[str, str]:
    """As Slurm has them; empty where it does not answer."""
    with suppress(ConfigError):
        said = slurm_says("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T") if nodes else ""
        return dict(line.split(maxsplit=1) for line in said.splitlines())
    return {}


def step_of(job: Job) -> Step:
    return lambda words, *, nodes, tasks_per_node: check_line(
        words, place=job.place, nodes=nodes, tasks_per_node=tasks_per_node
    )


def train_on(job: Job, *, nodes: Sequence[str]) -> ExitClass:
    per_node = job.config.cluster.gpus_per_node

    def command(stage: str) -> list[str]:
        words = ["-m", "training", str(job.run.root.resolve()), f"--stage={stage}"]
        return rank_line(words, place=job.place, nodes=nodes, tasks_per_node=per_node)

    # Slurm keeps the second signal: what it ends it ends itself.
    ranks = Ranks(command, environment=environment_of(job, nodes=nodes), signals=SIGNALS, second_ends=False)
    about = {"job": job.allocation.job, "nodes": list(nodes), "restarts": job.allocation.restarts}
    return train_stages(job.run, job.config, ranks=ranks, asked=job.asked, **about)


def environment_of(job: Job, *, nodes: Sequence[str]) -> dict[str, str]:
    """Of tasks on the nodes; they meet on the first."""
    cluster, cores = job.config.cluster, job.place.cores or 1
    port = str(cluster.master_port or job.allocation.port)
    settings = rank_settings(cluster, cores=cores // cluster.gpus_per_node)
    return {**child_environment(job.place.code.resolve()), **settings, "MASTER_ADDR": nodes[0], "MASTER_PORT": port}


def faults_of_nodes(events: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Of the last start: where a rank said that its node is bad, or all others waited for the ranks of one."""
    last = max((index for index, row in enumerate(events) if row["kind"] == "start"), default=0)
    for row in events[last:]:
        if row["kind"] == "fault" and row.get("exit") == ExitClass.BAD_NODE.name and row.get("node"):
            yield row["node"], row["error"]
        if row["kind"] == "hang" and row["node"]:
            yield row["node"], f"its ranks stood still in {row['phase']} after step {row['step']}"


def must_requeue(job: Job, *, ended: ExitClass) -> bool:
    """Whether a restart cannot be here: too few nodes are left, or Slurm wants the job to end."""
    left = [node for node in job.allocation.nodes if node not in job.bad_nodes]
    return bool(job.asked) or len(left) < job.config.cluster.num_nodes


def requeue(job: Job) -> bool:
    """Puts the job back into the queue, without the nodes that are bad. False where Slurm is ending it already: then someone
    has cancelled it, or Slurm queues it again by itself."""
    signals_ignored()
    fields = parse_fields(insist(["scontrol", "--oneliner", "show", "job", job.allocation.job]))
    if fields.get("JobState") != "RUNNING" and not timed_out(fields):
        print(f"{job.run.name}: job {job.allocation.job} is being ended by Slurm; not queued again from here")
        return False
    insist(["scontrol", "requeue", job.allocation.job])
    if job.bad_nodes:  # Slurm takes this only while the job waits
        before = [fields["ExcNodeList"]] if fields.get("ExcNodeList", "(null)") != "(null)" else []
        excluded = ",".join([*before, *job.bad_nodes])
        insist(["scontrol", "update", f"JobId={job.allocation.job}", f"ExcNodeList={excluded}"])
    return True


def timed_out(fields: dict[str, str]) -> bool:
    """Whether it is the time limit that ends the job: saving has taken longer than --signal left it."""
    run, limit = duration_s(fields.get("RunTime", "")), duration_s(fields.get("TimeLimit", ""))
    return run is not None and limit is not None and run >= limit


def insist(command: Sequence[str]) -> str:
    """What a Slurm command says, asked again while the controller does not answer: a job that is not queued again is lost
    time. ConfigError where it never does."""
    deadline = time.monotonic() + INSIST_S
    while True:
        try:
            return slurm_says(*command)
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(5)


def signals_ignored() -> None:
    for kind in SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


@contextmanager
def signals_kept() -> Iterator[list[int]]:
    """Collects the signals of Slurm, from the first moment: none may end the job before it can be queued again."""
    came: list[int] = []
    before: dict[signal.Signals, Any] = {kind: signal.signal(kind, lambda number, _: came.append(number)) for kind in SIGNALS}
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
