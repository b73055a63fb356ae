"""A rank's start: how long it takes from its process's start to its first step, phase by phase; and kernels that give the same
bits each time."""

import os
import time
from pathlib import Path

import torch

from training.metrics import Metrics


class Phases:
    """`mark` ends a phase, the first time it is called with its name; `end` ends the last one, and tells the run."""

    def __init__(self) -> None:
        self.born = self.last = time.monotonic() - process_age_s()
        self.seconds: dict[str, float] | None = {}

    def mark(self, name: str) -> None:
        now = time.monotonic()
        if self.seconds is not None and name not in self.seconds:
            self.seconds[name] = round(now - self.last, 3)
            self.last = now

    def end(self, metrics: Metrics) -> None:
        self.mark("first_step_s")
        if self.seconds is not None:
            metrics.event("started", phases=self.seconds, total_s=round(time.monotonic() - self.born, 3))
            self.seconds = None


def process_age_s() -> float:
    """Seconds since this process was started, the interpreter's own start included. proc(5): field 22 of stat, in ticks after
    boot."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def compute_alike() -> None:
    """Before anything is computed: kernels of torch, cuBLAS, transformer-engine and NCCL that add up in the same order each
    time, in place of faster ones. An operation that has none raises."""
    wanted = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Ring"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
