"""Window tables: where each window of a source lies that is not read as one stream of tokens.

`anchored` windows begin at the start of a document and lie in it; `best_fit` windows are whole documents, packed. A table is
made once by `phidias data` and read by every rank with numpy alone; its files: docs/data_format.md.
"""

import contextlib
import functools
import io
import json
import os
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from data_prep.errors import DataError
from data_prep.indexed import naming_full_disk, read_index, sync_directory
from data_prep.manifest import document_lengths
from data_prep.spec import STRICT
from data_prep.storage import Folder, as_folder
from data_prep.stream import SourceStream

__all__ = ["TableKind", "WindowTable", "build_window_table", "read_window_table"]

FORMAT_VERSION = 1
FOLDER = "windows"
PIECES, FIRST, HEADER = ".pieces.npy", ".first.npy", ".json"
PIECE = np.dtype([("offset", "<i8"), ("length", "<i4")])
NPY_HEADER_BYTES = 128

TableKind = Literal["anchored", "best_fit"]
Int64s = NDArray[np.int64]


@dataclass(config=STRICT, frozen=True)
class _Header:
    """What a table holds. `tokens`: inputs of its windows; `digest`: the stream it was made of."""

    _: KW_ONLY
    format_version: int
    kind: TableKind
    seq_length: int
    min_document_tokens: int
    digest: str
    num_windows: int
    num_pieces: int
    tokens: int
    unread_tokens: int
    unread_documents: int


