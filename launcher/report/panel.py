"""The live panel of a run: a bar a stage, the figures of now, a row a source, the last events."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.config.schema import RunConfig
from launcher.report.format import MISSING, format_count, format_duration, format_losses, format_number, format_percent
from launcher.report.progress import Progress, losses_of
from launcher.report.surroundings import Surroundings, event_line, newest_events

WIDEST = 110
# Figures stand in rows of so many, of fewer on a narrow screen.
IN_A_ROW, IN_A_NARROW_ROW, NARROW = 5, 3, 72
EVENTS = 5
STYLES = {"done": "green", "failed": "red", "died": "red", "stopped": "yellow", "queued": "yellow"}


def render_panel(
    progress: Progress,
    around: Surroundings,
    *,
    config: RunConfig,
    steps: Mapping[str, int],
    shares: Mapping[str, Mapping[str, float]],
    width: int,
    waiting: Sequence[RenderableType] = (),
) -> Panel:
    """`steps`: of each stage, as planned; `shares`: of each source, by stage; `waiting`: what is said before the first step."""
    width = min(WIDEST, width)
    parts: list[RenderableType] = [stage_bars(progress, config=config, steps=steps), *waiting, ""]
    parts += [figure_rows(figures(progress, around), width=width), ""]
    parts.append(source_table(progress, around, config=config, shares=shares.get(stage_in_hand(progress, config), {})))
    if lost := lost_line(around):
        parts += ["", Text(lost, style="dim")]
    if events := newest_events(around.events, most=EVENTS):
        parts += ["", *(event_text(event_line(event, now=time.time())) for event in events)]
    title = Text.assemble((config.run.name, "bold"), "  ", (progress.state, STYLES.get(progress.state, "blue")))
    place = Text(around.place, style="dim")
    frame = {"title_align": "left", "subtitle_align": "right", "border_style": "dim", "padding": (0, 1)}
    return Panel(Group(*parts), title=title, subtitle=place, width=width, **frame)  # type: ignore[arg-type]


def stage_bars(progress: Progress, *, config: RunConfig, steps: Mapping[str, int]) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    for name in config.stage_names:
        step, total = stage_steps(name, progress=progress, names=config.stage_names, planned=steps[name])
        bar = ProgressBar(total=max(1, total), completed=step, complete_style="cyan", finished_style="green")
        style = "bold" if name == progress.stage else "dim"
        table.add_row(Text(name, style=style), bar, f"{step:,}/{total:,}", format_percent(step / max(1, total), digits=0))
    return table


def stage_steps(name: str, *, progress: Progress, names: Sequence[str], planned: int) -> tuple[int, int]:
    """Steps done and to do of a stage; training's own count where it has spoken, else the plan's."""
    if name == progress.stage:
        return int(progress.status.get("step") or 0), int(progress.status.get("num_steps") or planned)
    is_earlier = progress.stage in names and names.index(name) < names.index(progress.stage)
    return (planned if is_earlier else 0), planned


def figures(progress: Progress, around: Surroundings) -> Iterator[tuple[str, str]]:
    """What each is called, and its text."""
    row, status = progress.train.get(progress.stage, {}), progress.status
    yield "loss", format_number(progress.loss)
    yield "held-out", format_number(progress.validation.get(progress.stage, {}).get("loss"))
    yield "tokens", format_count(status.get("tokens"))
    yield "tokens/s", format_count(status.get("tokens_per_s"))
    yield "left", format_duration(status.get("eta_s")) if progress.state == "running" else MISSING
    yield "step time", seconds(row.get("step_time_s"))
    yield "data wait", seconds(row.get("data_wait_s"))
    yield "slowest rank", slowest(row)
    yield "MFU", format_percent(around.mfu(progress))
    yield "goodput", format_percent(around.measured.goodput if around.measured else None)


def seconds(value: float | None) -> str:
    """Of one step, which may be short."""
    return f"{format_number(value, digits=3 if value < 1 else 2)} s" if value is not None else MISSING


def slowest(row: Mapping[str, Any]) -> str:
    """`12, 1.04x`: its computation against the median of its pipeline stage."""
    ratio = row.get("slowest_ratio")
    return f"{row.get('slowest_rank')}, {ratio:.2f}x" if ratio is not None else MISSING


def figure_rows(shown: Iterator[tuple[str, str]], *, width: int) -> Table:
    """Names above their figures."""
    left, count = list(shown), IN_A_ROW if width >= NARROW else IN_A_NARROW_ROW
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(count):
        table.add_column(ratio=1, no_wrap=True)
    while left:
        row, left = left[:count], left[count:]
        table.add_row(*(Text(name, style="dim") for name, _ in row))
        table.add_row(*(Text(value, style="bold") for _, value in row))
    return table


def stage_in_hand(progress: Progress, config: RunConfig) -> str:
    return progress.stage if progress.stage in config.stage_names else config.stage_names[0]


def source_table(progress: Progress, around: Surroundings, *, config: RunConfig, shares: Mapping[str, float]) -> Table:
    """The sources of the stage in hand: share, tokens read in it, epochs in the run, newest training and held-out loss."""
    stage = stage_in_hand(progress, config)
    train, held_out = progress.train.get(stage, {}), progress.validation.get(stage, {})
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    for name in ("source", "share", "tokens", "epochs", "loss", "held-out"):
        table.add_column(name, justify="left" if name == "source" else "right", no_wrap=True)
    for name in config.stage(stage).mixture.sources:
        table.add_row(
            name,
            format_percent(shares.get(name)),
            format_count(train.get("tokens_by_source", {}).get(name)),
            format_number(around.epochs(name, progress=progress), digits=2),
            format_number(losses_of(train).get(name)),
            format_number(losses_of(held_out).get(name)),
        )
    return table


def lost_line(around: Surroundings) -> str:
    """`lost of 2 h 00 min: start-up 10.0%, checkpoint 1.2%`; empty where nothing was, or nobody knows."""
    found = around.measured
    lost = format_losses(dict(found.largest), wall_s=found.wall_s) if found else ""
    return f"lost of {format_duration(found.wall_s)}: {lost}" if found and lost else ""


def event_text(line: str) -> Text:
    clock, _, rest = line.partition("  ")
    return Text.assemble((clock, "dim"), "  ", rest, no_wrap=True, overflow="ellipsis")
