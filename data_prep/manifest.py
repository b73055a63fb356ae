"""manifest.json of a source: what its shards hold, what made them, and the checksums that prove it.

Reading needs numpy and pydantic alone. Fields and rules: docs/data_format.md.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_prep.errors import DataError
from data_prep.fields import STRICT
from data_prep.indexed import Ids, Index, ShardEntry, map_tokens, naming_full_disk, partial, read_index, sync_directory
from data_prep.storage import Folder, as_folder

__all__ = [
    "Manifest",
    "ShardEntry",
    "SplitEntry",
    "Statistics",
    "TokenizerEntry",
    "accepted_states",
    "damaged_shards",
    "digest_of",
    "document_lengths",
    "encode_manifest",
    "import_shards",
    "imported_manifest",
    "read_manifest",
    "verify_source",
    "write_manifest",
]

FORMAT_VERSION = 1
FILE, RECEIPT = "manifest.json", "verified.json"
BLOCK_TOKENS = 1 << 22


@dataclass(config=STRICT, frozen=True)
class TokenizerEntry:
    """Which tokenizer wrote the ids; equal fingerprints mean equal ids for equal text."""

    _: KW_ONLY
    kind: str
    fingerprint: str
    vocab_size: int
    eod_id: int


@dataclass(config=STRICT, frozen=True)
class SplitEntry:
    """The shards of one split, in the order their token streams are laid end to end."""

    _: KW_ONLY
    documents: int
    tokens: int
    shards: tuple[ShardEntry, ...]


@dataclass(config=STRICT, frozen=True)
class Statistics:
    """What was seen on the way. `rows` = documents + empty + rejected + dropped. `dropped`: rows by step and reason; `kept`:
    rows that passed each step, in the order of the steps; `found`: kept documents by what a step said of them, such as their
    language. `length_documents`, `length_tokens`: of training documents with 2^b to 2^(b+1) - 1 tokens, EOD included, at
    place b. `code`: the versions of data_prep that wrote it."""

    _: KW_ONLY
    rows: int
    dropped: dict[str, dict[str, int]]
    kept: dict[str, int]
    found: dict[str, dict[str, int]]
    length_documents: tuple[int, ...]
    length_tokens: tuple[int, ...]
    code: tuple[str, ...]


@dataclass(config=STRICT, frozen=True)
class Manifest:
    """A source on disk. `text_bytes`: UTF-8 bytes of its documents. `settings`: what made it, compared on the next run.
    `statistics` is missing where shards were imported, or made before there were any."""

    _: KW_ONLY
    format_version: int
    source: str
    dtype: Literal["int32", "uint16"]
    tokenizer: TokenizerEntry
    text_bytes: int
    train: SplitEntry
    held_out: SplitEntry
    settings: dict[str, bool | int | float | str]
    rejected_rows: int
    empty_documents: int
    statistics: Statistics | None = None


def dtype_for(vocab_size: int) -> Literal["int32", "uint16"]:
    """Megatron's rule, so that its readers and ours agree on the bytes."""
    return "uint16" if vocab_size < 65_500 else "int32"


def split_of(shards: Sequence[ShardEntry]) -> SplitEntry:
    """The split that these shards make up."""
    return SplitEntry(
        documents=sum(shard.documents for shard in shards), tokens=sum(shard.tokens for shard in shards), shards=tuple(shards)
    )


def digest_of(shards: Iterable[ShardEntry]) -> str:
    """Equal where they hold the same tokens in the same order, by their checksums."""
    return blake2b("\n".join(shard.bin_xxh3 for shard in shards).encode(), digest_size=16).hexdigest()


def read_manifest(place: Path | Folder) -> Manifest:
    """The manifest of the source in `place`. DataError where it is missing, unreadable or newer than this code."""
    folder = as_folder(place)
    path, again = folder.path(FILE), f"remove {folder.place} and run `phidias data`"
    try:
        fields = json.loads(folder.read_bytes(FILE))
    except FileNotFoundError as error:
        raise DataError(
            f"no data for source '{folder.name}': {path} is missing; "
            "a source is read from its shards and their manifest; run `phidias data` first, or correct run.data_dir"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); {again}") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format_version {version!r}; this code reads {FORMAT_VERSION}; use the code that wrote it")
    try:
        return TypeAdapter(Manifest).validate_python(fields)
    except ValidationError as error:
        raise DataError(f"{path} is not a manifest: {error}; {again}") from error


def write_manifest(directory: Path, *, manifest: Manifest) -> None:
    """Writes manifest.json in one step: readers see the old one, the new one, or none. DataError: the disk is full."""
    path = directory / FILE
    try:
        with naming_full_disk(path), partial(path).open("wb") as file:
            file.write(encode_manifest(manifest))
            file.flush()
            os.fsync(file.fileno())
        partial(path).replace(path)
    finally:
        partial(path).unlink(missing_ok=True)
    sync_directory(directory)


def encode_manifest(manifest: Manifest) -> bytes:
    """As manifest.json has it."""
    return json.dumps(asdict(manifest), indent=2).encode()


