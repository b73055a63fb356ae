"""The folder a source is written in, and what may lie where it is published.

A source is written to `<data_dir>/<name>.partial` under a lock and renamed when its manifest is in it: it is there whole, or
not at all. What is there was made by the settings in its manifest, and other settings never overwrite it.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import xxhash

from data_prep.errors import DataError
from data_prep.indexed import naming_full_disk, sync_directory
from data_prep.manifest import Manifest, TokenizerEntry, damaged_shards, read_manifest, write_manifest
from data_prep.readers import InputFile
from data_prep.spec import DataSettings, Source

REJECTS, INPUTS = "rejects.jsonl", "inputs.json"

Settings = dict[str, bool | int | float | str]


def settings_of(source: Source, *, files: tuple[InputFile, ...], settings: DataSettings, seed: int) -> Settings:
    """All that decides what is in the shards, the tokenizer apart. Shares, epochs and tolerances do not."""
    folder = os.path.commonpath([file.path.rpartition("/")[0] for file in files]) if files else ""
    named = [(file.path.removeprefix(folder), file.size, file.version) for file in files]  # the whole folder may move
    digest = xxhash.xxh3_128_hexdigest(json.dumps(named).encode())
    return {
        "format": source.format or "",  # a source with inputs has one
        "text_field": source.text_field,
        "held_out_fraction": settings.held_out_fraction,
        "shard_tokens": settings.shard_tokens,
        "length_buckets": str(list(settings.length_buckets)),
        "seed": seed,
        "inputs": f"{len(files)} files, {sum(file.size for file in files)} bytes, {digest}",
    }


def existing(directory: Path, *, made_by: Settings, tokenizer: TokenizerEntry, files: tuple[InputFile, ...]) -> Manifest | None:
    """The manifest of a source prepared with these settings; None where nothing is there. DataError: with other settings."""
    if not directory.exists():
        return None
    if not (directory / "manifest.json").exists():
        raise DataError(
            f"{directory} exists without a manifest.json; a source is written whole or not at all; "
            "remove or rename it; shards that Megatron wrote are taken over by `phidias data action=import`"
        )
    manifest = read_manifest(directory)
    found = {"length_buckets": "[]", **manifest.settings, "tokenizer": manifest.tokenizer.fingerprint}
    wanted: Settings = {**made_by, "tokenizer": tokenizer.fingerprint}
    keys = ["tokenizer"] if manifest.settings.get("imported") else list(wanted)
    differing = [f"{key}: found {found.get(key)}, wanted {wanted[key]}" for key in keys if found.get(key) != wanted[key]]
    if differing:
        changed = _changed_inputs(directory, files=files)
        raise DataError(
            f"source '{directory.name}' was prepared with other settings: {'; '.join(differing)}{changed}; "
            f"prepared data is never overwritten; remove {directory} or choose another run.data_dir"
        )
    if damaged := damaged_shards(directory, manifest=manifest):
        raise DataError(
            f"source '{directory.name}': {'; '.join(damaged)}; shards are written once and never repaired; "
            f"restore them, or remove {directory} and run `phidias data` again"
        )
    return manifest


def _changed_inputs(directory: Path, *, files: tuple[InputFile, ...]) -> str:
    try:
        before = {tuple(file) for file in json.loads((directory / INPUTS).read_bytes())}
    except (OSError, ValueError):
        return ""
    changed = sorted({path for path, _, _ in before ^ {astuple(file) for file in files}})
    named = [*changed[:3], *(["..."] if len(changed) > 3 else [])]
    return f" (inputs added, removed or changed: {', '.join(named)})" if named else ""


@contextlib.contextmanager
def workplace(directory: Path) -> Iterator[Path]:
    """`<directory>.partial`, locked against other processes. After an error only the list of rejects stays in it."""
    work = directory.with_name(f"{directory.name}.partial")
    with naming_full_disk(work):
        work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        _lock(descriptor, work=work)
        try:
            yield work
        except BaseException:
            remove_contents(work, keep=REJECTS)
            raise
        finally:
            with contextlib.suppress(OSError):  # published, or the rejects are in it
                work.rmdir()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, work: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"another process is writing {work}; a source has one writer at a time; wait for it or stop it"
        ) from error
    except OSError:  # a file system without locks
        return


def remove_contents(work: Path, *, keep: str | None = None) -> None:
    """Empties the folder, but for the file `keep`."""
    for path in list(work.iterdir()) if work.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()


def publish(work: Path, *, directory: Path, manifest: Manifest, files: tuple[InputFile, ...]) -> None:
    """Writes the list of inputs and the manifest, and gives the folder its name. DataError: the disk is full."""
    with naming_full_disk(work / INPUTS):
        (work / INPUTS).write_text(json.dumps([astuple(file) for file in files]), encoding="utf-8")
    write_manifest(work, manifest=manifest)
    work.rename(directory)
    sync_directory(directory.parent)
