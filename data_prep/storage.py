"""Where the files of a source lie, and how its shards are read: a folder of this machine, or of an object store through fsspec.

Shards stay open in one list for the whole process, bounded by what the system allows.
"""

import mmap
import os
import resource
import shutil
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError

MAX_OPEN_SHARDS = 4096
DESCRIPTORS_PER_SHARD = 2  # ours, and the one Python's mmap keeps of its own
FEW_FILES = 16  # up to here a request a file is quicker than to list a folder that may hold thousands
COLD_NS_PER_TOKEN = 8.0  # slower than this (0.5 GB/s), and the bytes come from a disk, not from the page cache
RESTORE = "shards are written once and never change; restore it, or run `phidias data action=verify`"

Reader = Literal["mmap", "pread"]
Row = NDArray[np.int32]


@dataclass(frozen=True)
class Reading:
    """How shards are read. `reader` is for local folders; what is read from elsewhere is kept in `cache_dir`, up to
    `cache_gib` [GiB]; None keeps nothing."""

    reader: Reader = "mmap"
    cache_dir: str | None = None
    cache_gib: float = 100.0


DEFAULT_READING = Reading()


@dataclass(frozen=True)
class FileState:
    """What tells a file from another that takes its name: its size in bytes, and its time of change (or an object's etag)."""

    size: int
    version: str

    def __str__(self) -> str:
        if self.version.isdigit() and len(self.version) >= 18:  # nanoseconds
            changed = datetime.fromtimestamp(int(self.version) / 1e9, tz=UTC)
            return f"{self.size:,} bytes changed at {changed:%Y-%m-%d %H:%M:%S.%f} UTC"
        return f"{self.size:,} bytes of version {self.version or 'unknown'}"


class Run(NamedTuple):
    """Pieces of one .bin: rows[i], int32 in memory of its own, takes the tokens from starts[i] on."""

    file: str
    state: FileState
    rows: list[Row]
    starts: list[int]


class Shard(Protocol):
    """An open .bin."""

    def read_into(self, out: Row, start: int) -> None:
        """Copies tokens start..start+len(out)-1 into `out`, contiguous int32. DataError: not there, or the file changed."""

    def state(self) -> FileState:
        """The file as it is now."""


