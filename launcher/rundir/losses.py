"""Where the wall time of a run went: a sweep over its events and rows, oldest first, each of which may end a phase.

Phases are what their event says: `job_start` and `start` begin a start-up, `resume` and `stage_start` training, `fault`, `hang`
and `rewind` a restart, `job_end` a restart, the queue or nothing. Of what comes next depends

- what lies behind a fault: a restart where the same launch goes on, else waiting;
- what lies behind an end: waiting is `queue` while a job that was submitted, or queued again, had not started, else `stopped`;
- what lies between two stages: the start-up of the second.

A launch of which nothing more is heard ended with its last sign of life; conversions of checkpoints are none. Rows of training
where none had begun begin it themselves, as early as their steps have: the events are lost. Events that do not fit where they
stand are passed over.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from launcher.rundir.phases import (
    BEFORE,
    BETWEEN,
    CAUSES,
    CHECKPOINT,
    ENDED,
    FAULT,
    HANG,
    OPEN,
    OTHER,
    PRODUCTIVE,
    QUEUE,
    RESTART,
    START_UP,
    STOPPED,
    TRAINING,
    VALIDATION,
    Phase,
    Steps,
)

# Events of a launch at work; others come from commands that a person may call long after a run has ended.
LIFE = frozenset(
    {"job_start", "start", "no_start", "nodes_checked", "bad_node", "lost_node", "stage_start", "resume", "started"}
    | {"checkpoint", "checkpoint_failed", "skip", "rewind", "stage_done", "stop", "fault", "hang", "job_end"}
)
# More are no step.
MOST_STEPS = 10**15
# Work beside training that is submitted too.
BESIDE = ("data", "export", "eval")
# What becomes of an open phase with a sign that ranks have been started, where the event of it is lost.
WITH_RANKS = {FAULT: RESTART, BETWEEN: START_UP, ENDED: START_UP}

Event = Mapping[str, Any]


class Row(NamedTuple):
    """Of metrics.jsonl, a number where it must be one. `step_s`, `waited_s`: means of its steps; None where it has none, as a
    validation, of which `seconds` tells."""

    time: float
    stage: str
    step: int
    step_s: float | None
    waited_s: float = 0.0
    seconds: float = 0.0


class Ledger:
    """The phases so far, and the steps of each stage. Times are Unix seconds; what comes late counts as of now."""

    def __init__(self) -> None:
        self.phases, self.now = [Phase(BEFORE, 0.0)], 0.0
        self.steps: defaultdict[str, Steps] = defaultdict(Steps)
        self.launch: tuple[str, str] | None = None
        self.submitted: dict[str, float] = {}  # jobs that have not started yet

    @property
    def phase(self) -> Phase:
        return self.phases[-1]

    @property
    def has_begun(self) -> bool:
        return len(self.phases) > 1

    def take_event(self, event: Event) -> None:
        """Its time is a number."""
        at, kind = max(event["time"], self.now), event.get("kind")
        if kind == "submitted" and event.get("stage") not in BESIDE:
            self.submitted[str(event.get("job"))] = at
        if kind not in LIFE or (kind == "fault" and self.phase.cause == ENDED):  # the latter of a conversion
            return
        if kind in ("resume", "stage_start"):
            self.rewind_steps(event)
        if kind in ("job_start", "start"):
            self.launched(event, at=at)
        elif self.has_begun and (act := ACTS.get(kind)):
            act(self, event, at)
        self.now = at

    def take_row(self, row: Row) -> None:
        at, stage, step, step_s, waited_s, seconds = row
        if at < self.now:
            at = self.now
        self.now, phase = at, self.phases[-1]
        if step_s is None:
            if phase.cause == TRAINING:
                phase.claim(VALIDATION, seconds, at=at)
            return
        steps = self.steps[stage]
        while step <= steps.end and steps.ends:  # a rewind whose event is lost
            steps.drop_last(phases=self.phases)
        if step <= steps.end:
            return
        number = len(self.phases) - 1
        if phase.stage != stage or phase.cause != TRAINING:
            number = self.phase_of(stage, began=at - (step - steps.end) * step_s)
            phase = self.phases[number]
        steps.add(step, step_s, waited_s, phase=phase, number=number, at=at)
        phase.row_at, phase.behind_s = at, 0.0

    def phase_of(self, stage: str, *, began: float) -> int:
        """Number of the phase of a row outside of its stage's training: the one before, where steps begun in it came late."""
        before = self.steps[stage].last
        if not self.has_begun:
            return 0
        if before is not None and began < self.phase.begin:
            return before
        self.train(stage, at=max(began, self.phase.begin))
        return len(self.phases) - 1

    def rewind_steps(self, event: Event) -> None:
        """A launch goes on at a step: later ones are thrown away, and missing ones were like those before them. A stage's start
        names none."""
        step, steps = event.get("step", 0), self.steps[str(event.get("stage"))]
        step = step if isinstance(step, int) and 0 <= step < MOST_STEPS else 0
        steps.go_back_to(step, phases=self.phases)
        if steps.ends and (missing := step - steps.end) > 0:
            number = steps.last or 0
            phase = self.phases[number]
            steps.add(step, steps.step_s[-1], steps.waited_s[-1], phase=phase, number=number, at=self.now)
            phase.behind_s += missing * steps.step_s[-1]

    def launched(self, event: Event, *, at: float) -> None:
        job = event.get("job")
        launch = (str(job), str(event.get("restarts"))) if job is not None else ("", str(event.get("pid")))
        if launch == self.launch and "None" not in launch and self.phase.cause not in (ENDED, QUEUE):
            self.again(at)
            return
        self.waited(str(job), at=at)
        self.launch = launch
        self.open(START_UP, at=at)

    def again(self, at: float) -> None:
        """A start of ranks in the same launch: the first, or one behind a fault, which may have left no word."""
        if self.phase.cause in (TRAINING, *OPEN):
            self.settle(RESTART)
            if self.phase.cause == TRAINING:
                self.phase.is_broken = True
                self.open(RESTART, at=at)

    def waited(self, job: str, *, at: float) -> None:
        """Another launch has begun."""
        asked = self.submitted.pop(job, None)
        if self.phase.cause in (QUEUE, BEFORE):
            return
        if self.phase.cause not in OPEN:  # nothing was heard of its end
            self.open(ENDED, at=self.now)
        if self.launch and job == self.launch[0] != "":
            self.settle(QUEUE)  # Slurm has queued it again by itself
            return
        self.settle(STOPPED)
        if asked is not None:
            self.open(QUEUE, at=min(max(asked, self.phase.begin), at))

    def settle(self, cause: str) -> None:
        """Says what an open phase was."""
        if self.phase.cause in OPEN:
            self.phase.cause = cause

    def open(self, cause: str, *, at: float, stage: str = "") -> None:
        self.phases.append(Phase(cause, at, stage))

    def train(self, stage: str, *, at: float) -> None:
        """Training begins. Where it was going on it was broken off; nothing else tells of that."""
        self.settle(WITH_RANKS.get(self.phase.cause, RESTART))
        self.phase.is_broken = self.phase.stage == stage
        self.open(TRAINING, at=at, stage=stage)
        self.steps[stage].last = len(self.phases) - 1

    def go_on(self, event: Event, at: float) -> None:
        self.train(str(event.get("stage")), at=at)

    def checkpoint(self, event: Event, at: float) -> None:
        """An older phidias trained on only when it was written."""
        if self.phase.cause == TRAINING:
            seconds = event.get("stall_s", event.get("seconds"))
            self.phase.claim(CHECKPOINT, seconds_of(seconds), at=at)

    def rewind(self, event: Event, at: float) -> None:
        if self.phase.cause == TRAINING:
            self.phase.is_broken = True
            self.open(RESTART, at=at)

    def fault(self, event: Event, at: float) -> None:
        """The first word of it; others of its ranks follow."""
        if self.phase.cause in (QUEUE, ENDED, FAULT):
            return
        self.settle(START_UP)
        self.phase.is_broken = True
        self.open(FAULT, at=at)

    def hang(self, event: Event, at: float) -> None:
        """Nothing had moved for some time, though not for longer than since the last sign of life."""
        if self.phase.cause in (QUEUE, ENDED):
            return
        self.settle(WITH_RANKS.get(self.phase.cause, RESTART))
        self.phase.is_broken = True
        self.open(HANG, at=max(self.now, at - seconds_of(event.get("seconds"))))
        self.open(FAULT, at=at)

    def stop(self, event: Event, at: float) -> None:
        if self.phase.cause in (TRAINING, START_UP, RESTART):
            self.open(ENDED, at=at)

    def stage_done(self, event: Event, at: float) -> None:
        if self.phase.cause in (TRAINING, START_UP, RESTART):
            self.open(BETWEEN, at=at)

    def job_end(self, event: Event, at: float) -> None:
        """Until then the ranks of a fault were ended, or those of an end left."""
        self.settle(RESTART if self.phase.cause == FAULT else OTHER)
        self.phase.is_broken = True
        after = {"restart": RESTART, "requeue": QUEUE}
        self.open(after.get(str(event.get("after")), ENDED), at=at)

    def divide(self, until: float, *, waits: bool) -> dict[str, float]:
        """Seconds up to `until`, productive and by cause. `waits`: the run is in the queue, and nowhere at work."""
        seconds = dict.fromkeys((PRODUCTIVE, *CAUSES), 0.0)
        phases = [*self.phases[1:], *self.to_come(until, waits=waits)]
        for phase, after in zip(phases, [*phases[1:], None], strict=True):
            end = min(until, after.begin) if after else until
            for cause, part in phase.divide(end).items():
                seconds[END_OF_TIME.get(cause, cause)] += part
        return seconds

    def to_come(self, until: float, *, waits: bool) -> list[Phase]:
        """Waiting at the end of a history, before a job has started that was submitted."""
        if self.phase.cause == ENDED and self.submitted:
            return [Phase(QUEUE, max(self.phase.begin, *self.submitted.values()))]
        return [Phase(QUEUE, self.now)] if waits and self.phase.cause != ENDED else []


# What an open phase is of which nothing more is known.
END_OF_TIME = {FAULT: RESTART, BETWEEN: START_UP, ENDED: STOPPED}
ACTS = {
    "resume": Ledger.go_on,
    "stage_start": Ledger.go_on,
    "checkpoint": Ledger.checkpoint,
    "rewind": Ledger.rewind,
    "fault": Ledger.fault,
    "hang": Ledger.hang,
    "stop": Ledger.stop,
    "stage_done": Ledger.stage_done,
    "job_end": Ledger.job_end,
}


def seconds_of(value: Any) -> float:
    """Of a duration as it is written, 0 for what is none."""
    return float(value) if is_number(value) and value > 0 else 0.0


def is_number(value: Any) -> bool:
    """A number that can be reckoned with; true and false are none, nor is NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
