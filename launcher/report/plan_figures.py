"""The pictures of a plan, as SVG: the timeline of a step, the memory of each pipeline stage, where a step's time goes.

Each is drawn for a width in pixels, so that letters stay readable on a phone; colours are the page's CSS variables.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from launcher.plan.schedule import Span, simulate
from launcher.report.format import format_percent

Stage = Mapping[str, Any]  # one object of the plan document

AFTER_PIPELINE = ("DP exposed", "optimizer", "other")  # components of a step that come when the pipeline has drained
# Components of memory in the order of their colours in plan_page.css, and the GiB below which one is not drawn on its own.
MEMORY = (
    "weights",
    "FP8 weights",
    "gradients",
    "main weights",
    "optimizer states",
    "activations: residual and norms",
    "activations: attention",
    "activations: mlp",
    "activations: recomputed",
    "logits and loss",
    "activations: pipeline outputs",
    "communication buffers",
    "CUDA context",
    "allocator slack",
)
SMALL_GIB = 0.1
COLOURS = {"bubble": "idle-bar", "optimizer": "after-1", "DP exposed": "after-0", "other": "after-2"}
NARROW = 420  # below it: a phone
LETTER = 7.1  # pixels of a letter, on average, at 12 pixels
LEAST_BLOCK, GOOD_BLOCK = 3.0, 5.5  # pixels of a forward: when all is drawn, and else


@dataclass(frozen=True)
class Figure:
    """SVG elements on a ground of width x height pixels."""

    body: str
    width: float
    height: float

    def svg(self, *, label: str, css_class: str = "") -> str:
        """An element that shrinks with its page."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="figure {css_class}" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" role="img" aria-label="{escape(label)}">{self.body}</svg>'
        )

    def at(self, x: float, y: float) -> str:
        """The elements, moved: a part of a larger figure."""
        return f'<g transform="translate({x:g} {y:g})">{self.body}</g>'


@dataclass(frozen=True)
class View:
    """Which seconds of a step are drawn: all, or the beginning and the end with a break between them."""

    windows: tuple[tuple[float, float], ...]
    left: float
    pixels_per_s: float
    gap: float = 0.0  # pixels of the break

    def x(self, seconds: float, *, window: int) -> float:
        before = sum(end - start for start, end in self.windows[:window]) * self.pixels_per_s + window * self.gap
        return self.left + before + (seconds - self.windows[window][0]) * self.pixels_per_s


# ---- timeline


def draw_timeline(stage: Stage, *, width: float) -> Figure:
    """One step: a row a pipeline stage, a block a microbatch through a chunk, idle time the row's ground."""
    pipeline, layout = stage["pipeline"], stage["layout"]
    spans = simulate(
        pp=layout["pp"],
        vpp=layout["vpp"],
        num_microbatches=stage["num_microbatches"],
        forward_s=pipeline["forward_s"],
        backward_s=pipeline["backward_s"],
        send_s=pipeline["send_s"],
    )
    after = [(name, stage["time_s"].get(name, 0.0)) for name in AFTER_PIPELINE if stage["time_s"].get(name, 0.0) > 0]
    drained_s = max(span.end_s for span in spans)
    end_s = drained_s + sum(seconds for _, seconds in after)
    left = 30 if width < NARROW else 62
    legend, top = _legend(_timeline_legend(layout["vpp"], after=after), width=width)
    view = _view(spans, end_s=end_s, left=left, width=width - left - 6)
    height = _row_height(layout["pp"])
    top += 22 if len(view.windows) > 1 else 6
    bottom = top + layout["pp"] * height
    body = [
        legend,
        *_lanes(view, end_s=drained_s, pp=layout["pp"], top=top, height=height, narrow=width < NARROW),
        *_blocks(spans, view=view, vpp=layout["vpp"], top=top, height=height),
        *_numbers(spans, view=view, vpp=layout["vpp"], top=top, height=height),
        *_after(after, view=view, start_s=drained_s, top=top, bottom=bottom),
        *_break(view, end_s=end_s, top=top, bottom=bottom),
        *_time_axis(view, top=bottom, spacing=64 if width < NARROW else 84),
    ]
    return Figure("".join(body), width, bottom + 24)


