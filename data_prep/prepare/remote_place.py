"""A source that is prepared in an object store, or in another file system that fsspec knows.

Objects appear whole when they are put, so nothing carries a temporary name there; large files are first written here.
A claim is not exclusive: two workers that ask in the same second may both get it, and then put the same bytes twice.
"""

import contextlib
import functools
import json
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.errors import DataError
from data_prep.inputs import file_system
from data_prep.prepare.place import CLAIMS, STALE_S

RENEW_S = 30.0
RETRY_SECONDS = (0.5, 2.0, 8.0)
SETTLE_S = 0.2  # after which a claim that somebody else put last is seen

Answer = TypeVar("Answer")


class RemotePlace:
    """Below a URL. Requests are tried again; DataError where that does not help."""

    def __init__(self, url: str, *, name: str):
        self.name, self.url = name, url
        self._system, self._root = file_system(url)

    def path(self, file: str) -> str:
        return f"{self.url}/{file}"

    def read(self, file: str) -> bytes | None:
        def ask() -> bytes | None:
            try:
                data: bytes = self._system.cat_file(self._at(file))
            except FileNotFoundError:
                return None
            return data

        return self._retried("read", file, ask)

    def write(self, file: str, data: bytes) -> None:
        def ask() -> None:
            self._make_parent(file)
            self._system.pipe_file(self._at(file), data)

        self._retried("write", file, ask)

    def sizes(self, folder: str = "") -> dict[str, int]:
        def ask() -> dict[str, int]:
            self._system.invalidate_cache()
            try:
                infos = self._system.ls(self._at(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            return {info["name"].rpartition("/")[2]: int(info["size"] or 0) for info in infos if info["type"] == "file"}

        return self._retried("list", folder, ask)

    def names(self, folder: str) -> set[str]:
        return set(self.sizes(folder))

    def is_claimed(self) -> bool:
        claims = [self._claim(f"{CLAIMS}/{name}") for name in self.names(CLAIMS)]
        return any(claim and time.time() - claim["at"] < STALE_S for claim in claims)

    def remove(self, file: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._retried("remove", file, lambda: self._system.rm(self._at(file), recursive=True))

    @contextlib.contextmanager
    def workroom(self) -> Iterator[Path]:
        """A folder of TMPDIR; it needs room for a task's shards."""
        with tempfile.TemporaryDirectory(prefix=f"phidias-{self.name}-") as folder:
            yield Path(folder)

    def publish(self, room: Path, *, files: list[str]) -> None:
        for file in files:
            self._retried("write", file, functools.partial(self._put, room / file, file))

    def _put(self, path: Path, file: str) -> None:
        self._make_parent(file)
        self._system.put_file(str(path), self._at(file))

    def _make_parent(self, file: str) -> None:
        """Where the store has folders; it makes buckets nowhere."""
        if isinstance(self._system, LocalFileSystem | MemoryFileSystem):
            self._system.makedirs(self._system._parent(self._at(file)), exist_ok=True)

    @contextlib.contextmanager
    def local(self, file: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=f"phidias-{self.name}-") as folder:
            path = Path(folder) / Path(file).name
            self._retried("read", file, lambda: self._system.get_file(self._at(file), str(path)))
            yield path

    def claim(self, task: str) -> "RemoteClaim | None":
        file = f"{CLAIMS}/{task}"
        found = self._claim(file)
        if found and time.time() - found["at"] < STALE_S:
            return None
        ours = uuid.uuid4().hex
        self.write(file, _claim_of(ours))
        time.sleep(SETTLE_S)
        now = self._claim(file)
        return RemoteClaim(self, file, ours) if now and now["by"] == ours else None

    def _claim(self, file: str) -> dict[str, Any] | None:
        """By the clocks of the machines: those of a cluster agree to far less than the time after which a claim is stale."""
        try:
            fields: dict[str, Any] = json.loads(self.read(file) or b"null")
            return fields
        except ValueError:
            return None

    def _at(self, file: str) -> str:
        return f"{self._root}/{file}".rstrip("/")

    def _retried(self, what: str, file: str, task: Callable[[], Answer]) -> Answer:
        for pause in (*RETRY_SECONDS, None):
            try:
                return task()
            except Exception as error:  # every store raises its own
                if isinstance(error, FileNotFoundError) and what != "write":
                    raise
                if pause is None:
                    raise DataError(
                        f"cannot {what} {self.path(file)} after {len(RETRY_SECONDS) + 1} attempts: {error}; what is done stays "
                        "done; look at the store, its credentials and its quota, and start again"
                    ) from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


class RemoteClaim:
    """A task is ours until this is closed; a thread renews it meanwhile."""

    def __init__(self, place: RemotePlace, file: str, ours: str):
        self._place, self._file, self._ours, self._done = place, file, ours, threading.Event()
        threading.Thread(target=self._renew, name=f"claim {file}", daemon=True).start()

    def _renew(self) -> None:
        while not self._done.wait(RENEW_S):
            with contextlib.suppress(DataError):
                self._place.write(self._file, _claim_of(self._ours))

    def __enter__(self) -> "RemoteClaim":
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._place.remove(self._file)


def _claim_of(ours: str) -> bytes:
    return json.dumps({"by": ours, "at": time.time()}).encode()