def import_shards(directory: Path, *, source: str, tokenizer: TokenizerEntry, held_out: Sequence[str] = ()) -> Manifest:
    """Writes a manifest for shards that Megatron wrote into `directory`, after reading them whole; the files stay as they are.

    `held_out` names the stems kept for validation; the others, in the order of their names, are for training.
    DataError: a document that does not end in EOD, an id outside the vocabulary, holes in a .bin, shards of several dtypes."""
    stems = sorted(path.stem for path in directory.glob("*.idx"))
    unknown = sorted(set(held_out) - set(stems))
    if not stems or unknown:
        raise DataError(
            f"{directory} holds shards {stems}, asked for {unknown or 'any'}; give the folder of .bin and .idx files"
        )
    indexes = {stem: read_index(directory / f"{stem}.idx") for stem in stems}
    dtypes = sorted({index.dtype.name for index in indexes.values()})
    if dtypes not in (["int32"], ["uint16"]):
        raise DataError(f"{directory} holds token ids as {dtypes}; a source has one of int32, uint16; convert the shards")
    entries = {stem: _import_shard(directory / stem, index=index, tokenizer=tokenizer) for stem, index in indexes.items()}
    manifest = TypeAdapter(Manifest).validate_python(
        {
            "format_version": FORMAT_VERSION,
            "source": source,
            "dtype": dtypes[0],
            "tokenizer": tokenizer,
            "text_bytes": 0,  # the text is not here to be counted
            "train": split_of([entries[stem] for stem in stems if stem not in held_out]),
            "held_out": split_of([entries[stem] for stem in stems if stem in held_out]),
            "settings": {"imported": True},
            "rejected_rows": 0,
            "empty_documents": 0,
        }
    )
    if not manifest.train.tokens:
        raise DataError(f"{directory} holds no training documents; a source needs at least one shard outside held_out")
    write_manifest(directory, manifest=manifest)
    return manifest


def imported_manifest(directory: Path) -> Manifest | None:
    """The manifest that import_shards wrote there, if one did."""
    if not (directory / FILE).exists():
        return None
    manifest = read_manifest(directory)
    return manifest if manifest.settings.get("imported") else None


def damaged_shards(place: Path | Folder, *, manifest: Manifest) -> list[str]:
    """Shards that are missing or not as long as the manifest says, one line each; reads sizes only."""
    folder, shards = as_folder(place), (*manifest.train.shards, *manifest.held_out.shards)
    states = folder.states([f"{shard.file}{suffix}" for shard in shards for suffix in (".bin", ".idx")])
    found = []
    for shard in shards:
        path, state = folder.path(f"{shard.file}.bin"), states.get(f"{shard.file}.bin")
        if state is None or state.size != shard.bin_bytes:
            what = f"holds {state.size} bytes" if state else "is missing"
            found.append(f"{path} {what}, the manifest says {shard.bin_bytes}")
        if f"{shard.file}.idx" not in states:
            found.append(f"{folder.path(f'{shard.file}.idx')} is missing")
    return found


def document_lengths(index: Index) -> NDArray[np.int64]:
    """Tokens of each document of a shard [D], EOD included."""
    return np.diff(_document_borders(index))


def verify_source(place: Path | Folder) -> list[str]:
    """What is wrong with the shards of a source, against its manifest: one line a finding, none where all is well.

    Where all is well in a folder of this machine, verified.json is written: the files as they were read, see
    `accepted_states`. Shards in object storage are read through a folder of TMPDIR, one at a time."""
    folder = as_folder(place)
    manifest = read_manifest(folder)
    shards = (*manifest.train.shards, *manifest.held_out.shards)
    directory = folder.local
    if directory is None:
        return [problem for shard in shards for problem in _verify_elsewhere(folder, shard=shard)]
    before = _receipt(directory, shards=shards)
    found = [problem for shard in shards for problem in _verify_shard(directory / shard.file, shard=shard)]
    if not found and before and before == _receipt(directory, shards=shards):
        _write_receipt(directory, receipt=before)
    return found


def _verify_elsewhere(folder: Folder, *, shard: ShardEntry) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="phidias-verify-") as room:
        try:
            for path in _files(Path(room) / shard.file):
                folder.copy(path.name, path)
        except FileNotFoundError as error:
            return [f"{folder.path(shard.file)}: {error.args[0]} is missing; prepare or copy the source again"]
        found = _verify_shard(Path(room) / shard.file, shard=shard)
        return [problem.replace(room, folder.place) for problem in found]


def accepted_states(directory: Path) -> dict[str, list[Any]]:
    """[size in bytes, mtime in ns as text] of each file that `verify_source` last found to be what the manifest says.

    Empty where it never ran on this manifest."""
    try:
        receipt = json.loads((directory / RECEIPT).read_bytes())
        same = receipt["manifest"] == _digest_of(directory / FILE)
        return dict(receipt["files"]) if same else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _receipt(directory: Path, *, shards: Sequence[ShardEntry]) -> dict[str, Any] | None:
    """The state of the files now; None where one is missing."""
    paths = [path for shard in shards for path in _files(directory / shard.file)]
    try:
        stats = {path.name: path.stat() for path in paths}
        manifest = _digest_of(directory / FILE)
    except FileNotFoundError:
        return None
    return {"manifest": manifest, "files": {name: [stat.st_size, str(stat.st_mtime_ns)] for name, stat in stats.items()}}


