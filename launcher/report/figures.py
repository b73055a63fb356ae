"""The report's curves as plain data, decimated in numpy; page.js smooths and draws them, and alone knows colours and layout.

400,000 rows become about a thousand stretches. They lie evenly over the run and, besides, ever closer towards its beginning, so
that the first steep fall keeps its shape on a logarithmic token axis too. All curves are means over the same stretches, so that
their tokens are told once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.config.schema import RunConfig
from launcher.plan.memory import GIB
from launcher.report.history import History, Series, StageHistory
from launcher.report.report_plan import Plans
from launcher.report.report_rows import Column
from launcher.report.report_timeline import build_timeline
from launcher.report.summary import Summary, source_names

Trace = dict[str, Any]
Pick = Callable[[Series], Column]

# Points of a curve over the whole run, shared out by tokens; at least so many a stage; and more near a stage's beginning.
EVEN_POINTS = 800
MIN_POINTS = 100
EARLY_POINTS = 150
# A smoothed curve is a centred mean over this part of a stage's tokens, and over so many rows at least.
SMOOTHING = 0.03
MIN_SMOOTHED_ROWS = 17
MOST_SMOOTHING = 0.2
SPLIT = {
    "forward": "forward_s",
    "backward": "backward_s",
    "optimizer": "optimizer_s",
    "exposed communication and waiting": "exposed_s",
    "data wait": "data_wait_s",
    "checkpoint": "checkpoint_s",
}


@dataclass(frozen=True)
class Stretches:
    """A stage's rows in stretches: the tokens at which each begins, its mean tokens, and how many rows it has."""

    begins: Column
    tokens: Column
    rows: Column

    def means(self, tokens: Column, values: Column) -> Column:
        """Of the rows at `tokens`, passing over those without a value; NaN where a stretch has none."""
        known = np.isfinite(values)
        place = self._places(tokens[known])
        sums = np.bincount(place, weights=values[known], minlength=len(self.begins))
        counts = np.bincount(place, minlength=len(self.begins))
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    def largest(self, tokens: Column, values: Column) -> Column:
        known = np.isfinite(values)
        found = np.full(len(self.begins), -np.inf)
        np.maximum.at(found, self._places(tokens[known]), values[known])
        return np.where(np.isfinite(found), found, np.nan)

    def _places(self, tokens: Column) -> NDArray[np.intp]:
        return np.maximum(np.searchsorted(self.begins, tokens, side="right") - 1, 0)


def build_figures(history: History, *, config: RunConfig, summary: Summary, plans: Plans) -> dict[str, Any]:
    """Everything page.js draws: traces by chart over the stretches of `grid`, stage borders, the entropy the loss is measured
    against, the part of a stage that curves are smoothed over at first, and the timeline."""
    return _Drawing(history, config=config, plans=plans).figures() | {
        "borders": [{"name": stage.name, "tokens": stage.tokens_before} for stage in history.stages],
        "tokens": history.tokens,
        "entropy": _round(summary.entropy),
        "smoothing": _smoothing(history.stages),
        "timeline": build_timeline(history.events, bands=summary.bands),
    }


def _smoothing(stages: Iterable[StageHistory]) -> float:
    rows = max((len(stage.every["tokens"]) for stage in stages), default=0)
    return round(min(MOST_SMOOTHING, max(SMOOTHING, MIN_SMOOTHED_ROWS / max(1, rows))), 3)