def _view(spans: Sequence[Span], *, end_s: float, left: float, width: float) -> View:
    """All of the step where its blocks are wide enough; else what fills and what drains the pipeline, and some pairs."""
    one_s = median(span.end_s - span.start_s for span in spans if span.task.forward)
    if one_s * width / end_s >= LEAST_BLOCK:
        return View(((0.0, end_s),), left, width / end_s)
    filled_s = max(span.start_s for span in _edges(spans, forward=False, first=True))
    drains_s = min(span.end_s for span in _edges(spans, forward=True, first=False))
    gap = 26 if width < NARROW else 46
    room, edges_s = width - gap, filled_s + end_s - drains_s
    shown_s = max(room / GOOD_BLOCK * one_s, edges_s + 30 * one_s)
    if shown_s > 0.85 * end_s:
        return View(((0.0, end_s),), left, width / end_s)
    more_s = (shown_s - edges_s) / 2
    return View(((0.0, filled_s + more_s), (drains_s - more_s, end_s)), left, room / shown_s, gap)


def _edges(spans: Sequence[Span], *, forward: bool, first: bool) -> list[Span]:
    """The first, or the last, forward or backward of each rank."""
    found: dict[int, Span] = {}
    for span in spans:
        if span.task.forward == forward and not (first and span.task.stage in found):
            found[span.task.stage] = span
    return list(found.values())


def _row_height(rows: int) -> int:
    return 34 if rows <= 4 else 26 if rows <= 8 else 19 if rows <= 16 else 12


def _lanes(view: View, *, end_s: float, pp: int, top: float, height: float, narrow: bool) -> list[str]:
    """Names and grounds of the rows. What no block covers is idle."""
    parts = []
    for stage in range(pp):
        y = top + stage * height
        label = f"{stage}" if narrow else f"stage {stage}"
        parts.append(_text(view.left - 8, y + height / 2 + 4, label, anchor="end"))
        for window, (start, end) in enumerate(view.windows):
            x, right = view.x(start, window=window), view.x(min(end, end_s), window=window)
            parts.append(_rect(x, y + 1.5, right - x, height - 3, "idle", title=f"stage {stage} idle"))
    return parts


def _blocks(spans: Sequence[Span], *, view: View, vpp: int, top: float, height: float) -> list[str]:
    """One stroked path for all blocks of a rank, chunk and direction: a few bytes a block."""
    paths: dict[tuple[int, int, bool], list[str]] = {}
    for span in spans:
        for window, (first_s, last_s) in enumerate(view.windows):
            start, end = max(span.start_s, first_s), min(span.end_s, last_s)
            if end <= start:
                continue
            x, wide = view.x(start, window=window), (end - start) * view.pixels_per_s
            wide -= 0.8 if wide > 4 else wide * 0.1  # a hair between neighbours
            key = (span.task.stage, span.task.chunk, span.task.forward)
            paths.setdefault(key, []).append(f"M{x:.1f} {top + (span.task.stage + 0.5) * height:g}h{round(wide, 2):g}")
    return [
        f'<path class="{"forward" if forward else "backward"}" stroke-width="{height - 3:g}" '
        f'stroke-opacity="{_shade(chunk, vpp=vpp):.2f}" d="{"".join(path)}">'
        f"<title>stage {stage}, chunk {chunk}, {'forward' if forward else 'backward'}</title></path>"
        for (stage, chunk, forward), path in paths.items()
    ]


def _shade(chunk: int, *, vpp: int) -> float:
    """Of the forward's or backward's colour: the first chunk is the strongest."""
    return 1.0 if vpp == 1 else 1.0 - (0.5 if vpp == 2 else 0.66) * chunk / (vpp - 1)


def _numbers(spans: Sequence[Span], *, view: View, vpp: int, top: float, height: float) -> list[str]:
    """Microbatches by number, where the blocks have room for it."""
    most = max(len(str(span.task.microbatch)) for span in spans)
    one_s = median(span.end_s - span.start_s for span in spans if span.task.forward)
    if len(view.windows) > 1 or one_s * view.pixels_per_s < 5.8 * most + 0.4:
        return []
    parts = []
    for span in spans:
        x, y = view.x((span.start_s + span.end_s) / 2, window=0), top + (span.task.stage + 0.5) * height + 3.5
        css_class = "tiny on-block" if _shade(span.task.chunk, vpp=vpp) > 0.6 else "tiny on-light"
        parts.append(_text(x, y, str(span.task.microbatch), css_class=css_class, anchor="middle"))
    return parts


def _after(after: Sequence[tuple[str, float]], *, view: View, start_s: float, top: float, bottom: float) -> list[str]:
    parts, window = [], len(view.windows) - 1
    for name, seconds in after:
        x, wide = view.x(start_s, window=window), seconds * view.pixels_per_s
        parts.append(_rect(x, top + 1.5, wide, bottom - top - 3, COLOURS[name], title=f"{name}: {_ms(seconds)}"))
        start_s += seconds
    return parts


