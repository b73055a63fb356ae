"""Megatron's indexed shard: `<stem>.bin`, token ids end to end, and `<stem>.idx`, where each sequence and document lies.

Byte for byte what megatron-core 0.16.1's IndexedDataset reads and writes (docs/data_format.md has the table). Reading needs
numpy alone, so that ranks and the planner can do it.
"""

import contextlib
import errno
import mmap
import os
import re
import shutil
import socket
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences S, documents + 1
DTYPE_OF_CODE = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODE_OF_DTYPE = {np.dtype(name): code for code, name in DTYPE_OF_CODE.items()}
MAX_SEQUENCE_TOKENS = 2**31 - 1  # sequence lengths are int32
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Ids = NDArray[np.integer[Any]]
IdsType = np.dtype[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A finished shard. `file` is its stem; checksums are xxh3-128 in hexadecimal; no document in it is shorter than
    `min_document_tokens`."""

    file: str
    documents: int
    tokens: int
    bin_bytes: int
    bin_xxh3: str
    idx_xxh3: str
    min_document_tokens: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """An .idx, memory-mapped and read-only. S sequences, D documents; document d is the sequences
    document_indices[d] up to document_indices[d + 1]."""

    dtype: IdsType
    sequence_lengths: NDArray[np.int32]  # [S] tokens
    pointers: NDArray[np.int64]  # [S] byte offset in the .bin
    document_indices: NDArray[np.int64]  # [D + 1], first 0, last S

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of a .bin without holes: where the last sequence ends."""
        if not len(self.pointers):
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.sequence_lengths[-1])


def read_index(idx_path: Path) -> Index:
    """The index of a shard in constant time: sizes and borders are checked, the arrays are not read.

    DataError: not a Megatron index, another version, truncated, or with bytes that no field explains."""
    size = idx_path.stat().st_size if idx_path.exists() else -1
    with _refusing(idx_path, size=size):
        return _parse_index(idx_path, size=size)


def map_tokens(bin_path: Path, index: Index) -> Ids:
    """The token ids [tokens] of a shard, memory-mapped. DataError: the .bin is missing, or not as long as its index says."""
    wanted = index.num_tokens * index.dtype.itemsize
    found = bin_path.stat().st_size if bin_path.exists() else -1
    if found != wanted:
        what = "is missing" if found < 0 else f"holds {found:,} bytes"
        raise DataError(f"{bin_path} {what}; its .idx describes {wanted:,} bytes; copy or prepare this shard again")
    if not wanted:
        return np.empty(0, dtype=index.dtype)
    return np.memmap(bin_path, dtype=index.dtype, mode="r")


class ShardWriter:
    """Writes one shard, a sequence a document. Both files appear under their names at `close`, complete and synced; before
    that they carry their writer's name and `.partial`, and an error or `abort` removes them.

    DataError: the disk or the file-size limit is full."""

    def __init__(self, stem: Path, *, dtype: IdsType):
        import xxhash  # readers of shards do without

        self._stem, self._dtype = stem, dtype
        self._bin, self._idx = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".bin", ".idx"))
        self._lengths = array("i")
        self._hash, self._hash_idx = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._entry: ShardEntry | None = None
        self._file = partial(self._bin).open("wb", buffering=1 << 20)
        self.tokens = 0

    def add_document(self, ids: Ids) -> None:
        """Appends a document of `ids` [tokens], its EOD included."""
        self.add_documents(ids, lengths=[len(ids)])

    def add_documents(self, ids: Ids, *, lengths: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        """Appends documents that lie end to end in `ids` [tokens], their EODs included; `lengths` [documents] adds up to it."""
        sizes = np.asarray(lengths, dtype=np.int64)
        _check_ids(ids, lengths=sizes, dtype=self._dtype)
        data = np.ascontiguousarray(ids, dtype=self._dtype).data
        with naming_full_disk(self._bin):
            self._file.write(data)
        self._hash.update(data)
        self._lengths.frombytes(sizes.astype(np.int32).tobytes())
        self.tokens += len(ids)

    def close(self) -> ShardEntry:
        """Publishes the shard. The .idx comes last: where there is an .idx, there is a whole shard."""
        if self._entry is not None:
            return self._entry
        try:
            with naming_full_disk(self._bin):
                _sync_and_close(self._file)
            self._write_index()
            for path in (self._bin, self._idx):
                partial(path).replace(path)
            sync_directory(self._stem.parent)
        except BaseException:
            self.abort()
            raise
        self._entry = ShardEntry(
            file=self._stem.name,
            documents=len(self._lengths),
            tokens=self.tokens,
            bin_bytes=self.tokens * self._dtype.itemsize,
            bin_xxh3=self._hash.hexdigest(),
            idx_xxh3=self._hash_idx.hexdigest(),
        )
        return self._entry

    def abort(self) -> None:
        """Removes the temporaries."""
        with contextlib.suppress(OSError):  # closing flushes, and on a full disk flushing fails again
            self._file.close()
        for path in (self._bin, self._idx):
            partial(path).unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self._dtype.itemsize, out=pointers[1:])
        header = HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self._dtype], len(lengths), len(lengths) + 1)
        with naming_full_disk(self._idx):
            file = partial(self._idx).open("wb")
            for part in (header, lengths.data, pointers.data, np.arange(len(lengths) + 1, dtype=np.int64).data):
                file.write(part)
                self._hash_idx.update(part)
            _sync_and_close(file)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif self._entry is None:
            self.abort()


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turns "no space left" and its relatives into a DataError with the file and the free space."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        free_gib = shutil.disk_usage(path.parent).free / 2**30
        raise DataError(
            f"cannot write {path}: {error.strerror} ({free_gib:,.1f} GiB free on its disk); "
            "make room, raise the quota or the file-size limit, or choose another run.data_dir, and start again"
        ) from error


