"""Differences between groups of runs and how sure they are: Student's t intervals, paired by seed where seeds match.

Seeds stand for everything that another seed would change: initial weights and the order of the data. The two groups of a pair
that share seeds read the same order, so that much of that noise cancels in their difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
# Losses this near are equal: rounding of the files.
ROUNDING = 1e-12

Values = Mapping[int, float]  # mean loss by seed


@dataclass(frozen=True)
class Difference:
    """How far a group lies above the best one, in nats per token. `low`, `high`: the interval; None where the noise between
    seeds is not known. `method` says how it was found."""

    label: str
    mean: float
    low: float | None
    high: float | None
    method: str

    @property
    def is_known(self) -> bool:
        return self.low is not None

    @property
    def is_tie(self) -> bool:
        """The interval holds 0; of losses whose noise is not known, only equal ones tie."""
        return abs(self.mean) <= ROUNDING if self.low is None else self.low <= 0.0


@dataclass(frozen=True)
class Verdict:
    """`kind`: winner, tie, unknown (some noise is not known) or alone (one group)."""

    kind: str
    best: str
    ties: tuple[str, ...]
    text: str
    differences: tuple[Difference, ...]


def judge(groups: Mapping[str, Values]) -> Verdict:
    """Which group has the lowest mean. The intervals hold together at LEVEL: Bonferroni over all pairs of groups, as the best
    one was picked after looking."""
    ranked = sorted(groups, key=lambda label: mean_of(groups[label]))
    best, others = ranked[0], ranked[1:]
    if not others:
        return Verdict("alone", best, (), f"All runs are of one config, {best}: there is nothing to compare it with.", ())
    level = 1.0 - (1.0 - LEVEL) / math.comb(len(groups), 2)
    found = tuple(difference(label, best, groups=groups, level=level) for label in others)
    ties = tuple(each.label for each in found if each.is_tie)
    kind = "tie" if ties else "winner" if all(each.is_known for each in found) else "unknown"
    return Verdict(kind, best, ties, describe(kind, best=best, found=found, num_groups=len(groups)), found)


def mean_of(values: Values) -> float:
    return sum(values.values()) / len(values)


def spread_of(values: Values) -> float | None:
    """Standard deviation between seeds; None of one seed."""
    return float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else None


def difference(label: str, best: str, *, groups: Mapping[str, Values], level: float) -> Difference:
    """Of `label` to `best`: over the seeds that all groups have where there are two, else over those of the two groups, else by
    the spread of each (Welch)."""
    common = set.intersection(*(set(values) for values in groups.values()))
    here, there = groups[label], groups[best]
    own = sorted(set(here) & set(there))
    mean = mean_of(here) - mean_of(there)
    if len(common) > 1:
        return _paired(label, best, groups=groups, seeds=sorted(common), level=level)
    if len(own) > 1:
        return _paired(label, best, groups={label: here, best: there}, seeds=own, level=level)
    if len(here) > 1 and len(there) > 1:
        return _welch(label, here, there, level=level)
    return Difference(label, mean, None, None, "one seed: the noise is not known")


def _paired(label: str, best: str, *, groups: Mapping[str, Values], seeds: Sequence[int], level: float) -> Difference:
    """A two-way layout, groups by seeds: what is left of a loss after the mean of its group and of its seed is noise, alike in
    all groups, with (G - 1)(S - 1) degrees of freedom. Of two groups it is the paired t test."""
    losses = np.array([[values[seed] for seed in seeds] for values in groups.values()])  # [G, S]
    rest = losses - losses.mean(axis=1, keepdims=True) - losses.mean(axis=0, keepdims=True) + losses.mean()
    freedom = (losses.shape[0] - 1) * (losses.shape[1] - 1)
    error = math.sqrt(float((rest**2).sum()) / freedom * 2.0 / len(seeds))
    mean = float(np.mean([groups[label][seed] - groups[best][seed] for seed in seeds]))
    half = t_quantile(level, freedom=freedom) * error
    pooled = f", noise pooled over {len(groups)} groups" if len(groups) > 2 else ""
    return Difference(label, mean, mean - half, mean + half, f"t, paired by {len(seeds)} seeds{pooled}")


def _welch(label: str, here: Values, there: Values, *, level: float) -> Difference:
    """No seeds in common: variances add, degrees of freedom by Welch and Satterthwaite."""
    parts = [float(np.var(list(values.values()), ddof=1)) / len(values) for values in (here, there)]
    error, mean = sum(parts), mean_of(here) - mean_of(there)
    weights = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (here, there), strict=True))
    half = t_quantile(level, freedom=error**2 / weights) * math.sqrt(error) if weights else 0.0
    return Difference(label, mean, mean - half, mean + half, f"t, Welch, {len(here)} and {len(there)} seeds, none paired")


def t_quantile(level: float, *, freedom: float) -> float:
    """t with P(|T| < t) = level. With t = sqrt(v) tan(a) the density becomes cos(a)^(v - 1), which is summed up."""
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    middles = (angles[1:] + angles[:-1]) / 2
    mass = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (freedom - 1.0))])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, mass / mass[-1], angles)))


def describe(kind: str, *, best: str, found: Sequence[Difference], num_groups: int) -> str:
    """The verdict in a sentence or two."""
    nearest = next((each for each in found if each.is_tie), found[0])
    jointly = "" if num_groups == 2 else f", holding jointly over all pairs of {num_groups} groups"
    if kind == "unknown":
        lonely = "" if any(each.is_known for each in found) else "Groups have one seed each: "
        why = f"{lonely or 'Some groups have one seed: '}what another seed would change is not known, so this proves nothing."
        return f"{best} is lowest, {nearest.mean:.4f} below {nearest.label}. {why}"
    if kind == "winner":
        at = min(found, key=lambda each: each.low or 0.0)
        interval = f"{LEVEL:.0%} interval {at.low:.4f} to {at.high:.4f}{jointly}; {at.method}"
        return f"{best} wins: {at.label} lies {at.mean:.4f} above it ({interval})."
    ties = [each for each in found if each.is_tie]
    names = " and ".join([best, *(each.label for each in ties)]) if len(ties) < 4 else f"{best} and {len(ties)} others"
    if not nearest.is_known:
        return f"{names} tie: their losses are equal."
    interval = f"{LEVEL:.0%} interval {nearest.low:.4f} to {nearest.high:.4f}{jointly}; {nearest.method}"
    return f"{names} tie: {best} is lowest, but {nearest.label} lies {nearest.mean:.4f} above it ({interval}), which holds 0."
