"""Ranks that hang: seen from the heartbeat of the first, told by the stacks that all leave."""

import json
import shutil
import time
from dataclasses import dataclass
from typing import Any

from launcher.config.monitoring import Hang
from launcher.rundir.paths import RunDir

# The ranks leave their stacks at the limit; until then the launcher waits a little longer.
GRACE_S = 5.0


@dataclass(frozen=True)
class Hung:
    """Where ranks stood still, and those that left no stack, `rank 3 on n2`, by node."""

    stage: str
    phase: str
    step: int
    seconds: float
    silent: dict[str, list[int]]

    @property
    def node(self) -> str | None:
        """The one that all others wait for, where it is one."""
        return next(iter(self.silent)) if len(self.silent) == 1 else None

    def __str__(self) -> str:
        where = f"{self.phase} after step {self.step}" if self.phase != "start" else "start"
        ranks = [f"rank {rank} on {node}" for node, ranks in self.silent.items() for rank in ranks]
        silent = f"; no stack came from {', '.join(ranks[:8])}{' ...' if len(ranks) > 8 else ''}" if ranks else ""
        return f"hung: nothing moved for {self.seconds:.0f} s ({where}){silent}"


class HangWatch:
    """Looks at the heartbeat of the ranks of one stage, which are about to be started. Times are this process's own: clocks of
    nodes may differ."""

    def __init__(self, run: RunDir, *, stage: str, hang: Hang):
        self.run, self.stage, self.hang = run, stage, hang
        self.since, self.seen = time.monotonic(), (0, "")
        run.heartbeat.unlink(missing_ok=True)
        shutil.rmtree(run.stacks / stage, ignore_errors=True)

    def hung(self) -> Hung | None:
        now, found = time.monotonic(), self.look()
        if found != self.seen:
            self.since, self.seen = now, found
        beat = self.beat()
        still_s = now - self.since
        if still_s <= beat["limit_s"] + GRACE_S:
            return None
        return Hung(self.stage, beat["phase"], beat["step"], still_s, self.silent())

    def look(self) -> tuple[int, str]:
        try:
            return self.run.heartbeat.stat().st_mtime_ns, self.run.heartbeat.read_text()
        except OSError:
            return self.seen

    def beat(self) -> dict[str, Any]:
        """What the first rank said last; before it has said anything, or while it writes, as at the start."""
        try:
            beat = json.loads(self.seen[1])
            return {"phase": str(beat["phase"]), "step": int(beat["step"]), "limit_s": float(beat["limit_s"])}
        except (ValueError, TypeError, KeyError):
            return {"phase": "start", "step": 0, "limit_s": self.hang.start_s}

    def silent(self) -> dict[str, list[int]]:
        """Ranks that had begun and left no stack, by node; nobody where none did: then it is not known who."""
        files = sorted((self.run.stacks / self.stage).glob("rank_*.txt"))
        empty = [file for file in files if not file.stat().st_size]
        silent: dict[str, list[int]] = {}
        for file in empty if len(empty) < len(files) else []:
            _, rank, node = file.stem.split("_", 2)
            silent.setdefault(node, []).append(int(rank))
        return silent
