"""What training wrote, as columns: metrics.jsonl and events.jsonl of a run, one history through every crash and resume
(report_rows.py)."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launcher.report.report_rows import EVERY, Column, Rows, columns_of, read_metrics, read_whole, whole_rows
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, read_records

# Events of a launch at work. Others (created, amended, ...) come from commands that may run any time before the next launch.
LAUNCH = "start"
LIFE = (LAUNCH, "resume", "stage_start", "checkpoint", "stage_done", "stop", "fault")


@dataclass(frozen=True)
class Series:
    """Rows of one kind of one stage, oldest first, by column; NaN where a row has no value. `tokens` and `samples` count
    within the stage, rates are per second, times are Unix seconds or seconds. Of a long run some rows, the first and the last
    among them."""

    columns: dict[str, Column]
    loss_by_source: dict[str, Column]
    tokens_by_source: dict[str, Column]
    epochs_by_source: dict[str, Column] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["samples"])

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    def last(self, name: str) -> float | None:
        """The newest value of a column, None where it has none."""
        return last_value(self.columns[name])


@dataclass(frozen=True)
class StageHistory:
    """One stage: `tokens_before` is what the stages before it trained, so that all share one token axis. `every`: of each row
    of training its time, step, samples, tokens, loss and gradient norm."""

    name: str
    tokens_before: float
    train: Series
    validation: Series
    every: dict[str, Column]

    @property
    def tokens(self) -> float:
        """Tokens trained in this stage; the last step may have a validation row only."""
        return max(last_value(self.every["tokens"]) or 0.0, self.validation.last("tokens") or 0.0)

    @property
    def steps(self) -> int:
        return int(max(last_value(self.every["step"]) or 0.0, self.validation.last("step") or 0.0))


@dataclass(frozen=True)
class History:
    """A run so far. `activity` holds the times of all signs of life, rows taken back too, in order; `rows`: all
    as they were written."""

    stages: tuple[StageHistory, ...]
    events: tuple[dict[str, Any], ...]
    status: dict[str, Any]
    activity: Column
    rows: Rows

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


def read_history(run: RunDir) -> History:
    """Everything training recorded so far; empty where it has not begun."""
    rows = read_metrics(run.metrics)
    events = tuple(sorted(read_records(run.events), key=lambda event: event["time"]))
    times = np.append(rows.columns["time"], [event["time"] for event in events if event["kind"] in LIFE])
    return History(
        stages=_read_stages(run, rows),
        events=events,
        status=read_json(run.status) if run.status.exists() else {},
        activity=np.sort(times),
        rows=rows,
    )


def _read_stages(run: RunDir, rows: Rows) -> tuple[StageHistory, ...]:
    """In the order they were trained; other rows than those of training and validation make no stage."""
    found = {name: kept for name in rows.names if (kept := rows.kept(name)) and (len(kept[0]) or kept[1])}
    if not found:
        return ()
    stages: list[StageHistory] = []
    tokens_before = 0.0
    total = sum(len(train) for train, _ in found.values())
    with run.metrics.open("rb") as file:
        for name, (train, validations) in found.items():
            whole = train[whole_rows(len(train), total=total)]
            series = _series(*columns_of(read_whole(file, rows.offsets[whole].tolist())))
            every = {column: rows.columns[column][train] for column in EVERY}
            stages.append(StageHistory(name, tokens_before, series, _series(*columns_of(validations)), every=every))
            tokens_before += stages[-1].tokens
    return tuple(stages)


def _series(columns: dict[str, Column], by_source: dict[str, dict[str, Column]]) -> Series:
    return Series(columns=columns, **by_source)
