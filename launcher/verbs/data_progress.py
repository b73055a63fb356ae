"""The progress of `phidias data`: a line a source that moves on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

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
            self._tasks = {name: self._live.add_task(name, total=1.0, figures="waiting") for name in self._printed_at}
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        line = " · ".join([figures(progress), *self._speed(progress)])
        if self._live:
            self._live.update(self._tasks[progress.source], figures=line, completed=progress.fraction)
        elif progress.done or time.monotonic() - self._printed_at[progress.source] >= PLAIN_INTERVAL_S:
            self._printed_at[progress.source] = time.monotonic()
            state = "done" if progress.done else f"{progress.fraction:.0%} · {progress.task}"
            self._console.print(f"{progress.source}: {line} · {state}", soft_wrap=True)

    def _speed(self, progress: Progress) -> list[str]:
        """What this call reads a second, and how long it will take for the rest at that."""
        took, read = time.monotonic() - self._started, progress.fraction - progress.resumed
        if progress.done or took < 1 or read <= 0:
            return []
        left = (1 - progress.fraction) / read * took
        return [f"{short(progress.text_bytes * read / progress.fraction / took)}B/s", f"{timedelta(seconds=round(left))} left"]

    def _open_live(self) -> RichProgress:
        name = TextColumn("{task.description}", style="bold", markup=False)
        numbers = TextColumn("{task.fields[figures]}", markup=False)
        columns = (SpinnerColumn(finished_text="✓"), name, BarColumn(bar_width=20), numbers, TimeElapsedColumn())
        return RichProgress(*columns, console=self._console)


def figures(progress: Progress) -> str:
    words = [f"{progress.documents:,} documents", f"{short(progress.tokens)} tokens", f"{short(progress.text_bytes)}B of text"]
    lost = {"dropped": progress.dropped, "rejected": progress.rejected_rows}
    return " · ".join([*words, *(f"{count:,} {what}" for what, count in lost.items() if count)])
