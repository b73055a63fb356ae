"""The files that a source reads: what its globs name, on this machine or in an object store, and their decompressed bytes."""

import contextlib
import glob
import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
import zstandard
from isal import igzip, isal_zlib

from data_prep.errors import DataError
from data_prep.spec import Source

COMPRESSIONS = (".gz", ".zst", ".zstd")
EXTENSIONS = {"jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet", ".pq")}  # text: any
ISAL_ERROR = cast(type[Exception], isal_zlib.error)
DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, zstandard.ZstdError, ISAL_ERROR)
READ_BYTES = 1 << 16  # of compressed input: what comes out at once stays small at any sane ratio


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file a source reads. `version` changes when its content is written again: mtime, or the store's etag."""

    path: str
    size: int
    version: str


def find_inputs(source: Source, *, name: str) -> tuple[InputFile, ...]:
    """The files that the source's globs name, sorted by path, each once. Relative globs start at the working directory.

    DataError: a glob without a match, a file whose extension the format does not have."""
    found: dict[str, InputFile] = {}
    for pattern in source.inputs:
        matches = _glob(pattern)
        if not matches:
            raise DataError(
                f"source '{name}': input '{pattern}' matches no file; inputs are globs (** for any folders) of local paths, "
                f"seen from {Path.cwd()}, or of URLs; correct mixture.sources.{name}.inputs, or fetch the data"
            )
        found.update({identity: file for identity, file in matches.items() if identity not in found})
    files = tuple(sorted(found.values(), key=lambda file: file.path))
    for file in files:
        _check_extension(file.path, format=source.format)
    return files


def _check_extension(path: str, *, format: str | None) -> None:
    known = EXTENSIONS.get(format or "")
    if known is None:
        return
    pure = PurePosixPath(path)
    compressions = COMPRESSIONS if format == "jsonl" else ()
    suffix = PurePosixPath(pure.stem).suffix if pure.suffix in compressions else pure.suffix
    if suffix not in known:
        also = f", each also with {', '.join(compressions)}" if compressions else ""
        raise DataError(
            f"{path} has the extension '{pure.suffix}'; {format} files end in {', '.join(known)}{also}; rename or convert"
        )


def _glob(pattern: str) -> dict[str, InputFile]:
    """Identity -> file. fsspec's local glob neither follows links to folders nor counts links as files, so that linked data
    would go missing: the standard library's does both, and a file that is linked twice keeps one identity."""
    if "://" in pattern:
        system, name = file_system(pattern)
        try:
            infos = system.glob(name, detail=True).values()
        except Exception as error:  # every store raises its own
            raise DataError(f"cannot list input {pattern}: {error}; look at the store and its credentials") from error
        return {info["name"]: _remote_file(system, info) for info in infos if info["type"] == "file"}
    pattern = str(Path(pattern).expanduser())
    _refuse_hidden(pattern)
    names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob leaves linked folders out)
    files: dict[str, InputFile] = {}
    for path in map(Path, sorted(names)):
        if not path.is_dir():
            files.setdefault(str(path.resolve()), _local_file(path.absolute()))
    return files


def _refuse_hidden(pattern: str) -> None:
    """A folder that cannot be listed would be passed over by glob, with all that is in it."""
    folders = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)
    base = Path(*folders)
    depth = None if "**" in pattern else len(Path(pattern).parts) - len(base.parts)

    def refuse(error: OSError) -> None:
        what = f"cannot list {error.filename}, of input {pattern}: {error.strerror}"
        raise DataError(f"{what}; what is in it would be left out in silence; mend its rights, or narrow the glob")

    if base.is_dir() and glob.has_magic(pattern):
        for folder, below, _ in os.walk(base, onerror=refuse):
            if depth is not None and len(Path(folder).parts) - len(base.parts) >= depth - 1:
                below.clear()  # deeper than the glob looks


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. DataError: it knows none, or a package is missing."""
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataError(f"{url}: {error}; s3:// needs `pip install 's3fs'`, gs:// `gcsfs`") from error
    return system, path


def refuse_changed(file: InputFile) -> None:
    """DataError: an input is not the file that the plan was made of."""
    try:
        if "://" in file.path:
            system, name = file_system(file.path)
            system.invalidate_cache()
            now = _remote_file(system, system.info(name))
        else:
            now = _local_file(Path(file.path).resolve(strict=True))
        said = f"it is {now.size:,} bytes of version {now.version}"
    except FileNotFoundError:
        now, said = None, "it is gone"
    if now is None or (now.size, now.version) != (file.size, file.version):
        raise DataError(
            f"input {file.path} changed since it was planned: it was {file.size:,} bytes of version {file.version}, {said}; "
            "inputs stay as they are until their source is whole; restore it, or remove the source's folder and begin again"
        )


def _local_file(path: Path) -> InputFile:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read input {path}: {error.strerror}; restore the file or its link, or remove it") from error
    return InputFile(path=str(path), size=status.st_size, version=str(status.st_mtime_ns))


def _remote_file(system: Any, info: dict[str, Any]) -> InputFile:
    version = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated", "created") if info.get(key)), "")
    return InputFile(path=system.unstrip_protocol(info["name"]), size=info["size"], version=str(version))


@contextlib.contextmanager
def open_input(path: str) -> Iterator[Any]:
    """The decompressed bytes of a file, as a binary stream."""
    system, name = file_system(path) if "://" in path else (None, path)
    with system.open(name, "rb") if system else Path(name).open("rb") as raw:
        if path.endswith(".gz"):
            yield io.BufferedReader(igzip.IGzipFile(fileobj=raw, mode="rb"), 1 << 20)  # type: ignore[no-untyped-call]
        elif path.endswith((".zst", ".zstd")):
            yield io.BufferedReader(_Chunks(_zst_chunks(raw)), 1 << 20)
        else:
            yield raw


def _zst_chunks(raw: BinaryIO) -> Iterator[bytes]:
    """zstandard's own stream reader takes a truncated file for a finished one, so frames are followed to their end here."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # files of `zstd --long=31` too
    frame, frames = None, 0
    while data := raw.read(READ_BYTES):
        while data:
            if frame is None:
                frame, frames = decompressor.decompressobj(), frames + 1
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None or not frames:
        raise EOFError("the zstd stream ends inside a frame")


class _Chunks(io.RawIOBase):
    """A stream over an iterator of bytes."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
