"""Held-out loss as a function of the shares of sources, fitted to runs, and the mixture it calls best.

Two kinds of model, of which leave-one-out cross-validation over mixtures picks one:

- the data mixing law of Ye et al. 2024 (arXiv 2403.16952), for each held-out source i: L_i = c_i + k_i exp(sum_j t_ij r_j);
- regressions on the shares as in RegMix, Liu et al. 2024 (arXiv 2407.01492), here by ridge, of the shares and of their products
  (its gradient-boosted trees want hundreds of runs).

Neither is trusted beyond the box of the shares that were tried.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# Mixtures that a fit needs: so many for each source whose share differs, and so many more than those sources.
RUNS_PER_SOURCE, MORE_RUNS = 2, 3
LEAST_DIFFERENCE = 1e-3  # of a share
MAX_FOLDS = 64  # more mixtures are left out several at a time
# The law's floor c lies below the lowest loss by so many times their range; far below, the exponential is a straight line.
FLOORS = np.geomspace(0.01, 100.0, 60)
RIDGE = 1e-9
PENALTIES = np.geomspace(1e-6, 1e2, 9)
FIRST_STEP, LAST_STEP = 0.08, 1e-4
STARTS = 4
DIGITS = 4


class Model(Protocol):
    def fit(self, shares: Matrix, losses: Matrix, /) -> Any: ...

    def predict(self, shares: Matrix, /) -> Any: ...


class MixingLaw:
    """L_i = c_i + exp(sum_j t_ij r_j); k_i is in the t_ij, since shares sum to a constant. Least squares: for each floor c of a
    grid, then of a finer one around the best, log(L - c) is linear in the shares; weights L - c make its errors those of L."""

    def fit(self, shares: Matrix, losses: Matrix, /) -> "MixingLaw":
        """shares [N, M], losses [N, V]."""
        fitted = [self._fit_one(shares, column) for column in losses.T]
        self.floors = np.array([floor for floor, _ in fitted])  # [V]
        self.slopes = np.stack([slopes for _, slopes in fitted], axis=1)  # [M, V]
        return self

    def predict(self, shares: Matrix, /) -> Matrix:
        """[N, M] -> [N, V]"""
        return self.floors + np.exp(np.clip(shares @ self.slopes, -700.0, 50.0))

    def _fit_one(self, shares: Matrix, losses: Matrix) -> tuple[float, Matrix]:
        low, size = float(losses.min()), max(float(np.ptp(losses)), 1e-6)
        depth, _, _ = self._best(shares, losses, low - FLOORS * size)
        near = FLOORS[max(0, depth - 1)], FLOORS[min(len(FLOORS) - 1, depth + 1)]
        _, floor, slopes = self._best(shares, losses, low - np.geomspace(*near, 40) * size)
        return floor, slopes

    def _best(self, shares: Matrix, losses: Matrix, floors: Matrix) -> tuple[int, float, Matrix]:
        """The best of the floors [K]: its place, itself, and its slopes [M]."""
        above = losses[None] - floors[:, None]  # [K, N]
        weights = above**2
        normal = np.einsum("kn,ni,nj->kij", weights, shares, shares)
        scale = np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(shares.shape[1])
        right = np.einsum("kn,ni,kn->ki", weights, shares, np.log(above))
        slopes = np.linalg.solve(normal + RIDGE * scale, right[..., None])[..., 0]  # [K, M]
        errors = ((np.exp(np.clip(slopes @ shares.T, -700.0, 50.0)) - above) ** 2).sum(axis=1)
        place = int(np.argmin(errors))
        return place, float(floors[place]), slopes[place]


def regression(degree: int) -> Model:
    """Ridge on products of up to `degree` shares, its penalty by cross-validation. ImportError without scikit-learn."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    model: Model = make_pipeline(PolynomialFeatures(degree, include_bias=False), StandardScaler(), RidgeCV(PENALTIES))
    return model


MODELS: dict[str, Callable[[], Model]] = {
    "mixing law": MixingLaw,
    "linear ridge": lambda: regression(1),
    "quadratic ridge": lambda: regression(2),
}


@dataclass(frozen=True)
class Proposal:
    """The mixture of lowest predicted loss within `box`: shares of all sources, which sum to 1. `distance` is half the summed
    difference of shares to the nearest mixture that was tried, `nearest`."""

    shares: dict[str, float]
    box: dict[str, tuple[float, float]]
    predicted: float
    by_source: dict[str, float]
    nearest: str
    distance: float


@dataclass(frozen=True)
class MixtureFit:
    """Errors are root mean squares over mixtures left out, in nats per token of the shared mean; `baseline` is that of the mean
    of the others. `left_out`: what was predicted of each mixture without it. `rank`: Spearman's correlation of those with the
    losses. `proposal` is None where the model predicts no better than the mean."""

    sources: tuple[str, ...]
    model: str
    errors: dict[str, float]
    baseline: float
    rank: float
    left_out: dict[str, float]
    observed: dict[str, float]
    proposal: Proposal | None

    @property
    def error(self) -> float:
        return self.errors[self.model]


