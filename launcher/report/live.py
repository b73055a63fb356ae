"""What a person sees while a run trains: a live panel on a terminal, plain lines elsewhere. It only reads the run's files."""

import contextlib
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner

from launcher.config.schema import RunConfig
from launcher.plan.stage import plan_stage
from launcher.report.panel import render_panel
from launcher.report.progress import STARTING, Progress, RecordTail, progress_line, validation_line
from launcher.report.surroundings import Surroundings
from launcher.rundir.order import stage_shares
from launcher.rundir.paths import RunDir
from launcher.rundir.records import parse_status

PLAIN_INTERVAL_S = 5.0


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
        interval_s: float = PLAIN_INTERVAL_S,
    ):
        self._run, self._config, self._clock, self._interval_s = run, config, clock, interval_s
        self._console = console or Console(highlight=False)
        self._tail = RecordTail(run.metrics)
        self._steps = {stage.stage.name: plan_stage(stage, cluster=config.cluster).num_steps for stage in config.stages}
        self._progress, self._around = Progress(), self._surroundings()
        self._shares = self._read_shares()
        # What an earlier launch left: it says nothing about this one.
        self._stale_status = self._status_text()
        self._printed: tuple[Any, ...] = ()
        self._printed_at = float("-inf")
        self._spinner = Spinner("dots", text=STARTING)
        is_rich = mode == "rich" or (mode == "auto" and self._console.is_terminal and not self._console.is_dumb_terminal)
        self._live = Live(console=self._console, auto_refresh=False, transient=False) if is_rich else None

    def __enter__(self) -> Self:
        with self._harmless():
            # Rows of an earlier launch are where this one goes on from, not news.
            for row in self._tail.new_rows():
                self._progress.take(row)
            if self._live:
                self._live.start()
        self.refresh()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.refresh(final=True)
        with self._harmless():
            if self._live:
                self._live.stop()

    def refresh(self, *, final: bool = False) -> None:
        """Reads what is new and shows it; `final` prints the last line, due or not."""
        with self._harmless():
            self._show(final=final)

    def _show(self, *, final: bool) -> None:
        self._around.read(now=self._clock())
        self._read_status(final=final)
        for row in self._tail.new_rows():
            if self._progress.take(row) and row["kind"] == "validation" and not self._live:
                self._print(validation_line(row))
        if self._live:
            self._live.update(self.render(), refresh=True)
        else:
            self._print_progress(final=final)

    def note(self, text: str) -> None:
        """A message of the executor, above the panel or as a line of its own."""
        with self._harmless():
            self._print(text)

    def _harmless(self) -> contextlib.AbstractContextManager[None]:
        """Training must not end with its view: not where nobody looks any more (`| head`, which rich makes a SystemExit), nor
        where a file of the run is not what the view expects. The next refresh tries again."""
        return contextlib.suppress(Exception, SystemExit)

    def _surroundings(self) -> Surroundings:
        # All rows of a long run take seconds to read, for goodput: not while its ranks wait to be started.
        return Surroundings(self._run, self._config.cluster, measured_at=self._clock())

    def _read_shares(self) -> Mapping[str, Mapping[str, float]]:
        return stage_shares(self._run, self._config)

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
        """A line when the state or stage changes, at the end, and one an interval while steps go by."""
        progress = self._progress
        shown = (progress.state, progress.stage, progress.status.get("step"))
        due = self._clock() - self._printed_at >= self._interval_s
        if shown == self._printed or not (due or final or shown[:2] != self._printed[:2]):
            return
        self._printed, self._printed_at = shown, self._clock()
        measured = self._around.measured
        self._print(progress_line(progress, mfu=self._around.mfu(progress), goodput=measured.goodput if measured else None))

    def render(self) -> RenderableType:
        """The panel."""
        return render_panel(
            self._progress,
            self._around,
            config=self._config,
            steps=self._steps,
            shares=self._shares,
            width=self._console.width,
            waiting=[self._spinner] if self._progress.state == "starting" else [],
        )
