"""Training the stages of a run, whoever starts the ranks: one after another, watched from the run directory.

A signal raises the stop flag: the ranks finish their step, save and exit.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig, StageConfig
from launcher.config.validate import merge_over_stages
from launcher.jobs.hang import HangWatch
from launcher.plan.foreign import check_folder
from launcher.plan.stage import plan_stage
from launcher.report.live import LiveView
from launcher.rundir.ancestor import check_ancestor, place_of
from launcher.rundir.checkpoints import newest_checkpoint, stage_end, undo_replacing
from launcher.rundir.exits import ExitClass
from launcher.rundir.lock import lock_run
from launcher.rundir.paths import RunDir
from launcher.rundir.permissions import refuse_world_writable
from launcher.rundir.records import append_record, read_records
from launcher.rundir.stop import raise_flag

REFRESH_S = 0.2
FULL_BYTES = 1 << 20
# Slurm's KillWait is half a minute.
KILL_S = 45.0
# Before a third start in vain: what broke the first two may need a moment to pass.
RESTART_WAIT_S = 15.0
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


@dataclass
class Watch:
    """The signals that came, and the ranks that are running."""

    asked: list[int]
    process: "subprocess.Popen[bytes] | None" = None


def train_stages(run: RunDir, config: RunConfig, *, ranks: Ranks, asked: list[int], **about: Any) -> ExitClass:
    """Trains every selected stage that is not done. Returns the exit class of the first that did not end well, else DONE.

    Signals are added to `asked`; where one is there already, or the stop flag, nothing is started. `about` goes into the event
    that records the launch."""
    refuse_world_writable(run)
    watch = Watch(asked)
    with lock_run(run) as lock, LiveView(run, config, config.monitor.console) as view:
        append_record(run.events, "start", command=sys.argv, pid=os.getpid(), **about)
        with ask_on_signal(run, view, ranks=ranks, watch=watch):
            undo_replacing(run)  # a job that queues itself again opens no run
            for stage in config.stage_names:
                if stage_is_done(run, config, stage):
                    view.note(f"{stage}: done already")
                    continue
                if watch.asked or run.stop_flag.exists():
                    return ExitClass.INTERRUPTED
                hang = HangWatch(run, stage=stage, hang=config.monitor.hang)
                ended = run_stage(run, stage=stage, ranks=ranks, lock=lock, view=view, watch=watch, hang=hang)
                if ended is not ExitClass.DONE:
                    return ended
    return ExitClass.DONE


def stage_is_done(run: RunDir, config: RunConfig, stage: str) -> bool:
    """Whether the stage has a checkpoint at its end; a raised token horizon makes an ended stage go on."""
    num_samples = plan_stage(config.stage(stage), cluster=config.cluster).num_samples
    return stage_end(run, stage, num_samples=num_samples) is not None


def run_stage(run: RunDir, *, stage: str, ranks: Ranks, lock: int, view: LiveView, watch: Watch, hang: HangWatch) -> ExitClass:
    """Starts the ranks of one stage and waits for their end, or ends them where they hang."""
    run.logs.mkdir(exist_ok=True)
    log_path = run.logs / f"{stage}.log"
    num_events = sum(1 for _ in read_records(run.events))
    with log_path.open("ab") as log:
        watch.process = subprocess.Popen(
            ranks.command(stage),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(ranks.environment),
            start_new_session=True,  # Ctrl-C reaches this process alone, which asks the ranks to save
            pass_fds=[lock],  # the run stays locked while torchrun lives, and ranks die with it, even if this process is killed
        )
        hung = None
        while watch.process.poll() is None and hung is None:
            view.refresh()
            time.sleep(REFRESH_S)
            hung = hang.hung()
        if hung:
            append_record(run.events, "hang", **{**vars(hung), "node": hung.node, "stacks": str(run.stacks / stage)})
            end_ranks(watch.process, gently=not ranks.second_ends)
        view.refresh()
    if ranks.second_ends and len(watch.asked) > 1:
        view.note(f"{stage}: ended at once; it goes on from its last checkpoint")
        return ExitClass.INTERRUPTED
    if hung:
        view.note(f"{stage}: {hung}\n  stacks: {run.stacks / stage}")
        return ExitClass.RETRYABLE
    ended, error = how_it_ended(run, stage, skip=num_events, code=watch.process.returncode)
    if error:
        view.note(f"{stage}: {error}\n  log: {log_path}")
    return ended


def end_ranks(process: "subprocess.Popen[bytes]", *, gently: bool) -> None:
    """SIGKILL; `gently`: first what makes srun end its tasks on every node."""
    with suppress(ProcessLookupError):
        if gently:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def ask_on_signal(run: RunDir, view: LiveView, *, ranks: Ranks, watch: Watch) -> Iterator[None]:
    """While the block runs, a signal asks the ranks to save and stop; the second one kills them where the executor says so."""

    def ask(number: int, _: object) -> None:
        watch.asked.append(number)
        if len(watch.asked) == 1:
            raise_flag(run)
            again = " (again to end them at once)" if ranks.second_ends else f", on {signal.Signals(number).name}"
            view.note(f"stopping: the ranks save after this step{again}")
        elif ranks.second_ends and watch.process:
            with suppress(ProcessLookupError):
                os.killpg(watch.process.pid, signal.SIGKILL)  # the ranks die with torchrun

    before = {kind: signal.signal(kind, ask) for kind in ranks.signals}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def signals_collected(kinds: Sequence[signal.Signals]) -> Iterator[list[int]]:
    """While the block runs, signals are added to a list and do nothing else."""
    came: list[int] = []
    before: dict[signal.Signals, Any] = {kind: signal.signal(kind, lambda number, _: came.append(number)) for kind in kinds}
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def wait_before_restart(run: RunDir, *, in_vain: int, asked: Sequence[int]) -> None:
    """After so many starts `in_vain`. A signal or the stop flag ends the wait."""
    deadline = time.monotonic() + (RESTART_WAIT_S if in_vain > 1 else 0.0)
    while time.monotonic() < deadline and not asked and not run.stop_flag.exists():
        time.sleep(1)


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
    it nor trained to an end in this run, or from a folder, or another run, that the run cannot go on from."""
    refuse_folders(run, config)
    for stage in config.stages:
        parent = stage.stage.parent
        if parent is None or parent in config.stage_names or newest_checkpoint(run, parent, finished=True)[0]:
            continue
        rule = f"stage {stage.stage.name} starts from the end of {parent}, which run {run.name} has not trained"
        raise ConfigError(Problem("stage.init_from", repr(parent), rule, f"train stage={parent} first, or all stages at once"))


def refuse_folders(run: RunDir, config: RunConfig) -> None:
    """ConfigError with everything that is wrong with Hugging Face folders, and checkpoints of other runs, that stages are to
    start from. Those that have begun have read theirs."""
    starts = [stage for stage in config.stages if stage.stage.folder and not newest_checkpoint(run, stage.stage.name)[0]]
    found = [(stage.stage.name, problem) for stage in starts for problem in folder_problems(stage, config=config)]
    if found:
        raise ConfigError(*merge_over_stages(found, names=config.stage_names))


def folder_problems(stage: StageConfig, *, config: RunConfig) -> list[Problem]:
    if place_of(Path(str(stage.stage.folder))):
        return check_ancestor(stage, config=config)
    return check_folder(stage, config=config)[1]