def _break(view: View, *, end_s: float, top: float, bottom: float) -> list[str]:
    if len(view.windows) == 1:
        return []
    left_out_s = view.windows[1][0] - view.windows[0][1]
    x = view.x(view.windows[0][1], window=0)
    middle, right, parts = x + view.gap / 2, view.x(end_s, window=1), []
    for edge in (x + 5, x + view.gap - 5):
        teeth = "".join(f"l{3 if turn % 2 else -3} 6" for turn in range(math.ceil((bottom - top) / 6)))
        parts.append(f'<path class="tear" d="M{edge:.1f} {top:g}{teeth}"/>')
    words = f"{_ms(left_out_s)} of steady state left out" + (
        f" ({left_out_s / end_s:.0%} of the step)" if right > NARROW else ""
    )
    half = len(words) * LETTER / 2
    centre = min(max(middle, half + 8), right - half)
    parts.append(_text(centre, top - 8, words, css_class="strong", anchor="middle"))
    parts.append(_text(middle, (top + bottom) / 2 + 4, "···", anchor="middle"))
    return parts


def _time_axis(view: View, *, top: float, spacing: float) -> list[str]:
    step_s, parts, taken = _round_step(spacing / view.pixels_per_s), [], -math.inf
    for window, (start, end) in enumerate(view.windows):
        for tick in range(math.ceil(start / step_s - 1e-9), math.floor(end / step_s + 1e-9) + 1):
            x, words = view.x(tick * step_s, window=window), _ms(tick * step_s, step_s=step_s)
            parts.append(f'<path class="tick" d="M{x:.1f} {top:g}v5"/>')
            half, limit = len(words) * LETTER / 2, view.x(end, window=window) + 6
            place = min(max(x, half), limit - half) if window == len(view.windows) - 1 else max(x, half)
            if place - half > taken + 8 and abs(place - x) <= half:
                parts.append(_text(place, top + 18, words, anchor="middle"))
                taken = place + half
    return parts


def _timeline_legend(vpp: int, *, after: Sequence[tuple[str, float]]) -> list[tuple[str, float, str]]:
    chunks = "" if vpp == 1 else f", chunk 0 to {vpp - 1}"
    ramps = [(_ramp(name, vpp=vpp), 13.0 * min(vpp, 8), f"{name}{chunks}") for name in ("forward", "backward")]
    rests = [(_rect(0, 0, 11, 11, COLOURS[name]), 11.0, f"{name} {_ms(seconds)}") for name, seconds in after]
    return [*ramps, (_rect(0, 0, 11, 11, "idle"), 11.0, "idle"), *rests]


def _ramp(name: str, *, vpp: int) -> str:
    count = min(vpp, 8)
    chunks = [round(place * (vpp - 1) / max(1, count - 1)) for place in range(count)]
    shades = enumerate(_shade(chunk, vpp=vpp) for chunk in chunks)
    return "".join(
        f'<rect class="{name}-fill" x="{13 * place}" width="11" height="11" rx="2" fill-opacity="{shade:.2f}"/>'
        for place, shade in shades
    )


# ---- memory


def draw_memory(stage: Stage, *, width: float) -> Figure:
    """A bar for each pipeline stage, by component, against what a device has. GiB."""
    memory = stage["memory_gib"]
    rows, capacity = memory["by_stage"], memory["capacity"]
    rows = [{**row, "by_component": with_rest(row["by_component"])} for row in rows]
    names = list(dict.fromkeys(name for row in rows for name, gib in row["by_component"].items() if gib > 0))
    legend, top = _legend([(_rect(0, 0, 11, 11, _memory_colour(name)), 11.0, name) for name in names], width=width)
    left, top, height = (30 if width < NARROW else 62), top + (24 if capacity else 6), _row_height(len(rows))
    most = max([row["total"] for row in rows] + [capacity or 0.0]) or 1.0
    scale = (width - left - 52) / most
    bottom = top + len(rows) * height
    parts = [legend, *_gib_axis(most, left=left, scale=scale, top=top, bottom=bottom)]
    for place, row in enumerate(rows):
        y, x = top + place * height, float(left)
        parts.append(
            _text(left - 8, y + height / 2 + 4, f"{row['stage']}" if width < NARROW else f"stage {row['stage']}", anchor="end")
        )
        for name in names:
            gib = row["by_component"].get(name, 0.0)
            wide = gib * scale
            parts.append(
                _rect(x, y + 2.5, wide, height - 5, _memory_colour(name), title=f"stage {row['stage']}, {name}: {gib:.1f} GiB")
            )
            if wide >= 28 and height >= 19:
                parts.append(_text(x + wide / 2, y + height / 2 + 4, f"{gib:.1f}", css_class="on-block", anchor="middle"))
            x += wide
        over = bool(capacity) and row["total"] > capacity
        parts.append(_text(x + 6, y + height / 2 + 4, f"{row['total']:.1f}", css_class="over halo" if over else "strong halo"))
    if capacity:
        x = left + capacity * scale
        parts.extend(
            f'<path class="{kind}" d="M{x:.1f} {top - 4:g}V{bottom + 4:g}"/>' for kind in ("capacity-ground", "capacity")
        )
        words = f"device {capacity:.1f} GiB"
        parts.append(_text(min(x, width - len(words) * LETTER / 2), top - 9, words, css_class="over", anchor="middle"))
    return Figure("".join(parts), width, bottom + 24)


