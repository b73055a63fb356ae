"""Rows of jsonl, parquet and text files in bounded memory, each with the place it came from.

Nothing is skipped in silence: a row is a document, or a reject with file, line and reason; damage to a whole file stops.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from data_prep.errors import DataError
from data_prep.indexed import naming_full_disk
from data_prep.inputs import COMPRESSIONS, DAMAGE, InputFile, find_inputs, open_input
from data_prep.spec import Source

__all__ = ["InputFile", "Piece", "Place", "Rejects", "RowCount", "Rows", "Where", "find_inputs", "read_documents", "read_piece"]

BOM = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 25
COUNTED_BYTES = 1 << 30


class Where(NamedTuple):
    """Where a row was read; lines and rows count from 1."""

    file: str
    unit: str  # line | row | file
    number: int

    def __str__(self) -> str:
        return self.file if self.unit == "file" else f"{self.file}, {self.unit} {self.number:,}"


class Piece(NamedTuple):
    """The rows of a file that begin in bytes start..end-1; the whole file where `end` is None."""

    file: InputFile
    start: int = 0
    end: int | None = None


class Place(NamedTuple):
    """The `number`-th row of a piece, from 1. Where that is in its file is counted when somebody asks."""

    piece: Piece
    unit: str
    number: int

    @property
    def where(self) -> Where:
        """Deep in a large file, lines are counted from the beginning of the piece: counting all would read it once more."""
        start = self.piece.start
        if start > COUNTED_BYTES:
            return Where(f"{self.piece.file.path} after byte {start:,}", self.unit, self.number)
        try:
            return Where(self.piece.file.path, self.unit, self.number + _lines_before(self.piece))
        except OSError:  # it is asked for where reading failed
            return Where(f"{self.piece.file.path} after byte {start:,}", self.unit, self.number)

    def __str__(self) -> str:
        return str(self.where)


class Rows(NamedTuple):
    """Some rows of one piece: their texts, places, and what else they say (only where it was asked for)."""

    texts: list[str]
    places: list[Place]
    fields: list[dict[str, Any]]

    def only(self, kept: Sequence[int]) -> "Rows":
        """Those with these indices."""
        fields = [self.fields[index] for index in kept] if self.fields else []
        return Rows([self.texts[index] for index in kept], [self.places[index] for index in kept], fields)


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
        self.path.parent.mkdir(exist_ok=True)
        with naming_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_documents(
    files: Iterable[InputFile], *, source: Source, counts: RowCount, rejects: Rejects
) -> Iterator[tuple[str, Where]]:
    """(text, where) of every well-formed row of whole files, in order; texts may be empty. As read_piece."""
    for file in files:
        for rows in read_piece(Piece(file), source=source, counts=counts, rejects=rejects):
            for text, place in zip(rows.texts, rows.places, strict=True):
                yield text, place.where


def read_piece(
    piece: Piece,
    *,
    source: Source,
    counts: RowCount,
    rejects: Rejects,
    max_row_bytes: int = MAX_ROW_BYTES,
    fields: Sequence[str] | None = None,
) -> Iterator[Rows]:
    """Every well-formed row, in order; texts may be empty. Adds to `counts` and `rejects` as it goes.

    `fields`: the columns to read beside the text; None where nobody asks for what else a row says. A jsonl row says all.
    DataError: a truncated or damaged file, a missing parquet column, more rejects than tolerated."""
    if not piece.file.size and source.format != "text":
        raise DataError(f"{piece.file.path} is empty: 0 bytes; an input holds at least one row; fetch it again or remove it")
    yield from _reader_of(source.format)(
        Job(piece, source.text_field, counts=counts, rejects=rejects, max_bytes=max_row_bytes, fields=fields)
    )


def _reader_of(format: str | None) -> Callable[["Job"], Iterator[Rows]]:
    if format == "parquet":
        from data_prep.parquet import read_parquet  # pyarrow takes 50 MB and a tenth of a second

        return read_parquet
    return {"jsonl": _read_jsonl, "text": _read_text}[format or ""]


@dataclass
class Job:
    """One piece, and what is asked of it."""

    piece: Piece
    field: str
    counts: RowCount
    rejects: Rejects
    max_bytes: int
    fields: Sequence[str] | None

    @property
    def path(self) -> str:
        return self.piece.file.path

    def collect(
        self, raws: Iterable[Any], *, first: int, unit: str, parse: Callable[[Any], tuple[str, dict[str, Any]]]
    ) -> Rows:
        """The well-formed of these raw rows, the first of which has number `first`."""
        rows, keep = Rows([], [], []), self.fields is not None
        for number, raw in enumerate(raws, start=first):
            if raw is None:  # a blank line
                continue
            try:
                text, fields = parse(raw)
            except Malformed as reason:
                self.rejects.add(Place(self.piece, unit, number).where, reason=str(reason))
                continue
            rows.texts.append(text)
            rows.places.append(Place(self.piece, unit, number))
            if keep:
                rows.fields.append(fields)
        return rows


# jsonl


class _TooLong(NamedTuple):
    """Stands for a line that is too long to be kept."""

    size: int


def _read_jsonl(job: Job) -> Iterator[Rows]:
    number, key = 0, orjson.dumps(job.field)
    parse = functools.partial(_json_row, field=job.field, key=key, max_bytes=job.max_bytes)
    with naming_damage(lambda: Place(job.piece, "line", number).where), open_input(job.path) as stream:
        for lines in _lines(stream, piece=job.piece, max_bytes=job.max_bytes):
            told = [None if isinstance(line, bytes) and not line.strip() else line for line in lines]
            blank = told.count(None)
            job.counts.blank_lines += blank
            job.counts.rows += len(told) - blank
            yield job.collect(told, first=number + 1, unit="line", parse=parse)
            number += len(lines)


def _lines(stream: Any, *, piece: Piece, max_bytes: int) -> Iterator[list[bytes | _TooLong]]:
    """Lists of the lines that begin in the piece, without their newlines."""
    skip_first = piece.start > 0  # from the byte before: a line that begins at `start` follows a newline there
    if skip_first:
        stream.seek(piece.start - 1)
    left = None if piece.end is None else piece.end - piece.start + skip_first
    line, read = _Line(max_bytes), getattr(stream, "read1", stream.read)  # read1: what comes before damage is not lost with it
    while True:
        chunk = read(READ_BYTES if left is None else min(READ_BYTES, left) or READ_BYTES)
        if not chunk:
            break
        whole = chunk.split(b"\n")
        beyond = left == 0  # behind the end lies only the rest of the last line
        lines = [line.end(whole[0]), *(() if beyond else whole[1:-1])] if len(whole) > 1 else []
        if skip_first and lines:
            lines, skip_first = lines[1:], False
        if lines:
            yield lines
        if len(whole) > 1 and beyond:
            return
        line.add(whole[-1])
        if left is not None and not beyond:
            left -= len(chunk)
            if not left and (skip_first or not line.size):
                return
    if line.size and not skip_first:
        yield [line.end(b"")]


class _Line:
    """A line that comes in parts; what is longer than `max_bytes` is counted, not kept."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._parts, self.size = max_bytes, list[bytes](), 0

    def add(self, part: bytes) -> None:
        self.size += len(part)
        if self.size > self._max_bytes:
            self._parts.clear()
        elif part:
            self._parts.append(part)

    def end(self, part: bytes) -> bytes | _TooLong:
        """The line that ends with `part`; the next part begins another."""
        self.add(part)
        line = _TooLong(self.size) if self.size > self._max_bytes else b"".join(self._parts)
        self.size = 0
        self._parts.clear()
        return line


