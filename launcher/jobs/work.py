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
from launcher.jobs.nodes import INSPECT, Health, Step, check_nodes
from launcher.jobs.policy import fruitless_starts, judge
from launcher.jobs.slurm import duration_s, insist, show_job, slurm_says
from launcher.jobs.stages import Ranks, signals_collected, train_stages, wait_before_restart
from launcher.jobs.steps import Place, check_line, rank_line
from launcher.rundir.code import child_environment
from launcher.rundir.exits import ExitClass
from launcher.rundir.lock import is_live
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records
from launcher.rundir.stop import lower_flag, person_asked

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A file system frees the lock of a node that died when its lease ends.
LOCK_WAIT_S = 180.0
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
    def bad_nodes(self) -> frozenset[str]:
        """That this job is to avoid, from its earlier starts too."""
        rows = (row for row in self.events() if row["kind"] == "bad_node" and row["job"] == self.allocation.job)
        return frozenset(row["node"] for row in rows)


@dataclass(frozen=True)
class Attempt:
    """How it ended; `too_few`: before any rank, for want of nodes, so that trying again in this allocation is of no use."""

    ended: ExitClass
    too_few: bool = False


def work(job: Job) -> ExitClass:
    """Trains the stages, through faults that may pass and nodes that fail; queues the job again where its end asks for it."""
    job.note("job_start", restarts=job.allocation.restarts)
    if person_stopped(job):
        print(f"{job.run.name}: stopped by a person before it started")
        return ExitClass.INTERRUPTED
    while True:
        tried = attempt(job)
        ended, verdict = tried.ended, judge(tried.ended, events=job.events(), restarts=job.config.cluster.restarts)
        after = "requeue" if verdict.after == "restart" and (tried.too_few or must_requeue(job)) else verdict.after
        job.note("job_end", exit=ended.name, after=after, reason=verdict.reason)
        if after == "end":
            why = f"; not started again: {verdict.reason}" if verdict.reason else ""
            print(f"{job.run.name}: ended as {ended.name}{why}")
            return ended
        print(f"{job.run.name}: ended as {ended.name}; {after} of job {job.allocation.job}", flush=True)
        if after == "requeue":
            if refused := requeue(job):
                job.note("job_end", exit=ended.name, after="end", reason=refused)
                print(f"{job.run.name}: not queued again: {refused}")
            return ended
        wait_before_restart(job.run, in_vain=fruitless_starts(job.events()), asked=job.asked)


def person_stopped(job: Job) -> bool:
    """Whether someone raised the stop flag since the run was queued: whoever queues it lowers the flag before."""
    deadline = time.monotonic() + (LOCK_WAIT_S if job.allocation.restarts else 0.0)
    while is_live(job.run) and time.monotonic() < deadline:
        time.sleep(1)
    stopped = person_asked(job.run)
    lower_flag(job.run)
    return stopped


def attempt(job: Job) -> Attempt:
    """Checks the nodes and trains on those that pass, until the ranks end."""
    health = checked(job) if not job.asked else None
    if job.asked or health is None:
        job.note("no_start", reason="Slurm asked the job to end")
        return Attempt(ExitClass.CHECKPOINTED)  # there is nothing to save yet
    if health.problem:
        job.note("no_start", reason=health.problem)
        print(f"{job.run.name}: {health.problem}")
        return Attempt(ExitClass.RETRYABLE if health.may_pass else ExitClass.NEEDS_PERSON)
    wanted = job.config.cluster.num_nodes
    if len(health.healthy) < wanted:
        job.note("no_start", reason=f"{len(health.healthy)} sound nodes, {wanted} wanted")
        return Attempt(ExitClass.BAD_NODE, too_few=True)
    nodes = health.healthy[:wanted]
    ended = train_on(job, nodes=nodes)
    for node, reason in faults_of_nodes(job.events()).items():
        if node in nodes:
            job.note("bad_node", node=node, reason=reason)
    if ended is ExitClass.INTERRUPTED and not person_asked(job.run):
        return Attempt(ExitClass.CHECKPOINTED)  # Slurm asked: this process, or the ranks themselves
    return Attempt(ended)


