"""Where the files of a source lie: a folder of this machine, or of an object store through fsspec."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class FileState:
    """What tells a file from another that takes its name: its size in bytes, and its time of change (or an object's etag)."""

    size: int
    version: str


class Folder(Protocol):
    """The files of one source. `local` is the folder on this machine, None where it is elsewhere."""

    name: str
    local: Path | None

    def path(self, file: str) -> str:
        """How messages name a file."""

    def read_bytes(self, file: str) -> bytes:
        """The whole of a small file. FileNotFoundError."""

    def states(self, files: Iterable[str]) -> dict[str, FileState]:
        """The state of each file that is there."""


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, directory: Path):
        self.local, self.name = directory, directory.name

    def path(self, file: str) -> str:
        return str(self.local / file)

    def read_bytes(self, file: str) -> bytes:
        return (self.local / file).read_bytes()

    def states(self, files: Iterable[str]) -> dict[str, FileState]:
        found = {file: self.local / file for file in files}
        stats = {file: path.stat() for file, path in found.items() if path.exists()}
        return {file: FileState(stat.st_size, str(stat.st_mtime_ns)) for file, stat in stats.items()}


def as_folder(place: Path | Folder) -> Folder:
    return LocalFolder(place) if isinstance(place, Path) else place
