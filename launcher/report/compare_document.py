"""A comparison as plain data, which `phidias compare out=json` prints, and its findings in words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launcher.report.compare import Comparison, Measured, Reading
from launcher.report.compare_groups import differences_of
from launcher.report.compare_runs import CONVENTION
from launcher.report.compare_stats import LEVEL, Verdict, mean_of, spread_of
from launcher.report.compare_tasks import score_document, task_scores
from launcher.report.format import format_count
from launcher.report.mixture_fit import MixtureFit, Proposal, describe_box

SHARED_MEAN = "mean of the held-out losses of {sources}, equal weights; nats per token"
READ = "linear interpolation between validations, none outside them"
Row = dict[str, Any]


def document(comparison: Comparison) -> Row:
    """Everything, for out=json."""
    return {
        "stage": comparison.stage,
        "at_tokens": comparison.tokens,
        "measure": SHARED_MEAN.format(sources=", ".join(comparison.sources)),
        "read_by": READ,
        "sources": list(comparison.sources),
        "groups": group_rows(comparison.groups, verdict=comparison.verdict),
        "differences": differences_of([each.group for each in comparison.groups]),
        "verdict": verdict_row(comparison.verdict),
        "equal_flops": flops_row(comparison),
        "tasks": score_document(task_scores(comparison.groups, stage=comparison.stage)),
        "fit": fit_row(comparison.fit),
        "notes": list(comparison.notes),
    }


def group_rows(measured: Sequence[Measured], *, verdict: Verdict) -> list[Row]:
    found = {each.label: each for each in verdict.differences}
    return [group_row(each, difference=asdict(found[each.label]) if each.label in found else None) for each in measured]


def group_row(measured: Measured, *, difference: Mapping[str, Any] | None) -> Row:
    sources = measured.readings[0].losses
    by_source = {name: measured.of_source(name) for name in sources}
    return {
        "name": measured.label,
        "shared_mean": mean_of(measured.shared),
        "spread": spread_of(measured.shared),
        "num_seeds": len(measured.shared),
        "loss_by_source": {name: mean_of(values) for name, values in by_source.items()},
        "spread_by_source": {name: spread_of(values) for name, values in by_source.items()},
        "shares": measured.group.shares,
        "above_best": difference,
        "runs": [run_row(reading) for reading in measured.readings],
    }


def run_row(reading: Reading) -> Row:
    curve = reading.curve
    return {
        "name": curve.name,
        "seed": curve.seed,
        "tokens": reading.tokens,
        "flops": curve.flops_at(reading.tokens),
        "shared_mean": reading.shared,
        "own_mean": reading.own,
        "loss_by_source": reading.losses,
        "is_interpolated": reading.tokens not in curve.tokens,
        "reached_tokens": curve.reached,
        "planned_tokens": curve.planned,
    }


def verdict_row(verdict: Verdict) -> Row:
    return {"kind": verdict.kind, "best": verdict.best, "ties": list(verdict.ties), "level": LEVEL, "text": verdict.text}


def flops_row(comparison: Comparison) -> Row | None:
    verdict = comparison.flops_verdict
    if comparison.flops is None or verdict is None:
        return None
    groups = group_rows(comparison.at_flops, verdict=verdict)
    return {"flops": comparison.flops, "convention": CONVENTION, "groups": groups, "verdict": verdict_row(verdict)}


def fit_row(fit: MixtureFit | str) -> Row:
    """`text` says it in words; the rest is missing where no model was fitted."""
    return {"text": describe_fit(fit)} | ({} if isinstance(fit, str) else asdict(fit))


def describe_fit(fit: MixtureFit | str) -> str:
    if isinstance(fit, str):
        return fit
    errors = f"leave-one-out error {fit.error:.4f} nats (the mean of the others: {fit.baseline:.4f})"
    measured = f"{errors}, rank correlation {fit.rank:.2f}"
    if fit.proposal is not None:
        return f"{fit.model}: {measured}. {describe_proposal(fit, fit.proposal)}"
    tried = ", ".join(fit.errors)
    return f"no mixture is proposed: of {tried} the best, {fit.model}, predicts no better than the mean; {measured}"


def describe_proposal(fit: MixtureFit, found: Proposal) -> str:
    best = min(fit.observed, key=lambda label: fit.observed[label])
    gain = fit.observed[best] - found.predicted
    than = f"{abs(gain):.4f} {'below' if gain > 0 else 'above'} the best that was tried, {best} ({fit.observed[best]:.4f})"
    sure = "" if gain > fit.error else "; that is within the model's error: train both before choosing"
    near = f"the nearest mixture tried, {found.nearest}, differs in {found.distance:.1%} of the tokens"
    bound = f"It lies within the shares that were tried ({describe_box(found.box)}); {near}."
    return f"Proposed: predicted {found.predicted:.4f} ± {fit.error:.4f}, {than}{sure}. {bound}"


def describe_where(comparison: Comparison) -> str:
    """What was compared, in a line."""
    readings = [reading for each in comparison.groups for reading in each.readings]
    exact = all(reading.tokens in reading.curve.tokens for reading in readings)
    read = "validations of all runs lie there" if exact else READ
    place = f"stage {comparison.stage}, at {format_count(comparison.tokens)} tokens"
    return f"{len(readings)} runs in {len(comparison.groups)} groups, {place} ({read})"
