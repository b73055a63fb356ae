"""Which steps are sick: NaN and Inf, losses and gradient norms far above those before them.

Arithmetic on two numbers a step that every rank has alike, so that all ranks judge alike without asking each other.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.config.monitoring import Health, Spike
from launcher.rundir.exits import ExitClass

Kind = Literal["non_finite", "loss_spike", "grad_norm"]
Action = Literal["note", "skip", "rewind", "stop"]
SEVERITY: tuple[Action, ...] = ("note", "skip", "rewind", "stop")
MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_VALUES = 16
# Of the median: values that hardly differ must not make a deviation of nothing.
FLOOR = 1e-3
# Rows of events.jsonl that are a detection, and the part of monitor.health that says how many are let pass.
DETECTIONS = {
    "non_finite": "non_finite",
    "loss_spike": "loss_spike",
    "grad_norm": "grad_norm",
    "straggler": "straggler",
    "corruption": "corruption",
    "data_stall": "data_stall",
    "checkpoint_failed": "checkpoint",
    "disk_low": "disk_low",
    "device_error": "device_error",
}
# A person queued the run, or changed its config; after such a fault only a person goes on.
BY_PERSON = ("created", "submitted", "amended", "asked")


@dataclass(frozen=True)
class Finding:
    """A step that is not to be trained on as it is. To leave out what caused it: samples [first_sample, end_sample) of the
    stage, `skip_before_steps` batches before the first elevated step included. `limit` is what the value may be at most."""

    kind: Kind
    action: Action
    budget: int
    value: float
    limit: float | None
    first_sample: int
    end_sample: int
    text: str

    @property
    def fields(self) -> dict[str, Any]:
        """What its event says; JSON has no NaN."""
        value = self.value if math.isfinite(self.value) else None
        return {"action": self.action, "value": value, "limit": self.limit, "reason": self.text}


@dataclass
class Series:
    """One number a step: those accepted of late, and the steps in a row that were above what these allow.

    Elevated steps are trained on but held back from the window until `patience_steps` of them have come. Where they end before,
    they are dropped: single outliers shall not widen what is allowed. Where they are noted, they enter the window with all that
    follow: it is the new level."""

    spike: Spike
    window: deque[float]
    held: list[float] = field(default_factory=list)
    elevated: int = 0
    last_sample: int = -1
    first_sample: int = 0
    noted_at: int | None = None  # the sample

    def limit(self) -> float | None:
        """What the next value may be; None before the window says enough."""
        if len(self.window) < max(LEAST_VALUES, (self.window.maxlen or 0) / 2):
            return None
        middle = median(self.window)
        deviation = MAD_TO_SIGMA * median([abs(value - middle) for value in self.window])
        return middle + self.spike.z * max(deviation, FLOOR * abs(middle))

    def judge(self, value: float, *, sample: int, back_to: int) -> float | None:
        """The limit, where the step that begins at `sample` is the last of enough elevated ones. Judging a step again changes
        nothing."""
        limit = self.limit()
        if limit is None or value <= limit:
            self.held, self.elevated, self.noted_at = [], 0, None
            return None
        if not self.elevated:
            self.first_sample = back_to
        if not self.elevated or sample != self.last_sample:
            self.elevated, self.last_sample = self.elevated + 1, sample
        return limit if self.elevated >= self.spike.patience_steps and self.noted_at in (None, sample) else None

    def accept(self, value: float) -> None:
        """The update was taken."""
        if self.elevated and self.noted_at is None:
            self.held.append(value)
            return
        self.window.extend([*self.held, value])
        self.held = []

    def forget(self) -> None:
        self.window.clear()
        self.held, self.elevated, self.noted_at = [], 0, None

    def to_json(self) -> dict[str, Any]:
        row = {name: value for name, value in vars(self).items() if name != "spike"}
        return row | {"window": list(self.window), "held": list(self.held)}

    def restore(self, row: Mapping[str, Any]) -> None:
        window = deque[float](row.get("window", ()), self.window.maxlen)
        vars(self).update(row, window=window, held=list(row.get("held", ())))


class StepHealth:
    """Judges each step before its update. `to_json` is all it knows: one that is made of it judges as this one would."""

    def __init__(self, health: Health):
        self.health = health
        self.loss = Series(health.loss_spike, deque(maxlen=health.window_steps))
        self.grad_norm = Series(health.grad_norm, deque(maxlen=health.window_steps))
        # Where the judged steps began: this one and those that may be left out with it.
        self.starts = deque[int](maxlen=health.skip_before_steps + 1)

    def judge(self, *, loss: float, grad_norm: float | None, samples: int, next_samples: int) -> Finding | None:
        """What is wrong with the step that reads samples [samples, next_samples) of the stage, by its global loss and gradient
        norm; of several findings the one with the gravest action. A finding with action `note` is told once an excursion."""
        if not self.starts or self.starts[-1] != samples:
            self.starts.append(samples)
        if not math.isfinite(loss) or not (grad_norm is None or math.isfinite(grad_norm)):
            return self._non_finite(loss, grad_norm=grad_norm, end_sample=next_samples)
        found = self._spike("loss_spike", self.loss, value=loss, end_sample=next_samples)
        if grad_norm is not None:
            also = self._spike("grad_norm", self.grad_norm, value=grad_norm, end_sample=next_samples)
            found = max((one for one in (found, also) if one), key=lambda one: SEVERITY.index(one.action), default=None)
        if found and found.action == "note":
            (self.loss if found.kind == "loss_spike" else self.grad_norm).noted_at = samples
        return found

    def accept(self, *, loss: float, grad_norm: float | None) -> None:
        """The update of the step judged last was taken. A step that was left out is not told here."""
        self.loss.accept(loss)
        if grad_norm is not None:
            self.grad_norm.accept(grad_norm)

    def forget(self) -> None:
        """Begins anew, where another mixture begins: its losses may be others."""
        self.loss.forget()
        self.grad_norm.forget()

    @property
    def is_in_doubt(self) -> bool:
        """Whether the last steps were elevated and, with some more, would be rewound."""
        rewound = [series for series in (self.loss, self.grad_norm) if series.spike.action == "rewind"]
        return any(series.elevated and series.noted_at is None for series in rewound)

    def to_json(self) -> dict[str, Any]:
        """For meta.json; floats come back from JSON bit for bit."""
        return {"starts": list(self.starts), "loss": self.loss.to_json(), "grad_norm": self.grad_norm.to_json()}

    @classmethod
    def from_json(cls, health: Health, row: Mapping[str, Any]) -> "StepHealth":
        """From `to_json`, under settings that may have changed since; an empty row, of an older checkpoint, begins anew."""
        made = cls(health)
        made.starts.extend(row.get("starts", ()))
        made.loss.restore(row.get("loss", {}))
        made.grad_norm.restore(row.get("grad_norm", {}))
        return made

    def _non_finite(self, loss: float, *, grad_norm: float | None, end_sample: int) -> Finding:
        rule = self.health.non_finite
        what, value = ("gradient norm", grad_norm) if math.isfinite(loss) and grad_norm is not None else ("loss", loss)
        return Finding(
            "non_finite", rule.action, rule.budget, value, None, self.starts[0], end_sample, text=f"{what} is {value}"
        )

    def _spike(
        self, kind: Literal["loss_spike", "grad_norm"], series: Series, *, value: float, end_sample: int
    ) -> Finding | None:
        limit = series.judge(value, sample=self.starts[-1], back_to=self.starts[0])
        if limit is None:
            return None
        what = "loss" if kind == "loss_spike" else "gradient norm"
        text = (
            f"{what} {value:.5g} above {limit:.5g}, which the last {len(series.window)} allow, {series.elevated} steps in a row"
        )
        rule = series.spike
        return Finding(kind, rule.action, rule.budget, value, limit, series.first_sample, end_sample, text=text)


@dataclass
class Budgets:
    """How often each part of monitor.health has been acted on in a stage. The same on every rank: the first one reads the
    events at a start, all count alike from there."""

    used: dict[str, int] = field(default_factory=dict)

    def allowed(self, kind: str, budget: int) -> bool:
        """Whether one more is within the budget."""
        return self.used.get(kind, 0) < budget

    def use(self, kind: str) -> None:
        self.used[kind] = self.used.get(kind, 0) + 1


def count_actions(events: Iterable[Mapping[str, Any]], *, stage: str) -> dict[str, int]:
    """What was done about detections of the stage, by the part of monitor.health they belong to, since a person last queued or
    amended the run, or it ended for one: who goes on after that has looked at it."""
    counts: dict[str, int] = {}
    for event in events:
        kind = event.get("kind")
        if kind in BY_PERSON or (kind == "fault" and event.get("exit") == ExitClass.NEEDS_PERSON.name):
            counts = {}
        elif kind in DETECTIONS and event.get("stage") == stage and event.get("action") not in ("note", "stop"):
            counts[DETECTIONS[kind]] = counts.get(DETECTIONS[kind], 0) + 1
    return counts


def median(values: Iterable[float]) -> float:
    """Of one value at least."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
