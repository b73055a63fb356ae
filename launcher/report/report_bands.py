"""The wall time of a run as bands, one after another: what it did when, as goodput counts it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from launcher.rundir.goodput import Meter, is_event
from launcher.rundir.losses import END_OF_TIME, Ledger, Row
from launcher.rundir.phases import QUEUE, STOPPED, TRAINING

# Time in which nobody worked on the run.
AWAY = (QUEUE, STOPPED)


class Band(NamedTuple):
    """Unix seconds. `stage`: the one that is trained, or that is trained next."""

    cause: str
    stage: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def fill_meter(meter: Meter, *, rows: Iterable[Row], events: Sequence[Mapping[str, Any]]) -> None:
    """As `meter.read`, of rows that have been read already; events in the order of their times."""
    waiting = [event for event in events if is_event(event)][::-1]
    for row in rows:
        while waiting and waiting[-1]["time"] <= row.time:
            meter.ledger.take_event(waiting.pop())
        meter.ledger.take_row(row)
        meter.num_rows += row.step_s is not None
    while waiting:
        meter.ledger.take_event(waiting.pop())


def bands_of(ledger: Ledger, *, until: float | None) -> tuple[Band, ...]:
    """`until`: the time now of a run that is live; else its time ends with its last sign of life."""
    end = ledger.now if until is None else max(until, ledger.now)
    phases = [*ledger.phases[1:], *ledger.to_come(end, waits=False)]
    bands: list[Band] = []
    stage = next((phase.stage for phase in reversed(phases) if phase.cause == TRAINING), "")
    for phase in reversed(phases):
        begin = min(phase.begin, end)
        stage = phase.stage or stage
        cause = END_OF_TIME.get(phase.cause, phase.cause)
        if bands and bands[-1].cause == cause and bands[-1].stage == stage:
            bands[-1] = bands[-1]._replace(begin=begin)
        elif begin < end:
            bands.append(Band(cause, stage, begin, end))
        end = begin
    return tuple(reversed(bands))


def work_s(bands: Iterable[Band], *, stage: str) -> float:
    """Seconds that a stage took: training with its checkpoints, start-ups and restarts, without queue and stops."""
    return sum(band.seconds for band in bands if band.stage == stage and band.cause not in AWAY)
