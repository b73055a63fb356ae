"""The local executor: torchrun on this machine, one stage after another, watched from the run directory.

Ctrl-C raises the stop flag: the ranks finish their step, save and exit. A second Ctrl-C ends them at once.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster, RunConfig
from launcher.plan.stage import plan_stage
from launcher.report.live import LiveView
from launcher.rundir.checkpoints import newest_checkpoint, stage_end
from launcher.rundir.code import child_environment
from launcher.rundir.exits import ExitClass
from launcher.rundir.lock import lock_run
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records

REFRESH_S = 0.2
FULL_BYTES = 1 << 20
TELLING = [kind.name for kind in (ExitClass.NEEDS_PERSON, ExitClass.REFUSED, ExitClass.BAD_NODE, ExitClass.STATE)]
TELLING += [kind.name for kind in ExitClass if kind.name not in TELLING]


@dataclass(frozen=True)
class Ranks:
    """How an executor starts the ranks of a stage, and which signals ask them to save: the second one ends them at once where
    nobody else would."""

    command: Callable[[str], list[str]]
    environment: Mapping[str, str]
    signals: tuple[signal.Signals, ...]
    second_ends: bool


def local_ranks(run: RunDir, config: RunConfig) -> Ranks:
    """torchrun on this machine."""
    return Ranks(
        command=lambda stage: torchrun_command(run, cluster=config.cluster, stage=stage),
        environment=rank_environment(config.cluster),
        signals=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
        second_ends=True,
    )


def train(run: RunDir, config: RunConfig) -> ExitClass:
    """Trains every selected stage that is not done, on this machine. Returns the exit class of the first that did not end well,
    else DONE."""
    refuse_port_in_use(config.cluster)
    return train_stages(run, config, ranks=local_ranks(run, config))[0]


def train_stages(run: RunDir, config: RunConfig, *, ranks: Ranks, **about: Any) -> tuple[ExitClass, list[int]]:
    """The exit class, and the signals that came. `about` goes into the event that records the launch."""
    asked: list[int] = []
    with lock_run(run) as lock, LiveView(run, config, config.monitor.console) as view:
        run.stop_flag.unlink(missing_ok=True)
        append_record(run.events, "start", command=sys.argv, pid=os.getpid(), **about)
        for stage in config.stage_names:
            if stage_is_done(run, config, stage):
                view.note(f"{stage}: done already")
                continue
            ended = run_stage(run, stage=stage, ranks=ranks, lock=lock, view=view, asked=asked)
            if ended is ExitClass.DONE and run.stop_flag.exists():
                ended = ExitClass.INTERRUPTED  # asked while the stage took its last step
            if ended is not ExitClass.DONE:
                return ended, asked
    return ExitClass.DONE, asked


def stage_is_done(run: RunDir, config: RunConfig, stage: str) -> bool:
    """Whether the stage has a checkpoint at its end; a raised token horizon makes an ended stage go on."""
    num_samples = plan_stage(config.stage(stage), cluster=config.cluster).num_samples
    return stage_end(run, stage, num_samples=num_samples) is not None


def run_stage(run: RunDir, *, stage: str, ranks: Ranks, lock: int, view: LiveView, asked: list[int]) -> ExitClass:
    """Starts the ranks of one stage and waits for their end; adds the signals that came to `asked`."""
    run.logs.mkdir(exist_ok=True)
    log_path = run.logs / f"{stage}.log"
    num_events = sum(1 for _ in read_records(run.events))
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            ranks.command(stage),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(ranks.environment),
            start_new_session=True,  # Ctrl-C reaches this process alone, which asks the ranks to save
            pass_fds=[lock],  # the run stays locked while torchrun lives, and ranks die with it, even if this process is killed
        )
        with ask_on_interrupt(run, process, view, ranks=ranks, asked=asked):
            while process.poll() is None:
                view.refresh()
                time.sleep(REFRESH_S)
        view.refresh()
    if ranks.second_ends and len(asked) > 1:
        view.note(f"{stage}: ended at once; it goes on from its last checkpoint")
        return ExitClass.INTERRUPTED
    ended, error = how_it_ended(run, stage, skip=num_events, code=process.returncode)
    if error:
        view.note(f"{stage}: {error}\n  log: {log_path}")
    return ended


def torchrun_command(run: RunDir, *, cluster: Cluster, stage: str) -> list[str]:
    """torchrun's own rendezvous takes a free port unless the cluster names one."""
    port = cluster.master_port or 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={cluster.gpus_per_node}"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=0"]
    return [*torchrun, *rendezvous, "-m", "training", str(run.root), f"--stage={stage}"]


