"""The report's tables and cards as HTML fragments. Everything that comes from a file is escaped here."""

import time
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from launcher.config.schema import RunConfig
from launcher.report.format import (
    MISSING,
    format_bytes,
    format_cause,
    format_count,
    format_duration,
    format_number,
    format_percent,
)
from launcher.report.history import History
from launcher.report.report_plan import Measured, Plans, measure
from launcher.report.summary import SourceSummary, Summary
from launcher.rundir.goodput import MeasuredGoodput
from launcher.rundir.phases import PRODUCTIVE

# Newest events shown; a long run checkpoints thousands of times.
MAX_EVENTS = 300
# Colours in page.css; sources past them start again, dashed in the charts.
NUM_COLOURS = 8
EVENT_FIELDS = ("time", "kind", "stage")
WHERE_TIME_GOES = {
    "productive": "steps that count, without their wait for data",
    "queue": "waiting for Slurm to start a job",
    "stopped": "nobody wanted it to run",
    "start_up": "from the start of a job or stage to the first step: node checks, imports, loading",
    "restart": "from a fault or rewind to the next step in the same job",
    "hang": "ranks stood still, until it was noticed",
    "recomputed": "steps that a restart or rewind threw away",
    "checkpoint": "training stood still for a checkpoint",
    "validation": "held-out loss",
    "data_wait": "steps waited for their batches",
    "other": "between steps, steps left out, steps not logged yet, the end of ranks",
}


def table(columns: Iterable[str], *, rows: Iterable[Iterable[str]], empty: str) -> str:
    """Cells are HTML already. A column named with a leading '#' holds numbers."""
    names = list(columns)
    kinds = [' class="number"' if name.startswith("#") else "" for name in names]
    heads = [f"<th{kind}>{escape(name.lstrip('#'))}</th>" for kind, name in zip(kinds, names, strict=True)]
    bodies = ["".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows]
    if not bodies:
        return f'<p class="empty">{escape(empty)}</p>'
    body = "".join(f"<tr>{cells}</tr>" for cells in bodies)
    return f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>{body}</tbody></table></div>'


def cards(summary: Summary, *, history: History, plans: Plans) -> str:
    """The run in a few figures; those that nobody knows are left out, but for the loss."""
    trained = " + ".join(f"{stage.steps:,}" for stage in summary.stages)
    part = f" · {format_percent(summary.tokens / plans.tokens)} of the plan" if plans.tokens else ""
    found = [
        _card("Held-out loss", value=format_number(summary.held_out_loss), note=_against_entropy(summary)),
        _card("Tokens trained", value=format_count(summary.tokens), note=f"{trained or 'no'} steps{part}"),
        _card("Wall time", value=format_duration(summary.wall_s), note="launch to last row, pauses not counted"),
        _card("Tokens per second", value=format_count(summary.tokens_per_s), note="median of the last stage"),
        *_speed_cards(measure(history.stages[-1], bands=summary.bands) if history.stages else None),
        *_goodput_cards(summary.goodput),
    ]
    return "".join(found)


def _speed_cards(last: Measured | None) -> list[str]:
    found = []
    if last and last.mfu is not None:
        note = f"{format_number(last.tflops_per_gpu, digits=0)} TFLOP/s a GPU, causal FLOPs"
        found.append(_card("MFU", value=format_percent(last.mfu), note=note))
    if last and last.memory_gib is not None:
        found.append(_card("Memory", value=f"{last.memory_gib:,.1f} GiB", note="of the fullest rank, at most"))
    return found


def _goodput_cards(goodput: MeasuredGoodput | None) -> list[str]:
    if goodput is None:
        return []
    most = next((f"; most lost: {format_cause(cause)}" for cause, _ in goodput.largest), "")
    return [_card("Goodput", value=format_percent(goodput.goodput), note=f"of {format_duration(goodput.wall_s)}{most}")]


def _card(label: str, *, value: str, note: str) -> str:
    parts = (("label", label), ("value", value), ("note", note))
    inside = "".join(f'<div class="{kind}">{escape(text)}</div>' for kind, text in parts)
    return f'<div class="card">{inside}</div>'


def _against_entropy(summary: Summary) -> str:
    below = summary.below_entropy
    if below is None:
        return "unigram entropy not known"
    direction = "below" if below >= 0 else "above"
    return f"{format_percent(abs(below))} {direction} the unigram entropy, {format_number(summary.entropy)}"


def stages_table(summary: Summary, *, config: RunConfig) -> str:
    columns = ("stage", "#tokens", "#first loss", "#last loss", "#tokens/s", "#steps", "#planned tokens", "#sequence", "#batch")
    rows = []
    for stage in summary.stages:
        losses = (format_number(stage.first_loss), format_number(stage.last_loss))
        cells = (format_count(stage.tokens), *losses, format_count(stage.tokens_per_s), f"{stage.steps:,}")
        settings = config.stage(stage.name).stage if stage.name in config.stage_names else None
        planned = (settings.tokens, settings.seq_length, settings.global_batch_size) if settings else (None, None, None)
        rows.append((escape(stage.name), *cells, *map(format_count, planned)))
    return table(columns, rows=rows, empty="No step is logged yet.")