def _digest_of(path: Path) -> str:
    """Of the standard library: what receipts of an older phidias hold."""
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _write_receipt(directory: Path, *, receipt: dict[str, Any]) -> None:
    """In one step. Data may lie where nobody may write: then there is no receipt, and the finding stands."""
    path = directory / RECEIPT
    with contextlib.suppress(OSError):
        try:
            partial(path).write_text(json.dumps(receipt, indent=2), encoding="utf-8")
            partial(path).replace(path)
        finally:
            partial(path).unlink(missing_ok=True)


def _verify_shard(stem: Path, *, shard: ShardEntry) -> list[str]:
    bin_path, idx_path = _files(stem)
    try:
        index = read_index(idx_path)
        tokens = map_tokens(bin_path, index)
    except DataError as error:
        return [str(error)]
    found = asdict(_entry_of(stem, index=index, bin_xxh3=_hash(block.data for block in _blocks(tokens))))
    wanted, shortest = asdict(shard), shard.min_document_tokens
    if found["idx_xxh3"] == shard.idx_xxh3:  # in a damaged index documents may lie anywhere
        shortest = int(document_lengths(index).min(initial=shortest))
    found["min_document_tokens"] = shortest
    return [
        f"{stem}: {key} is {value}, the manifest says {wanted[key]}; prepare or copy the source again"
        for key, value in found.items()
        if value != wanted[key]
    ]


def _import_shard(stem: Path, *, index: Index, tokenizer: TokenizerEntry) -> ShardEntry:
    bin_path, idx_path = _files(stem)
    _check_contiguous(idx_path, index=index)
    tokens = map_tokens(bin_path, index)
    _check_documents(bin_path, tokens=tokens, index=index, eod_id=tokenizer.eod_id)
    blocks = (_checked_ids(block, bin_path=bin_path, vocab_size=tokenizer.vocab_size).data for block in _blocks(tokens))
    return _entry_of(stem, index=index, bin_xxh3=_hash(blocks))


def _checked_ids(block: Ids, *, bin_path: Path, vocab_size: int) -> Ids:
    low, high = int(block.min()), int(block.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{bin_path} holds token ids from {low} to {high}; the tokenizer has ids 0 to {vocab_size - 1}; "
            "name the tokenizer that wrote these shards"
        )
    return block


def _entry_of(stem: Path, *, index: Index, bin_xxh3: str) -> ShardEntry:
    """What the files of a shard hold now."""
    return ShardEntry(
        file=stem.name,
        documents=index.num_documents,
        tokens=index.num_tokens,
        bin_bytes=index.num_tokens * index.dtype.itemsize,
        bin_xxh3=bin_xxh3,
        idx_xxh3=_hash([_files(stem)[1].read_bytes()]),
    )


def _files(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(f"{stem.name}.bin"), stem.with_name(f"{stem.name}.idx")


def _hash(blocks: Iterable[memoryview | bytes]) -> str:
    import xxhash  # reading a manifest does without

    digest = xxhash.xxh3_128()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _check_contiguous(idx_path: Path, *, index: Index) -> None:
    """A source is read as one stream of tokens, whatever its sequences: holes and overlaps would be read as text."""
    lengths = index.sequence_lengths.astype(np.int64)
    ends = np.cumsum(lengths) * index.dtype.itemsize
    if (
        (lengths < 0).any()
        or (np.diff(index.document_indices) < 0).any()
        or (index.pointers != ends - lengths * index.dtype.itemsize).any()
    ):
        raise DataError(f"{idx_path} describes sequences that do not lie end to end in the .bin; write these shards again")


def _check_documents(bin_path: Path, *, tokens: Ids, index: Index, eod_id: int) -> None:
    """Borders inside a window are found from EOD alone, so every document must end in one."""
    borders = _document_borders(index)
    wrong = np.diff(borders) == 0
    wrong[~wrong] = tokens[borders[1:][~wrong] - 1] != eod_id
    if not wrong.any():
        return
    document = int(np.argmax(wrong))
    start, end = borders[document : document + 2]
    found = "is empty" if start == end else f"ends in token {tokens[end - 1]}"
    raise DataError(
        f"{bin_path}: document {document} {found} ({wrong.sum():,} of {len(wrong):,} documents break the rule); "
        f"every document must end in EOD ({eod_id}); write them with --append-eod, or prepare the text with `phidias data`"
    )


def _document_borders(index: Index) -> NDArray[np.int64]:
    """Where each document of a shard without holes begins, and where the last ends [D + 1], in tokens."""
    ends = np.cumsum(index.sequence_lengths, dtype=np.int64)
    return np.concatenate([np.zeros(1, dtype=np.int64), ends])[index.document_indices]


def _blocks(tokens: Ids) -> Iterator[Ids]:
    for start in range(0, len(tokens), BLOCK_TOKENS):
        yield tokens[start : start + BLOCK_TOKENS]
