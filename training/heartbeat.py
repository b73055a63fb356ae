"""Signs of life. The first rank tells the launcher what it does and how long that may take; every rank leaves its stack where
it has not moved for so long, from a thread of its own that a hung collective does not stop.

A rank that left none is stopped itself, or gone with its node: the others wait for it.
"""

import faulthandler
import json
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.config.monitoring import Hang
from launcher.rundir.paths import RunDir

STEPS = 50  # of which the median is taken
BEAT_S = 1.0  # short steps need not all be told
# The file is written in place, a step at a time: always as long, so that no reader sees the end of an older text.
WIDTH = 256


class Heartbeat:
    """Of one rank, from its start on; `close` ends it."""

    def __init__(self, run: RunDir, *, stage: str, rank: int, hang: Hang):
        self.hang, self.times = hang, deque[float](maxlen=STEPS)
        folder = run.stacks / stage
        folder.mkdir(parents=True, exist_ok=True)
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.stack = (folder / f"rank_{rank:05d}_{node}.txt").open("w")
        self.beats = os.open(run.heartbeat, os.O_WRONLY | os.O_CREAT, 0o666) if rank == 0 else None
        self._next_step(0)

    def step(self, step: int, *, seconds: float) -> None:
        """A step has ended; the next one begins."""
        self.times.append(seconds)
        if len(self.times) == 1 or time.monotonic() - self.told >= BEAT_S:
            self._next_step(step)

    @contextmanager
    def pause(self, phase: str, *, step: int) -> Iterator[None]:
        """Something else than steps, while the block runs; then steps again."""
        self._tell(phase, step=step, limit_s=self.hang.pause_s)
        yield
        self._next_step(step)

    def end(self, *, step: int) -> None:
        """No step comes any more: what is open is closed, by sinks and by the interpreter."""
        self._tell("end", step=step, limit_s=self.hang.pause_s)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.stack.close()
        if self.beats is not None:
            os.close(self.beats)

    def _next_step(self, step: int) -> None:
        if self.times:
            limit_s = max(self.hang.least_s, self.hang.factor * statistics.median(self.times))
            self._tell("step", step=step, limit_s=limit_s)
        else:
            self._tell("start", step=step, limit_s=self.hang.start_s)

    def _tell(self, phase: str, *, step: int, limit_s: float) -> None:
        self.told = time.monotonic()
        if os.fstat(self.stack.fileno()).st_size:  # it moved after all
            self.stack.seek(0)
            self.stack.truncate()
        faulthandler.dump_traceback_later(limit_s, file=self.stack)
        if self.beats is not None:
            text = json.dumps({"phase": phase, "step": step, "limit_s": round(limit_s, 3)})
            os.pwrite(self.beats, f"{text:<{WIDTH}}\n".encode(), 0)
            os.utime(self.beats)  # also where the text is the same: it is the time that is looked at
