"""One small run, and faults that hit it one after another, each once the run has got over the one before: `phidias train` on
two CPU ranks, which starts ranks again by itself. Where a fault ends the launcher by design, the harness is the person, or the
queue, that starts it again (tests/chaos/faults.py).
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from launcher.rundir.exits import ExitClass
from launcher.rundir.records import write_json
from tests.chaos.processes import Rank, descendants, ranks_of
from tests.chaos.tail import Tail
from tests.endtoend.workspace import REPOSITORY, Workspace

STAGE, BATCH, SEQ_LENGTH = "small", 8, 64
# What a run has to notice soon, and may get over often. Thresholds lie far from what the run does by itself: it must not skip
# what the undisturbed one trains on.
SPIKE = "{z: 1000, patience_steps: %d, action: %s, budget: 1000}"
PATIENCE = 3
CHECKPOINT_STEPS, CHECK_STEPS = 8, 4
SETTINGS = (
    f"stage={STAGE}",
    f"stage.checkpoint.interval_tokens={CHECKPOINT_STEPS * BATCH * SEQ_LENGTH}",
    "stage.checkpoint.keep_last=3",
    "optim={lr: 1.0e-3, min_lr: 1.0e-3}",  # what a step does must not hang on how many follow
    "data.trace=true",
    "cluster.restarts=1000",
    "monitor.hang={factor: 1.1, least_s: 3, start_s: 120, pause_s: 10}",
    "monitor.health.window_steps=16",
    "monitor.health.non_finite={action: skip, budget: 1000}",
    f"monitor.health.loss_spike={SPIKE % (PATIENCE, 'rewind')}",
    f"monitor.health.grad_norm={SPIKE % (1, 'skip')}",
    "monitor.health.straggler={factor: 6, rows: 2, action: note, budget: 1000}",
    f"monitor.health.corruption={{interval_steps: {CHECK_STEPS}, tolerance: 1.0e-3, action: restart, budget: 1000}}",
    "monitor.health.data_stall.limit_s=1",
    "monitor.health.checkpoint={action: note, budget: 1000}",
    "monitor.health.disk_low.free_gib=0",
)
INJECT = Path(__file__).parent / "inject"
LAST_STEPS = 16
FIRST_STEP = 20  # the first fault comes later: there are checkpoints, and the window of losses is full
SURVIVE_S, STARTED_S = 150.0, 150.0
POLL_S = 0.05
SKEW_S = 0.01  # times of events are rounded
UNTOLD = ("checkpoint", "started")
OF_A_RANK = ("straggler", "data_stall")
TELLING = 600  # characters of what a run said


class NotSurvivedError(Exception):
    """What did not come about after a fault."""


@dataclass(frozen=True)
class Outcome:
    """Of one fault. It struck at `step`, `at_s` seconds after the run's first start; `lost_s` seconds later came the first step
    that the run had not taken before; `said` are the kinds of events that followed, or what did not come about."""

    kind: str
    step: int
    at_s: float
    survived: bool
    lost_s: float | None
    said: str


@dataclass(frozen=True)
class Moment:
    """Unix seconds, the furthest step, and how many events there were."""

    struck: float
    step: int
    events: int


def nothing(storm: "Storm") -> None:
    """There is nothing to mend."""


@dataclass(frozen=True)
class Fault:
    """`strike` hits a run that trains, and returns when, where that was not at once; `damage` is the same for a run of which
    no rank is up. `told`: events that follow. `codes`: what the launcher ends with, for a person to mend something and start it
    again; none where it goes on by itself."""

    name: str
    strike: Callable[["Storm"], float | None]
    told: tuple[str, ...]
    codes: tuple[ExitClass, ...] = ()
    mend: Callable[["Storm"], None] = nothing
    damage: Callable[["Storm"], None] | None = None


# One, or one and what is damaged while no rank is up for it.
Blow = tuple[Fault, ...]


class Storm:
    """Blows in an order and at moments that `seed` chooses, on a run of `steps` steps: until the last blow more than it will
    take, then a few more than it has taken."""

    def __init__(self, workspace: Workspace, *, seed: int, steps: int = 100_000):
        self.workspace, self.random, self.steps = workspace, Random(seed), steps
        self.run_dir = workspace.run_dir
        self.metrics, self.events = Tail(self.run_dir / "metrics.jsonl"), Tail(self.run_dir / "events.jsonl")
        self.output = workspace.root / f"{workspace.run}.out"
        self.injections: list[dict[str, Any]] = []
        self.process: subprocess.Popen[bytes] | None = None

    # The run

    @property
    def words(self) -> list[str]:
        return ["train", *self.workspace.words(), *SETTINGS, f"stage.tokens={self.steps * BATCH * SEQ_LENGTH}"]

    def launch(self) -> None:
        """`phidias train`, as a person or a queue would again."""
        path = os.pathsep.join([str(INJECT), str(REPOSITORY)])
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launcher", *self.words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                cwd=self.workspace.root,
                start_new_session=True,
            )

    @property
    def launcher(self) -> "subprocess.Popen[bytes]":
        assert self.process is not None
        return self.process

    def ended(self) -> int | None:
        """What `phidias train` ended with."""
        return self.launcher.poll()

    def train_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics.rows() if row["kind"] == "train"]

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.events.rows() if row["kind"] == kind]

    @property
    def samples(self) -> int:
        """The furthest that the run has come."""
        return max((row["samples"] for row in self.train_rows()), default=0)

    @property
    def step(self) -> int:
        return max((row["step"] for row in self.train_rows()), default=0)

    def ranks(self) -> list[Rank]:
        """Those that run now, by their number."""
        return ranks_of(self.run_dir)

    def checkpoints(self) -> list[Path]:
        """That are whole, oldest first."""
        return sorted(self.run_dir.glob(f"checkpoints/{STAGE}/step_*[0-9]"))

    # Moments

    def wait(self, true: Any, *, what: str, seconds: float = SURVIVE_S) -> None:
        """NotSurvivedError after so long, or when the launcher ends."""
        deadline = time.monotonic() + seconds
        while not true():
            if (code := self.ended()) is not None:
                raise NotSurvivedError(f"the launcher ended with {code}, waiting for {what}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise NotSurvivedError(f"after {seconds:.0f} s still waiting for {what}\n{self.tail()}")
            time.sleep(POLL_S)

    def wait_for_new_ground(self, steps: int) -> None:
        wanted = self.samples + steps * BATCH
        self.wait(lambda: self.samples >= wanted, what=f"sample {wanted}")

    def tail(self) -> str:
        logs = [self.output, self.run_dir / "logs" / f"{STAGE}.log"]
        return "\n".join(f"{path.name}: ...{path.read_text(errors='replace')[-TELLING:]}" for path in logs if path.exists())

    # Faults

    def inject(
        self,
        kind: str,
        *,
        rank: int | None = None,
        batches: int = 1,
        once: bool = False,
        suits: Callable[[int], bool] = lambda step: True,
        **more: Any,
    ) -> float:
        """Has ranks do it some steps from now, after one that `suits`; waits until one has. When: Unix seconds."""
        last = max(self.train_rows(), key=lambda row: row["samples"])
        step, batch = last["step"], last["samples"] // BATCH
        ahead = next(ahead for ahead in itertools.count(self.random.randint(6, 12)) if suits(step + ahead))
        name, span = len(self.injections), {"first": (batch + ahead) * BATCH, "end": (batch + ahead + batches) * BATCH}
        self.injections.append({"id": name, "kind": kind, "rank": rank, "once": once, **span, **more})
        write_json(self.run_dir / "chaos.json", self.injections)
        done = Tail(self.run_dir / "chaos_done.jsonl")
        self.wait(lambda: any(row["id"] == name for row in done.rows()), what=f"{kind} at sample {span['first']}")
        return float(next(row["time"] for row in done.rows() if row["id"] == name))

    def rank(self) -> Rank:
        """One of them; they may be about to be started."""
        self.wait(lambda: len(self.ranks()) == 2, what="two ranks")
        return self.random.choice(self.ranks())

    # The storm

    def drive(self, blows: Sequence[Blow]) -> Iterator[Outcome]:
        """All of them, up to the first that is not survived; then the run trains to its end. NotSurvivedError: it does not. The
        last is one after which the launcher is started again, where there is such a one: for fewer steps."""
        order = self.random.sample(blows, len(blows))
        cut = next((blow for blow in order if ExitClass.INTERRUPTED in blow[0].codes), None)
        order.sort(key=lambda blow: blow is cut)
        self.launch()
        try:
            self.wait(lambda: self.step >= FIRST_STEP, what="the first steps", seconds=STARTED_S)
            for blow in order:
                outcomes = self.endure(blow, cuts=blow is cut)
                yield from outcomes
                if not outcomes[0].survived:
                    return
            if cut is None:
                self.cut_short()
            self.wait_for_end()
        finally:
            self.end()

    def cut_short(self) -> None:
        os.kill(self.launcher.pid, signal.SIGTERM)
        self.launcher.wait(SURVIVE_S)
        self.steps = self.samples // BATCH + LAST_STEPS
        self.launch()

    def endure(self, blow: Blow, *, cuts: bool) -> list[Outcome]:
        """One of them, from a moment on that nobody chose."""
        moment, error = self.moment(), None
        try:
            self.wait_for_new_ground(self.random.randint(2, 10))
            self.wait(lambda: len(self.checkpoints()) > 1, what="two checkpoints")
            time.sleep(self.random.random() / 5)
            moment = self.moment()
            moment = replace(moment, struck=self.strike(blow, cuts=cuts) or moment.struck)
            wanted = {kind for fault in blow for kind in fault.told}
            self.wait(lambda: self.lost_s(moment, wanted=wanted) is not None, what=f"{', '.join(wanted)} and new ground")
        except NotSurvivedError as found:
            error = str(found)
        lost_s = None if error else self.lost_s(moment, wanted=wanted)
        kinds = [row["kind"] for row in self.events.rows()[moment.events :] if row["kind"] not in UNTOLD]
        said = " ".join(kinds) + (f"\n{error}" if error else "")
        at_s = round(moment.struck - self.events.rows()[0]["time"], 1)
        return [Outcome(fault.name, moment.step, at_s, error is None, lost_s, said) for fault in blow]

    def moment(self) -> Moment:
        return Moment(time.time(), self.step, len(self.events.rows()))

    def strike(self, blow: Blow, *, cuts: bool) -> float | None:
        """The second one hits what no rank is running on."""
        first, *more = blow
        ranks = self.ranks()
        struck = first.strike(self)
        self.mend(first)
        for fault in more:
            assert fault.damage
            self.wait_for_end_of(ranks)
            fault.damage(self)
        if cuts:
            self.steps = self.samples // BATCH + LAST_STEPS
        if first.codes:
            self.launch()
        for fault in more:
            if fault.codes:
                self.mend(fault)
                self.launch()
        return struck

    def mend(self, fault: "Fault") -> None:
        """Where the launcher ends by design: as the person, or the queue, before it is started again."""
        if not fault.codes:
            return
        try:
            code = self.launcher.wait(SURVIVE_S)
        except subprocess.TimeoutExpired:
            raise NotSurvivedError(f"{fault.name}: the launcher goes on; it was to end\n{self.tail()}") from None
        if code not in fault.codes:
            raise NotSurvivedError(f"{fault.name}: the launcher ended with {code}, not {fault.codes}\n{self.tail()}")
        fault.mend(self)

    def wait_for_end_of(self, ranks: Sequence[Rank]) -> None:
        deadline = time.monotonic() + SURVIVE_S
        while {rank.pid for rank in ranks} & {rank.pid for rank in self.ranks()}:
            if time.monotonic() > deadline:
                raise NotSurvivedError(f"ranks outlive their torchrun\n{self.tail()}")
            time.sleep(POLL_S)

    def lost_s(self, moment: Moment, *, wanted: set[str]) -> float | None:
        """Until the run has told of it and taken a step that it had not taken before; None before."""
        told = [
            row for row in self.events.rows()[moment.events :] if row["time"] >= moment.struck - SKEW_S and self.is_about(row)
        ]
        first = {kind: next((row["time"] for row in told if row["kind"] == kind), None) for kind in wanted}
        known = [time for time in first.values() if time is not None]
        if len(known) < len(wanted):
            return None
        rows = self.train_rows()
        before = max((row["samples"] for row in rows if row["time"] <= max(known)), default=0)
        after = [row["time"] for row in rows if row["time"] > max(known) and row["samples"] > before]
        return round(min(after) - moment.struck, 2) if after else None

    def is_about(self, row: dict[str, Any]) -> bool:
        """Not about another rank than the one that was made slow."""
        injected = [one["rank"] for one in self.injections[-1:]]
        return row["kind"] not in OF_A_RANK or row["rank"] in injected

    def wait_for_end(self) -> None:
        try:
            code = self.launcher.wait(STARTED_S + self.steps)
        except subprocess.TimeoutExpired:
            raise NotSurvivedError(f"the run does not end\n{self.tail()}") from None
        if code:
            raise NotSurvivedError(f"the run ended with {code}\n{self.tail()}")

    def end(self) -> None:
        """Leaves nothing behind."""
        if self.process is not None and self.process.poll() is None:
            for pid in [self.launcher.pid, *descendants(self.launcher.pid)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.wait()