class Folder(Protocol):
    """The files of one source. `local` is the folder on this machine, None where it is elsewhere; `place` names it."""

    @property
    def name(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def local(self) -> Path | None: ...

    def path(self, file: str) -> str:
        """How messages name a file."""

    def read_bytes(self, file: str) -> bytes:
        """The whole of a small file. FileNotFoundError."""

    def copy(self, file: str, target: Path) -> None:
        """A file of any size, to this machine. FileNotFoundError, with the file's name."""

    def states(self, files: Iterable[str]) -> dict[str, FileState]:
        """The state of each file that is there."""

    def open_shard(self, file: str, *, dtype: str, state: FileState) -> Shard:
        """A .bin of `dtype`, opened or still open. DataError: its state is not `state`."""

    def read(self, runs: Sequence[Run], *, dtype: str) -> None:
        """Fills the rows of all runs, in whatever order is quick. DataError: as for a shard."""


def open_folder(data_dir: str | Path, name: str, *, reading: Reading = DEFAULT_READING) -> Folder:
    """The folder of source `name`: of this machine, or behind a URL that fsspec knows (s3://, gs://, file://, memory://)."""
    if "://" in str(data_dir):
        from data_prep.remote import RemoteFolder  # it builds on what stands here

        return RemoteFolder(f"{str(data_dir).rstrip('/')}/{name}", name=name, reading=reading)
    return LocalFolder(Path(data_dir) / name, reader=reading.reader)


def as_folder(place: Path | Folder) -> Folder:
    return LocalFolder(place) if isinstance(place, Path) else place


# Open shards


class OpenShards:
    """The shards last used, over all sources of the process. One that is dropped while another thread reads it is closed after
    that read: whoever holds a shard keeps it open."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self._shards: OrderedDict[tuple[str | int, ...], Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._shards)

    def get(self, key: tuple[str | int, ...], opener: Callable[[], Any]) -> Any:
        """The shard of `key`, opened where it is not yet."""
        with self._lock:
            shard = self._shards.get(key)
            if shard is not None:
                self._shards.move_to_end(key)
                return shard
        shard = opener()  # outside the lock: opening waits for the file system
        with self._lock:
            self._shards[key] = shard
            self._drop()
        return shard

    def clear(self) -> None:
        """Drops them all."""
        with self._lock:
            self._shards.clear()

    def _drop(self) -> None:
        if self.limit is None:
            self.limit = open_limit()
        while len(self._shards) > self.limit:
            self._shards.popitem(last=False)


OPEN_SHARDS = OpenShards()


def open_limit() -> int:
    """How many shards may be open: a quarter of the descriptors (the limit is raised where the system lets us) and of the maps
    of the process."""
    maps = Path("/proc/sys/vm/max_map_count")
    most_maps = int(maps.read_text()) if maps.exists() else 65_530
    return max(1, min(MAX_OPEN_SHARDS, _descriptors() // 4 // DESCRIPTORS_PER_SHARD, most_maps // 4))


def _descriptors() -> int:
    """The most files this process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * DESCRIPTORS_PER_SHARD * MAX_OPEN_SHARDS
    reachable = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= reachable:
        return wanted if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
    except (OSError, ValueError):
        return soft
    return reachable


# A folder of this machine


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, directory: Path, *, reader: Reader = "mmap"):
        self.local, self.name, self.place = directory, directory.name, str(directory)
        self._shard = MappedShard if reader == "mmap" else PreadShard
        self._cold = True

    def path(self, file: str) -> str:
        return f"{self.place}/{file}"

    def read_bytes(self, file: str) -> bytes:
        return (self.local / file).read_bytes()

    def copy(self, file: str, target: Path) -> None:
        try:
            shutil.copyfile(self.local / file, target)
        except FileNotFoundError as error:
            raise FileNotFoundError(self.path(file)) from error

    def states(self, files: Iterable[str]) -> dict[str, FileState]:
        wanted = set(files)
        stats = self._few(wanted) if len(wanted) <= FEW_FILES else self._listed(wanted)
        return {file: local_state(stat) for file, stat in stats}

    def open_shard(self, file: str, *, dtype: str, state: FileState) -> "LocalShard":
        key = (self.place, self._shard.__name__, file, dtype, state.version, state.size)
        shard: LocalShard = OPEN_SHARDS.get(key, lambda: self._shard(self.path(file), dtype=dtype, state=state))
        return shard

    def read(self, runs: Sequence[Run], *, dtype: str) -> None:
        began = time.perf_counter_ns()
        if self._cold:
            self._announce(runs, dtype=dtype)
        for run in runs:
            self.open_shard(run.file, dtype=dtype, state=run.state).read(run.rows, run.starts)
        tokens = sum(sum(map(len, run.rows)) for run in runs)
        self._cold = time.perf_counter_ns() - began > COLD_NS_PER_TOKEN * tokens

    def _announce(self, runs: Sequence[Run], *, dtype: str) -> None:
        """Asks for all pieces at once, so that a disk works on many: done while reads come from the disk, as it takes time."""
        for run in runs:
            self.open_shard(run.file, dtype=dtype, state=run.state).announce(run.rows, run.starts)

    def _few(self, wanted: Iterable[str]) -> Iterator[tuple[str, os.stat_result]]:
        for file in wanted:
            try:
                yield file, (self.local / file).stat()
            except (FileNotFoundError, NotADirectoryError):
                continue

    def _listed(self, wanted: set[str]) -> Iterator[tuple[str, os.stat_result]]:
        """In the order of the folder: what a parallel file system sends along with a listing need not be asked for again."""
        if not self.local.is_dir():
            return
        with os.scandir(self.local) as entries:
            for entry in entries:
                if entry.name in wanted:
                    try:
                        yield entry.name, entry.stat()
                    except FileNotFoundError:  # a link that leads nowhere
                        continue


def local_state(stat: os.stat_result) -> FileState:
    return FileState(stat.st_size, str(stat.st_mtime_ns))


