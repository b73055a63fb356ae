"""The report's curves as plain data: decimated in numpy, drawn by page.js, which alone knows colours and layout.

400,000 rows become about a thousand points a curve. Points lie evenly over the run and, besides, ever closer towards its
beginning, so that the first steep fall keeps its shape on a logarithmic token axis too.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.config.schema import RunConfig
from launcher.report.history import History, Series, StageHistory
from launcher.report.summary import Summary, source_names

Column = NDArray[np.float64]
Trace = dict[str, Any]

# Points of a curve over the whole run, shared out by tokens; at least so many a stage; and more near a stage's beginning.
EVEN_POINTS = 800
MIN_POINTS = 100
EARLY_POINTS = 150
# The smoothed curve is a centred mean over this part of a stage's rows, and over so many rows at least.
SMOOTHING = 0.03
MIN_SMOOTHED_ROWS = 17


def build_figures(history: History, *, config: RunConfig, summary: Summary) -> dict[str, Any]:
    """Everything page.js draws: traces by chart, stage borders, and the entropy the loss is measured against."""
    stages = history.stages
    return {
        "traces": {
            "loss": _loss_traces(stages),
            "sources": _source_traces(stages, names=source_names(config)),
            "lr": [_curve(stages, kind="value", name="learning rate", pick=lambda series: series["lr"])],
            "grad_norm": _raw_and_smooth(stages, name="gradient norm", column="grad_norm"),
            "throughput": _raw_and_smooth(stages, name="tokens/s", column="tokens_per_s"),
        },
        "borders": [{"name": stage.name, "tokens": stage.tokens_before} for stage in stages],
        "tokens": history.tokens,
        "entropy": _round(summary.entropy),
    }


def _loss_traces(stages: tuple[StageHistory, ...]) -> list[Trace]:
    held_out = _markers(stages, name="held-out", pick=lambda stage: stage.validation["loss"])
    return [*_raw_and_smooth(stages, name="training", column="loss"), held_out]


def _source_traces(stages: tuple[StageHistory, ...], *, names: Iterable[str]) -> list[Trace]:
    """Smoothed training loss and held-out points of each source; `source` is its place in the config, and so its colour."""
    traces: list[Trace] = []
    for index, name in enumerate(names):
        curve, points = _source_curve(stages, name=name), _source_points(stages, name=name)
        traces += [trace | {"source": index} for trace in (curve, points) if trace["x"]]
    return traces


def _source_curve(stages: tuple[StageHistory, ...], *, name: str) -> Trace:
    return _curve(stages, kind="smooth", name=name, pick=lambda series: smooth(_of(series, name)))


def _source_points(stages: tuple[StageHistory, ...], *, name: str) -> Trace:
    return _markers(stages, name=f"{name} held-out", pick=lambda stage: _of(stage.validation, name))


def _of(series: Series, source: str) -> Column:
    return series.loss_by_source.get(source, np.full(len(series), np.nan))


def _raw_and_smooth(stages: tuple[StageHistory, ...], *, name: str, column: str) -> list[Trace]:
    """The raw rows, spikes kept, behind their smoothed curve."""
    parts = [
        extremes(stage.tokens_before + stage.train["tokens"], stage.train[column], points=_num_points(stage, stages=stages))
        for stage in stages
    ]
    raw = _trace(parts, kind="raw", name=f"{name}, as logged")
    return [raw, _curve(stages, kind="smooth", name=f"{name}, smoothed", pick=lambda series: smooth(series[column]))]


def _curve(stages: tuple[StageHistory, ...], *, kind: str, name: str, pick: Callable[[Series], Column]) -> Trace:
    parts = []
    for stage in stages:
        values = pick(stage.train)
        rows = sample_rows(len(values), points=_num_points(stage, stages=stages))
        parts.append((stage.tokens_before + stage.train["tokens"][rows], values[rows]))
    return _trace(parts, kind=kind, name=name)


def _markers(stages: tuple[StageHistory, ...], *, name: str, pick: Callable[[StageHistory], Column]) -> Trace:
    parts = []
    for stage in stages:
        rows = sample_rows(len(stage.validation), points=_num_points(stage, stages=stages))
        parts.append((stage.tokens_before + stage.validation["tokens"][rows], pick(stage)[rows]))
    return _trace(parts, kind="held_out", name=name)


def _num_points(stage: StageHistory, *, stages: tuple[StageHistory, ...]) -> int:
    """The same density everywhere: a short stage drawn with as many points as a long one would be a smear."""
    return max(MIN_POINTS, round(EVEN_POINTS * stage.tokens / max(1.0, sum(each.tokens for each in stages))))


def _trace(parts: Iterable[tuple[Column, Column]], *, kind: str, name: str) -> Trace:
    """One curve over the stages, broken at their borders; a row without a value is left out, not a gap."""
    x: list[float | None] = []
    y: list[float | None] = []
    for tokens, values in parts:
        known = np.isfinite(values)
        if known.any():
            # A None between two stages lifts the pen.
            x += [None] * bool(x) + [_round(value) for value in tokens[known]]
            y += [None] * bool(y) + [_round(value, digits=5) for value in values[known]]
    return {"name": name, "kind": kind, "x": x, "y": y}


def _round(value: float | None, *, digits: int = 7) -> float | None:
    """Significant digits, which keep the page small: a pixel shows fewer."""
    return None if value is None else float(f"{value:.{digits}g}")


def sample_rows(size: int, *, points: int) -> NDArray[np.intp]:
    """Row numbers to draw: all of a short series, else evenly spaced ones and geometrically spaced early ones, ends kept."""
    if size <= points:
        return np.arange(size)
    even = np.linspace(0, size - 1, points)
    early = np.geomspace(1, size, EARLY_POINTS) - 1
    return np.unique(np.concatenate([even, early]).round().astype(np.intp))


def smooth(values: Column) -> Column:
    """Centred mean of neighbouring rows, passing over those without a value. Towards the beginning the window shrinks and stays
    symmetric, so that a steep start is not flattened; towards the end it loses only what is not there yet, so that the last
    row does not stand alone."""
    size = len(values)
    index = np.arange(size)
    left = np.minimum(int(max(size * SMOOTHING, MIN_SMOOTHED_ROWS) / 2), index)
    right = np.minimum(left, size - 1 - index)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    total, count = sums[index + right + 1] - sums[index - left], counts[index + right + 1] - counts[index - left]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


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
