"""Documents of jsonl, parquet and text files, one after the other in bounded memory, each with the place it came from.

Nothing is skipped in silence: a row is a document, or a reject with file, line and reason; damage to a whole file stops.
"""

import contextlib
import glob
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from isal import igzip, isal_zlib

from data_prep.errors import DataError
from data_prep.indexed import naming_full_disk
from data_prep.spec import Source

BOM = b"\xef\xbb\xbf"
COMPRESSIONS = (".gz", ".zst", ".zstd")
EXTENSIONS = {"jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet", ".pq")}  # text: any
ISAL_ERROR = cast(type[Exception], isal_zlib.error)
DAMAGE = (OSError, EOFError, zstandard.ZstdError, ISAL_ERROR, pa.ArrowException)
READ_BYTES = 1 << 16  # of compressed input: what comes out at once stays small at any sane ratio
PARQUET_ROWS = 64


class Where(NamedTuple):
    """Where a row was read; lines and rows count from 1."""

    file: str
    unit: str  # line | row | file
    number: int

    def __str__(self) -> str:
        return self.file if self.unit == "file" else f"{self.file}, {self.unit} {self.number:,}"


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file a source reads. `version` changes when its content is written again: mtime, or the store's etag."""

    path: str
    size: int
    version: str


@dataclass(kw_only=True)
class RowCount:
    """What the readers saw; blank lines of jsonl are not rows."""

    rows: int = 0
    blank_lines: int = 0


class Malformed(Exception):
    """Why a row cannot be a document."""


class Rejects:
    """The malformed rows of a source: listed in `path` up to `tolerance` of them, then DataError."""

    def __init__(self, path: Path, *, tolerance: int):
        self.path, self.tolerance, self.count = path, tolerance, 0

    def add(self, where: Where, *, reason: str) -> None:
        if self.count >= self.tolerance:
            listed = f" after {self.count} others, listed in {self.path}" if self.count else ""
            raise DataError(
                f"{where}: the row {reason}{listed}; data.max_rejected_rows tolerates {self.tolerance} malformed rows "
                "a source; repair the input, correct the source's format or text_field, or raise it"
            )
        self.count += 1
        line = json.dumps({"file": where.file, where.unit: where.number, "reason": reason}, ensure_ascii=False)
        with naming_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


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


def read_documents(
    files: Iterable[InputFile], *, source: Source, counts: RowCount, rejects: Rejects
) -> Iterator[tuple[str, Where]]:
    """(text, where) of every well-formed row, in order; texts may be empty. Adds to `counts` and `rejects` as it goes.

    DataError: a truncated or damaged file, a missing parquet column, more rejects than tolerated."""
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}
    for file in files:
        if not file.size and source.format != "text":
            raise DataError(f"{file.path} is empty: 0 bytes; an input holds at least one row; fetch it again or remove it")
        for row, where in readers[source.format or ""](file, field=source.text_field, counts=counts):
            if isinstance(row, Malformed):
                rejects.add(where, reason=str(row))
            else:
                yield row, where


Rows = Iterator[tuple[str | Malformed, Where]]


def _read_jsonl(file: InputFile, *, field: str, counts: RowCount) -> Rows:
    number = 0
    with _naming_damage(lambda: Where(file.path, "line", number)), _open(file.path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                counts.blank_lines += 1
                continue
            counts.rows += 1
            yield _attempt(_json_text, line, field), Where(file.path, "line", number)


def _read_parquet(file: InputFile, *, field: str, counts: RowCount) -> Rows:
    number = 0
    with _naming_damage(lambda: Where(file.path, "row", number)), _open(file.path) as stream:
        parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        _check_column(file.path, schema=parquet.schema_arrow, field=field)
        counts.rows += parquet.metadata.num_rows
        for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
            for value in batch.column(0):
                number += 1
                yield _attempt(_parquet_text, value, field), Where(file.path, "row", number)
        if number != parquet.metadata.num_rows:
            raise EOFError(f"its footer promises {parquet.metadata.num_rows:,} rows")


def _read_text(file: InputFile, *, field: str, counts: RowCount) -> Rows:
    where = Where(file.path, "file", 1)
    with _naming_damage(lambda: where), _open(file.path) as stream:
        content = stream.read()
    counts.rows += 1
    yield _attempt(_decode, content, field), where


def _attempt(parse: Callable[[Any, str], str], raw: Any, field: str) -> str | Malformed:
    try:
        return parse(raw, field)
    except Malformed as reason:
        return reason


def _json_text(line: bytes, field: str) -> str:
    if line.startswith(BOM):
        raise Malformed("starts with a byte order mark (BOM); the rule is plain UTF-8")
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise Malformed(f"is a JSON {type(row).__name__}; the rule is an object with the field '{field}'")
    if field not in row:
        raise Malformed(f"has no field '{field}'; it has {', '.join(list(row)[:12]) or 'no fields'}")
    if not isinstance(row[field], str):
        raise Malformed(f"has {'null' if row[field] is None else type(row[field]).__name__} in '{field}'; the rule is a string")
    return str(row[field])


def _parquet_text(value: Any, field: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise Malformed(f"is not valid UTF-8: {error.reason} at byte {error.start}") from error
    if text is None:
        raise Malformed(f"has null in '{field}'; the rule is a string")
    return str(text)


def _decode(content: bytes, field: str) -> str:
    """A byte order mark at the start of a text file says how it is encoded and is no part of the text."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Malformed(f"is not valid UTF-8: {error.reason} at byte {error.start}") from error


def _check_column(path: str, *, schema: pa.Schema, field: str) -> None:
    if field not in schema.names:
        raise DataError(f"{path} has no column '{field}'; it has {', '.join(schema.names)}; set the source's text_field")
    kind = schema.field(field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: column '{field}' holds {kind}; documents are strings; set the source's text_field")


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
    system, name = fsspec.core.url_to_fs(pattern)
    if "file" not in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        infos = system.glob(name, detail=True).values()
        return {info["name"]: _remote_file(system, info) for info in infos if info["type"] == "file"}
    names = [name] if Path(name).is_file() else glob.glob(name, recursive=True)  # noqa: PTH207 (Path.glob leaves linked folders out)
    files: dict[str, InputFile] = {}
    for path in map(Path, sorted(names)):
        if not path.is_dir():
            files.setdefault(str(path.resolve()), _local_file(path))
    return files


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
def _naming_damage(where: Callable[[], Where]) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise DataError(
            f"{where()} is the last that could be read: the file is truncated or damaged ({error}); "
            "what follows would be lost, so nothing of it is used; fetch the file again"
        ) from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    """The decompressed bytes of a file, as a binary stream."""
    system, name = fsspec.core.url_to_fs(path)
    with system.open(name, "rb") as raw:
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
