"""The comparison as one HTML file with everything in it, as the report page of a run is: compare.html, compare.css and
compare.js lie beside this module; colours and cards are those of page.css."""

import time
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from launcher.config.validate import shown
from launcher.report.compare import Comparison, Measured, Reading
from launcher.report.compare_document import describe_fit, describe_where
from launcher.report.compare_groups import differences_of
from launcher.report.compare_history import Column
from launcher.report.compare_stats import Verdict, mean_of, spread_of
from launcher.report.compare_table import format_difference, format_spread, own_mean, short_paths
from launcher.report.compare_tasks import caution, cell, task_scores
from launcher.report.figures import sample_rows
from launcher.report.format import format_count, format_number, format_percent
from launcher.report.mixture_fit import MixtureFit, Proposal
from launcher.report.page import _plotly_base64, _script_json
from launcher.rundir.records import write_atomic

LOSS_DIGITS = 4
CURVE_POINTS = 150
NUM_COLOURS = 8
KINDS = {"winner": "one winner", "tie": "a tie", "unknown": "noise not known", "alone": "one config"}


def write_page(path: Path, comparison: Comparison) -> None:
    """ReportError without plotly."""
    page = render_page(comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page)


def render_page(comparison: Comparison) -> str:
    verdict = comparison.verdict
    return Template(_asset("compare.html")).substitute(
        title=escape(f"{len(comparison.groups)} configs compared"),
        kind=verdict.kind,
        state=KINDS[verdict.kind],
        subtitle=escape(describe_where(comparison)),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        css=_asset("page.css") + _asset("compare.css"),
        js=_asset("compare.js"),
        plotly=_plotly_base64(),
        figures=_script_json(figures(comparison)),
        cards=cards(comparison),
        verdict=escape(verdict.text),
        sources=escape(", ".join(comparison.sources)),
        losses=losses_table(comparison.groups, verdict=verdict),
        flops=flops_section(comparison) + tasks_section(comparison),
        differences=differences_table(comparison),
        fit=fit_section(comparison.fit, best=comparison.groups[0]),
        notes="".join(f"<p>{escape(line)}</p>" for line in comparison.notes) or '<p class="empty">None.</p>',
        runs=runs_table(comparison.groups),
        chart_height=100 + (34 if len(comparison.groups) <= NUM_COLOURS else 24) * len(comparison.groups),
        source_height=120 + 40 * len(comparison.sources),
    )


def tasks_section(comparison: Comparison) -> str:
    """Empty where no export was scored."""
    found, labels = task_scores(comparison.groups, stage=comparison.stage), [each.label for each in comparison.groups]
    if not found:
        return ""
    rows = [(escape(name), *(cell(row, label) for label in labels), escape(told)) for (name, told), row in found.items()]
    heads, told = ("task", *(f"#{label}" for label in labels), ""), caution(found)
    lead = "As `phidias eval` scored the exports" + (f"; {told}." if told else ".")
    return f'<section><h2>Tasks</h2><p class="lead">{escape(lead)}</p>{_table(heads, rows=rows)}</section>'


def _asset(name: str) -> str:
    return (files("launcher.report") / name).read_text(encoding="utf-8")