def _swatch(name: str, *, index: int) -> str:
    return f'<span class="swatch" style="--colour:var(--series-{index % NUM_COLOURS})"></span>{escape(name)}'


def time_table(summary: Summary) -> str:
    """The wall time since the first start, divided: steps, then what was lost, the largest first."""
    found = summary.goodput
    parts = [(PRODUCTIVE, found.productive_s), *found.largest] if found else []
    rows = [_time_row(cause, seconds=seconds, share=seconds / found.wall_s) for cause, seconds in parts if found]
    return table(("cause", "#hours", "#share", "", "what it is"), rows=rows, empty="No step is logged yet.")


def _time_row(cause: str, *, seconds: float, share: float) -> tuple[str, ...]:
    colour = "--good" if cause == PRODUCTIVE else "--bad"
    bar = _bar(share, colour=colour)
    return format_cause(cause), format_number(seconds / 3600, digits=2), format_percent(share), bar, WHERE_TIME_GOES[cause]


def exposure_table(summary: Summary, *, config: RunConfig) -> str:
    """Tokens read of each source against what it has: the epochs, and the cap they may not pass."""
    shares = [f"#share in {name}" for name in config.stage_names]
    rows = [
        (
            _swatch(source.name, index=index),
            format_count(source.tokens),
            format_count(source.unique_tokens),
            _epochs(source),
            "none" if source.max_epochs is None else format_number(source.max_epochs, digits=2),
            *(format_percent(source.shares.get(stage)) for stage in config.stage_names),
        )
        for index, source in enumerate(summary.sources)
    ]
    return table(("source", "#tokens read", "#unique tokens", "#epochs", "#cap", *shares), rows=rows, empty="No sources.")


def _epochs(source: SourceSummary) -> str:
    number = format_number(source.epochs, digits=2)
    return f'<strong class="over" title="over its cap">{number}</strong>' if source.is_over_cap else number


def held_out_table(summary: Summary) -> str:
    rows = [
        (
            _swatch(source.name, index=index),
            format_number(source.held_out_loss),
            format_number(source.entropy),
            format_number(source.ratio),
            _ratio_bar(source, index=index),
        )
        for index, source in enumerate(summary.sources)
    ]
    columns = ("source", "#held-out loss", "#unigram entropy", "#ratio", "loss as part of entropy")
    return table(columns, rows=rows, empty="No sources.")


def _ratio_bar(source: SourceSummary, *, index: int) -> str:
    if source.ratio is None:
        return MISSING
    return _bar(source.ratio, colour=f"--series-{index % NUM_COLOURS}")


def _bar(part: float, *, colour: str) -> str:
    width = f"{100 * min(part, 1.0):.1f}%"
    return f'<span class="bar"><span style="width:{width};--colour:var({colour})"></span></span>'


def events_table(events: tuple[dict[str, Any], ...]) -> str:
    """Newest first."""
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"])),
            f'<span class="kind {escape(event["kind"])}">{escape(event["kind"].replace("_", " "))}</span>',
            escape(str(event.get("stage") or MISSING)),
            escape(describe_event(event)),
        )
        for event in reversed(events[-MAX_EVENTS:])
    ]
    shown = table(("time (UTC)", "event", "stage", "what"), rows=rows, empty="No events.")
    hidden = len(events) - len(rows)
    return shown + (f'<p class="empty">{hidden:,} earlier events are in events.jsonl.</p>' if hidden > 0 else "")


def describe_event(event: Mapping[str, Any]) -> str:
    """The fields of an event as words, whatever its kind; known units are spelled out."""
    formats: dict[str, Callable[[Any], str]] = {
        "samples": lambda value: f"{value:,} samples",
        "step": lambda value: f"step {value:,}",
        "tokens": lambda value: f"{format_count(value)} tokens",
        "seconds": lambda value: f"{value:.2f} s",
        "finished": lambda value: "the end" if value else "",
        "validation_loss": lambda value: f"held-out loss {value:.3f}",
        "stall_s": lambda value: f"stood still {value:.2f} s",
        "bytes": format_bytes,
        "error": str,
        "exit": str,
        "path": str,
        "reason": str,
        "command": " ".join,
        "changes": lambda value: ", ".join(f"{name}: {before} → {after}" for name, (before, after) in value.items()),
        "tokens_by_source": lambda value: ", ".join(f"{name} {format_count(count)}" for name, count in value.items()),
        "stages": ", ".join,
    }
    words = []
    for name, value in event.items():
        if name not in EVENT_FIELDS and value is not None:
            words.append(formats[name](value) if name in formats else f"{name} {value}")
    return " · ".join(filter(None, words))


def places_list(summary: Summary) -> str:
    rows = [f"<dt>{escape(name)}</dt><dd><code>{escape(str(path))}</code></dd>" for name, path in summary.places.items()]
    return f"<dl>{''.join(rows)}</dl>"
