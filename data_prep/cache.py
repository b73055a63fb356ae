"""What was read from an object store, kept on a disk of this machine in blocks, shared by the processes of a node.

One sparse file an object: its bytes; a byte a block that says whether the block is there; the boot of the machine that wrote
it. A block is written, then marked: whoever sees the mark sees the block. A power failure may keep the mark and lose the block,
so a file of another boot is not believed.
"""

import contextlib
import fcntl
import hashlib
import os
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from data_prep.errors import DataError

BLOCK = 1 << 16
SUFFIX = ".blocks"
RECOUNT = 64  # parts of the limit: other processes write as well, and after each part of our own all is counted again


@lru_cache(maxsize=8)
def block_cache(folder: str, gib: float) -> "BlockCache":
    """The one cache of this process in `folder`: all sources count against the limit together."""
    return BlockCache(Path(folder), limit_bytes=int(gib * 2**30))


class BlockCache:
    """The cached files of a folder, up to `limit_bytes` on disk; then nothing more is stored. DataError: no such folder can be
    made."""

    def __init__(self, folder: Path, *, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self._boot = _boot()
        self._full = False  # the disk is, whatever the limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".lock").touch()
        except OSError as error:
            raise DataError(
                f"cannot write the cache {folder}: {error.strerror}; it is a folder of this machine; correct data.cache_dir"
            ) from error
        self._recount()

    def open(self, url: str, *, size: int, version: str) -> "CachedFile | None":
        """The blocks of this version of an object, none where it is new. A file that is not whole is thrown away.

        None: the disk takes no more files."""
        key = hashlib.blake2b(f"{url}\n{size}\n{version}".encode(), digest_size=16).hexdigest()
        try:
            with self._locked():
                descriptor = self._open(self.folder / f"{key}{SUFFIX}", length=size + _blocks(size) + len(self._boot))
        except OSError:
            self.failed()
            return None
        return CachedFile(self, descriptor, size=size)

    def has_room(self) -> bool:
        if self._written > self.limit_bytes // RECOUNT:
            self._recount()
        return not self._full and self._held + self._written < self.limit_bytes

    def wrote(self, count: int) -> None:
        """Counts `count` bytes that a file of this cache has taken."""
        self._written += count

    def failed(self) -> None:
        """The disk takes no more: reads go on without it."""
        self._full = True

    def _open(self, path: Path, *, length: int) -> int:
        descriptor = _descriptor(path)
        if self._is_whole(descriptor, length=length):
            return descriptor
        os.close(descriptor)
        path.unlink()  # a process that still reads the old one keeps it
        descriptor = _descriptor(path)
        os.ftruncate(descriptor, length)
        os.pwrite(descriptor, self._boot, length - len(self._boot))
        return descriptor

    def _is_whole(self, descriptor: int, *, length: int) -> bool:
        found = os.fstat(descriptor).st_size
        return found == length and os.pread(descriptor, len(self._boot), length - len(self._boot)) == self._boot

    def _recount(self) -> None:
        with os.scandir(self.folder) as entries:
            self._held = sum(_disk_bytes(entry) for entry in entries if entry.name.endswith(SUFFIX))
        self._written = 0

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class CachedFile:
    """The blocks of one object that are here."""

    def __init__(self, cache: BlockCache, descriptor: int, *, size: int):
        self._cache, self._descriptor, self._size = cache, descriptor, size
        weakref.finalize(self, os.close, descriptor).atexit = False

    def read(self, low: int, high: int) -> bytes | None:
        """Bytes low..high-1; None where a block of them is not here."""
        first, count = low // BLOCK, -(-high // BLOCK) - low // BLOCK
        try:
            if os.pread(self._descriptor, count, self._size + first) != b"\1" * count:
                return None
            data = os.pread(self._descriptor, high - low, low)
        except OSError:
            return None
        return data if len(data) == high - low else None

    def write(self, block: int, data: bytes) -> None:
        """Keeps a block while there is room. Another process may do the same: the bytes are equal."""
        if not self._cache.has_room():
            return
        try:
            if os.pwrite(self._descriptor, data, block * BLOCK) == len(data):
                os.pwrite(self._descriptor, b"\1", self._size + block)
        except OSError:
            self._cache.failed()
        self._cache.wrote(BLOCK)


def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _boot() -> bytes:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_bytes().strip().ljust(36, b"-")[:36] if path.exists() else b"-" * 36


def _disk_bytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