class _Drawing:
    """The stages of a run in stretches, and traces over them."""

    def __init__(self, history: History, *, config: RunConfig, plans: Plans):
        self.stages, self.sources, self.plans = history.stages, source_names(config), plans
        self.stretches = [stretches(stage.every["tokens"], points=self.num_points(stage)) for stage in self.stages]

    def num_points(self, stage: StageHistory) -> int:
        """The same density everywhere: a short stage drawn with as many points as a long one would be a smear."""
        return max(MIN_POINTS, round(EVEN_POINTS * stage.tokens / max(1.0, sum(each.tokens for each in self.stages))))

    def figures(self) -> dict[str, Any]:
        tokens = [stage.tokens_before + each.tokens for stage, each in zip(self.stages, self.stretches, strict=True)]
        return {
            "grid": {
                "tokens": [_round(value) for part in tokens for value in part],
                "rows": [int(count) for each in self.stretches for count in each.rows],
                "sizes": [len(each.tokens) for each in self.stretches],
            },
            "traces": {name: [trace for trace in traces if trace] for name, traces in self.charts().items()},
        }

    def charts(self) -> dict[str, list[Trace | None]]:
        per_step = [self.mean(name, self.column(column), kind="part") for name, column in SPLIT.items()]
        plain = ("weight_norm", "update_ratio", "zero_grads", "slowest_ratio", "fp8_scale_min", "fp8_amax_max", "fp8_overflows")
        return {
            "loss": [*self.spiky("training", column="loss"), self.markers("held-out", lambda series: series["loss"])],
            "sources": [trace for index, name in enumerate(self.sources) for trace in self.of_source(name, index=index)],
            "throughput": [*self.noisy("tokens/s", column="tokens_per_s"), self.planned("tokens_per_s")],
            "mfu": [*self.noisy("MFU", column="mfu"), self.planned("mfu")],
            "split": per_step if self.mean("", self.column("backward_s")) else [],  # older rows know a part of it
            "memory": [self.memory(), self.planned("memory_gib")],
            "lr": [self.mean("learning rate", self.column("lr"), kind="value")],
            "grad_norm": self.spiky("gradient norm", column="grad_norm"),
            **{name: self.noisy(name.replace("_", " "), column=name) for name in plain},
            "epochs": [self.epochs(name, index=index) for index, name in enumerate(self.sources)],
        }

    @staticmethod
    def column(name: str) -> Pick:
        return lambda series: series[name]

    def mean(self, name: str, pick: Pick, *, kind: str = "mean", **more: Any) -> Trace | None:
        parts = [
            each.means(stage.train["tokens"], pick(stage.train))
            for stage, each in zip(self.stages, self.stretches, strict=True)
        ]
        return _over_grid(parts, name=name, kind=kind, **more)

    def memory(self) -> Trace | None:
        parts = [
            each.largest(stage.train["tokens"], stage.train["memory_max_bytes"] / GIB)
            for stage, each in zip(self.stages, self.stretches, strict=True)
        ]
        return _over_grid(parts, name="fullest rank", kind="value")

    def spiky(self, name: str, *, column: str) -> list[Trace | None]:
        """Of every row: the raw ones, spikes kept, behind the means."""
        every = [(stage.every["tokens"], stage.every[column]) for stage in self.stages]
        parts = [each.means(*rows) for rows, each in zip(every, self.stretches, strict=True)]
        return [self.raw(name, every), _over_grid(parts, name=f"{name}, smoothed", kind="mean")]

    def noisy(self, name: str, *, column: str) -> list[Trace | None]:
        rows = [(stage.train["tokens"], stage.train[column]) for stage in self.stages]
        return [self.raw(name, rows), self.mean(f"{name}, smoothed", self.column(column))]

    def raw(self, name: str, rows: Iterable[tuple[Column, Column]]) -> Trace | None:
        parts = [
            extremes(stage.tokens_before + tokens, values, points=self.num_points(stage))
            for stage, (tokens, values) in zip(self.stages, rows, strict=True)
        ]
        return _trace(parts, kind="raw", name=f"{name}, as logged")

    def markers(self, name: str, pick: Pick, **more: Any) -> Trace | None:
        """Held-out losses."""
        parts = []
        for stage in self.stages:
            rows = sample_rows(len(stage.validation), points=self.num_points(stage))
            parts.append((stage.tokens_before + stage.validation["tokens"][rows], pick(stage.validation)[rows]))
        return _trace(parts, kind="held_out", name=name, **more)

    def of_source(self, name: str, *, index: int) -> list[Trace | None]:
        """Training loss and held-out points of a source; `source` is its place in the config, and so its colour."""
        return [
            self.mean(name, lambda series: _of(series.loss_by_source, name, size=len(series)), source=index),
            self.markers(f"{name} held-out", lambda s: _of(s.loss_by_source, name, size=len(s)), source=index),
        ]

    def epochs(self, name: str, *, index: int) -> Trace | None:
        return self.mean(name, lambda s: _of(s.epochs_by_source, name, size=len(s)), kind="value", source=index)

    def planned(self, figure: str) -> Trace | None:
        """A level for each stage that has a prediction."""
        parts = []
        for stage in self.stages:
            level = self.plans.predicted(stage.name).get(figure)
            ends = stage.tokens_before + np.array([stage.every["tokens"][:1].sum(), stage.tokens])
            parts.append((ends, np.full(2, np.nan if level is None else level)))
        return _trace(parts, kind="plan", name="planned")