def _table(columns: Iterable[str], *, rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already. A column named with a leading '#' holds numbers."""
    names = list(columns)
    kinds = [' class="number"' if name.startswith("#") else "" for name in names]
    heads = "".join(f"<th{kind}>{escape(name.lstrip('#'))}</th>" for kind, name in zip(kinds, names, strict=True))
    bodies = ["".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows]
    body = "".join(f"<tr>{cells}</tr>" for cells in bodies)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _card(label: str, *, value: str, note: str) -> str:
    parts = (("label", label), ("value", value), ("note", note))
    return f'<div class="card">{"".join(f"<div class={kind!r}>{escape(text)}</div>" for kind, text in parts)}</div>'


def cards(comparison: Comparison) -> str:
    best, fit, verdict = comparison.groups[0], comparison.fit, comparison.verdict
    seeds = sorted({len(each.shared) for each in comparison.groups})
    told = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else "1 seed" if seeds == [1] else f"{seeds[0]} seeds"
    runs = sum(len(each.readings) for each in comparison.groups)
    second = verdict.differences[0] if verdict.differences else None
    above = (second.mean, f"{second.label}: {format_difference(second)}") if second else (None, "nothing to compare with")
    proposed: tuple[float | None, str] = (None, "no model was fitted, or none held")
    if not isinstance(fit, str) and fit.proposal:
        proposed = fit.proposal.predicted, f"± {fit.error:.4f} by leave-one-out"
    return "".join(
        (
            _card("Lowest shared mean", value=format_number(mean_of(best.shared), digits=LOSS_DIGITS), note=best.label),
            _card("The next lies above it by", value=format_number(above[0], digits=LOSS_DIGITS), note=above[1]),
            _card("Runs", value=str(runs), note=f"{len(comparison.groups)} configs, {told} each"),
            _card("Predicted of the proposal", value=format_number(proposed[0], digits=LOSS_DIGITS), note=proposed[1]),
        )
    )


def losses_table(groups: Sequence[Measured], *, verdict: Verdict, tokens: bool = False) -> str:
    sources = groups[0].losses()
    extra = ["#tokens"] if tokens else []
    columns = ("config", "#seeds", *extra, "#shared mean", "#above the best", *(f"#{name}" for name in sources), "#own mean")
    found = {each.label: each for each in verdict.differences}
    rows = []
    for each in groups:
        mean = format_spread(mean_of(each.shared), spread=spread_of(each.shared))
        read = [format_count(each.readings[0].tokens)] if tokens else []
        losses = [format_number(value, digits=LOSS_DIGITS) for value in each.losses().values()]
        above = format_difference(found.get(each.label)) or "the best"
        rows.append(
            (escape(each.label), str(len(each.shared)), *read, f"<strong>{mean}</strong>", above, *losses, own_mean(each))
        )
    return _table(columns, rows=rows)


def flops_section(comparison: Comparison) -> str:
    if comparison.flops is None or comparison.flops_verdict is None:
        return ""
    table = losses_table(comparison.at_flops, verdict=comparison.flops_verdict, tokens=True)
    lead = f"{comparison.flops:.3g} FLOPs of training, causal, as the planner counts them. {comparison.flops_verdict.text}"
    return f'<section><h2>At equal FLOPs</h2><p class="lead">{escape(lead)}</p>{table}</section>'


def differences_table(comparison: Comparison) -> str:
    found = differences_of([each.group for each in comparison.groups])
    prefix, names = short_paths(list(found)) if found else ("", [])
    rows = [
        [escape(each.label), *(escape(shown(row[each.label]).strip("'")) for row in found.values())]
        for each in comparison.groups
    ]
    lead = f"All paths below begin with {prefix}" if prefix else "Seeds, names and places apart."
    return f'<p class="lead">{escape(lead)}</p>' + _table(["config", *(f"#{name}" for name in names)], rows=rows)


def fit_section(fit: MixtureFit | str, *, best: Measured) -> str:
    text = f'<p class="lead">{escape(describe_fit(fit))}</p>'
    if isinstance(fit, str):
        return text
    rows = [(escape(name), format_number(error, digits=LOSS_DIGITS)) for name, error in fit.errors.items()]
    rows.append(("the mean of the others", format_number(fit.baseline, digits=LOSS_DIGITS)))
    errors = _table(("model", "#leave-one-out error"), rows=rows)
    chart = '<div class="chart" id="chart-fit" role="img" aria-label="Predicted and measured loss of mixtures left out"></div>'
    figure = f"<figure><figcaption>Each mixture, predicted without it</figcaption>{chart}</figure>"
    shares = shares_table(fit.proposal, best=best) if fit.proposal else ""
    return f'{text}<div class="pair">{figure}<div>{shares}{errors}</div></div>'


def shares_table(proposal: Proposal, *, best: Measured) -> str:
    read = best.group.shares or {}
    rows = [
        (escape(name), f"<strong>{format_percent(share)}</strong>", format_percent(read.get(name, 0.0)),
         " to ".join(format_percent(value) for value in proposal.box[name]))
        for name, share in proposal.shares.items()
    ]  # fmt: skip
    return _table(("source", "#proposed", f"#{best.label}", "#tried"), rows=rows)


def runs_table(groups: Sequence[Measured]) -> str:
    rows = [
        (
            escape(reading.curve.name),
            escape(each.label),
            str(reading.curve.seed),
            format_number(reading.shared, digits=LOSS_DIGITS),
            format_count(reading.curve.reached),
            format_percent(reading.curve.reached / reading.curve.planned, digits=0),
        )
        for each in groups
        for reading in each.readings
    ]
    return _table(("run", "config", "#seed", "#shared mean", "#validated tokens", "#of the horizon"), rows=rows)


def figures(comparison: Comparison) -> dict[str, Any]:
    """Everything compare.js draws; groups from the lowest loss up."""
    found = {each.label: each for each in comparison.verdict.differences}
    best = comparison.groups[0].losses()
    fit = comparison.fit
    return {
        "tokens": comparison.tokens,
        "groups": [each.label for each in comparison.groups],
        "curves": curves(comparison.groups),
        "above": [
            {"mean": one.mean if one else 0.0, "low": one.low if one else None, "high": one.high if one else None}
            for one in (found.get(each.label) for each in comparison.groups)
        ],
        "sources": list(comparison.sources),
        "by_source": [[each.losses()[name] - best[name] for name in comparison.sources] for each in comparison.groups],
        "fit": None if isinstance(fit, str) else {
            "labels": list(fit.observed), "observed": list(fit.observed.values()),
            "predicted": list(fit.left_out.values()), "error": fit.error,
        },
    }  # fmt: skip


def curves(groups: Sequence[Measured]) -> list[dict[str, Any]]:
    """The shared mean of each run over tokens, where all sources were validated; `above`: less that of the best group, where
    all its runs were validated around."""
    best = [shared_curve(reading) for reading in groups[0].readings]
    found = []
    for index, each in enumerate(groups):
        for reading in each.readings:
            x, y = shared_curve(reading)
            rows = sample_rows(len(x), points=CURVE_POINTS)
            x, y = x[rows], y[rows]
            level = np.mean([np.interp(x, *curve, left=np.nan, right=np.nan) for curve in best], axis=0)
            values = {"x": x, "y": y, "above": y - level}
            found.append({"group": index, "name": reading.curve.name} | {key: numbers(row) for key, row in values.items()})
    return found


def shared_curve(reading: Reading) -> tuple[Column, Column]:
    mean = np.mean([reading.curve.losses[name] for name in reading.losses], axis=0)
    known = np.isfinite(mean)
    return reading.curve.tokens[known], mean[known]


def numbers(values: Column) -> list[float | None]:
    """For JSON: null where there is none."""
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values]