def checked(job: Job) -> Health:
    """The nodes of the allocation that are not known to be bad. Those that are found to be, and those that Slurm has lost,
    become events; Slurm itself keeps the latter out of the next allocation."""
    bad = job.bad_nodes
    given = [node for node in job.allocation.nodes if node not in bad]
    lost = {node: state for node, state in states_of(given).items() if LOST.match(state)}
    for node, state in lost.items():
        job.note("lost_node", node=node, reason=f"Slurm says {state}")
        print(f"{job.run.name}: node {node}: Slurm says {state}", flush=True)
    up = [node for node in given if node not in lost]
    if not up:
        return Health((), (), None, {})
    inspect = job.place.code.resolve() / "launcher" / "jobs" / INSPECT.name
    health = check_nodes(
        job.run, job.config.cluster, nodes=up, step=step_of(job), environment=environment_of(job, nodes=up), inspect=inspect
    )
    for fault in health.faults:
        print(f"{job.run.name}: bad node {fault.node}: {fault.reason}", flush=True)
    broken = [fault for fault in health.faults if fault.node in health.figures.get("nodes", {})]  # the others are silent
    if len(broken) > max(1, MOST_BAD * len(job.allocation.nodes)):
        told = f"{len(broken)} of {len(job.allocation.nodes)} nodes fail their checks, {broken[0].node}: {broken[0].reason}"
        return replace(health, healthy=(), faults=(), problem=told)
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


def faults_of_nodes(events: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of the last start, why by node: a rank said that its node is bad, or that another's is, which many may say at once; or
    all others waited for the ranks of one."""
    last = max((index for index, row in enumerate(events) if row["kind"] == "start"), default=0)
    found: dict[str, str] = {}
    for row in events[last:]:
        if row["kind"] == "fault" and row.get("exit") == ExitClass.BAD_NODE.name and row.get("node"):
            found.setdefault(row["node"], row["error"])
        if row["kind"] == "hang" and row["node"]:
            found.setdefault(row["node"], f"its ranks stood still in {row['phase']} after step {row['step']}")
    return found


def must_requeue(job: Job) -> bool:
    """Whether a restart cannot be here: too few nodes are left, or Slurm wants the job to end."""
    bad = job.bad_nodes
    return bool(job.asked) or sum(node not in bad for node in job.allocation.nodes) < job.config.cluster.num_nodes


def requeue(job: Job) -> str | None:
    """Puts the job back into the queue, without the nodes that are bad. Why not, where it must not or cannot."""
    signals_ignored()
    name, bad = job.allocation.job, sorted(job.bad_nodes)
    fields = show_job(job.allocation.number)
    if fields.get("JobState") != "RUNNING" and not timed_out(fields):
        return "Slurm is ending it: someone has cancelled it, or it queues it again by itself"
    if bad and (few := too_few_others(fields, excluded=bad)):
        return few
    try:
        insist("scontrol", "requeue", name)
        if bad:  # Slurm takes this only while the job waits
            before = [fields["ExcNodeList"]] if fields.get("ExcNodeList", "(null)") != "(null)" else []
            insist("scontrol", "update", f"JobId={name}", f"ExcNodeList={','.join([*before, *bad])}")
    except ConfigError as error:
        return str(error)
    return None


def too_few_others(fields: dict[str, str], *, excluded: Sequence[str]) -> str | None:
    """Why the job would wait for ever without these nodes: its partition has not enough others. None where it has."""
    with suppress(ConfigError):
        said = slurm_says("sinfo", "--noheader", "--Node", f"--partition={fields['Partition']}", "--format=%N")
        others, wanted = set(said.split()) - set(excluded), int(fields["NumNodes"].partition("-")[0])
        if len(others) < wanted:
            found = f"without {', '.join(excluded)} partition {fields['Partition']} has {len(others)} nodes"
            return f"{found}, and the job wants {wanted}. Fix: have them repaired, or fewer cluster.num_nodes"
    return None


def timed_out(fields: dict[str, str]) -> bool:
    """Whether it is the time limit that ends the job: saving has taken longer than --signal left it."""
    run, limit = duration_s(fields.get("RunTime", "")), duration_s(fields.get("TimeLimit", ""))
    return run is not None and limit is not None and run >= limit


def signals_ignored() -> None:
    for kind in SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


@contextmanager
def signals_kept() -> Iterator[list[int]]:
    """Collects the signals of Slurm, from the first moment: none may end the job before it can be queued again."""
    with signals_collected(SIGNALS) as came:
        yield came
