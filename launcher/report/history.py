"""What training wrote, as columns: metrics.jsonl and events.jsonl of a run, one history through every crash and resume.

A row says where its stage stands. After a crash training goes on from a checkpoint before it, so a row at or before one
already read takes back whatever lies past it: the curves show the history that led to the model, once.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, read_records

Column = NDArray[np.float64]

FIELDS = ("time", "step", "samples", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "step_time_s", "data_wait_s")
BY_SOURCE = ("loss_by_source", "tokens_by_source")
# Events of a launch at work. Others (created, amended, ...) come from commands that may run any time before the next launch.
LAUNCH = "start"
LIFE = (LAUNCH, "resume", "stage_start", "checkpoint", "stage_done", "stop", "fault")
NAN = float("nan")


@dataclass(frozen=True)
class Series:
    """Rows of one kind of one stage, oldest first, by column; NaN where a row has no value. `tokens` and `samples` count
    within the stage, rates are per second, times are Unix seconds or seconds."""

    columns: dict[str, Column]
    loss_by_source: dict[str, Column]
    tokens_by_source: dict[str, Column]

    def __len__(self) -> int:
        return len(self.columns["samples"])

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    def last(self, name: str) -> float | None:
        """The newest value of a column, None where it has none."""
        return last_value(self.columns[name])


@dataclass(frozen=True)
class StageHistory:
    """One stage: `tokens_before` is what the stages before it trained, so that all share one token axis."""

    name: str
    tokens_before: float
    train: Series
    validation: Series

    @property
    def tokens(self) -> float:
        """Tokens trained in this stage; the last step may have a validation row only."""
        return max(self.train.last("tokens") or 0.0, self.validation.last("tokens") or 0.0)

    @property
    def steps(self) -> int:
        return int(max(self.train.last("step") or 0.0, self.validation.last("step") or 0.0))


@dataclass(frozen=True)
class History:
    """A run so far. `activity` holds the times of all signs of life, rows taken back too, in order."""

    stages: tuple[StageHistory, ...]
    events: tuple[dict[str, Any], ...]
    status: dict[str, Any]
    activity: Column

    @property
    def tokens(self) -> float:
        return sum(stage.tokens for stage in self.stages)

    @property
    def wall_s(self) -> float:
        """Seconds from each launch to the last sign of life before the next: a night between stop and resume is not in it."""
        launches = [event["time"] for event in self.events if event["kind"] == LAUNCH]
        if not len(self.activity):
            return 0.0
        starts = np.unique([self.activity[0], *launches])
        borders = np.searchsorted(self.activity, starts)
        ends = self.activity[np.append(borders[1:], len(self.activity)) - 1]
        return float((ends - starts).clip(0.0).sum())


def last_value(column: Column) -> float | None:
    known = column[~np.isnan(column)]
    return float(known[-1]) if len(known) else None


def first_value(column: Column) -> float | None:
    known = column[~np.isnan(column)]
    return float(known[0]) if len(known) else None


@dataclass
class _Rows:
    """Columns that grow row by row: 400,000 rows are arrays of doubles, not dictionaries."""

    size: int = 0
    columns: dict[tuple[str, str], "array[float]"] = field(default_factory=dict)

    def append(self, row: Mapping[str, Any]) -> None:
        values = {(name, ""): row.get(name) for name in FIELDS}
        for name in BY_SOURCE:
            values |= {(name, source): value for source, value in row.get(name, {}).items()}
        for key in values.keys() - self.columns.keys():
            self.columns[key] = array("d", [NAN]) * self.size
        for key, column in self.columns.items():
            value = values.get(key)
            column.append(NAN if value is None else value)
        self.size += 1

    def take_back(self, samples: int, *, inclusive: bool) -> None:
        """Drops the rows past `samples`, and those at it where inclusive."""
        if not self.size:
            return
        place = bisect_left if inclusive else bisect_right
        keep = place(self.columns["samples", ""], samples)
        if keep < self.size:
            self.size = keep
            for column in self.columns.values():
                del column[keep:]

    def freeze(self) -> Series:
        def of(name: str) -> dict[str, Column]:
            return {source: np.array(column) for (kind, source), column in self.columns.items() if kind == name}

        empty = np.empty(0)
        columns = {name: np.array(self.columns.get((name, ""), empty), dtype=np.float64) for name in FIELDS}
        return Series(columns=columns, loss_by_source=of("loss_by_source"), tokens_by_source=of("tokens_by_source"))


@dataclass
class _StageRows:
    train: _Rows = field(default_factory=_Rows)
    validation: _Rows = field(default_factory=_Rows)

    def append(self, row: Mapping[str, Any]) -> None:
        own, other = (self.train, self.validation) if row["kind"] == "train" else (self.validation, self.train)
        own.take_back(row["samples"], inclusive=True)
        # A validation belongs to the step it follows: at equal samples the other kind stays.
        other.take_back(row["samples"], inclusive=False)
        own.append(row)


def read_history(run: RunDir) -> History:
    """Everything training recorded so far; empty where it has not begun."""
    rows: dict[str, _StageRows] = {}
    times = array("d")
    for row in read_records(run.metrics):
        times.append(row["time"])
        if row["kind"] in ("train", "validation"):
            rows.setdefault(row["stage"], _StageRows()).append(row)
    events = tuple(sorted(read_records(run.events), key=lambda event: event["time"]))
    times.extend(event["time"] for event in events if event["kind"] in LIFE)
    return History(
        stages=_freeze_stages(rows),
        events=events,
        status=read_json(run.status) if run.status.exists() else {},
        activity=np.sort(np.array(times, dtype=np.float64)),
    )


def _freeze_stages(rows: Mapping[str, _StageRows]) -> tuple[StageHistory, ...]:
    stages: list[StageHistory] = []
    tokens_before = 0.0
    for name, stage_rows in rows.items():
        train, validation = stage_rows.train.freeze(), stage_rows.validation.freeze()
        stages.append(StageHistory(name=name, tokens_before=tokens_before, train=train, validation=validation))
        tokens_before += stages[-1].tokens
    return tuple(stages)
