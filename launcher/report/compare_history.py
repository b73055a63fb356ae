"""The held-out losses of a run by stage, as report/history.py tells them through crashes and resumes, in a sixth of the time:
of a row of training only its place counts, and a sweep has a million of them."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.rundir.paths import RunDir

Column = NDArray[np.float64]
Row = dict[str, Any]

# How training writes the beginning of a row; one that begins otherwise is read whole.
TRAIN = re.compile(rb'\{"time": [^,]+, "kind": "train", "stage": "([^"\\]+)", "step": \d+, "samples": (\d+), "tokens": (\d+)')


@dataclass
class StageLosses:
    """Validations of a stage, oldest first: `samples` and their `rows`. `tokens`: where the stage stands."""

    samples: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    tokens: int = 0

    def take_back(self, place: int) -> None:
        del self.samples[place:], self.rows[place:]

    def column(self, name: str) -> Column:
        return np.array([_number(row.get(name)) for row in self.rows], dtype=np.float64)

    def by_source(self, name: str) -> dict[str, Column]:
        """Of the sources that have a value at all, in the order of the rows."""
        sources = dict.fromkeys(source for row in self.rows for source in row.get(name) or {})
        columns = {source: np.array([_number((row.get(name) or {}).get(source)) for row in self.rows]) for source in sources}
        return {source: column for source, column in columns.items() if np.isfinite(column).any()}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def read_losses(run: RunDir) -> dict[str, StageLosses]:
    """By stage, in the order they were trained. After a crash training goes on from a checkpoint: a row takes back the
    validations past it, and a validation those at it."""
    found: dict[str, StageLosses] = {}
    for stage_name, samples, tokens, row in _places(run):
        stage = found.setdefault(stage_name, StageLosses())
        stage.tokens = tokens
        if row is None:
            if stage.samples and stage.samples[-1] > samples:
                stage.take_back(bisect_right(stage.samples, samples))
            continue
        stage.take_back(bisect_left(stage.samples, samples))
        stage.samples.append(samples)
        stage.rows.append(row)
    return found


def _places(run: RunDir) -> Iterator[tuple[str, int, int, Row | None]]:
    """Stage, samples and tokens of each row, and the row itself where it is a validation; what is cut off is passed over."""
    if not run.metrics.exists():
        return
    with run.metrics.open("rb") as file:
        for line in file:
            if head := TRAIN.match(line):
                if line.endswith(b"}\n"):
                    yield head[1].decode(), int(head[2]), int(head[3]), None
                continue
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("kind") in ("train", "validation"):
                yield row["stage"], row["samples"], row["tokens"], row if row["kind"] == "validation" else None