class LocalShard(ABC):
    """A .bin held open, so that a file that takes its name does not disturb the reads."""

    def __init__(self, path: str, *, dtype: str, state: FileState):
        self.path, self.dtype = path, np.dtype(dtype).newbyteorder("<")
        self._state, self._size, self._modified_ns = state, state.size, int(state.version)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot open {path}: {error.strerror}; {RESTORE}") from error
        close_with(self, self._descriptor)
        self._check()

    def state(self) -> FileState:
        return local_state(os.fstat(self._descriptor))

    def read_into(self, out: Row, start: int) -> None:
        tokens = self._size // self.dtype.itemsize
        if start < 0 or start + len(out) > tokens:
            raise DataError(
                f"{self.path}: asked for tokens {start} to {start + len(out)}, it holds {tokens}; reads stay inside a shard; "
                "take the borders from the manifest"
            )
        self.read([out], [start])

    def read(self, rows: Sequence[Row], starts: Sequence[int]) -> None:
        """Fills each row from its start. The file is looked at first: a page beyond its end would be a bus error."""
        self._check()
        self._copy(rows, starts)

    def announce(self, rows: Sequence[Row], starts: Sequence[int]) -> None:
        """Has the system begin to read the pieces, and waits for none."""
        size = self.dtype.itemsize
        for row, start in zip(rows, starts, strict=True):
            os.posix_fadvise(self._descriptor, start * size, len(row) * size, os.POSIX_FADV_WILLNEED)

    @abstractmethod
    def _copy(self, rows: Sequence[Row], starts: Sequence[int]) -> None:
        """Fills each row from its start; the file is as long as it was."""

    def _check(self) -> None:
        found = os.fstat(self._descriptor)
        if found.st_size != self._size or found.st_mtime_ns != self._modified_ns:
            what = "is truncated or replaced" if found.st_size < self._size else "changed"
            raise DataError(f"{self.path} {what}: it was {self._state}, it is {local_state(found)}; {RESTORE}")


class MappedShard(LocalShard):
    """Reads through a memory map: the quickest from the page cache."""

    def __init__(self, path: str, *, dtype: str, state: FileState):
        super().__init__(path, dtype=dtype, state=state)
        self._tokens: NDArray[np.integer[Any]] = np.empty(0, dtype=self.dtype)
        if self._size:
            whole = mmap.mmap(self._descriptor, self._size, prot=mmap.PROT_READ)
            whole.madvise(mmap.MADV_RANDOM)  # or a missing page has the system read megabytes around it
            self._tokens = np.frombuffer(whole, dtype=self.dtype)

    def _copy(self, rows: Sequence[Row], starts: Sequence[int]) -> None:
        tokens = self._tokens
        for row, start in zip(rows, starts, strict=True):
            row[:] = tokens[start : start + len(row)]


class PreadShard(LocalShard):
    """Reads with system calls: right-sized requests to a disk, and an error where a map would end the process."""

    def _copy(self, rows: Sequence[Row], starts: Sequence[int]) -> None:
        for row, start in zip(rows, starts, strict=True):
            direct = self.dtype == row.dtype
            buffer = row if direct else np.empty(len(row), dtype=self.dtype)
            self._fill(buffer, start * self.dtype.itemsize)
            if not direct:
                row[:] = buffer

    def _fill(self, buffer: NDArray[np.integer[Any]], offset: int) -> None:
        try:
            done = os.preadv(self._descriptor, [buffer.data], offset)
            while done < buffer.nbytes:  # a signal, or a file system that gives what it has
                more = os.preadv(self._descriptor, [buffer.view(np.uint8)[done:].data], offset + done)
                if not more:
                    raise DataError(
                        f"{self.path} is truncated: it ends at byte {offset + done}; it was {self._state}; {RESTORE}"
                    )
                done += more
        except OSError as error:
            raise DataError(f"cannot read {self.path} at byte {offset}: {error.strerror}; {RESTORE}") from error


def close_with(owner: object, descriptor: int) -> None:
    """Closes the descriptor when nobody holds `owner` any more; not at exit, where threads may still read."""
    weakref.finalize(owner, os.close, descriptor).atexit = False