def _of(columns: dict[str, Column], source: str, *, size: int) -> Column:
    return columns.get(source, np.full(size, np.nan))


def _over_grid(parts: Iterable[Column], *, name: str, kind: str, **more: Any) -> Trace | None:
    """A curve over the grid, null where it has no value; None for one that has none at all."""
    values = [value for part in parts for value in part]
    if not np.isfinite(values).any():
        return None
    y = [_round(value, digits=5) if np.isfinite(value) else None for value in values]
    return {"name": name, "kind": kind, "y": y, **more}


def _trace(parts: Iterable[tuple[Column, Column]], *, kind: str, name: str, **more: Any) -> Trace | None:
    """A curve with tokens of its own, broken at the borders of stages; a row without a value is left out, not a gap."""
    x: list[float | None] = []
    y: list[float | None] = []
    for tokens, values in parts:
        known = np.isfinite(values)
        if known.any():
            # A None between two stages lifts the pen.
            x += [None] * bool(x) + [_round(value) for value in tokens[known]]
            y += [None] * bool(y) + [_round(value, digits=5) for value in values[known]]
    return {"name": name, "kind": kind, "x": x, "y": y, **more} if x else None


def _round(value: float | None, *, digits: int = 7) -> float | None:
    """Significant digits, which keep the page small: a pixel shows fewer."""
    return None if value is None else float(f"{value:.{digits}g}")


def stretches(tokens: Column, *, points: int) -> Stretches:
    """A stage of rows at `tokens`, in about so many stretches: a row each where there are few."""
    borders = sample_rows(len(tokens), points=points)
    rows = np.diff(np.append(borders, len(tokens))).astype(np.float64)
    if not len(borders):
        return Stretches(borders.astype(np.float64), borders.astype(np.float64), rows)
    return Stretches(tokens[borders], np.add.reduceat(tokens, borders) / rows, rows)


def sample_rows(size: int, *, points: int) -> NDArray[np.intp]:
    """Row numbers to draw: all of a short series, else evenly spaced ones and geometrically spaced early ones, ends kept."""
    if size <= points:
        return np.arange(size)
    even = np.linspace(0, size - 1, points)
    early = np.geomspace(1, size, EARLY_POINTS) - 1
    return np.unique(np.concatenate([even, early]).round().astype(np.intp))


def extremes(x: Column, y: Column, *, points: int) -> tuple[Column, Column]:
    """Decimates to the lowest and highest row of each stretch, in their order: a spike of one row stays visible."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    borders = sample_rows(len(y), points=points)
    if len(borders) == len(y):
        return x, y
    kept = {0, len(y) - 1}
    for start, stop in pairwise(borders):
        stretch = y[start:stop]
        kept |= {int(start + stretch.argmin()), int(start + stretch.argmax())}
    rows = np.array(sorted(kept))
    return x[rows], y[rows]
