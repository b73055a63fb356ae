"""A source's folder in an object store, or in another file system that fsspec knows: ranges of bytes, kept in a local cache."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.cache import BLOCK, CachedFile, block_cache
from data_prep.errors import DataError
from data_prep.storage import DEFAULT_READING, FEW_FILES, OPEN_SHARDS, RESTORE, FileState, Reading, Row, Run

PIECES_AT_ONCE = 256  # reads under way together: what bounds their memory
BLOCKS_A_REQUEST = 64
RETRY_SECONDS = (0.5, 2.0, 8.0)

Answer = TypeVar("Answer")


class RemoteFolder:
    """A folder of an object store, or of another file system that fsspec knows. Reads are retried.

    An object that is replaced in the middle of a run is found when its shard is opened, not at every read."""

    local = None

    def __init__(self, url: str, *, name: str, reading: Reading = DEFAULT_READING):
        self.name, self.place = name, url
        self._system, self._root = _file_system(url)
        self._cache = block_cache(reading.cache_dir, reading.cache_gib) if reading.cache_dir else None

    def path(self, file: str) -> str:
        return f"{self.place}/{file}"

    def read_bytes(self, file: str) -> bytes:
        data: bytes = self._retried(file, lambda: self._system.cat_file(self._remote(file)))
        return data

    def copy(self, file: str, target: Path) -> None:
        try:
            self._retried(file, lambda: self._system.get_file(self._remote(file), str(target)))
        except FileNotFoundError as error:
            raise FileNotFoundError(self.path(file)) from error

    def states(self, files: Iterable[str]) -> dict[str, FileState]:
        wanted = set(files)
        self._system.invalidate_cache(self._root)
        infos = self._listed(wanted) if len(wanted) > FEW_FILES else {}
        unknown = [file for file in wanted if infos.get(file, {}).get("size") is None]  # plain web servers list no sizes
        with ThreadPoolExecutor(max(1, min(32, len(unknown)))) as pool:
            infos.update(zip(unknown, pool.map(self._info, unknown), strict=True))
        return {file: remote_state(info) for file, info in infos.items() if info}

    def open_shard(self, file: str, *, dtype: str, state: FileState) -> "RemoteShard":
        key = (self.place, "remote", file, dtype, state.version, state.size)
        shard: RemoteShard = OPEN_SHARDS.get(key, lambda: self._open(file, dtype=dtype, state=state))
        return shard

    def read(self, runs: Sequence[Run], *, dtype: str) -> None:
        pieces = iter(self._pieces(runs, dtype=dtype))
        while lot := list(islice(pieces, PIECES_AT_ONCE)):
            missing = [piece for piece in lot if not piece.from_cache()]
            if not missing:
                continue
            self._confirm({piece.shard for piece in missing})
            if self._cache and self._cache.has_room():
                self._fetch_blocks(missing)
            else:
                self._fetch_pieces(missing)

    def _open(self, file: str, *, dtype: str, state: FileState) -> "RemoteShard":
        cached = None
        if self._cache and state.version:  # where a store tells no versions, a new object would not be told from the old
            cached = self._cache.open(self.path(file), size=state.size, version=state.version)
        return RemoteShard(self, file, dtype=dtype, state=state, cached=cached)

    def _pieces(self, runs: Sequence[Run], *, dtype: str) -> Iterator["Piece"]:
        for run in runs:
            shard = self.open_shard(run.file, dtype=dtype, state=run.state)
            for row, start in zip(run.rows, run.starts, strict=True):
                yield Piece(shard, row, start)

    def _confirm(self, shards: Iterable["RemoteShard"]) -> None:
        """Compares each object with the one recorded, once for every time its shard is opened."""
        new = {shard.file: shard for shard in shards if not shard.confirmed}
        found = self.states(new) if new else {}
        for file, shard in new.items():
            if found.get(file) != shard.recorded:
                now = f"it is {found[file]}" if file in found else "it is missing"
                raise DataError(f"{self.path(file)} changed: it was {shard.recorded}, {now}; {RESTORE}")
            shard.confirmed = True

    def _fetch_pieces(self, pieces: Sequence["Piece"]) -> None:
        found = self._fetch([(piece.shard.file, piece.low, piece.high) for piece in pieces])
        for piece, data in zip(pieces, found, strict=True):
            piece.fill(data)

    def _fetch_blocks(self, pieces: Sequence["Piece"]) -> None:
        """Reads whole blocks, each once, and keeps them."""
        wanted: dict[RemoteShard, set[int]] = {}
        for piece in pieces:
            wanted.setdefault(piece.shard, set()).update(piece.blocks)
        spans = [(shard, span) for shard, blocks in wanted.items() for span in adjacent(blocks)]
        found = self._fetch([(shard.file, *shard.bytes_of(span)) for shard, span in spans])
        blocks = {
            (shard, block): data[index * BLOCK : (index + 1) * BLOCK]
            for (shard, span), data in zip(spans, found, strict=True)
            for index, block in enumerate(span)
        }
        for (shard, block), data in blocks.items():
            shard.keep(block, data)
        for piece in pieces:
            low = piece.low - piece.blocks[0] * BLOCK
            piece.fill(b"".join(blocks[piece.shard, block] for block in piece.blocks)[low : low + piece.high - piece.low])

    def _fetch(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes low..high-1 of each file, asked for together."""
        paths, lows, highs = (
            [*column] for column in zip(*((self._remote(file), *rest) for file, *rest in ranges), strict=True)
        )
        what = ranges[0][0]
        try:
            found: list[bytes] = self._retried(what, lambda: self._system.cat_ranges(paths, lows, highs, on_error="raise"))
        except FileNotFoundError as error:
            raise DataError(f"an object of {self.place} is missing: {error}; {RESTORE}") from error
        for (file, low, high), data in zip(ranges, found, strict=True):
            if len(data) != high - low:
                raise DataError(
                    f"{self.path(file)} gave {len(data)} of the {high - low} bytes from {low} on: it is truncated, or the "
                    f"server knows no ranges; {RESTORE}"
                )
        return found

    def _retried(self, file: str, ask: Callable[[], Answer]) -> Answer:
        for seconds in (*RETRY_SECONDS, None):
            try:
                return ask()
            except FileNotFoundError:
                raise
            except Exception as error:  # every store has errors of its own
                if seconds is None or isinstance(error, PermissionError):
                    raise DataError(
                        f"cannot read {self.path(file)}: {type(error).__name__}: {error}; tried {len(RETRY_SECONDS) + 1} times "
                        "unless refused; check the network and the credentials"
                    ) from error
                time.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")

    def _listed(self, wanted: set[str]) -> dict[str, dict[str, Any]]:
        try:
            infos = self._retried("", lambda: self._system.ls(self._root, detail=True))
        except FileNotFoundError:
            return {}
        named = {info["name"].rpartition("/")[2]: info for info in infos}
        return {file: named[file] for file in wanted & named.keys()}

    def _info(self, file: str) -> dict[str, Any]:
        """What the store says of a file; empty where it is not there."""
        try:
            info: dict[str, Any] = self._retried(file, lambda: self._system.info(self._remote(file)))
        except FileNotFoundError:
            return {}
        return info

    def _remote(self, file: str) -> str:
        return f"{self._root}/{file}"


