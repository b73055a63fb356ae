"""Checkpoints on disk, as seen without torch: which are there, which are whole, which is the newest.

checkpoints/<stage>/step_00000100/   the sharded tensors and meta.json
checkpoints/<stage>/index.jsonl      one row a finished checkpoint, append-only
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, read_records

FORMAT_VERSION = 1


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read: what was found, the rule, the fix."""


class UnwrittenError(CheckpointError):
    """A checkpoint that could not be written: as often as not because another rank died meanwhile. What was there is valid."""


class DiskFullError(CheckpointError):
    """A checkpoint that found no room; a person has to make some."""


@dataclass(frozen=True)
class Meta:
    """meta.json: what a checkpoint is. `ledger` is what the run had consumed, `start_ledger` where the stage began."""

    format_version: int
    stage: str
    step: int
    samples: int
    tokens: int
    finished: bool
    layout: dict[str, int]
    ledger: dict[str, dict[str, Any]]
    start_ledger: dict[str, dict[str, Any]]
    tokens_by_source: dict[str, int]
    files: dict[str, int]


@dataclass(frozen=True)
class Saved:
    """A checkpoint found on disk."""

    path: Path
    meta: Meta


def read_checkpoint(path: Path) -> Saved:
    """A checkpoint whose files are all there in the sizes they were written with; CheckpointError otherwise."""
    try:
        row = read_json(path / "meta.json")
        version = row["format_version"]
        meta = Meta(**row) if version == FORMAT_VERSION else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: meta.json is missing or unreadable ({error}); the checkpoint is torn") from error
    if meta is None:
        raise CheckpointError(f"{path}: format {version}, this version reads {FORMAT_VERSION}; use the version that wrote it")
    for name, size in meta.files.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            raise CheckpointError(f"{path / name}: found {found} bytes, written with {size}; the checkpoint is torn")
    return Saved(path, meta)


def newest_checkpoint(run: RunDir, stage: str, *, finished: bool = False) -> tuple[Saved | None, list[str]]:
    """The newest valid checkpoint of a stage (`finished`: a stage's end only), and why newer ones were passed over."""
    directory, refused = run.checkpoints(stage), []
    rows = list(read_records(directory / "index.jsonl"))
    for name in dict.fromkeys(row["path"] for row in reversed(rows)):
        if not (directory / name).exists():
            continue  # pruned, or set aside
        try:
            saved = read_checkpoint(directory / name)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        if saved.meta.finished or not finished:
            return saved, refused
    return None, refused


def stage_end(run: RunDir, stage: str, *, num_samples: int) -> Saved | None:
    """The checkpoint at the end of a stage that lasts `num_samples`; None where it has not come so far."""
    saved, _ = newest_checkpoint(run, stage, finished=True)
    return saved if saved and saved.meta.samples >= num_samples else None


def set_torn_aside(run: RunDir, stage: str) -> None:
    """Renames checkpoints that are not whole to `*.torn`: they are kept for a look, and no longer counted."""
    for path in run.checkpoints(stage).glob("step_*[0-9]"):
        try:
            read_checkpoint(path)
        except CheckpointError:
            torn = path.with_name(path.name + ".torn")
            shutil.rmtree(torn, ignore_errors=True)
            path.rename(torn)


def prune(directory: Path, *, keep_last: int) -> None:
    """Removes all but the newest `keep_last` checkpoints, and all leftovers of writes that never finished. The end of a
    stage stays."""
    for leftover in directory.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = sorted(path for path in directory.glob("step_*[0-9]") if (path / "meta.json").exists())
    for path in steps[:-keep_last]:
        if not read_json(path / "meta.json")["finished"]:
            shutil.rmtree(path)