def fit_mixtures(shares: Mapping[str, Mapping[str, float]], *, losses: Mapping[str, Mapping[str, float]]) -> MixtureFit | str:
    """`shares` and held-out `losses` of each mixture, by source; what is minimised is the mean of the losses. A sentence where
    there are too few mixtures. ImportError without scikit-learn."""
    labels = list(shares)
    names = list(dict.fromkeys(name for row in shares.values() for name in row))
    every = np.array([[shares[label].get(name, 0.0) for name in names] for label in labels])
    varies = np.ptp(every, axis=0) > LEAST_DIFFERENCE
    if short := too_few(len(np.unique(every.round(3), axis=0)), num_sources=int(varies.sum())):
        return short
    x, y = every[:, varies], np.array([list(losses[label].values()) for label in labels])
    observed = y.mean(axis=1)
    left_out = {name: leave_one_out(make, x, y) for name, make in MODELS.items()}
    errors = {name: _rms(found - observed) for name, found in left_out.items()}
    model = min(errors, key=lambda name: errors[name])
    baseline = _rms((observed.sum() - observed) / (len(observed) - 1) - observed)
    proposal = None
    if errors[model] < baseline:
        fitted = MODELS[model]()
        fitted.fit(x, y)
        proposal = _propose(fitted, every, varies, names=names, labels=labels, sources=list(losses[labels[0]]), order=observed)
    return MixtureFit(
        sources=tuple(name for name, one in zip(names, varies, strict=True) if one),
        model=model,
        errors=errors,
        baseline=baseline,
        rank=_rank_correlation(left_out[model], observed),
        left_out=dict(zip(labels, left_out[model].tolist(), strict=True)),
        observed=dict(zip(labels, observed.tolist(), strict=True)),
        proposal=proposal,
    )


def too_few(num_mixtures: int, *, num_sources: int) -> str:
    """Why no model is fitted; empty where there are enough mixtures."""
    if num_sources < 2:
        return "no model is fitted: the shares of the sources do not differ"
    needed = max(RUNS_PER_SOURCE * num_sources, num_sources + MORE_RUNS)
    if num_mixtures >= needed:
        return ""
    found = f"{num_mixtures} mixtures of {num_sources} sources whose shares differ"
    rule = f"{RUNS_PER_SOURCE} for each of those sources, and {MORE_RUNS} more than sources at least"
    return f"no model is fitted: found {found}; it takes {needed} ({rule})"


def leave_one_out(make: Callable[[], Model], x: Matrix, y: Matrix) -> Matrix:
    """[N]: the mean over the held-out sources of each mixture, predicted by a model that has not seen it."""
    folds = np.arange(len(x)) % min(len(x), MAX_FOLDS)
    found = np.empty(len(x))
    for fold in np.unique(folds):
        model = make()
        model.fit(x[folds != fold], y[folds != fold])
        found[folds == fold] = model.predict(x[folds == fold]).mean(axis=1)
    return found


def _rms(errors: Matrix) -> float:
    return float(np.sqrt((errors**2).mean()))


def _rank_correlation(first: Matrix, second: Matrix) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _propose(
    model: Model, every: Matrix, varies: NDArray[np.bool_], *, names: list[str], labels: list[str], sources: list[str],
    order: Matrix,
) -> Proposal:  # fmt: skip
    """every [N, all sources]; starts at the mixtures that were measured best."""
    x = every[:, varies]
    low, high = x.min(axis=0), x.max(axis=0)

    def predict(rows: Matrix) -> Matrix:
        means: Matrix = np.asarray(model.predict(rows), dtype=np.float64).mean(axis=1)
        return means

    found = [minimise(predict, x[start], low=low, high=high) for start in np.argsort(order)[:STARTS]]
    best = min(found, key=lambda row: float(predict(row[None])[0]))
    whole = every[0].copy()
    whole[varies] = best
    shares = rounded(dict(zip(names, whole.tolist(), strict=True)))
    at = np.array(list(shares.values()))
    distances = np.abs(every - at).sum(axis=1) / 2
    losses = np.asarray(model.predict(at[varies][None]))[0]
    return Proposal(
        shares=shares,
        box={name: (float(column.min()), float(column.max())) for name, column in zip(names, every.T, strict=True)},
        predicted=float(losses.mean()),
        by_source=dict(zip(sources, losses.tolist(), strict=True)),
        nearest=labels[int(distances.argmin())],
        distance=float(distances.min()),
    )


def minimise(predict: Callable[[Matrix], Matrix], start: Matrix, *, low: Matrix, high: Matrix) -> Matrix:
    """Moves share from one source to another, the best pair at a time, by ever smaller steps: the sum stays, and low and high
    [M] are never left. Such moves make up every direction that both allow, so where none gains a smooth function is at rest."""
    here, value, step, size = start.copy(), float(predict(start[None])[0]), FIRST_STEP, len(start)
    pairs = [(giver, taker) for giver in range(size) for taker in range(size) if giver != taker]
    while step >= LAST_STEP:
        moves = np.repeat(here[None], len(pairs), axis=0)
        for row, (giver, taker) in zip(moves, pairs, strict=True):
            part = max(0.0, min(step, here[giver] - low[giver], high[taker] - here[taker]))
            row[giver] -= part
            row[taker] += part
        values = predict(moves)
        place = int(np.argmin(values))
        if values[place] < value - 1e-10:
            here, value = moves[place], float(values[place])
        else:
            step /= 2
    return here


def rounded(shares: Mapping[str, float]) -> dict[str, float]:
    """To DIGITS places and to a sum of 1: the largest share takes what rounding leaves."""
    found = {name: round(share, DIGITS) for name, share in shares.items()}
    largest = max(found, key=lambda name: found[name])
    found[largest] = round(1.0 - sum(share for name, share in found.items() if name != largest), DIGITS)
    return found


def describe_box(box: Mapping[str, Sequence[float]]) -> str:
    """The shares that were tried, of the sources that differ."""
    return ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in box.items() if high - low > LEAST_DIFFERENCE)
