"""Measured goodput: the part of a run's time that went into the model it has, and where the rest went; from rows and events.

The wall time since the first start is divided, whatever of the records is lost, cut off or out of order: every second has one
cause, and none has two. Productive are the seconds of the steps that count: each step of a stage once, as it was last taken,
without its wait for data. The losses, by cause:

    queue        waiting for a job that was submitted, or queued again
    stopped      nobody wanted it to run
    start_up     from the start of a job, or the end of the stage before, to the first step: node checks, imports, loading
    restart      from a fault or rewind to the next first step of the same launch, and the end of ranks behind a fault
    hang         ranks stood still, until that was noticed
    recomputed   steps that a rewind or restart threw away, their wait for data among them
    checkpoint   training stood still for one
    validation
    data_wait    of the steps that count
    other        between steps, steps left out, those since the newest row, the end of ranks

A row of metrics.jsonl gives the mean over the steps since the row before it or, behind a `resume` or `stage_start` event, since
the step that the event names. Estimated are

- steps without a row, between the last row of a launch and the checkpoint that kept them: as long as those before them;
- rows of which a rewind kept a part: each step as long as the row's mean;
- rows of an older phidias, which timed their last step only: all their steps as long as that one;
- steps behind the last row before a fault, thrown away: all of that time for which there is no other cause;
- the end of a launch that left no word of it: its last sign of life;
- what in a stretch of training is said to have taken longer than the stretch: cut, all in proportion.

An older phidias does not say what validations took; that is `other`.
"""

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from launcher.rundir.losses import MOST_STEPS, Ledger, Row, is_number, seconds_of
from launcher.rundir.paths import RunDir
from launcher.rundir.phases import CAUSES, PRODUCTIVE

# A row of training as it is written: a month's rows are read ten times as fast as by json, which reads those that differ.
NUMBER = rb"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
TRAIN_ROW = re.compile(
    rb'\{"time": %b, "kind": "train", "stage": "([\w.-]*)", "step": (\d{1,15}), .*"step_time_s": %b, "data_wait_s": %b[,}]'
    % (NUMBER, NUMBER, NUMBER)
)


@dataclass(frozen=True)
class MeasuredGoodput:
    """Of a run so far. `wall_s` is counted from its first launch on, waiting between jobs included; `lost_s` has every cause,
    and is what of it was not productive."""

    productive_s: float
    wall_s: float
    lost_s: Mapping[str, float]

    @property
    def goodput(self) -> float:
        return self.productive_s / self.wall_s

    @property
    def largest(self) -> list[tuple[str, float]]:
        """Causes with their seconds, those that cost most first; without those that cost nothing."""
        return sorted(((cause, lost) for cause, lost in self.lost_s.items() if lost > 0), key=lambda row: -row[1])


class Meter:
    """Reads what a run records, and each time only what is new. Of events those given, where some are."""

    def __init__(self, run: RunDir):
        self.ledger, self.events, self.rows = Ledger(), Tail(run.events), Tail(run.metrics)
        self.num_rows = 0

    def read(self, events: Iterable[Any] | None = None) -> None:
        """Events are taken by their time, rows as they stand."""
        new = [event for event in (self.events.documents() if events is None else events) if is_event(event)]
        waiting = sorted(new, key=lambda event: event["time"])[::-1]  # the next one stands last
        ledger, next_at = self.ledger, waiting[-1]["time"] if waiting else math.inf
        for line in self.rows.lines():
            if (row := parse_row(line)) is None:
                continue
            while next_at <= row.time:
                ledger.take_event(waiting.pop())
                next_at = waiting[-1]["time"] if waiting else math.inf
            ledger.take_row(row)
            self.num_rows += row.step_s is not None
        while waiting:
            ledger.take_event(waiting.pop())

    def measure(self, until: float | None, *, waits: bool = False) -> MeasuredGoodput | None:
        """As `measure_goodput`."""
        ledger = self.ledger
        if not ledger.has_begun or not self.num_rows:
            return None
        end = ledger.now if until is None else until
        wall_s = end - ledger.phases[1].begin
        if wall_s <= 0:
            return None
        seconds = ledger.divide(end, waits=waits)
        return MeasuredGoodput(
            productive_s=seconds[PRODUCTIVE], wall_s=wall_s, lost_s={cause: seconds[cause] for cause in CAUSES}
        )


class Tail:
    """A file that others append to: whole lines, each once. One that is cut off is left until its end is there."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0

    def lines(self) -> Iterator[bytes]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            offset = file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                yield line
        self.offset = offset

    def documents(self) -> Iterator[Any]:
        """None for what is none."""
        return map(parse, self.lines())


def measure_goodput(
    run: RunDir, *, events: Sequence[Mapping[str, Any]], until: float | None, waits: bool = False
) -> MeasuredGoodput | None:
    """`events` as recorded; `until`: the time now (Unix seconds) of a run that is live or queued, None of one that has ended,
    whose time ends with its last sign of life; `waits`: it is queued, and nowhere at work. None before its first row."""
    meter = Meter(run)
    meter.read(events)
    return meter.measure(until, waits=waits)


def goodput_fields(run: RunDir) -> dict[str, float]:
    """Flat numbers for who logs a run that is live: `goodput/productive`, a part of 1, and seconds, `goodput/checkpoint_s`.
    Empty before its first row. The first call in a process reads all there is, later ones what is new."""
    meter = _meter(run)
    meter.read()
    found = meter.measure(time.time())
    if found is None:
        return {}
    seconds = {"productive": found.productive_s, "wall": found.wall_s, **found.lost_s}
    return {"goodput/productive": found.goodput} | {f"goodput/{name}_s": value for name, value in seconds.items()}


@lru_cache(maxsize=1)
def _meter(run: RunDir) -> Meter:
    return Meter(run)


def is_event(found: Any) -> bool:
    return isinstance(found, Mapping) and is_number(found.get("time"))


def parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def parse_row(line: bytes) -> Row | None:
    """None for what is no row, cut off by a crash or edited by hand."""
    if found := TRAIN_ROW.match(line):
        return Row(float(found[1]), found[2].decode(), int(found[3]), float(found[4]), float(found[5]))
    row = parse(line)
    if not is_event(row) or not isinstance(row.get("step"), int) or not 0 <= row["step"] < MOST_STEPS:
        return None
    step_s = row.get("step_time_s")
    times = {"waited_s": seconds_of(row.get("data_wait_s")), "seconds": seconds_of(row.get("seconds"))}
    return Row(row["time"], str(row.get("stage")), row["step"], max(0.0, step_s) if is_number(step_s) else None, **times)
