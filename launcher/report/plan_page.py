"""The picture of a plan, for a slide: what a run costs, one step of its pipeline, its memory, where its time goes.

One HTML file without a network; or the picture alone, as SVG, drawn here so that the base install writes it. A PNG needs
fonts and a rasterizer, which a browser has: the page has a button for each figure, and `.png` takes the Chromium that PATH has.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from launcher.plan.page import short
from launcher.report.format import MISSING, format_count, format_percent
from launcher.report.page import ReportError
from launcher.report.plan_figures import Figure, Stage, draw_memory, draw_time, draw_timeline
from launcher.rundir.records import write_atomic

WIDE, HALF, NARROW = 1026, 480, 336  # pixels of a figure: across the page, beside another, on a phone
SLIDE, MARGIN, COLUMN = 1200, 28, 24
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_TIMEOUT_S = 120


def write_plan_page(path: Path, pages: Sequence[Stage]) -> None:
    """Writes the plan document, one object a stage, as .html, .svg or .png by the path's suffix.

    ReportError on another suffix, without a stage, and on .png without a Chromium that draws it."""
    if not pages:
        raise ReportError("no stage to draw. Fix: a run with a stage")
    writers = {".html": _write_html, ".svg": _write_svg, ".png": _write_png}
    if path.suffix not in writers:
        raise ReportError(f"picture={path}: the suffix says the format. Fix: one of {', '.join(writers)}")
    writers[path.suffix](path, pages)


def _write_html(path: Path, pages: Sequence[Stage]) -> None:
    write_atomic(path, render_plan_page(pages))


def _write_svg(path: Path, pages: Sequence[Stage]) -> None:
    write_atomic(path, render_plan_picture(pages)[0])


def _write_png(path: Path, pages: Sequence[Stage]) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise ReportError(f"picture={path}: a PNG is drawn by Chromium or Chrome, and PATH has none. Fix: .svg, or .html")
    picture, height = render_plan_picture(pages)
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder) / "plan.svg").write_text(picture)
        (drawn := Path(folder) / "plan.png").unlink(missing_ok=True)
        command = [
            *(browser, "--headless", "--hide-scrollbars", "--disable-gpu", "--force-device-scale-factor=2"),
            *(("--no-sandbox",) if os.geteuid() == 0 else ()),  # Chromium's sandbox refuses root, as in a container
            *(f"--user-data-dir={folder}/profile", f"--window-size={SLIDE},{height}", f"--screenshot={drawn}", source.as_uri()),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ReportError(f"{browser} drew no PNG within {BROWSER_TIMEOUT_S} s. Fix: picture=plan.svg") from error
        if not drawn.exists():
            raise ReportError(f"{browser} drew no PNG: {done.stderr.strip()[-300:]}. Fix: picture=plan.svg")
        shutil.copyfile(drawn, path)


# ---- the page


def render_plan_page(pages: Sequence[Stage]) -> str:
    """The page as text, 30 KB to 400 KB."""
    return Template(_asset("plan_page.html")).substitute(
        title=escape(str(pages[0].get("run", "plan"))),
        subtitle=escape(describe_plan(pages[0])),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        css=_asset("page.css") + _asset("plan_page.css"),
        js=_asset("plan_page.js"),
        stages="\n".join(_stage_html(stage) for stage in pages),
    )


def describe_plan(stage: Stage) -> str:
    """Model and cluster in a line."""
    return f"{stage['model']}, {short(stage['num_params'])} parameters · {stage['cluster']}, {stage['world_size']:,} ranks"


def describe_stage(stage: Stage) -> str:
    """Layout, batch and precision in a line."""
    layout = " ".join(f"{name}{stage['layout'][name]}" for name in ("tp", "pp", "vpp", "cp", "dp"))
    if stage["layout"].get("recompute", "none") != "none":
        layout += f" · {stage['layout']['recompute']} recomputation"
    batch = f"{stage['num_microbatches']} microbatches of {stage['micro_batch_size']}"
    size = f"{stage['global_batch_size']:,} x {stage['seq_length']:,} tokens a step"
    return f"{layout} · {batch} · {size} · {stage['precision']}"


def headline(stage: Stage) -> list[tuple[str, str, str]]:
    """Label, figure and note of what a stage comes to; a figure that nobody predicts is a dash."""
    tflops, memory = stage.get("model_tflops_per_gpu") or {}, stage.get("memory_gib") or {}
    cost, peak, capacity = stage.get("cost_usd"), memory.get("peak"), memory.get("capacity")
    others = ", ".join(f"{tflops[name]:,.0f} {name}" for name in ("full", "sixn") if name in tflops)
    return [
        ("Throughput", _figure(stage.get("tokens_per_s_per_gpu"), "{:,.0f}"), "tokens per second and GPU"),
        ("Model FLOPs", _figure(tflops.get("causal"), "{:,.0f} TFLOP/s"), f"a GPU, causal; {others}" if others else "a GPU"),
        ("MFU", format_percent(stage.get("mfu")), "of the GPU's peak, causal FLOPs"),
        (
            "Duration",
            _figure(stage.get("days"), "{:,.1f} days"),
            f"{short(stage['tokens'])} tokens, {stage['num_steps']:,} steps",
        ),
        (
            "Cost",
            _figure(stage.get("gpu_hours"), "{:,.0f} GPU hours"),
            f"${format_count(cost)}" if cost is not None else "no price of a GPU hour given",
        ),
        (
            "Memory",
            _figure(peak, "{:.1f} GiB"),
            f"of {capacity:.1f} GiB, {peak / capacity:.0%}" if peak and capacity else "of the fullest rank",
        ),
    ]


def is_predicted(stage: Stage) -> bool:
    """Whether the plan knows the time of a step: a cluster of CPUs has none."""
    return stage.get("step_time_s") is not None and stage.get("pipeline") is not None


def _figure(value: float | None, form: str) -> str:
    return MISSING if value is None else form.format(value)


def _stage_html(stage: Stage) -> str:
    name = escape(stage["stage"])
    cards = "".join(_card(*row) for row in headline(stage))
    refusals = "".join(f"<li>{escape(words)}</li>" for words in stage.get("refusals") or ())
    return (
        f'<h2 class="stage-name">{name}</h2><p class="lead">{escape(describe_stage(stage))}</p>'
        + (f'<ul class="refusals">{refusals}</ul>' if refusals else "")
        + f'<section class="cards">{cards}</section>{_figures_html(stage)}'
    )


def _card(label: str, value: str, note: str) -> str:
    parts = (("label", label), ("value", value), ("note", note))
    inner = "".join(f'<div class="{kind}">{escape(words)}</div>' for kind, words in parts)
    return f'<div class="card">{inner}</div>'


def _figures_html(stage: Stage) -> str:
    name, boxes = stage["stage"], []
    if is_predicted(stage):
        figures = [draw_timeline(stage, width=width) for width in (WIDE, NARROW)]
        step = _section(step_title(stage), note=STEP_NOTE, figures=figures, name=f"{name}-step", css_class="step")
    else:
        step = f'<section class="step"><p class="empty">{NO_PREDICTION}</p></section>'
    if has_memory(stage):
        figures = [draw_memory(stage, width=width) for width in (HALF, NARROW)]
        boxes.append(_section(MEMORY_TITLE, note=MEMORY_NOTE, figures=figures, name=f"{name}-memory"))
    if is_predicted(stage):
        figures = [draw_time(stage, width=width) for width in (HALF, NARROW)]
        boxes.append(_section(TIME_TITLE, note=TIME_NOTE, figures=figures, name=f"{name}-time"))
    return step + (f'<div class="pair">{"".join(boxes)}</div>' if boxes else "")


def has_memory(stage: Stage) -> bool:
    return bool((stage.get("memory_gib") or {}).get("by_stage"))


MEMORY_TITLE, TIME_TITLE = "Memory of a rank", "Where the step's time goes"
STEP_NOTE = "Blocks are microbatches through a chunk of layers, on each stage of the pipeline."
MEMORY_NOTE = "GiB at the fullest moment, by pipeline stage."
TIME_NOTE = "Exposed: communication that no computation hides."
NO_PREDICTION = "No step time: the plan predicts it for GPUs that it knows, and this cluster has none."


def step_title(stage: Stage) -> str:
    return f"One step: {stage['step_time_s'] * 1e3:,.0f} ms"


def _section(title: str, *, note: str, figures: Iterable[Figure], name: str, css_class: str = "") -> str:
    drawn = "".join(figure.svg(label=title, css_class=kind) for figure, kind in zip(figures, ("wide", "narrow"), strict=True))
    button = f'<button class="save" data-name="{escape(name)}" hidden>Save as PNG</button>'
    return (
        f'<section class="{css_class}"><div class="toolbar"><h2>{escape(title)}</h2>{button}</div>'
        f'<p class="lead">{escape(note)}</p>{drawn}</section>'
    )


def _asset(name: str) -> str:
    return (files("launcher.report") / name).read_text(encoding="utf-8")


# ---- the picture alone


def render_plan_picture(pages: Sequence[Stage]) -> tuple[str, int]:
    """One SVG with everything, for a slide, and its height in pixels."""
    y, parts = 44.0, [_words(MARGIN, 44, f"{pages[0].get('run', 'plan')}: {describe_plan(pages[0])}", "title")]
    for stage in pages:
        for body, height in _stage_parts(stage):
            y += 22
            parts.append(f'<g transform="translate({MARGIN} {y:g})">{body}</g>')
            y += height
    y += MARGIN
    style = escape("\n".join(line for line in _css_lines() if line), quote=False)
    ground = f'<rect class="ground" width="{SLIDE}" height="{y:g}"/>'
    figure = Figure(f"<style>{style}</style>{ground}{''.join(parts)}", SLIDE, round(y))
    return figure.svg(label="plan") + "\n", round(y)


def _css_lines() -> list[str]:
    """Colours of both themes and rules of figures; the rest of the page's style has nothing to do in a picture."""
    colours = _asset("page.css").partition("* {")[0]
    return [*colours.splitlines(), *_asset("plan_page.css").splitlines()]


