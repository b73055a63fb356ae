"""Checkpoints on disk, as seen without torch: which are there, which are whole, which is the newest.

checkpoints/<stage>/step_00000100/   the sharded tensors and meta.json, which has a digest of every file
checkpoints/<stage>/index.jsonl      one row a finished checkpoint, append-only, with the digest of its meta.json
"""

import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, read_records

FORMAT_VERSION = 1
READ_BYTES = 8 << 20


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read: what was found, the rule, the fix."""


class UnwrittenError(CheckpointError):
    """A checkpoint that could not be written: as often as not because another rank died meanwhile. What was there is valid."""


class DiskFullError(CheckpointError):
    """A checkpoint that found no room; a person has to make some."""


@dataclass(frozen=True)
class Meta:
    """meta.json: what a checkpoint is. `ledger` is what the run had consumed, `start_ledger` where the stage began; `files` are
    sizes in bytes, `digests` empty in checkpoints of an older phidias."""

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
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint found on disk."""

    path: Path
    meta: Meta


def read_checkpoint(path: Path, *, digest: str | None = None) -> Saved:
    """A checkpoint whose files are all there in the sizes they were written with; CheckpointError otherwise. `digest`: of its
    meta.json, as the index has it."""
    try:
        if digest and file_digest(path / "meta.json") != digest:
            raise CheckpointError(
                f"{path}: meta.json is not the one that this run wrote; the checkpoint was changed or replaced"
            )
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


def file_digest(path: Path) -> str:
    """XXH3 of a file's content. It tells damage, at the speed of memory: who may write the run directory could write digests
    too."""
    import xxhash  # of ranks and of few verbs

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def damages(saved: Saved, *, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with the content of a checkpoint's files (`names`: of these), all of which is read. Files that an older
    phidias wrote have no digests, and pass."""
    found = []
    for name in saved.meta.files if names is None else names:
        wanted = saved.meta.digests.get(name)
        try:
            if wanted and file_digest(saved.path / name) != wanted:
                found.append(f"{saved.path / name}: its content is not what was written; the checkpoint is damaged")
        except OSError as error:
            found.append(f"{saved.path / name}: {error.strerror}; the checkpoint is torn")
    return found


def indexed(run: RunDir, stage: str) -> Iterator[tuple[Path, str | None]]:
    """Checkpoints that the index names and that are still there, newest first, with the digests of their meta.json."""
    directory = run.checkpoints(stage)
    digests: dict[str, str | None] = {}
    for row in reversed(list(read_records(directory / "index.jsonl"))):
        digests.setdefault(row["path"], row.get("meta"))
    for name, digest in digests.items():
        if (directory / name).exists():  # else it was pruned, or set aside
            yield directory / name, digest


def newest_checkpoint(
    run: RunDir, stage: str, *, finished: bool = False, passing: Collection[str] = ()
) -> tuple[Saved | None, list[str]]:
    """The newest valid checkpoint of a stage (`finished`: a stage's end only; not one of the folders of `passing`), and why
    newer ones were passed over. Contents are not read: `damages` does that."""
    refused = []
    for path, digest in indexed(run, stage):
        if path.name in passing:
            continue
        try:
            saved = read_checkpoint(path, digest=digest)
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


def set_torn_aside(run: RunDir, stage: str, *, damaged: Collection[str] = ()) -> None:
    """Renames checkpoints that are not whole, and those that are known to be `damaged`, to `*.torn`: they are kept for a look,
    and no longer counted."""
    digests = dict(indexed(run, stage))
    for path in run.checkpoints(stage).glob("step_*[0-9]"):
        try:
            read_checkpoint(path, digest=digests.get(path))
            if path.name in damaged:
                raise CheckpointError
        except CheckpointError:
            torn = path.with_name(path.name + ".torn")
            shutil.rmtree(torn, ignore_errors=True)
            path.rename(torn)


def prune(directory: Path, *, keep_last: int, keep_every_tokens: float | None = None) -> list[str]:
    """Removes all but the newest `keep_last` checkpoints, the first one past every `keep_every_tokens`, and ends of stages; and
    all leftovers of writes that never finished. The names of those removed."""
    for leftover in directory.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = sorted(path for path in directory.glob("step_*[0-9]") if (path / "meta.json").exists())
    kept, removed = milestones(directory, every_tokens=keep_every_tokens), []
    for path in steps[:-keep_last]:
        if path.name not in kept and not read_json(path / "meta.json")["finished"]:
            shutil.rmtree(path)
            removed.append(path.name)
    return removed


def milestones(directory: Path, *, every_tokens: float | None) -> set[str]:
    """The first checkpoint at or past each multiple, of all that were ever written."""
    found, passed = set[str](), 0.0
    for row in read_records(directory / "index.jsonl") if every_tokens else ():
        if row.get("tokens", 0) // every_tokens > passed:
            found.add(row["path"])
        passed = max(passed, row.get("tokens", 0) // every_tokens)
    return found
