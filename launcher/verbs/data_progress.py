"""The progress of `phidias data`: a line a source that moves on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from data_prep.build import Progress
from launcher.plan.page import short

PLAIN_INTERVAL_S = 5.0


class DataProgress:
    """A context manager; `update` is prepare_sources' on_progress."""

    def __init__(self, sources: Iterable[str], *, console: Console):
        self._console, self._started, self._printed_at = console, time.monotonic(), dict.fromkeys(sources, float("-inf"))
        self._live = self._open_live() if console.is_terminal and not console.is_dumb_terminal else None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._tasks = {name: self._live.add_task(name, total=1, figures="waiting") for name in self._printed_at}
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        if self._live:
            task = self._tasks[progress.source]
            self._live.update(task, figures=figures(progress), completed=1 if progress.done else 0)
        elif progress.done or time.monotonic() - self._printed_at[progress.source] >= PLAIN_INTERVAL_S:
            self._printed_at[progress.source] = time.monotonic()
            state = "done" if progress.done else progress.file
            self._console.print(f"{progress.source}: {figures(progress)} · {state}", soft_wrap=True)

    def _open_live(self) -> RichProgress:
        name = TextColumn("{task.description}", style="bold", markup=False)
        numbers = TextColumn("{task.fields[figures]}", markup=False)
        return RichProgress(SpinnerColumn(finished_text="✓"), name, numbers, TimeElapsedColumn(), console=self._console)


def figures(progress: Progress) -> str:
    words = [f"{progress.documents:,} documents", f"{short(progress.tokens)} tokens", f"{short(progress.text_bytes)}B of text"]
    return " · ".join([*words, *([f"{progress.rejected_rows:,} rejected"] if progress.rejected_rows else [])])