@functools.lru_cache(maxsize=64)
def _lines_before(piece: Piece) -> int:
    """The lines that begin in front of a piece, the last of which may end in it."""
    if not piece.start:
        return 0
    left, found = piece.start - 1, 1
    with open_input(piece.file.path) as stream:
        while left and (chunk := stream.read(min(READ_BYTES, left))):
            found, left = found + chunk.count(b"\n"), left - len(chunk)
    return found


def _json_row(line: bytes | _TooLong, *, field: str, key: bytes, max_bytes: int) -> tuple[str, dict[str, Any]]:
    if isinstance(line, _TooLong) or len(line) > max_bytes:
        raise too_long(line.size if isinstance(line, _TooLong) else len(line), max_bytes=max_bytes)
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if line.startswith(BOM):
            raise Malformed("starts with a byte order mark (BOM); the rule is plain UTF-8") from error
        raise Malformed(f"is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise Malformed(f"is a JSON {type(row).__name__}; the rule is an object with the field '{field}'")
    if field not in row:
        raise Malformed(f"has no field '{field}'; it has {', '.join(list(row)[:12]) or 'no fields'}")
    text = row.pop(field)
    if not isinstance(text, str):
        raise Malformed(f"has {'null' if text is None else type(text).__name__} in '{field}'; the rule is a string")
    if line.count(key) > 1:
        _refuse_twice(line, field=field)
    return text, row


def _refuse_twice(line: bytes, *, field: str) -> None:
    """JSON readers take the last of two equal keys in silence; which text was meant, nobody can tell."""
    found: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        found[:] = [key for key, _ in pairs]  # the outermost object comes last

    json.loads(line, object_pairs_hook=keep)
    if found.count(field) > 1:
        raise Malformed(f"has the field '{field}' {found.count(field)} times; the rule is once")


# Plain text


def _read_text(job: Job) -> Iterator[Rows]:
    with naming_damage(lambda: Where(job.path, "file", 1)), open_input(job.path) as stream:
        content = stream.read(job.max_bytes + 1)
    job.counts.rows += 1
    yield job.collect([content], first=1, unit="file", parse=functools.partial(_text_row, max_bytes=job.max_bytes))


def _text_row(content: bytes, *, max_bytes: int) -> tuple[str, dict[str, Any]]:
    """A byte order mark at the start of a text file says how it is encoded and is no part of the text."""
    if len(content) > max_bytes:
        raise too_long(len(content), max_bytes=max_bytes)
    try:
        return content.decode("utf-8-sig"), {}
    except UnicodeDecodeError as error:
        raise Malformed(f"is not valid UTF-8: {error.reason} at byte {error.start}") from error


def too_long(size: int, *, max_bytes: int) -> Malformed:
    return Malformed(
        f"holds {size:,} bytes or more; the rule is at most {max_bytes:,} (data.max_row_mib), so that memory stays bounded; "
        "split the document, or raise it"
    )


@contextlib.contextmanager
def naming_damage(where: Callable[[], Where], *, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Names the last row before a file turns out to be damaged; `also`: what else a reader raises then."""
    try:
        yield
    except (*DAMAGE, *also) as error:
        place = where()
        if isinstance(error, OSError) and error.errno:
            raise DataError(
                f"cannot read {place.file} after {place}: {error.strerror or error}; restore the file, its rights or the "
                "connection, and start again: what is done stays done"
            ) from error
        raise DataError(
            f"{place} is the last that could be read: the file is truncated or damaged ({error}), or its name ends in another "
            "compression than it has; what follows would be lost, so nothing of it is used; fetch the file again"
        ) from error


def can_be_cut(file: InputFile, *, format: str | None) -> bool:
    """Whether the lines of a file can be read from any byte on."""
    return format == "jsonl" and not file.path.endswith(COMPRESSIONS)
