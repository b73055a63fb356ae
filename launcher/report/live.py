"""What a person sees while a run trains: a live panel on a terminal, plain lines elsewhere. It only reads the run's files."""

import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from launcher.config.schema import RunConfig
from launcher.plan.stage import plan_stage
from launcher.report.format import MISSING, format_count, format_duration, format_number, format_percent
from launcher.report.progress import STARTING, Progress, RecordTail, progress_line, validation_line
from launcher.rundir.order import stage_shares
from launcher.rundir.paths import RunDir
from launcher.rundir.records import parse_status

PLAIN_INTERVAL_S = 5.0


def harmless() -> contextlib.suppress:
    """Training must not end with its view: not where nobody looks any more (`| head`, which rich makes a SystemExit), nor where
    a file of the run is not what the view expects. The next refresh tries again."""
    return contextlib.suppress(Exception, SystemExit)


class LiveView:
    """The view `phidias train` shows. Call `refresh` a few times a second; it reads what is new and redraws."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        mode: Literal["auto", "rich", "plain"] = "auto",
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run, self._config, self._clock = run, config, clock
        self._console = console or Console(highlight=False)
        self._tail = RecordTail(run.metrics)
        self._steps = {stage.stage.name: plan_stage(stage, cluster=config.cluster).num_steps for stage in config.stages}
        self._shares = stage_shares(run, config)
        self._progress = Progress()
        # What an earlier launch left: it says nothing about this one.
        self._stale_status = self._status_text()
        self._printed: tuple[Any, ...] = ()
        self._printed_at = float("-inf")
        self._spinner = Spinner("dots", text=STARTING)
        is_rich = mode == "rich" or (mode == "auto" and self._console.is_terminal and not self._console.is_dumb_terminal)
        self._live = Live(console=self._console, auto_refresh=False, transient=False) if is_rich else None

    def __enter__(self) -> Self:
        with harmless():
            # Rows of an earlier launch are where this one goes on from, not news.
            for row in self._tail.new_rows():
                self._progress.take(row)
            if self._live:
                self._live.start()
        self.refresh()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.refresh(final=True)
        with harmless():
            if self._live:
                self._live.stop()

    def refresh(self, *, final: bool = False) -> None:
        """Reads what is new and shows it; `final` prints the last line, due or not."""
        with harmless():
            self._show(final=final)

    def _show(self, *, final: bool) -> None:
        self._read_status(final=final)
        for row in self._tail.new_rows():
            self._progress.take(row)
            if row.get("kind") == "validation" and not self._live:
                self._print(validation_line(row))
        if self._live:
            self._live.update(self.render(), refresh=True)
        else:
            self._print_progress(final=final)

    def note(self, text: str) -> None:
        """A message of the executor, above the panel or as a line of its own."""
        with harmless():
            self._print(text)

    def _status_text(self) -> str:
        return self._run.status.read_text(errors="replace") if self._run.status.exists() else "{}"

    def _read_status(self, *, final: bool) -> None:
        """The file is of the past until the ranks write it: at a launch, and between two stages. At the end it is the truth."""
        text = self._status_text()
        status = parse_status(text)
        stages = self._config.stage_names
        if text == self._stale_status and not final:
            status["state"] = "starting"
        elif status.get("state") == "done" and status.get("stage") in stages[:-1] and not final:
            status = {"stage": stages[stages.index(status["stage"]) + 1], "state": "starting"}
        self._progress.status = status

    def _print(self, text: str) -> None:
        # markup and soft_wrap: a path or "[0/8]" is shown as it is, and a log line stays one line.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print_progress(self, *, final: bool) -> None:
        """A line when the state or stage changes, at the end, and every PLAIN_INTERVAL_S while steps go by."""
        progress = self._progress
        shown = (progress.state, progress.stage, progress.status.get("step"))
        due = self._clock() - self._printed_at >= PLAIN_INTERVAL_S
        if shown == self._printed or not (due or final or shown[:2] != self._printed[:2]):
            return
        self._printed, self._printed_at = shown, self._clock()
        self._print(progress_line(progress))

    def render(self) -> RenderableType:
        """The panel: a bar a stage, the figures of now, a row a source."""
        progress = self._progress
        parts: list[RenderableType] = [self._stage_bars()]
        if progress.state == "starting":
            parts.append(self._spinner)
        parts += ["", self._figures(), "", self._source_table()]
        style = {"done": "green", "failed": "red", "stopped": "yellow"}.get(progress.state, "blue")
        title = Text.assemble((self._config.run.name, "bold"), "  ", (progress.state, style))
        return Panel(Group(*parts), title=title, title_align="left", border_style="dim", padding=(0, 1), width=self._width)

    @property
    def _width(self) -> int:
        return min(96, self._console.width)

    def _stage_bars(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for _ in range(2):
            table.add_column(justify="right", no_wrap=True)
        for name in self._config.stage_names:
            step, total = self._stage_steps(name)
            bar = ProgressBar(total=max(1, total), completed=step, complete_style="cyan", finished_style="green")
            style = "bold" if name == self._progress.stage else "dim"
            table.add_row(Text(name, style=style), bar, f"{step:,}/{total:,}", format_percent(step / max(1, total), digits=0))
        return table

    def _stage_steps(self, name: str) -> tuple[int, int]:
        """Steps done and to do of a stage; training's own count where it has spoken, else the plan's."""
        names, status = self._config.stage_names, self._progress.status
        total = self._steps[name]
        if name == self._progress.stage:
            return int(status.get("step") or 0), int(status.get("num_steps") or total)
        is_earlier = self._progress.stage in names and names.index(name) < names.index(self._progress.stage)
        return (total if is_earlier else 0), total

    def _figures(self) -> Table:
        progress, table = self._progress, Table.grid(padding=(0, 2), expand=True)
        held_out = progress.validation.get(progress.stage, {}).get("loss")
        figures = {
            "loss": format_number(progress.loss),
            "held-out": format_number(held_out),
            "tokens": format_count(progress.status.get("tokens")),
            "tokens/s": format_count(progress.status.get("tokens_per_s")),
            "left": format_duration(progress.status.get("eta_s")) if progress.state == "running" else MISSING,
        }
        for _ in figures:
            table.add_column(ratio=1, no_wrap=True)
        table.add_row(*(Text(name, style="dim") for name in figures))
        table.add_row(*(Text(value, style="bold") for value in figures.values()))
        return table

    def _source_table(self) -> Table:
        """The sources of the stage in hand: share, tokens read in it, newest training and held-out loss."""
        stage = self._progress.stage if self._progress.stage in self._config.stage_names else self._config.stage_names[0]
        train, held_out = self._progress.train.get(stage, {}), self._progress.validation.get(stage, {})
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        for name in ("source", "share", "tokens", "loss", "held-out"):
            table.add_column(name, justify="left" if name == "source" else "right", no_wrap=True)
        for name in self._config.stage(stage).mixture.sources:
            table.add_row(
                name,
                format_percent(self._shares.get(stage, {}).get(name)),
                format_count(train.get("tokens_by_source", {}).get(name)),
                format_number(train.get("loss_by_source", {}).get(name)),
                format_number(held_out.get("loss_by_source", {}).get(name)),
            )
        return table
