"""Where everything of a run lies. `runs/<name>/` is the run; a stage is a row in its files and a folder of checkpoints."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """Paths of one run directory; nothing here touches the disk."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def order(self) -> Path:
        """Which mixture holds from which sample on, and the shards as they were at launch."""
        return self.root / "order.json"

    @property
    def code(self) -> Path:
        return self.root / "code.json"

    def code_copy(self, digest: str) -> Path:
        """Code that jobs of the run work with."""
        return self.root / "code" / digest

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def window_trace(self) -> Path:
        """Which windows each rank read, batch by batch, where data.trace asks for it."""
        return self.root / "windows.jsonl"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def stop_flag(self) -> Path:
        """Exists while someone wants the ranks to save and exit after the step they are in. What is in it says who
        (rundir/stop.py)."""
        return self.root / "stop"

    @property
    def heartbeat(self) -> Path:
        """What the first rank does, and how long it may take for that before the ranks count as hung."""
        return self.root / "heartbeat.json"

    @property
    def stacks(self) -> Path:
        """Where each rank was when it had not moved for too long."""
        return self.root / "stacks"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def checkpoints(self, stage: str) -> Path:
        return self.root / "checkpoints" / stage

    def export(self, stage: str) -> Path:
        """Of a stage, or of a checkpoint of it (`at_step`)."""
        return self.root / "export" / stage

    def eval(self, stage: str) -> Path:
        """What that export was measured to be."""
        return self.root / "eval" / f"{stage}.json"


def at_step(stage: str, step: int | None) -> str:
    """What the export of a chosen checkpoint, and its evaluation, is called; no stage's name has an @. None: the newest, which
    is called as the stage is."""
    return stage if step is None else f"{stage}@{step}"
