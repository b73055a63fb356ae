"""What a view of a run shows beside its losses: its events, speed against the hardware, goodput, epochs, and where it runs.
Read from the run directory, again only where a file has changed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.config.schema import Cluster
from launcher.report.format import format_count, format_duration
from launcher.report.progress import Progress
from launcher.rundir.goodput import MeasuredGoodput, Meter
from launcher.rundir.losses import is_number
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records
from launcher.rundir.speed import mfu_of, read_plan

Row = Mapping[str, Any]

# Goodput needs all rows: those that are new are read so often.
GOODPUT_S = 5.0
SHOWN_NODES = 2
KIND = 11  # columns; stage start has as many


@dataclass
class Surroundings:
    """`plan`: plan.json by stage; `measured`: None before the first row; `measured_at`: when it was, by the
    caller's clock; `ended`: the run's time has ended with its last sign of life; `waits`: it is queued, and nowhere at work."""

    run: RunDir
    cluster: Cluster
    measured_at: float = float("-inf")
    ended: bool = False
    waits: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: MeasuredGoodput | None = None

    def __post_init__(self) -> None:
        self._seen: dict[Path, tuple[int, int]] = {}
        self._meter, self._rows_bytes = Meter(self.run), 0

    def read(self, *, now: float) -> None:
        """What is new. `now`: of a clock that never goes back, in seconds."""
        if self._has_changed(self.run.events):
            self.events = list(read_records(self.run.events))
        if self._has_changed(self.run.plan):
            self.plan = read_plan(self.run.plan)
        if now - self.measured_at >= GOODPUT_S:
            self.measured_at = now
            self._measure()

    def stand(self, *, ended: bool, waits: bool) -> None:
        """Where the run stands now."""
        if (ended, waits) != (self.ended, self.waits):
            self.ended, self.waits = ended, waits
            self._measure()

    def _has_changed(self, path: Path) -> bool:
        try:
            status = path.stat()
        except OSError:
            return False
        before = self._seen.get(path)
        self._seen[path] = (status.st_size, status.st_mtime_ns)
        return self._seen[path] != before

    def _measure(self) -> None:
        size = self.run.metrics.stat().st_size if self.run.metrics.exists() else 0
        if size < self._rows_bytes:  # cut off, or another file: what was read of it is not there any more
            self._meter = Meter(self.run)
        self._rows_bytes = size
        self._meter.read()
        self.measured = self._meter.measure(None if self.ended else time.time(), waits=self.waits)

    def mfu(self, progress: Progress) -> float | None:
        return mfu_of(self.plan.get(progress.stage, {}), tokens_per_s=progress.status.get("tokens_per_s"))

    def epochs(self, source: str, *, progress: Progress) -> float | None:
        """How often the run has read the source so far; of stages before, what their rows say, or else their plan. None where
        nobody has counted the source."""
        plan = self.plan.get(progress.stage, {})
        unique = next((row.get("unique_tokens") for row in plan.get("exposure", ()) if row.get("source") == source), None)
        if not is_number(unique) or not unique:
            return None
        stages = list(self.plan)
        before = stages[: stages.index(progress.stage)]
        return float(sum(self._tokens(source, stage=stage, progress=progress) for stage in [*before, progress.stage]) / unique)

    def _tokens(self, source: str, *, stage: str, progress: Progress) -> float:
        row, plan = progress.train.get(stage, {}), self.plan[stage]
        if row or stage == progress.stage:
            return float(row.get("tokens_by_source", {}).get(source) or 0.0)
        return float(plan.get("sources", {}).get(source, 0.0) * plan["num_samples"] * plan["seq_length"])

    @property
    def place(self) -> str:
        """`16 h100_sxm on 2 nodes (n1, n2), job 4711`: of the newest launch."""
        cluster = self.cluster
        ranks = f"{cluster.world_size:,} {f'{cluster.gpu} GPU' if cluster.gpu else 'CPU rank'}{'s' * (cluster.world_size > 1)}"
        launch: Row = next((event for event in reversed(self.events) if event.get("kind") == "start"), {})
        nodes = [str(node) for node in launch.get("nodes") or ()]
        names = ", ".join(nodes) if len(nodes) <= SHOWN_NODES else f"{nodes[0]} … {nodes[-1]}"
        on = f" on {cluster.num_nodes:,} nodes" if cluster.num_nodes > 1 else " on one node" if cluster.kind == "slurm" else ""
        job = f", job {launch['job']}" if launch.get("job") else ""
        return f"{ranks}{on}{f' ({names})' if names else ''}{job}"


def event_line(event: Row, *, now: float) -> str:
    """`14:03:12  checkpoint  pretrain, step 1,200, 12 s`; one of yesterday or before has its date."""
    at: Any = event.get("time")
    at, kind = at if is_number(at) else 0.0, str(event.get("kind")).replace("_", " ")
    then, today = time.localtime(at), time.localtime(now)
    clock = time.strftime("%H:%M:%S" if then[:3] == today[:3] else "%m-%d %H:%M", then)
    return f"{clock}  {kind:<{KIND}}  {', '.join(event_words(event))}".rstrip()


def event_words(event: Row) -> Iterator[str]:
    """What a person should know of it."""
    if isinstance(event.get("stage"), str):
        yield event["stage"]
    if is_number(event.get("step")):
        yield f"step {event['step']:,}"
    if is_number(event.get("bytes")):
        yield f"{format_count(event['bytes'])}B"
    if is_number(event.get("seconds")):
        yield format_duration(event["seconds"])
    yield from (f"{key} {event[key]}" for key in ("job", "rank", "node") if event.get(key) is not None)
    yield from (str(event[key]) for key in ("action", "exit", "after") if event.get(key) is not None)
    if told := event.get("error") or event.get("reason") or event.get("cause"):
        yield next(iter(str(told).splitlines()), "")


def newest_events(events: Sequence[Row], *, most: int) -> list[Row]:
    return [event for event in events if isinstance(event, Mapping) and event.get("kind")][-most:]