def _stage_parts(stage: Stage) -> Iterator[tuple[str, float]]:
    """Elements and heights, from the top down."""
    yield _words(0, 18, stage["stage"], "value") + _words(0, 38, describe_stage(stage), ""), 40
    inner = SLIDE - 2 * MARGIN
    tile, tiles = (inner - 2 * 16) / 3, headline(stage)
    moved = (((place % 3) * (tile + 16), place // 3 * 102) for place in range(len(tiles)))
    yield "".join(_tile(x, y, tile, *row) for (x, y), row in zip(moved, tiles, strict=True)), 188
    for words in stage.get("refusals") or ():
        yield _words(0, 14, words, "over"), 16
    if is_predicted(stage):
        yield _boxed(draw_timeline(stage, width=inner - 44), title=step_title(stage))
    else:
        yield _words(0, 14, NO_PREDICTION, ""), 16
    half = (inner - COLUMN) / 2
    memory = [(draw_memory(stage, width=half - 44), MEMORY_TITLE)] if has_memory(stage) else []
    spent = [(draw_time(stage, width=half - 44), TIME_TITLE)] if is_predicted(stage) else []
    if both := memory + spent:
        tallest = max(figure.height for figure, _ in both)
        boxes = [_boxed(Figure(figure.body, figure.width, tallest), title=title) for figure, title in both]
        yield "".join(Figure(box, 0, 0).at(place * (half + COLUMN), 0) for place, (box, _) in enumerate(boxes)), boxes[0][1]


def _tile(x: float, y: float, width: float, label: str, value: str, note: str) -> str:
    return (
        f'<g transform="translate({x:g} {y:g})"><rect class="surface" width="{width:g}" height="86" rx="10"/>'
        f"{_words(14, 24, label, '')}{_words(14, 50, value, 'value')}{_words(14, 71, note, 'small')}</g>"
    )


def _boxed(figure: Figure, *, title: str) -> tuple[str, float]:
    height = figure.height + 64
    box = f'<rect class="surface" width="{figure.width + 44:g}" height="{height:g}" rx="12"/>'
    return box + _words(22, 32, title, "heading") + figure.at(22, 48), height


def _words(x: float, y: float, words: str, css_class: str) -> str:
    return f'<text class="{css_class}" x="{x:g}" y="{y:g}">{escape(words)}</text>'
