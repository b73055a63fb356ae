"""A source on its way: its plan, its place, and the tools that its tasks share in one process."""

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.document import Document, Step
from data_prep.errors import DataError
from data_prep.inputs import InputFile, refuse_changed
from data_prep.prepare.keys import is_dedup
from data_prep.prepare.place import Place
from data_prep.prepare.plan import Plan, Stage
from data_prep.prepare.receipt import Counts
from data_prep.readers import Piece, Rejects, Rows, read_piece
from data_prep.spec import DataSettings, Source, TokenizerSpec
from data_prep.tokenizers import Oracle, TextTokenizer, build_tokenizer

TICK_S = 0.1
CLEAN = ".jsonl.zst"
CLEAN_SOURCE = Source(inputs=("-",), format="jsonl", text_field="text")


@dataclass(frozen=True)
class Tick:
    """How far a task is: all it did until now."""

    source: str
    task: str
    counts: Counts


OnTick = Callable[[Tick], None]


@dataclass
class Job:
    """One source. Steps and tokenizer are built once a process, where a task needs them."""

    source: Source
    plan: Plan
    place: Place
    tokenizer_spec: TokenizerSpec
    settings: DataSettings
    seed: int
    on_tick: OnTick | None = None
    stop: threading.Event | None = None
    starts: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    _told_at: float = -math.inf

    @property
    def name(self) -> str:
        return self.plan.source

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        return shared_tokenizer(self.tokenizer_spec)

    @functools.cached_property
    def steps(self) -> list[Step | None]:
        """As configured; None stands where documents are compared with each other."""
        from data_prep.curate.steps import build_step  # a source without steps does without its libraries

        return [None if is_dedup(step) else build_step(step, place=f"source '{self.name}'") for step in self.source.steps]

    @functools.cached_property
    def labels(self) -> list[str]:
        """What reports call each step: its kind, and a number from the second of a kind on."""
        kinds = [step.kind for step in self.source.steps]
        before = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
        return [f"{kind}_{count + 1}" if count else kind for kind, count in zip(kinds, before, strict=True)]

    @functools.cached_property
    def wants_fields(self) -> bool:
        """Whether anything looks at more of a row than its text."""
        return bool(self.source.steps)

    @functools.cached_property
    def oracle(self) -> Oracle | None:
        """Tokenizes a part of the documents a second time; None where nobody asked for it."""
        fraction = self.settings.oracle_fraction
        return Oracle(self.tokenizer, fraction=fraction, seed=self.seed) if fraction else None

    def tick(self, stage: Stage, *, number: int, counts: Counts) -> None:
        """Says how far a task is, not more often than anybody can read. KeyboardInterrupt: `stop`."""
        if self.stop and self.stop.is_set():
            raise KeyboardInterrupt
        now = time.monotonic()
        if self.on_tick and now - self._told_at >= TICK_S:
            self._told_at = now
            self.on_tick(Tick(self.name, stage.task(number), replace(counts)))

    def read(self, stage: Stage, *, number: int, counts: Counts, rejects: Rejects) -> Iterator[Rows]:
        """The rows of a task, in order; `counts` and `rejects` grow as they come."""
        for part in range(*stage.parts[number]):
            for rows in self._read_part(stage, part=part, counts=counts, rejects=rejects):
                counts.rejected_rows = rejects.count
                yield rows
            counts.input_bytes += self.plan.input_bytes(stage, part)

    def _read_part(self, stage: Stage, *, part: int, counts: Counts, rejects: Rejects) -> Iterator[Rows]:
        most = self.settings.max_row_mib << 20
        fields = needed_fields(self.source) if self.wants_fields else None
        if stage.takes_from is None:
            piece = self.plan.piece(part)
            with _unchanged(piece.file):
                yield from read_piece(
                    piece, source=self.source, counts=counts, rejects=rejects, max_row_bytes=most, fields=fields
                )
            return
        with self.place.local(f"{stage.takes_from}/{part:05d}{CLEAN}") as path:
            clean = Piece(InputFile(path=str(path), size=max(1, path.stat().st_size), version=""))
            yield from read_piece(
                clean, source=CLEAN_SOURCE, counts=counts, rejects=rejects, max_row_bytes=8 * most, fields=fields
            )


@contextlib.contextmanager
def _unchanged(file: InputFile) -> Iterator[None]:
    """DataError: an input is not what was planned, when it is opened or after it was read. That comes before what its rows are
    found to be then."""
    refuse_changed(file)
    try:
        yield
    except DataError:
        refuse_changed(file)
        raise
    refuse_changed(file)


@functools.lru_cache(maxsize=2)
def shared_tokenizer(spec: TokenizerSpec) -> TextTokenizer:
    """Building one takes a tenth of a second and tens of megabytes: once a process."""
    return build_tokenizer(spec)


def needed_fields(source: Source) -> tuple[str, ...]:
    """The columns that the steps of a source look at."""
    named = [getattr(step, "field", None) or getattr(step, "answers_field", None) for step in source.steps]
    return tuple(dict.fromkeys(filter(None, [source.id_field, *named])))


def documents_of(rows: Rows, *, id_field: str | None) -> Iterator[tuple[int, Document]]:
    """Each row of the inputs as the steps see it, with its index."""
    for index, (text, fields, place) in enumerate(zip(rows.texts, rows.fields, rows.places, strict=True)):
        said = fields.get(id_field) if id_field else None
        start = f"+{place.piece.start}" if place.piece.start else ""
        name = place.piece.file.path.rpartition("/")[2]
        yield index, Document(text, str(said) if said is not None else f"{name}{start}:{place.number}", fields)


def clean_row(document: Document) -> dict[str, Any]:
    """What a stage of curation writes of a document, so that no name of its metadata can be mistaken."""
    return {"text": document.text, "id": document.id, "metadata": document.metadata}


def cleaned_documents(rows: Rows) -> Iterator[tuple[int, Document]]:
    """Each row that a stage of curation wrote, with its index."""
    for index, (text, fields) in enumerate(zip(rows.texts, rows.fields, strict=True)):
        yield index, Document(text, fields["id"], fields["metadata"])
