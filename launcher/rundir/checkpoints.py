"""Checkpoints on disk, as seen without torch: which are there, which are whole, which is the newest.

checkpoints/<stage>/step_00000100/   the sharded tensors and meta.json, which has a digest of every file
checkpoints/<stage>/index.jsonl      one row a finished checkpoint, append-only, with the digest of its meta.json

A folder that the index does not name is none: a crash left it there, and the run replaces it when it comes past that step.
Folders beside them: `.partial` is being written, `.torn` was found damaged, `.rewound` was left behind by a rewind.
"""

import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_json, read_records, replace_folder

FORMAT_VERSION = 2
READABLE = (1, 2)  # 1: always fully_reshardable, without what was added since
READ_BYTES = 8 << 20
STEP = re.compile(r"step_\d+")  # a name in the index
REWOUND = "rewound"  # the kind of an index row, and how the folder's name ends

# Megatron's names: any layout reads the first; the second, which is faster to write, only one whose `reshard` is equal.
FULLY_RESHARDABLE, DP_RESHARDABLE = "fully_reshardable", "dp_reshardable"


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read: what was found, the rule, the fix."""


class UnwrittenError(CheckpointError):
    """A checkpoint that could not be written: as often as not because another rank died meanwhile. What was there is valid."""


class DiskFullError(CheckpointError):
    """A checkpoint that found no room; a person has to make some."""


@dataclass(frozen=True)
class Meta:
    """meta.json: what a checkpoint is. `ledger` is what the run had consumed, `start_ledger` where the stage began; `files` are
    sizes in bytes, `digests` empty in checkpoints of an older phidias. `reshard`: what a layout must equal to read one that is
    dp_reshardable (rundir/reshard.py). `health` is the state of what judges the steps, `skipped_samples` were left out up to
    here, `validation_loss` is the held-out loss of this very step, where it was measured."""

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
    sharding: str = FULLY_RESHARDABLE
    reshard: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    skipped_samples: int = 0
    validation_loss: float | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint found on disk."""

    path: Path
    meta: Meta


def read_checkpoint(path: Path, *, digest: frozenset[str] | None = None) -> Saved:
    """A checkpoint whose files are all there in the sizes they were written with; CheckpointError otherwise. `digest`: of its
    meta.json, one of those that the index has; None: any."""
    try:
        if digest and file_digest(path / "meta.json") not in digest:
            raise CheckpointError(
                f"{path}: meta.json is not the one that this run wrote; the checkpoint was changed or replaced"
            )
        row = read_json(path / "meta.json")
        version = row["format_version"]
        meta = Meta(**row) if version in READABLE else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: meta.json is missing or unreadable ({error}); the checkpoint is torn") from error
    if meta is None:
        raise CheckpointError(
            f"{path}: format {version}, this version reads up to {FORMAT_VERSION}; use the version that wrote it"
        )
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


def publish(partial: Path, final: Path, *, row: Mapping[str, Any]) -> None:
    """Puts a whole checkpoint, its meta.json included, in place of what may be there of its step, and names it in the index:
    `row` with `path` and `meta`. After a crash at any moment the index names what is there, or nothing:

    - one that the index names is replaced: the index has the digests of both before the folder changes;
    - else the folder is nobody's until its row is written."""
    index, meta = final.parent / "index.jsonl", file_digest(partial / "meta.json")
    is_named = final.name in named(final.parent)
    if not is_named:
        replace_folder(partial, final)
    append_record(index, "checkpoint", **{**row, "path": final.name, "meta": meta})
    with index.open("rb") as file:  # on a network file system it lies in this node's memory until then
        os.fsync(file.fileno())
    if is_named:
        replace_folder(partial, final)


