"""Append-only records of a run and small atomic files.

events.jsonl    one row per thing that happened: `time` (Unix seconds), `kind`, `stage`, and what the kind needs
metrics.jsonl   rows of kind `train` (every log_interval steps) and `validation`, keyed by `stage` and `samples`
status.json     where the run stands now, replaced whole
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append_record(path: Path, kind: str, /, **fields: Any) -> dict[str, Any]:
    """Adds one row. A single O_APPEND write: rows of several processes never mix. A row that an earlier crash cut off is
    closed first, so that it spoils nothing but itself."""
    row = {"time": round(time.time(), 3), "kind": kind, **fields}
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        line = (b"\n" if cut_off else b"") + json.dumps(row).encode() + b"\n"
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, "the disk is full", str(path))
    finally:
        os.close(descriptor)
    return row


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows so far, oldest first; rows cut off by a crash, and what is none, are passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def write_atomic(path: Path, text: str) -> None:
    """Replaces the file whole, or leaves the old one as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def replace_folder(new: Path, /, final: Path) -> None:
    """Puts a folder that is whole in place of another; between the two renames the old one lies beside it as `*.old`, the only
    one there is."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        new.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def parse_status(text: str) -> dict[str, Any]:
    """The content of status.json; empty where it was torn or edited by hand: one broken file must not hide the rest."""
    try:
        status = json.loads(text)
    except ValueError:
        return {}
    return status if isinstance(status, dict) else {}