def rank_environment(cluster: Cluster) -> dict[str, str]:
    """The environment of a rank: the cores shared out between the ranks, and what the cluster sets."""
    threads = max(1, (os.cpu_count() or 1) // cluster.gpus_per_node)
    ours = {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if cluster.gpu is None:
        ours["CUDA_VISIBLE_DEVICES"] = ""  # CPU ranks were asked for, also where there are GPUs
    return {**child_environment(), **ours, **cluster.env}


@contextmanager
def ask_on_interrupt(
    run: RunDir, process: "subprocess.Popen[bytes]", view: LiveView, *, ranks: Ranks, asked: list[int]
) -> Iterator[None]:
    """While the block runs, a signal asks the ranks to save and stop; the second one kills them where the executor says so."""

    def ask(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) == 1:
            run.stop_flag.touch()
            again = " (again to end them at once)" if ranks.second_ends else f", on {signal.Signals(number).name}"
            view.note(f"stopping: the ranks save after this step{again}")
        elif ranks.second_ends:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks die with torchrun

    before = {kind: signal.signal(kind, ask) for kind in ranks.signals}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def how_it_ended(run: RunDir, stage: str, *, skip: int, code: int) -> tuple[ExitClass, str | None]:
    """The exit class the ranks wrote, and the first fault's message. Without a word from them: a fault that may be retried."""
    rows = [row for row in list(read_records(run.events))[skip:] if row.get("stage") == stage]
    # Ranks that lost a neighbour report that; the one that says what a person can act on is the cause.
    faults = [row for row in rows if row["kind"] == "fault"]
    if fault := min(faults, key=lambda row: TELLING.index(row["exit"]), default=None):
        return ExitClass[fault["exit"]], f"rank {fault['rank']}: {fault['error']}"
    if ending := next((row for row in rows if row["kind"] in ("stop", "stage_done")), None):
        return ExitClass[ending["exit"]], None
    if shutil.disk_usage(run.root).free < FULL_BYTES:
        return ExitClass.NEEDS_PERSON, f"the disk of {run.root} is full. Fix: free space there and start the run again"
    return ExitClass.RETRYABLE, f"the ranks ended with code {code} and without a cause"


def refuse_headless(run: RunDir, config: RunConfig) -> None:
    """ConfigError, before the run directory is touched, where a selected stage starts from one that is neither selected before
    it nor trained to an end in this run."""
    for stage in config.stages:
        parent = stage.stage.init_from
        if parent is None or parent in config.stage_names or newest_checkpoint(run, parent, finished=True)[0]:
            continue
        rule = f"stage {stage.stage.name} starts from the end of {parent}, which run {run.name} has not trained"
        raise ConfigError(Problem("stage.init_from", repr(parent), rule, f"train stage={parent} first, or all stages at once"))


def refuse_port_in_use(cluster: Cluster) -> None:
    if cluster.master_port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", cluster.master_port))
        except OSError as error:
            fix = "cluster.master_port=null takes a free one"
            found = f"port {cluster.master_port}, which another process is using"
            raise ConfigError(Problem("cluster.master_port", found, "the rendezvous needs a free port", fix)) from error
