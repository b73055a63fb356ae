"""The folder of a source while it is prepared, on a file system or in an object store: files that appear whole, and claims.

A claim says that a live process works on a task. It keeps workers from doing the same twice; nothing breaks where two do, as
files carry their writer's name until they are whole and the same task always gives the same bytes.
"""

import contextlib
import functools
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from data_prep.indexed import naming_full_disk, partial, sync_directory, writer_of

HEARTBEAT_S = 10.0
STALE_S = 90.0  # a claim that nobody renewed for so long belongs to a dead machine
ABANDONED_S = 3600.0  # the same for half-written files of another machine
CLAIMS, FAILED = "claims", "failed"


class Place(Protocol):
    """Where a source is prepared. Names are relative, with `/`; `name` is the source's."""

    name: str

    def path(self, file: str) -> str:
        """How messages name a file."""

    def read(self, file: str) -> bytes | None:
        """The whole of a small file; None where it is not there."""

    def write(self, file: str, data: bytes) -> None:
        """A small file, in one step: it is there whole or not at all. DataError: the disk is full."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file in a folder, not of those in folders below; empty where it is not there."""

    def names(self, folder: str) -> set[str]:
        """The files of a folder, quicker than with their sizes."""

    def remove(self, file: str) -> None:
        """A file of ours, or a folder with all that is in it, where it is there."""

    def workroom(self) -> contextlib.AbstractContextManager[Path]:
        """A folder of this machine where a task writes its large files."""

    def publish(self, room: Path, *, files: list[str]) -> None:
        """Files written in a workroom, under their names in the source's folder."""

    def local(self, file: str) -> contextlib.AbstractContextManager[Path]:
        """A file of the source on this machine, while it is needed."""

    def is_claimed(self) -> bool:
        """Whether a live process works on any task."""

    def claim(self, task: str) -> contextlib.AbstractContextManager[object] | None:
        """The right to work on a task; None while another live process has it."""


def open_place(data_dir: str | Path, name: str) -> Place:
    """The place of source `name`: below a folder of this machine, or a URL that fsspec knows."""
    if "://" not in str(data_dir):
        return LocalPlace(Path(data_dir) / name)
    from data_prep.prepare.remote_place import RemotePlace  # it builds on what stands here

    return RemotePlace(f"{str(data_dir).rstrip('/')}/{name}", name=name)


# A folder of this machine, or of a file system that machines share


class LocalPlace:
    """A folder that this machine mounts."""

    def __init__(self, directory: Path):
        self.directory, self.name = directory, directory.name

    def path(self, file: str) -> str:
        return str(self.directory / file)

    def read(self, file: str) -> bytes | None:
        try:
            return (self.directory / file).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, file: str, data: bytes) -> None:
        path = self.directory / file
        with naming_full_disk(self.directory):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with naming_full_disk(path), partial(path).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial(path).replace(path)
        finally:
            partial(path).unlink(missing_ok=True)
        sync_directory(path.parent)

    def sizes(self, folder: str = "") -> dict[str, int]:
        try:
            with os.scandir(self.directory / folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def names(self, folder: str) -> set[str]:
        try:
            return {path.name for path in (self.directory / folder).iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def remove(self, file: str) -> None:
        path = self.directory / file
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def workroom(self) -> Iterator[Path]:
        """The folder itself: files take their names when they are whole."""
        yield self.directory

    def publish(self, room: Path, *, files: list[str]) -> None:
        return  # they are where they belong

    @contextlib.contextmanager
    def local(self, file: str) -> Iterator[Path]:
        yield self.directory / file

    def is_claimed(self) -> bool:
        claims = self.directory / CLAIMS
        return any(not is_stale(claims / name) for name in self.names(CLAIMS) if not name.startswith("."))

    def claim(self, task: str) -> "Claim | None":
        path = self.directory / CLAIMS / task
        with naming_full_disk(self.directory):
            path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                with naming_full_disk(path):
                    _create(path, content=owner())
                return Claim(path)
            except FileNotFoundError:  # somebody ended the source and removed all claims
                return None
            except FileExistsError:
                if not is_stale(path):
                    return None
                path.unlink(missing_ok=True)
        return None

    def sweep(self) -> None:
        """Removes what writers that were killed left half written."""
        for path in self.directory.rglob("*.partial"):
            pid = writer_of(path)
            if not is_running(pid) if pid else _age_s(path) > ABANDONED_S:
                path.unlink(missing_ok=True)


class Claim:
    """A task is ours until this is closed; a thread renews it meanwhile."""

    def __init__(self, path: Path | None):
        self._path, self._done = path, threading.Event()
        if path:
            threading.Thread(target=self._renew, name=f"claim {path.name}", daemon=True).start()

    def _renew(self) -> None:
        while self._path and not self._done.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._path:
            self._path.unlink(missing_ok=True)


def _create(path: Path, *, content: str) -> None:
    """FileExistsError: it is there. Nothing is left where the disk is full: an empty claim would be waited for."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def owner() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid()})


def is_stale(path: Path) -> bool:
    """Whether the process of a claim is dead: known at once on this machine, after a while on another."""
    try:
        found: Any = json.loads(path.read_text())
        if found["host"] == socket.gethostname() and not is_running(found["pid"]):
            return True
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError):
        pass  # it is being written, or its writer died in the middle of it
    return _age_s(path) > STALE_S


def is_running(pid: int) -> bool:
    """Whether this machine has the process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _age_s(path: Path) -> float:
    """By the clock of the file server, which dates the files; 0 where it is not there."""
    with contextlib.suppress(OSError):
        return time.time() + _clock_offset_s(path.parent) - path.stat().st_mtime
    return 0.0


@functools.cache
def _clock_offset_s(folder: Path) -> float:
    """What the clock of the server that holds a folder is ahead of ours."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now-") as now:
        return os.fstat(now.fileno()).st_mtime - time.time()
