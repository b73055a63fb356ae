"""The documents of a task: its rows through the steps, and in batches for the tokenizer."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from data_prep.curate.document import Document, Step
from data_prep.errors import DataError
from data_prep.indexed import naming_full_disk
from data_prep.prepare.job import CLEAN, Job, clean_row, cleaned_documents, documents_of
from data_prep.prepare.plan import Stage
from data_prep.prepare.receipt import Counts
from data_prep.readers import Place, Rejects, Rows

BATCH_CHARACTERS = 1 << 21
BATCH_DOCUMENTS = 1024
REJECTS, DROPPED = "rejects", "dropped"

Labelled = tuple[str, Step]  # a step, and what reports call it
Numbered = tuple[int, Document]  # a document, and where its row stands among those that were read with it


class Documents:
    """The documents of a task that its steps keep, as batches of texts with their places; counts what became of the others."""

    def __init__(self, job: Job, stage: Stage, *, number: int, room: Path):
        self._job, self._stage, self._number = job, stage, number
        self.counts = Counts()
        name = stage.task(number)
        tolerance = 0 if stage.takes_from else job.settings.max_rejected_rows  # what we wrote ourselves is well formed
        self._rejects = Rejects(room / REJECTS / f"{name}.jsonl", tolerance=tolerance)
        self._samples = room / DROPPED / f"{name}.jsonl"
        for path in (self._rejects.path, self._samples):
            path.unlink(missing_ok=True)  # of an attempt that did not end
        self._copies = self._copies_before() if stage.takes_from else {}
        numbers = range(stage.first_step, stage.last_step)
        self._runs = _runs([(job.labels[number], step) for number in numbers if (step := job.steps[number])])

    @property
    def files(self) -> list[Path]:
        return [path for path in (self._rejects.path, self._samples) if path.exists()]

    def __iter__(self) -> Iterator[Rows]:
        """Batches without empty documents. DataError: as the readers', and what a step refuses."""
        rows: Rows
        for rows in self._job.read(self._stage, number=self._number, counts=self.counts, rejects=self._rejects):
            kept = [index for index, text in enumerate(rows.texts) if text]
            self.counts.empty_documents += len(rows.texts) - len(kept)
            if len(kept) < len(rows.texts):
                rows = rows.only(kept)
            if self._job.wants_fields:
                rows = self._filter(rows)
            self._tick()
            if rows.texts:
                yield rows

    def _tick(self) -> None:
        self._job.tick(self._stage, number=self._number, counts=self.counts)

    def _copies_before(self) -> dict[int, frozenset[int]]:
        """By task of the stage before: the rows that it found to be copies; none where it compared nothing."""
        before = str(self._stage.takes_from).replace("curate", "clusters")
        if all(stage.name != before for stage in self._job.plan.stages):
            return {}
        from data_prep.prepare.dedup import dropped_rows  # it stands on this module

        return dropped_rows(self._job, self._stage, number=self._number)

    def _filter(self, rows: Rows) -> Rows:
        """The rows that every step keeps; a step may have changed their texts."""
        id_field, is_clean = self._job.source.id_field, self._stage.takes_from is not None
        found = list(cleaned_documents(rows) if is_clean else documents_of(rows, id_field=id_field))
        documents = self._without_copies(found, places=rows.places)
        for steps in self._runs:
            documents = list(self._judge(steps, documents, places=rows.places))
        last = self._runs[-1][-1][0] if self._runs else ""  # a step that takes text away is the only one to leave none
        kept = [pair for pair in documents if pair[1].text or self._drop(pair[1], last, "nothing_left")]
        for index, document in kept:
            rows.texts[index] = document.text
            rows.fields[index] = clean_row(document)
            self._look(document)
        return rows.only([index for index, _ in kept])

    def _without_copies(self, documents: list[Numbered], *, places: Sequence[Place]) -> list[Numbered]:
        if not self._copies:
            return documents
        step = self._job.labels[self._stage.first_step - 1]
        return [
            (index, document)
            for index, document in documents
            if places[index].number not in self._copies[task_of(places[index])] or self._drop(document, step, "copy")
        ]

    def _judge(
        self, steps: Sequence[Labelled], documents: Sequence[Numbered], *, places: Sequence[Place]
    ) -> Iterator[Numbered]:
        """Those that a run of steps keeps."""
        label, first = steps[0]
        judge_all = getattr(first, "judge_all", None)
        if judge_all:
            reasons = judge_all([document for _, document in documents])
            judged = [(label, reason) for reason in reasons]
        else:
            judged = [_first_reason(steps, document, place=places[index]) for index, document in documents]
        for (index, document), (step, reason) in zip(documents, judged, strict=True):
            if not reason or self._drop(document, step, reason):
                yield index, document

    def _drop(self, document: Document, step: str, reason: str) -> bool:
        """Counts, and keeps a sample; False, so that a condition may end in it."""
        counts = self.counts
        counts.count(counts.dropped, key=step, value=reason)
        if counts.dropped[step][reason] <= self._job.settings.dropped_samples:
            sample = {"step": step, "reason": reason, "id": document.id, "text": document.text, "metadata": document.metadata}
            self._samples.parent.mkdir(exist_ok=True)
            with naming_full_disk(self._samples), self._samples.open("ab") as file:
                file.write(encode_row(sample))
        return False

    def _look(self, document: Document) -> None:
        language = document.metadata.get("language")
        if isinstance(language, str):
            self.counts.count(self.counts.found, key="language", value=language)


def _runs(steps: Sequence[Labelled]) -> list[list[Labelled]]:
    """Steps that look at one document at a time, together, so that what one found out serves the next; those that are quicker
    with many documents, each alone."""
    runs: list[list[Labelled]] = []
    for label, step in steps:
        if runs and not hasattr(step, "judge_all") and not hasattr(runs[-1][0][1], "judge_all"):
            runs[-1].append((label, step))
        else:
            runs.append([(label, step)])
    return runs


def _first_reason(steps: Sequence[Labelled], document: Document, *, place: Place) -> tuple[str, str | None]:
    for label, step in steps:
        try:
            reason = step(document)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if reason:
            return label, reason
    return "", None


def encode_row(row: dict[str, Any]) -> bytes:
    """A line of jsonl. What JSON has no word for becomes null (NaN), or its text (a date, a whole number of over 64 bits)."""
    try:
        return orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
    except TypeError:
        return json.dumps(row, default=str).encode() + b"\n"


def task_of(place: Place) -> int:
    """Which task of curation left the file that a row is read from."""
    return int(Path(place.piece.file.path).name.removesuffix(CLEAN))


def batches(documents: Documents) -> Iterator[tuple[list[str], list[Place]]]:
    """Enough text a call to keep the tokenizer busy, little enough to stay small; in the order in which it was read, as texts
    that stand together have their words in common, which the tokenizer then finds in its cache."""
    texts: list[str] = []
    places: list[Place] = []
    size = 0
    for rows in documents:
        texts += rows.texts
        places += rows.places
        size += sum(map(len, rows.texts))
        if size >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
            yield texts, places
            texts, places, size = [], [], 0
    if texts:
        yield texts, places
