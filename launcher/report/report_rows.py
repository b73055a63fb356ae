"""metrics.jsonl as columns, a month's rows in seconds. Of every row its place, loss, gradient norm and times are read; the rest
of at most some ten thousand rows a run, evenly taken, which is more than a chart shows, or a median needs.

A row says where its stage stands. After a crash training goes on from a checkpoint before it, so a row at or before one already
read takes back whatever lies past it: the columns show the history that led to the model, once.
"""

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from launcher.rundir.goodput import parse_row as parse_for_goodput
from launcher.rundir.losses import Row as GoodputRow

Column = NDArray[np.float64]
Numbers = NDArray[np.intp]
Row = Mapping[str, Any]

# Read of every row of training.
EVERY = ("time", "step", "samples", "tokens", "loss", "grad_norm")
# Of all rows, besides: what goodput asks of them. `seconds` are those of a validation.
COLUMNS = (*EVERY, "step_time_s", "data_wait_s", "seconds")
FIELDS = (
    *EVERY,
    *("lr", "weight_norm", "update_ratio", "zero_grads"),
    *("tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "memory_max_bytes"),
    *("step_time_s", "forward_s", "backward_s", "optimizer_s", "exposed_s", "data_wait_s", "checkpoint_s"),
    *("slowest_ratio", "fp8_scale_min", "fp8_amax_max", "fp8_overflows"),
)
BY_SOURCE = ("loss_by_source", "tokens_by_source", "epochs_by_source")
# Rows of a run that are read whole, besides so many at both ends of each stage: the loss falls fast at first, and the newest
# launch may have few.
WHOLE_ROWS = 10_000
WHOLE_END_ROWS = 1_000
# How training writes the beginning of a row; one that begins otherwise is read whole at once.
NUMBER = rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
ANY_NUMBER = rb"(%b|null|NaN|-?Infinity)" % NUMBER
HEAD = re.compile(
    rb'\{"time": (%b), "kind": "train", "stage": "([^"\\]+)", "step": (\d+), "samples": (\d+), "tokens": (\d+), "loss": %b[,}]'
    % (NUMBER, ANY_NUMBER)
)
GRAD_NORM = re.compile(rb'"grad_norm": %b[,}]' % ANY_NUMBER)
STEP_TIME = re.compile(rb'"step_time_s": (%b), "data_wait_s": (%b)[,}]' % (NUMBER, NUMBER))
GRAD_NORM_KEY, STEP_TIME_KEY = b'"grad_norm": ', b'"step_time_s": '
TRAIN, VALIDATION, OTHER = range(3)
BUFFER_BYTES = 1 << 20
# Rows whose words are turned into numbers together.
BLOCK_ROWS = 20_000
NAN = float("nan")


@dataclass(frozen=True)
class Rows:
    """All rows in the order of the file, those taken back too. `offsets`: where in the file each begins; `kinds`: TRAIN,
    VALIDATION or OTHER; `stages`: numbers of `names`; `told`: the validations by row number; `logged`: whether goodput counts a
    row."""

    columns: dict[str, Column]
    offsets: Numbers
    kinds: Numbers
    stages: Numbers
    logged: NDArray[np.bool_]
    names: tuple[str, ...]
    told: dict[int, Row]

    def kept(self, stage: str) -> tuple[Numbers, list[Row]]:
        """What led to the model: numbers of the stage's rows of training, and its validations."""
        found = self.stages == self.names.index(stage)
        train, validation = (np.flatnonzero(found & (self.kinds == kind)) for kind in (TRAIN, VALIDATION))
        kept = self._not_taken_back(validation, others=train)
        return self._not_taken_back(train, others=validation), [self.told[int(row)] for row in kept]

    def _not_taken_back(self, rows: Numbers, *, others: Numbers) -> Numbers:
        """A row takes back those of its kind at or past it, and of the other kind those past it: a validation belongs to the
        step that it follows."""
        samples = self.columns["samples"]
        later = _least_from(samples[rows])[1:]
        later_other = _least_from(samples[others])[np.searchsorted(others, rows)]
        return rows[(samples[rows] < later) & (samples[rows] <= later_other)]

    def for_goodput(self) -> Iterator[GoodputRow]:
        chosen = np.flatnonzero(self.logged)
        names = ("time", "step", "step_time_s", "data_wait_s", "seconds")
        columns = [self.columns[name][chosen].tolist() for name in names]
        for stage, time, step, step_s, waited_s, seconds in zip(self.stages[chosen].tolist(), *columns, strict=True):
            known_s = step_s if step_s == step_s else None  # NaN is not itself
            yield GoodputRow(time, self.names[stage], int(step), known_s, waited_s, seconds)


def _least_from(samples: Column) -> Column:
    """The least of the values from each on; infinity after the last."""
    return np.append(np.minimum.accumulate(samples[::-1])[::-1], np.inf)


class _Reader:
    """Words of rows as they are read, and in blocks the numbers that they are."""

    def __init__(self) -> None:
        self.words: list[bytes] = []
        self.blocks: list[Column] = []
        self.offsets, self.kinds, self.stages, self.logged = array("q"), array("b"), array("q"), array("b")
        self.names: dict[bytes, int] = {}
        self.told: dict[int, Row] = {}

    def read(self, file: BinaryIO) -> None:
        offset = 0
        for line in file:
            if not (line.endswith(b"}\n") and self.take_head(line, offset)):
                self.take_other(line, offset)
            offset += len(line)
            if len(self.words) >= BLOCK_ROWS * len(COLUMNS):
                self.flush()
        self.flush()

    def take_head(self, line: bytes, offset: int) -> bool:
        """A row of training as training writes it; False for another. A GB of them goes through here: keys are searched for,
        which takes a tenth of the time of parsing them."""
        if not (head := HEAD.match(line)):
            return False
        at = line.find(GRAD_NORM_KEY, head.end())
        norm = GRAD_NORM.match(line, at) if at > 0 else None
        # Most often behind it.
        times_at = line.find(STEP_TIME_KEY, max(at, 0))
        times = STEP_TIME.match(line, times_at if times_at > 0 else max(0, line.find(STEP_TIME_KEY)))
        if not times:
            return False
        time, name, step, samples, tokens, loss = head.groups()
        self.words += (time, step, samples, tokens, loss, norm[1] if norm else b"nan", *times.groups(), b"0")
        self.note(TRAIN, name, offset=offset, logged=True)
        return True

    def take_other(self, line: bytes, offset: int) -> None:
        if not (row := parse_row(line)):
            return
        kind = {"train": TRAIN, "validation": VALIDATION}.get(row.get("kind", ""), OTHER)
        read = parse_for_goodput(line)
        told = (read.step_s, read.waited_s, read.seconds) if read else (None, None, None)
        self.words += [repr(number(value)).encode() for value in (*map(row.get, EVERY), *told)]
        if kind == VALIDATION:
            self.told[len(self.kinds)] = row
        self.note(kind, str(row.get("stage")).encode(), offset=offset, logged=read is not None)

    def note(self, kind: int, name: bytes, *, offset: int, logged: bool) -> None:
        self.offsets.append(offset)
        self.kinds.append(kind)
        self.stages.append(self.names.setdefault(name, len(self.names)))
        self.logged.append(logged)

    def flush(self) -> None:
        text = b" ".join(self.words).replace(b"null", b"nan").replace(b"Infinity", b"inf").decode()
        self.blocks.append(np.fromstring(text, dtype=np.float64, sep=" ").reshape(-1, len(COLUMNS)))
        self.words = []

    def rows(self) -> Rows:
        table = np.concatenate([np.empty((0, len(COLUMNS))), *self.blocks])
        return Rows(
            columns=dict(zip(COLUMNS, table.T, strict=True)),
            offsets=np.array(self.offsets, dtype=np.intp),
            kinds=np.array(self.kinds, dtype=np.intp),
            stages=np.array(self.stages, dtype=np.intp),
            logged=np.array(self.logged, dtype=np.bool_),
            names=tuple(name.decode() for name in self.names),
            told=self.told,
        )


def read_metrics(path: Path) -> Rows:
    """What a crash cut off is passed over."""
    reader = _Reader()
    if path.exists():
        with path.open("rb", buffering=BUFFER_BYTES) as file:
            reader.read(file)
    return reader.rows()


def parse_row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "time" in row else None


def number(value: Any) -> float:
    """NaN for a figure that a row lacks."""
    if type(value) is float:  # nearly all: told at once
        return value
    return float(value) if isinstance(value, int | float) else NAN


def whole_rows(size: int, *, total: int) -> Numbers:
    """Numbers of the rows of a stage to be read whole: all of a run of few, else evenly spaced ones and those at the ends."""
    if total <= WHOLE_ROWS:
        return np.arange(size)
    even = np.linspace(0, size - 1, max(2, round(WHOLE_ROWS * size / total))).round() if size else np.empty(0)
    begin, end = np.arange(min(size, WHOLE_END_ROWS)), np.arange(max(0, size - WHOLE_END_ROWS), size)
    return np.unique(np.concatenate([begin, even, end]).astype(np.intp))


def read_whole(file: BinaryIO, offsets: Sequence[int]) -> Iterator[Row]:
    for offset in offsets:
        file.seek(offset)
        if row := parse_row(file.readline()):
            yield row


def columns_of(rows: Iterable[Row]) -> tuple[dict[str, Column], dict[str, dict[str, Column]]]:
    """`FIELDS` by name, and `BY_SOURCE` by name and source; NaN where a row has no value."""
    columns = {name: array("d") for name in FIELDS}
    by_source: dict[str, dict[str, array[float]]] = {name: {} for name in BY_SOURCE}
    size = 0
    for row in rows:
        for name, column in columns.items():
            column.append(number(row.get(name)))
        for name, found in by_source.items():
            for source, value in (row.get(name) or {}).items():
                column = found.get(source) or found.setdefault(source, array("d"))
                _pad(column, size=size)
                column.append(number(value))
        size += 1
    for found in by_source.values():
        for column in found.values():
            _pad(column, size=size)
    frozen = {name: {source: _frozen(column) for source, column in found.items()} for name, found in by_source.items()}
    return {name: _frozen(column) for name, column in columns.items()}, frozen


def _pad(column: "array[float]", *, size: int) -> None:
    if len(column) < size:
        column.extend([NAN] * (size - len(column)))


def _frozen(column: "array[float]") -> Column:
    return np.array(column, dtype=np.float64)
