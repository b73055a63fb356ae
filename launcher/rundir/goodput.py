"""Measured goodput: the part of a run's time that went into the model it has, from its rows and events.

Productive are the seconds of the steps that count: each step of a stage once, as it was last taken. Their wait for data is
among them; steps that a rewind threw away, checkpoints, validations, starts and waiting for nodes are not.

A row of metrics.jsonl gives the mean over the steps since the row before it or, behind a `resume` or `stage_start` event, since
the step that the event names. Estimated are

- steps without a row, between the last row of a launch and the checkpoint that kept them: as long as those before them;
- rows of which a rewind kept a part: each step as long as the row's mean;
- rows of an older phidias, which timed their last step only: all their steps as long as that one.

Steps since the newest row are not counted yet.
"""

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from launcher.rundir.paths import RunDir

# Events of a launch at work; others come from commands that a person may call long after a run has ended.
LIFE = frozenset(
    {"start", "no_start", "resume", "stage_start", "checkpoint", "stage_done", "stop", "fault", "bad_node", "job_end"}
)
GOES_ON = ("resume", "stage_start")
# A row of training as it is written: a month's rows are read ten times as fast as by json, which reads those that differ.
NUMBER = rb"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
TRAIN_ROW = re.compile(
    rb'\{"time": %b, "kind": "train", "stage": "([\w.-]*)", "step": (\d+), .*"step_time_s": %b[,}]' % (NUMBER, NUMBER)
)


class _Row(NamedTuple):
    """`step_s`: mean seconds of its steps, None where it has none, as a validation."""

    time: float
    stage: str
    step: int
    step_s: float | None


@dataclass(frozen=True)
class MeasuredGoodput:
    """Of a run so far. `wall_s` is counted from its first launch on, waiting between jobs included."""

    productive_s: float
    wall_s: float

    @property
    def goodput(self) -> float:
        return self.productive_s / self.wall_s


@dataclass
class _Steps:
    """The steps of one stage that count, from 0 on: stretches of steps, each from where the one before it ends up to its own
    end, and the mean seconds of a step of each."""

    ends: list[int] = field(default_factory=list)
    means: list[float] = field(default_factory=list)

    def goes_on_at(self, step: int) -> None:
        """A launch begins here: later steps are thrown away, and missing ones were like those before them."""
        while self.ends and (self.ends[-2] if len(self.ends) > 1 else 0) >= step:
            self._drop_last()
        if self.ends:
            self.ends[-1] = step

    def reached(self, step: int, *, step_s: float) -> None:
        """A row. One at or before an earlier row tells of a rewind whose event is lost."""
        while self.ends and self.ends[-1] >= step:
            self._drop_last()
        self.ends.append(step)
        self.means.append(step_s)

    def _drop_last(self) -> None:
        del self.ends[-1], self.means[-1]

    def seconds(self) -> float:
        starts = [0, *self.ends]
        return math.fsum(step_s * (end - start) for start, end, step_s in zip(starts, self.ends, self.means, strict=False))


def measure_goodput(run: RunDir, *, events: Sequence[dict[str, Any]], until: float | None) -> MeasuredGoodput | None:
    """`events` as recorded; `until`: the time now (Unix seconds) of a run that is live or queued, None of one that has ended,
    whose time ends with its last sign of life. None before its first row."""
    events = [event for event in events if is_number(event.get("time"))]
    starts = [event["time"] for event in events if event.get("kind") == "start"]
    life = [event["time"] for event in events if event.get("kind") in LIFE]
    steps: defaultdict[str, _Steps] = defaultdict(_Steps)
    waiting = [event for event in reversed(events) if event.get("kind") in GOES_ON]
    for row in _read_rows(run):
        while waiting and waiting[-1]["time"] <= row.time:
            _go_on(steps, waiting.pop())
        if row.step_s is not None:
            steps[row.stage].reached(row.step, step_s=row.step_s)
        life.append(row.time)
    if not starts or not steps:
        return None
    while waiting:
        _go_on(steps, waiting.pop())
    wall_s = (max(life) if until is None else until) - starts[0]
    productive_s = math.fsum(stage.seconds() for stage in steps.values())
    return MeasuredGoodput(productive_s=productive_s, wall_s=wall_s) if wall_s > 0 else None


def _go_on(steps: dict[str, _Steps], event: dict[str, Any]) -> None:
    step = event.get("step", 0)  # a stage's start names none
    steps[str(event.get("stage"))].goes_on_at(step if isinstance(step, int) else 0)


def _read_rows(run: RunDir) -> Iterator[_Row]:
    """What is no row, cut off by a crash or edited by hand, is passed over."""
    if not run.metrics.exists():
        return
    with run.metrics.open("rb") as file:
        for line in file:
            if found := TRAIN_ROW.match(line):
                yield _Row(float(found[1]), found[2].decode(), int(found[3]), float(found[4]))
            elif row := _parse_row(line):
                yield row


def _parse_row(line: bytes) -> _Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not is_number(row.get("time")) or not isinstance(row.get("step"), int):
        return None
    step_s = row.get("step_time_s")
    return _Row(row["time"], str(row.get("stage")), row["step"], step_s if is_number(step_s) else None)


def is_number(value: Any) -> bool:
    """A number that can be reckoned with; true and false are none, nor is NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