def named(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of the index of each checkpoint, oldest first, those that were pruned included; of one that was rewound, those
    since. Whose newest row is the oldest comes first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_records(directory / "index.jsonl"):
        name = str(row.get("path"))
        before = rows.pop(name, [])
        if row.get("kind") != REWOUND and STEP.fullmatch(name):
            rows[name] = [*before, row]
    return rows


def indexed(run: RunDir, stage: str) -> Iterator[tuple[Path, frozenset[str] | None]]:
    """Checkpoints that the index names and that are still there, newest first, with the digests that their meta.json may have:
    several where a crash came while one replaced another. None: an older phidias recorded none."""
    directory = run.checkpoints(stage)
    for name, rows in reversed(named(directory).items()):
        if (directory / name).exists():  # else it was pruned, or set aside
            digests = [row.get("meta") for row in rows]
            yield directory / name, None if None in digests else frozenset(map(str, digests))


def lost(run: RunDir, stage: str) -> list[str]:
    """Why a stage must not begin anew though it has no checkpoint: its index names some, and none is there. Empty where some
    are, or none was ever named."""
    directory = run.checkpoints(stage)
    names = list(named(directory))
    if not names or any((directory / name).exists() for name in names):
        return []
    found = f"{directory}: index.jsonl names {names[-1]}, and no checkpoint that it names is there"
    return [f"{found}. Fix: restore the folder; to begin stage {stage} anew, remove {directory}"]


def newest_checkpoint(
    run: RunDir, stage: str, *, finished: bool = False, passing: Collection[str] = ()
) -> tuple[Saved | None, list[str]]:
    """The newest valid checkpoint of a stage (`finished`: a stage's end only; not one of the folders of `passing`), and why
    newer ones were passed over, or that all are `lost`. Contents are not read: `damages` does that."""
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
    return None, refused + lost(run, stage)


def checkpoint_at(run: RunDir, stage: str, *, step: int) -> Saved:
    """The checkpoint of that step. CheckpointError where it was never written, is gone or torn, with those there are."""
    for path, digest in indexed(run, stage):
        if int(path.name.rpartition("_")[2]) == step:
            return read_checkpoint(path, digest=digest)
    steps = whole_numbers(run, stage)
    there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
    gone = f"step_{step:08d}" in named(run.checkpoints(stage))
    found = f"stage {stage} of run {run.name} has no checkpoint of step {step}" + (" any more: it was pruned" * gone)
    fix = f"step={steps[-1]}" if steps else "train the stage first"
    rule = "stage.checkpoint.keep_every_tokens keeps some of a stage"
    raise CheckpointError(f"{found}; {there}, and {rule}. Fix: {fix}")


def whole_numbers(run: RunDir, stage: str) -> list[int]:
    """The steps of the checkpoints that are there."""
    return [int(path.name.rpartition("_")[2]) for path in whole_steps(run.checkpoints(stage))]


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


def undo_replacing(run: RunDir) -> None:
    """Takes back the checkpoints, of any stage, whose folder a crash left without its successor (records.replace_folder). Of a
    run that is locked, before its checkpoints are looked at."""
    for old in run.root.glob("checkpoints/*/step_*[0-9].old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(old.with_suffix(""))


def set_later_aside(run: RunDir, stage: str, *, samples: int) -> list[str]:
    """Renames checkpoints of more than `samples` to `*.rewound`: the run goes on from an earlier one, and must not come back to
    them. The newest goes first, and from the index before its folder does, so that a crash leaves no later one without those
    before it. The names of those renamed."""
    directory, renamed, rows = run.checkpoints(stage), [], written(run.checkpoints(stage))
    for path in reversed(whole_steps(directory)):
        reached = recorded(path, rows=rows, name="samples")
        if reached is not None and reached > samples:
            aside, tokens = path.with_name(f"{path.name}.{REWOUND}"), recorded(path, rows=rows, name="tokens")
            append_record(directory / "index.jsonl", REWOUND, path=path.name, tokens=tokens, to_samples=samples)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            renamed.append(path.name)
    return renamed


def recorded(path: Path, *, rows: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """Of a checkpoint, by its row of the index; where that does not say, as in an older one, by its meta.json. None where
    neither can be read."""
    if (found := rows[path.name].get(name)) is None:
        try:
            found = read_json(path / "meta.json").get(name)
        except (OSError, ValueError, AttributeError):
            return None
    return found


def prune(
    directory: Path,
    *,
    keep_last: int,
    keep_every_tokens: float | None = None,
    keep_best: int = 0,
    writing: str | None = None,
) -> list[str]:
    """Removes all but the newest `keep_last` checkpoints, the first one past every `keep_every_tokens`, the `keep_best` of
    lowest held-out loss, and ends of stages; and all leftovers: of writes that never finished, but for `writing`, the step that
    is being written now, and of rewinds that the run has come past again. The names of those removed."""
    steps = whole_steps(directory)
    for leftover in [*directory.glob("*.partial"), *directory.glob("*.pruned"), *passed_again(directory, steps=steps)]:
        if leftover.name not in (writing, f"{writing}.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
    kept = milestones(directory, every_tokens=keep_every_tokens) | best(directory, steps=steps, count=keep_best)
    removed, rows = [], written(directory)
    for path in steps[:-keep_last]:
        if path.name not in kept and recorded(path, rows=rows, name="finished") is False:
            with suppress(OSError):  # one that cannot go is no reason to lose the next
                doomed = path.rename(path.with_name(f"{path.name}.pruned"))  # a leftover, where this is broken off
                shutil.rmtree(doomed, ignore_errors=True)
                removed.append(path.name)
    return removed


def whole_steps(directory: Path) -> list[Path]:
    """The checkpoints that were published and are there, by step."""
    return sorted(path for name in named(directory) if ((path := directory / name) / "meta.json").exists())


def passed_again(directory: Path, *, steps: Sequence[Path]) -> list[Path]:
    """What rewinds left behind, up to the newest checkpoint there is: until then it may be wanted for a look."""
    newest = steps[-1].name if steps else ""
    return [path for path in directory.glob(f"step_*.{REWOUND}") if path.stem <= newest]


def written(directory: Path) -> dict[str, dict[str, Any]]:
    """The newest row of the index of each checkpoint, those that were pruned included; not of those that were rewound."""
    return {name: rows[-1] for name, rows in named(directory).items()}


def milestones(directory: Path, *, every_tokens: float | None) -> set[str]:
    """The first checkpoint at or past each multiple, of all that were ever written."""
    found, passed = set[str](), 0.0
    rows = sorted(written(directory).values(), key=lambda row: row.get("tokens", 0)) if every_tokens else []
    for row in rows:
        multiple = row.get("tokens", 0) // every_tokens
        if multiple > passed:
            found.add(row["path"])
            passed = multiple
    return found


def best(directory: Path, *, steps: Sequence[Path], count: int) -> set[str]:
    """The `count` of lowest held-out loss, of those that are there and were measured."""
    rows, there = written(directory) if count else {}, {path.name for path in steps}
    losses = {name: row.get("validation_loss") for name, row in rows.items() if name in there}
    measured = {name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return set(sorted(measured, key=measured.__getitem__)[:count])