class WindowTable:
    """The windows of one source at one sequence length, by the place of their first document. A window is pieces of the
    source's stream: one of seq_length + 1 tokens (anchored), or some that hold seq_length together at most (best_fit)."""

    def __init__(self, header: _Header, *, pieces: NDArray[np.void], first: Int64s):
        self.kind, self.seq_length, self.num_windows = header.kind, header.seq_length, header.num_windows
        self.tokens, self.unread_tokens = header.tokens, header.unread_tokens
        self.unread_documents = header.unread_documents
        self._words, self._first = pieces.view("<i4").reshape(-1, PIECE.itemsize // 4), first

    def pieces(self, windows: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Of the windows [N]: row in 0..N-1, offset in the stream, length in tokens of each of their pieces, in order."""
        first = self._first[windows]
        counts = self._first[windows + 1] - first
        row, nth = _repeat(counts)
        at = np.repeat(first, counts) + nth
        found = self._words.take(at, axis=0).reshape(-1).view(PIECE)  # four times as fast as indexing records
        return row, found["offset"].astype(np.int64), found["length"].astype(np.int64)


def build_window_table(
    directory: Path, *, name: str, kind: TableKind, seq_length: int, min_document_tokens: int = 0
) -> WindowTable:
    """The table of a source whose shards lie in `directory`: the one that is there, or where there is none of these shards, a
    new one in its place. DataError: the shards are damaged, they yield no window, another process writes the table."""
    from data_prep.workplace import remove_contents, workplace  # needs the data extra; readers of tables do without

    stream = SourceStream(directory, name=name, min_document_tokens=min_document_tokens)
    asked: dict[str, Any] = {"kind": kind, "seq_length": seq_length, "min_document_tokens": min_document_tokens}
    read = functools.partial(read_window_table, directory, name=name, **asked, digest=stream.digest)
    with contextlib.suppress(DataError):  # a table that is missing, old or damaged is written anew
        return read()
    target = directory / _stem(**asked)
    with workplace(target) as work:
        remove_contents(work)
        counted = _write_arrays(work, stream=stream, directory=directory, kind=kind, seq_length=seq_length)
        header = _Header(format_version=FORMAT_VERSION, **asked, digest=stream.digest, **counted)
        if not header.num_windows:
            raise _no_window(directory, name=name, stream=stream, header=header)
        _publish(work, target=target, header=header)
    return read()


def read_window_table(
    place: Path | Folder, *, name: str, kind: TableKind, seq_length: int, min_document_tokens: int = 0, digest: str
) -> WindowTable:
    """The table of a source at `place`, for a stream of this `digest`; memory-mapped where the folder is local.

    DataError: there is none, it was made of other shards, or its files do not fit together."""
    folder = as_folder(place)
    stem = _stem(kind=kind, seq_length=seq_length, min_document_tokens=min_document_tokens)
    try:
        header = TypeAdapter(_Header).validate_json(folder.read_bytes(stem + HEADER))
        _check_header(header, stem=stem, digest=digest)
        return WindowTable(
            header,
            pieces=_load(folder, stem + PIECES, count=header.num_pieces),
            first=_load(folder, stem + FIRST, count=header.num_windows + 1),
        )
    except (FileNotFoundError, EOFError, ValueError) as error:
        found = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be used: {error}"
        raise DataError(
            f"source '{name}': window table {folder.path(stem + HEADER)} or an array beside it {found}; "
            f"{kind} windows are listed in a table made of the shards that are read; run `phidias data` with the same overrides"
        ) from error


def _stem(*, kind: TableKind, seq_length: int, min_document_tokens: int) -> str:
    return f"{FOLDER}/{kind}_s{seq_length}_m{min_document_tokens}"


def _check_header(header: _Header, *, stem: str, digest: str) -> None:
    if header.format_version != FORMAT_VERSION:
        raise ValueError(f"it has format_version {header.format_version}, this code reads {FORMAT_VERSION}")
    described = _stem(kind=header.kind, seq_length=header.seq_length, min_document_tokens=header.min_document_tokens)
    if described != stem:
        raise ValueError(f"it describes {described}")
    if header.digest != digest:
        raise ValueError(f"it was made of other shards (digest {header.digest}, these have {digest})")


def _load(folder: Folder, file: str, *, count: int) -> NDArray[Any]:
    """An array of the table. ValueError: it is damaged or not as long as the header says."""
    if folder.local is None:
        array = np.load(io.BytesIO(folder.read_bytes(file)))
    else:
        array = np.load(folder.local / file, mmap_mode="r").view(np.ndarray)  # the subclass makes every look-up slower
    if len(array) != count:
        raise ValueError(f"{file} holds {len(array):,} entries, the header says {count:,}")
    return np.asarray(array)


# Cutting one shard into windows


class _Cut(NamedTuple):
    """The windows of a shard: `first` [W] is the first piece of each, offsets are those in the shard."""

    pieces: NDArray[np.void]  # [P] PIECE
    first: Int64s
    unread_tokens: int
    unread_documents: int


def _repeat(counts: Int64s) -> tuple[Int64s, Int64s]:
    """Row i counts[i] times, and the number 0, 1, ... of each of its copies: two arrays [sum of counts]."""
    ends = np.cumsum(counts, dtype=np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - np.repeat(ends - counts, counts)


def _strides(lengths: Int64s, *, counts: Int64s, stride: int) -> tuple[Int64s, Int64s]:
    """counts[d] pieces of document d, one every `stride` tokens: where each begins in the shard, and in its document."""
    document, nth = _repeat(counts)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return starts[document] + nth * stride, nth * stride


def _pieces_of(offsets: Int64s, *, lengths: Int64s) -> NDArray[np.void]:
    pieces = np.empty(len(offsets), dtype=PIECE)
    pieces["offset"], pieces["length"] = offsets, lengths
    return pieces


def _cut_anchored(lengths: Int64s, *, seq_length: int) -> _Cut:
    """Documents of these lengths [D], end to end."""
    counts = (lengths - 1) // seq_length
    offsets, _ = _strides(lengths, counts=counts, stride=seq_length)
    read = counts * seq_length + (counts > 0)  # the last token of the last window is a label only, but read
    return _Cut(
        pieces=_pieces_of(offsets, lengths=np.full(len(offsets), seq_length + 1)),
        first=np.arange(len(offsets)),
        unread_tokens=int((lengths - read).sum()),
        unread_documents=int((counts == 0).sum()),
    )


def _cut_best_fit(lengths: Int64s, *, seq_length: int) -> _Cut:
    """Documents of these lengths [D], end to end; only those longer than a window are cut."""
    counts = -(-lengths // seq_length)
    offsets, begun = _strides(lengths, counts=counts, stride=seq_length)
    sizes = np.minimum(np.repeat(lengths, counts) - begun, seq_length)
    window = _by_first_piece(_pack(sizes, space=seq_length))
    order = np.argsort(window, kind="stable")
    first = np.flatnonzero(np.diff(window[order], prepend=-1))
    return _Cut(pieces=_pieces_of(offsets, lengths=sizes)[order], first=first, unread_tokens=0, unread_documents=0)


def _by_first_piece(window: Int64s) -> Int64s:
    """Numbers the windows anew, by the first of their pieces: neighbours in the table are near on disk."""
    first = np.full(int(window.max(initial=-1)) + 1, len(window))
    np.minimum.at(first, window, np.arange(len(window)))
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[window]


def _pack(sizes: Int64s, *, space: int) -> Int64s:
    """Best-fit decreasing (Ding et al. 2024): the window [P] of each piece; no window holds more than `space` tokens."""
    longest_first = np.argsort((space - sizes).astype(np.min_scalar_type(space)), kind="stable")
    runs = np.array(list(_runs(np.bincount(sizes, minlength=space + 1).tolist(), space=space)), dtype=np.int64).reshape(-1, 3)
    run, nth = _repeat(runs[:, 1])
    window = np.empty_like(sizes)
    window[longest_first] = runs[run, 0] + nth // runs[run, 2]
    return window


def _runs(counts: list[int], *, space: int) -> Iterator[tuple[int, int, int]]:
    """Packs counts[l] pieces of each length l, the longest first. Yields (window, pieces, each): that many of the next pieces
    go into the windows from this one on, `each` of them into one.

    All pieces of a length are placed together: the window with the least room for one takes as many as it has room for."""
    room, opened = _Room(), 0
    for length in range(space, 0, -1):
        left = counts[length]
        while left:
            if not room.has(length):
                new = -(-left // (space // length))
                room.add(space, first=opened, windows=new)
                opened += new
            taken, first, windows = room.take(length)
            each = taken // length
            used = min(windows, -(-left // each))
            placed = min(left, used * each)
            last = placed - (used - 1) * each
            yield first, placed, each
            left -= placed
            room.add(taken, first=first + used, windows=windows - used)
            full = used if last == each else used - 1
            room.add(taken - each * length, first=first, windows=full)
            room.add(taken - last * length, first=first + full, windows=used - full)


class _Room:
    """Which windows have how many tokens of room left, as runs of neighbouring windows."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # ascending, those with a run
        self._runs: dict[int, list[tuple[int, int]]] = {}

    def has(self, length: int) -> bool:
        return bool(self._rooms) and self._rooms[-1] >= length

    def add(self, tokens: int, *, first: int, windows: int) -> None:
        if not tokens or not windows:
            return
        runs = self._runs.setdefault(tokens, [])
        if not runs:
            insort(self._rooms, tokens)
        runs.append((first, windows))

    def take(self, length: int) -> tuple[int, int, int]:
        """The least room for `length` tokens, and a run of windows that have it: (tokens, first, windows)."""
        at = bisect_left(self._rooms, length)
        tokens = self._rooms[at]
        first, windows = self._runs[tokens].pop()
        if not self._runs[tokens]:
            del self._rooms[at]
        return tokens, first, windows


# Writing


class _NpyFile:
    """An .npy file written piece by piece: its header has a fixed size and is written last, when the length is known."""

    def __init__(self, path: Path, *, dtype: np.dtype[Any]):
        self._dtype, self._path, self.count = dtype, path, 0
        self._file = path.open("wb", buffering=1 << 20)
        self._file.write(bytes(NPY_HEADER_BYTES))

    def append(self, values: NDArray[Any]) -> None:
        with naming_full_disk(self._path):
            self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.count += len(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with naming_full_disk(self._path), self._file:  # closing flushes, and on a full disk that fails again
            if error is None:
                self._file.seek(0)
                self._file.write(_npy_header(self._dtype, count=self.count))
                self._file.flush()
                os.fsync(self._file.fileno())


def _npy_header(dtype: np.dtype[Any], *, count: int) -> bytes:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    start = np.lib.format.magic(1, 0) + (NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return start + repr(described).ljust(NPY_HEADER_BYTES - 11).encode() + b"\n"


CUTS = {"anchored": _cut_anchored, "best_fit": _cut_best_fit}


def _write_arrays(work: Path, *, stream: SourceStream, directory: Path, kind: TableKind, seq_length: int) -> dict[str, Any]:
    """Cuts shard after shard, one in memory at a time; the counts of the header."""
    counts = Counter(num_windows=0, num_pieces=0, tokens=0, unread_tokens=0, unread_documents=0)
    start = 0
    with _NpyFile(work / PIECES, dtype=PIECE) as pieces, _NpyFile(work / FIRST, dtype=np.dtype("<i8")) as first:
        for lengths in _shard_lengths(directory, stream=stream):
            cut = CUTS[kind](lengths, seq_length=seq_length)
            first.append(cut.first + pieces.count)
            cut.pieces["offset"] += start
            pieces.append(cut.pieces)
            start += int(lengths.sum())
            counts.update(_counts_of(cut, seq_length=seq_length))
        first.append(np.array([pieces.count]))
    return dict(counts)


def _counts_of(cut: _Cut, *, seq_length: int) -> dict[str, int]:
    inputs = np.minimum(cut.pieces["length"], seq_length)
    return {
        "num_windows": len(cut.first),
        "num_pieces": len(cut.pieces),
        "tokens": int(inputs.sum(dtype=np.int64)),
        "unread_tokens": cut.unread_tokens,
        "unread_documents": cut.unread_documents,
    }


def _shard_lengths(directory: Path, *, stream: SourceStream) -> Iterator[Int64s]:
    """Document lengths [D], EOD included, shard by shard."""
    for shard in stream.shards:
        index = read_index(directory / f"{shard.file}.idx")
        in_order = bool((np.diff(index.document_indices) > 0).all())
        lengths = document_lengths(index) if in_order else np.zeros(0, dtype=np.int64)
        if (len(lengths), int(lengths.sum())) != (shard.documents, shard.tokens):
            raise DataError(
                f"source '{stream.name}': {shard.file}.idx describes {len(lengths):,} documents of {lengths.sum():,} tokens, "
                f"the manifest {shard.documents:,} of {shard.tokens:,}; copy or prepare the source again"
            )
        yield lengths


def _no_window(directory: Path, *, name: str, stream: SourceStream, header: _Header) -> DataError:
    longest = max((int(lengths.max(initial=0)) for lengths in _shard_lengths(directory, stream=stream)), default=0)
    needed = header.seq_length + 1 if header.kind == "anchored" else 1
    return DataError(
        f"source '{name}' yields no {header.kind} window: its longest document has {longest:,} tokens, EOD included; "
        f"at seq_length {header.seq_length:,} such a window needs a document of {needed:,} or more; "
        f"lower the stage's seq_length, set mixture.sources.{name}.windows to another kind, or leave the source out"
    )


def _publish(work: Path, *, target: Path, header: _Header) -> None:
    """Takes the old header away, moves the arrays, and the new header last: where there is one, its arrays are beside it."""
    path = work / HEADER
    with naming_full_disk(path), path.open("w", encoding="utf-8") as file:
        json.dump(asdict(header), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    target.with_name(target.name + HEADER).unlink(missing_ok=True)
    sync_directory(target.parent)
    for suffix in (PIECES, FIRST, HEADER):
        (work / suffix).rename(target.with_name(target.name + suffix))
        sync_directory(target.parent)