class RemoteShard:
    """A .bin elsewhere: what it was when the stream was opened, and the blocks of it that are here."""

    def __init__(self, folder: RemoteFolder, file: str, *, dtype: str, state: FileState, cached: CachedFile | None):
        self.file, self.dtype, self.recorded, self.cached = file, np.dtype(dtype).newbyteorder("<"), state, cached
        self.confirmed = False
        self._folder, self._dtype = folder, dtype

    def state(self) -> FileState:
        found = self._folder.states([self.file])
        if self.file not in found:
            raise DataError(f"{self._folder.path(self.file)} is missing; {RESTORE}")
        return found[self.file]

    def read_into(self, out: Row, start: int) -> None:
        self._folder.read([Run(self.file, self.recorded, [out], [start])], dtype=self._dtype)

    def bytes_of(self, blocks: Sequence[int]) -> tuple[int, int]:
        """Where adjacent blocks begin and end."""
        return blocks[0] * BLOCK, min(self.recorded.size, (blocks[-1] + 1) * BLOCK)

    def keep(self, block: int, data: bytes) -> None:
        if self.cached:
            self.cached.write(block, data)


class Piece:
    """A row, and the bytes low..high-1 of a remote shard that belong in it."""

    def __init__(self, shard: RemoteShard, row: Row, start: int):
        self.shard, self._row = shard, row
        self.low = start * shard.dtype.itemsize
        self.high = self.low + len(row) * shard.dtype.itemsize
        self.blocks = range(self.low // BLOCK, -(-self.high // BLOCK))

    def from_cache(self) -> bool:
        """Fills the row from the blocks kept here, if they all are."""
        data = self.shard.cached.read(self.low, self.high) if self.shard.cached else None
        if data is None:
            return False
        self.fill(data)
        return True

    def fill(self, data: bytes) -> None:
        self._row[:] = np.frombuffer(data, dtype=self.shard.dtype)


def adjacent(blocks: Iterable[int]) -> list[list[int]]:
    """Groups of blocks that follow each other, none longer than a request should be."""
    spans: list[list[int]] = []
    for block in sorted(blocks):
        if spans and spans[-1][-1] == block - 1 and len(spans[-1]) < BLOCKS_A_REQUEST:
            spans[-1].append(block)
        else:
            spans.append([block])
    return spans


def remote_state(info: dict[str, Any]) -> FileState:
    """Listings and single requests of one store agree on it."""
    keys = ("ETag", "etag", "mtime", "LastModified", "updated", "created")
    version = next((info[key] for key in keys if info.get(key)), "")
    return FileState(int(info["size"]), str(version.timestamp() if isinstance(version, datetime) else version))


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system, and the path in it."""
    try:
        import fsspec
    except ImportError as error:
        raise DataError(
            f"{url} needs fsspec, which is not installed; data behind a URL is read through it; pip install 'phidias[data]'"
        ) from error
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"fsspec cannot open {url}: {error}; install what it names, or correct run.data_dir") from error
    return system, root.rstrip("/")
