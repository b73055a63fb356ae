"""What the wall time of a run is divided into: phases of it, one after another, and the steps that were taken in them."""

import math
from array import array
from dataclasses import dataclass, field

PRODUCTIVE = "productive"
# Why time is lost, in the order in which it is shown.
QUEUE, STOPPED, START_UP, RESTART, HANG = "queue", "stopped", "start_up", "restart", "hang"
RECOMPUTED, CHECKPOINT, VALIDATION, DATA_WAIT, OTHER = "recomputed", "checkpoint", "validation", "data_wait", "other"
CAUSES = (QUEUE, STOPPED, START_UP, RESTART, HANG, RECOMPUTED, CHECKPOINT, VALIDATION, DATA_WAIT, OTHER)
# Phases that have no cause of their own. What `ENDED`, `BETWEEN` (two stages) and `FAULT` cost is said by what comes next.
BEFORE, TRAINING, ENDED, BETWEEN, FAULT = "before", "training", "ended", "between", "fault"
OPEN = (ENDED, BETWEEN, FAULT)


@dataclass(slots=True)
class Phase:
    """Wall time from `begin` (Unix seconds) to where the next one begins.

    Of training: what in it took how long, the wait among the seconds of the steps that count; the time of its last row, and
    what of it lies behind the row; whether it ended so that steps since the row were lost."""

    cause: str
    begin: float
    stage: str = ""
    steps_s: float = 0.0
    waited_s: float = 0.0
    lost_s: dict[str, float] = field(default_factory=dict)
    row_at: float = 0.0
    behind_s: float = 0.0
    is_broken: bool = False

    def __post_init__(self) -> None:
        self.row_at = self.begin

    def claim(self, cause: str, seconds: float, *, at: float) -> None:
        """Something of training that was over at `at`; no more than there was time for."""
        seconds = min(seconds, max(0.0, at - self.begin))
        self.lost_s[cause] = self.lost_s.get(cause, 0.0) + seconds
        self.behind_s += seconds

    def divide(self, end: float) -> dict[str, float]:
        """Seconds by cause: what its parts say, cut in proportion where they say too much, and the rest. Their sum is the
        time up to `end`."""
        length = max(0.0, end - self.begin)
        if self.cause != TRAINING:
            return {self.cause: length}
        parts = {RECOMPUTED: 0.0, **self.lost_s, DATA_WAIT: max(0.0, self.waited_s)}
        parts[PRODUCTIVE] = max(0.0, self.steps_s - self.waited_s)
        claimed = math.fsum(parts.values())
        if claimed > length:
            return {cause: seconds * (length / claimed) for cause, seconds in parts.items()}
        rest = length - claimed
        lost = min(rest, max(0.0, end - self.row_at - self.behind_s)) if self.is_broken else 0.0
        parts[RECOMPUTED] += lost
        return parts | {OTHER: rest - lost}


class Steps:
    """The steps of one stage that count, from 0 on, as stretches: each from where the one before it ends up to its own end,
    with the mean seconds of its steps, how much of those was wait for data, and the phase that they were taken in."""

    def __init__(self) -> None:
        self.ends, self.step_s, self.waited_s, self.phases = array("q"), array("d"), array("d"), array("l")
        self.end = 0  # of the last stretch
        self.last: int | None = None  # phase in which the stage trained last

    def add(self, end: int, step_s: float, waited_s: float, *, phase: Phase, number: int, at: float) -> None:
        """A stretch up to step `end`, which is past the last one, over at `at` in phase `number`."""
        count = end - self.end
        if count * step_s > at - phase.begin:
            step_s = max(0.0, at - phase.begin) / count
        if waited_s > step_s:
            waited_s = step_s
        self.end = end
        self.ends.append(end)
        self.step_s.append(step_s)
        self.waited_s.append(waited_s)
        self.phases.append(number)
        phase.steps_s += count * step_s
        phase.waited_s += count * waited_s

    def go_back_to(self, step: int, *, phases: list[Phase]) -> None:
        """Later ones are thrown away."""
        while self.ends and self.begin() >= step:
            self.drop_last(phases=phases)
        if self.end > step:
            self.throw_away(self.end - step, phases=phases)
            self.ends[-1] = self.end = step

    def begin(self) -> int:
        """Of the last stretch."""
        return self.ends[-2] if len(self.ends) > 1 else 0

    def drop_last(self, *, phases: list[Phase]) -> None:
        begin = self.begin()
        self.throw_away(self.end - begin, phases=phases)
        self.end = begin
        for column in (self.ends, self.step_s, self.waited_s, self.phases):
            column.pop()

    def throw_away(self, count: int, *, phases: list[Phase]) -> None:
        """The last steps of the last stretch."""
        phase, seconds = phases[self.phases[-1]], count * self.step_s[-1]
        phase.steps_s -= seconds
        phase.waited_s -= count * self.waited_s[-1]
        phase.lost_s[RECOMPUTED] = phase.lost_s.get(RECOMPUTED, 0.0) + seconds