def with_rest(sizes: Mapping[str, float]) -> dict[str, float]:
    """The components that can be seen, the others as one. GiB."""
    seen = {name: gib for name, gib in sizes.items() if gib >= SMALL_GIB}
    rest = sum(sizes.values()) - sum(seen.values())
    return {**seen, "the rest": rest} if rest > 1e-9 else seen


def _memory_colour(name: str) -> str:
    """What a component is told by its hue: states blue, activations warm, what libraries hold grey."""
    return f"memory-{MEMORY.index(name)}" if name in MEMORY else "memory-rest"


def _gib_axis(most: float, *, left: float, scale: float, top: float, bottom: float) -> list[str]:
    step, parts = _round_step(70 / scale), []
    for tick in range(math.floor(most / step) + 1):
        x = left + tick * step * scale
        words = f"{tick * step:g}" + (" GiB" if tick == 0 else "")
        parts.append(f'<path class="grid" d="M{x:.1f} {top:g}V{bottom + 4:g}"/>')
        parts.append(_text(x, bottom + 18, words, anchor="middle" if tick else "start"))
    return parts


# ---- time


def draw_time(stage: Stage, *, width: float) -> Figure:
    """Where the step's time goes: components by size, in ms and as a share of the step."""
    step_s = stage["step_time_s"]
    rows = sorted(((name, seconds) for name, seconds in stage["time_s"].items() if seconds > 0), key=lambda row: -row[1])
    left, right, height = max(len(name) for name, _ in rows) * LETTER + 18, 132, 26
    scale = (width - left - right) / rows[0][1]
    parts = []
    for place, (name, seconds) in enumerate(rows):
        y, wide = place * height, max(1.0, seconds * scale)
        parts.append(_text(left - 8, y + 17, name, anchor="end"))
        parts.append(_rect(left, y + 4, wide, height - 8, _time_colour(name), title=f"{name}: {_ms(seconds)}"))
        parts.append(_text(width - 52, y + 17, _ms(seconds), css_class="strong", anchor="end"))
        parts.append(_text(width, y + 17, format_percent(seconds / step_s), anchor="end"))
    return Figure("".join(parts), width, len(rows) * height + 2)


def _time_colour(name: str) -> str:
    return COLOURS.get(name, "exposed" if name.endswith("exposed") else "compute")


# ---- what they share


def _legend(entries: Sequence[tuple[str, float, str]], *, width: float) -> tuple[str, float]:
    """Swatches and their words, as many rows as they need; and the height of it all."""
    x, y, parts = 0.0, 4.0, []
    for swatch, wide, words in entries:
        room = wide + 6 + len(words) * LETTER
        if x and x + room > width:
            x, y = 0.0, y + 20
        parts.append(f'<g transform="translate({x:.1f} {y:g})">{swatch}{_text(wide + 6, 10, words)}</g>')
        x += room + 16
    return "".join(parts), y + 22


def _text(x: float, y: float, words: str, *, css_class: str = "", anchor: str = "") -> str:
    attributes = (f' class="{css_class}"' if css_class else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(words)}</text>'


def _rect(x: float, y: float, width: float, height: float, css_class: str, *, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    place = f'x="{x:.1f}" y="{y:g}" width="{max(0.0, width):.1f}" height="{height:g}"'
    return f'<rect class="{css_class}" {place} rx="2">{inner}</rect>'


def _ms(seconds: float, *, step_s: float | None = None) -> str:
    """Milliseconds, with as many places as the step of an axis, or three digits, need."""
    ms, least = seconds * 1e3, (abs(seconds) if step_s is None else step_s) * 1e3
    places = 0 if least >= 100 or (step_s and least >= 1) else 1 if least >= 0.95 or (step_s and least >= 0.1) else 2
    return f"{ms:,.{places}f} ms"


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, ... at or above."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))