def partial(path: Path) -> Path:
    """The name of a file while this process writes it; another that writes the same file takes another."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def writer_of(path: Path) -> int | None:
    """The process of this machine that gave a file its partial name; None where another machine's did."""
    found = re.search(rf"\.{re.escape(socket.gethostname())}\.(\d+)\.partial$", path.name)
    return int(found[1]) if found else None


def sync_directory(directory: Path) -> None:
    """Makes renames in `directory` survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_and_close(file: Any) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


def _check_ids(ids: Ids, *, lengths: NDArray[np.int64], dtype: IdsType) -> None:
    """numpy wraps ids that are too large without a word."""
    wrong = lengths[(lengths <= 0) | (lengths > MAX_SEQUENCE_TOKENS)]
    if len(wrong):
        raise DataError(f"a document of {wrong[0]:,} tokens; a shard holds documents of 1 to {MAX_SEQUENCE_TOKENS:,}; split it")
    if lengths.sum() != len(ids):
        raise DataError(
            f"documents of {lengths.sum():,} tokens in {len(ids):,} ids; a shard's documents lie end to end; report it"
        )
    if ids.dtype != dtype and (int(ids.min()) < 0 or int(ids.max()) > np.iinfo(dtype).max):
        raise DataError(
            f"token ids {ids.min()} to {ids.max()} do not fit in {dtype}; the shards' dtype must hold the vocabulary"
        )


@contextlib.contextmanager
def _refusing(idx_path: Path, *, size: int) -> Iterator[None]:
    """Adds the file, its size and the fix to what `_parse_index` found."""
    try:
        yield
    except ValueError as error:
        found = "is missing" if size < 0 else f"({size:,} bytes) {error}"
        raise DataError(f"index {idx_path} {found}; copy or prepare this shard again") from error


def _parse_index(idx_path: Path, *, size: int) -> Index:
    if size < HEADER.size:
        raise ValueError(f"is truncated: the header of an index takes {HEADER.size} bytes")
    with idx_path.open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    magic, version, code, sequences, documents = HEADER.unpack_from(buffer)
    if magic != MAGIC:
        raise ValueError(f"is not a Megatron index: it starts with {magic!r}, the rule is {MAGIC!r}")
    if version != VERSION:
        raise ValueError(f"has version {version}; this reader knows version {VERSION}")
    if code not in DTYPE_OF_CODE:
        raise ValueError(f"has dtype code {code}; the rule is one of {sorted(DTYPE_OF_CODE)}")
    wanted = HEADER.size + 12 * sequences + 8 * documents
    if size not in (wanted, wanted + sequences):  # Megatron's multimodal shards end in one mode byte a sequence
        what = "is truncated" if size < wanted else "is too long"
        raise ValueError(f"{what}: {sequences:,} sequences and {documents:,} document borders take {wanted:,} bytes")
    lengths_end = HEADER.size + 4 * sequences
    index = Index(
        dtype=np.dtype(DTYPE_OF_CODE[code]),
        sequence_lengths=np.frombuffer(buffer, dtype="<i4", count=sequences, offset=HEADER.size),
        pointers=np.frombuffer(buffer, dtype="<i8", count=sequences, offset=lengths_end),
        document_indices=np.frombuffer(buffer, dtype="<i8", count=documents, offset=lengths_end + 8 * sequences),
    )
    borders = index.document_indices
    if not documents or borders[0] != 0 or borders[-1] != sequences:
        raise ValueError(f"has document borders that do not run from 0 to its {sequences:,} sequences")
    return index
