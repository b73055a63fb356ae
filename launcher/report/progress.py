"""Where a live run stands, read from its files while another process writes them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.report.format import format_count, format_duration, format_number, format_percent
from launcher.rundir.losses import is_number

# What a resumed view reads of older rows: enough to show the last losses, at once even for a file of gigabytes.
BACKLOG_BYTES = 256 * 1024
STARTING = "starting: ranks load torch and build the model"


class RecordTail:
    """New rows of a JSON-lines file that another process appends to, whole lines only. It begins at most `backlog_bytes`
    before the present end."""

    def __init__(self, path: Path, *, backlog_bytes: int = BACKLOG_BYTES):
        self._path, self._backlog = path, backlog_bytes
        size = path.stat().st_size if path.exists() else 0
        self._offset = max(0, size - backlog_bytes)
        # Inside a row: its rest is not JSON.
        self._skip_partial = self._offset > 0

    def new_rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            size = file.seek(0, 2)
            if size < self._offset:  # cut off, or another file: its newest rows are news
                self._offset = max(0, size - self._backlog)
                self._skip_partial = self._offset > 0
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        if lines and self._skip_partial:
            self._skip_partial = False
            lines = lines[1:]
        return [row for line in lines if (row := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for a line that is not a row: a view of a run never stops for one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


@dataclass
class Progress:
    """Where a run stands: status.json as it is, and the newest losses by stage."""

    status: dict[str, Any] = field(default_factory=dict)
    train: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return str(self.status.get("state", "starting"))

    @property
    def stage(self) -> str:
        return str(self.status.get("stage") or "")

    @property
    def loss(self) -> float | None:
        loss = self.train.get(self.stage, {}).get("loss")
        return self.status.get("loss") if loss is None else loss

    def take(self, row: dict[str, Any]) -> bool:
        """Whether it is a row of training or validation."""
        newest = {"train": self.train, "validation": self.validation}.get(str(row.get("kind")))
        loss = row.get("loss")
        if newest is None or not isinstance(row.get("stage"), str) or not (loss is None or is_number(loss)):
            return False
        earlier = newest.get(row["stage"], {})
        # A step need not hold every source: each keeps its newest loss.
        newest[row["stage"]] = row | {"loss_by_source": earlier.get("loss_by_source", {}) | losses_of(row)}
        return True


def losses_of(row: dict[str, Any]) -> dict[str, float | None]:
    """By source; empty where a row that no rank wrote has something else there."""
    found = row.get("loss_by_source")
    return found if isinstance(found, dict) else {}


def progress_line(progress: Progress, *, mfu: float | None = None, goodput: float | None = None) -> str:
    """One plain line of where the run stands; with parts of 1 where they are known."""
    status = progress.status
    if progress.state == "starting":
        return f"{progress.stage}: {STARTING}".removeprefix(": ")
    if not status.get("num_steps"):
        return f"{progress.stage}: {progress.state}".removeprefix(": ")
    step = f"{progress.stage}: step {status.get('step') or 0:,}/{status.get('num_steps') or 0:,}"
    words = [step, f"loss {format_number(progress.loss)}", f"{format_count(status.get('tokens'))} tokens"]
    if progress.state == "running":
        words.append(f"{format_count(status.get('tokens_per_s'))} tokens/s")
        words += [f"{name} {format_percent(part)}" for name, part in (("MFU", mfu), ("goodput", goodput)) if part is not None]
        words.append(f"{format_duration(status.get('eta_s'))} left")
    else:
        words.append(progress.state)
    return ", ".join(words)


def validation_line(row: dict[str, Any]) -> str:
    by_source = ", ".join(f"{name} {format_number(loss)}" for name, loss in losses_of(row).items())
    return f"{row.get('stage')}: step {row.get('step') or 0:,}, held-out loss {format_number(row.get('loss'))} ({by_source})"
