"""How far the sources are, put together from what workers say of their tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from data_prep.manifest import Manifest
from data_prep.prepare.job import Job, Tick
from data_prep.prepare.receipt import Counts, finished_tasks, read_receipt


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a source is. `done` once its manifest is on disk. `fraction` of its input went through all stages that read text,
    `resumed` of it before this call."""

    source: str
    task: str
    documents: int
    tokens: int
    text_bytes: int
    rejected_rows: int
    dropped: int
    fraction: float
    resumed: float
    done: bool


OnProgress = Callable[[Progress], None]


class Board:
    """What is known of every task. Another machine's tasks are seen when their receipts are read."""

    def __init__(self, jobs: Mapping[str, Job], *, on_progress: OnProgress | None):
        self._on_progress = on_progress
        self._tasks: dict[str, dict[str, Counts]] = {name: _done_before(job) for name, job in jobs.items()}
        self._input_bytes = {name: _input_bytes(job) for name, job in jobs.items()}
        self._resumed = {name: self._fraction(name) for name in jobs}

    def tick(self, tick: Tick) -> None:
        self._tasks[tick.source][tick.task] = tick.counts
        if self._on_progress:
            self._on_progress(self._progress(tick.source, task=tick.task))

    def finish(self, manifest: Manifest) -> None:
        if self._on_progress:
            self._on_progress(progress_of(manifest, resumed=self._resumed.get(manifest.source, 1.0)))

    def _progress(self, name: str, *, task: str) -> Progress:
        final, everything = Counts(), Counts()
        for number, counts in self._tasks[name].items():
            everything.add(counts)
            if number.startswith("tokenize"):
                final.add(counts)
        return Progress(
            source=name,
            task=task,
            documents=final.documents,
            tokens=final.tokens,
            text_bytes=final.text_bytes,
            rejected_rows=everything.rejected_rows,
            dropped=everything.num_dropped,
            fraction=self._fraction(name),
            resumed=self._resumed[name],
            done=False,
        )

    def _fraction(self, name: str) -> float:
        return sum(counts.input_bytes for counts in self._tasks[name].values()) / max(1, self._input_bytes[name])


def _done_before(job: Job) -> dict[str, Counts]:
    receipts = {task: read_receipt(job.place, task=task) for task in finished_tasks(job.place)}
    return {task: receipt.counts for task, receipt in receipts.items() if receipt}


def _input_bytes(job: Job) -> int:
    """Over all stages that read text."""
    reading = [stage for stage in job.plan.stages if stage.kind in ("curate", "tokenize")]
    first = reading[0]
    return len(reading) * sum(job.plan.input_bytes(first, part) for low, high in first.parts for part in range(low, high))


def progress_of(manifest: Manifest, *, resumed: float) -> Progress:
    """Of a source that is whole."""
    return Progress(
        source=manifest.source,
        task="",
        documents=manifest.train.documents + manifest.held_out.documents,
        tokens=manifest.train.tokens + manifest.held_out.tokens,
        text_bytes=manifest.text_bytes,
        rejected_rows=manifest.rejected_rows,
        dropped=sum(sum(row.values()) for row in manifest.statistics.dropped.values()) if manifest.statistics else 0,
        fraction=1.0,
        resumed=resumed,
        done=True,
    )
