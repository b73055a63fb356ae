"""A comparison of runs by held-out loss.

The comparison number is the shared mean: the mean held-out loss over the sources that every run was measured on, with equal
weights. A run's own total weighs the sources by its own mixture, and would change with the mixture at equal losses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.config.errors import ConfigError, Problem
from launcher.report.compare_groups import Group, differing, group_runs, is_amount
from launcher.report.compare_runs import Curve, read_curves, refuse_incomparable, shared_sources, unfinished, value_at
from launcher.report.compare_stats import Values, Verdict, judge, mean_of
from launcher.report.mixture_fit import MixtureFit, fit_mixtures
from launcher.rundir.paths import RunDir


@dataclass(frozen=True)
class Reading:
    """One run where it is compared, at `tokens`: its losses by shared source, their mean, and its own total."""

    curve: Curve
    tokens: float
    losses: dict[str, float]
    own: float | None

    @property
    def shared(self) -> float:
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class Measured:
    """A group with a reading of each of its runs."""

    group: Group
    readings: tuple[Reading, ...]

    @property
    def label(self) -> str:
        return self.group.label

    def by_seed(self, pick: Callable[[Reading], float]) -> Values:
        """The mean by seed: a run repeated with one seed is not another seed."""
        seeds: dict[int, list[float]] = {}
        for reading in self.readings:
            seeds.setdefault(reading.curve.seed, []).append(pick(reading))
        return {seed: float(np.mean(values)) for seed, values in seeds.items()}

    @property
    def shared(self) -> Values:
        return self.by_seed(lambda reading: reading.shared)

    def of_source(self, name: str) -> Values:
        return self.by_seed(lambda reading: reading.losses[name])

    def losses(self) -> dict[str, float]:
        return {name: mean_of(self.of_source(name)) for name in self.readings[0].losses}


@dataclass(frozen=True)
class Comparison:
    """Groups from the lowest shared mean up, at equal tokens; at equal FLOPs besides where models differ. `fit` is a sentence
    where there is none."""

    stage: str
    tokens: float
    sources: tuple[str, ...]
    groups: tuple[Measured, ...]
    verdict: Verdict
    flops: float | None
    at_flops: tuple[Measured, ...]
    flops_verdict: Verdict | None
    fit: MixtureFit | str
    notes: tuple[str, ...]


def compare_runs(runs: Sequence[RunDir], *, stage: str | None = None, at_tokens: float | None = None) -> Comparison:
    """ConfigError: runs that cannot be compared, or not at these tokens."""
    curves = read_curves(runs, stage=stage)
    refuse_incomparable(curves)
    sources, left_out = shared_sources(curves)
    tokens = min(curve.reached for curve in curves) if at_tokens is None else at_tokens
    refuse_outside(curves, tokens=tokens, sources=sources)
    groups = group_runs(curves, tokens=tokens)
    measured = ranked(measure(groups, sources=sources, place=lambda curve: tokens))
    flops, at_flops = equal_flops(groups, sources=sources)
    return Comparison(
        stage=curves[0].stage,
        tokens=tokens,
        sources=tuple(sources),
        groups=measured,
        verdict=judge({each.label: each.shared for each in measured}),
        flops=flops,
        at_flops=at_flops,
        flops_verdict=judge({each.label: each.shared for each in at_flops}) if at_flops else None,
        fit=fit_groups(measured, stage=curves[0].stage),
        notes=(*left_out, *unfinished(curves), *cautions(groups, flops=flops, at_flops=at_flops)),
    )


def refuse_outside(curves: Sequence[Curve], *, tokens: float, sources: Sequence[str]) -> None:
    problems = []
    for curve in curves:
        if any(value_at(curve, curve.losses[name], tokens=tokens) is None for name in sources):
            validated = f"{curve.name} was validated from {curve.tokens[0]:,.0f} to {curve.reached:,.0f} tokens"
            low = max(other.tokens[0] for other in curves)
            high = min(other.reached for other in curves)
            fix = f"at_tokens={low:.0f} to {high:.0f}" if low <= high else "leave out the runs that are far behind"
            problems.append(Problem("at_tokens", f"{tokens:,.0f}", f"{validated}; nothing is extrapolated", fix))
    if problems:
        raise ConfigError(*problems)


def read_at(curve: Curve, *, tokens: float, sources: Sequence[str]) -> Reading | None:
    values = {name: value_at(curve, curve.losses[name], tokens=tokens) for name in sources}
    losses = {name: value for name, value in values.items() if value is not None}
    return Reading(curve, tokens, losses, value_at(curve, curve.own, tokens=tokens)) if len(losses) == len(sources) else None


def measure(groups: Sequence[Group], *, sources: Sequence[str], place: Callable[[Curve], float]) -> list[Measured]:
    """The groups whose runs were all validated around the `place` in tokens."""
    found = []
    for group in groups:
        readings = [read_at(curve, tokens=place(curve), sources=sources) for curve in group.curves]
        if whole := [reading for reading in readings if reading is not None]:
            found += [Measured(group, tuple(whole))] if len(whole) == len(readings) else []
    return found


def ranked(measured: Sequence[Measured]) -> tuple[Measured, ...]:
    return tuple(sorted(measured, key=lambda each: mean_of(each.shared)))


def equal_flops(groups: Sequence[Group], *, sources: Sequence[str]) -> tuple[float | None, tuple[Measured, ...]]:
    """The most FLOPs that all runs reached and the groups there; nothing where a token costs the same in all of them."""
    curves = [curve for group in groups for curve in group.curves]
    if len({(curve.flops_per_token, curve.flops_before) for curve in curves}) == 1:
        return None, ()
    flops = min(curve.flops_at(curve.reached) for curve in curves)
    # The run that sets the figure is read at its last validation, not a rounding error behind it.
    measured = measure(groups, sources=sources, place=lambda curve: min(curve.tokens_at(flops), curve.reached))
    return flops, ranked(measured)


def cautions(groups: Sequence[Group], *, flops: float | None, at_flops: Sequence[Measured]) -> list[str]:
    """What a reader of the numbers should know of the runs."""
    found = []
    curves = [curve for group in groups for curve in group.curves]
    stages = [curve.config.stage(curve.stage).stage for curve in curves]
    if len({settings.tokens for settings in stages}) > 1:
        found.append("horizons differ: at equal tokens the learning rate of the shorter runs has decayed further")
    if len({settings.reset_attention_mask for settings in stages}) > 1:
        found.append("attention across documents differs, and with it what held-out tokens see before them")
    if len({curve.config.run.data_dir for curve in curves}) > 1:
        found.append("runs read different data_dirs; that their held-out text is the same is not recorded")
    missing = [group.label for group in groups if group.label not in {each.label for each in at_flops}]
    if flops is not None and missing:
        found.append(f"at equal FLOPs ({flops:.3g}) {', '.join(missing)} had not been validated yet")
    return found


def fit_groups(measured: Sequence[Measured], *, stage: str) -> MixtureFit | str:
    """A model of the shared mean over mixtures, or why there is none."""
    others = [
        ".".join(path) for path, _ in differing([each.group.tree for each in measured]) if not is_amount(path, stage=stage)
    ]
    if others:
        return f"no model is fitted: groups differ in {others[0]} too, and it knows mixtures only"
    shares = {each.label: each.group.shares for each in measured}
    if unknown := [label for label, row in shares.items() if row is None]:
        return f"no model is fitted: the shares that {unknown[0]} read are not recorded"
    known = {label: row for label, row in shares.items() if row is not None}
    try:
        return fit_mixtures(known, losses={each.label: each.losses() for each in measured})
    except ImportError:
        return "no model is fitted: it needs scikit-learn. Fix: pip install 'phidias[compare]'"
