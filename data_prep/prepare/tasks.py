"""What a worker does with one task: curate (filter rows), or tokenize (rows to shards). Each leaves its files and a receipt."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from data_prep.curate.document import Document
from data_prep.errors import DataError
from data_prep.indexed import naming_full_disk, partial
from data_prep.manifest import dtype_for
from data_prep.prepare.job import CLEAN, ID_FIELD, Job, documents_of
from data_prep.prepare.keys import KeyWriter
from data_prep.prepare.plan import Stage
from data_prep.prepare.receipt import Counts, Receipt, code_version, write_receipt
from data_prep.prepare.shards import TaskShards
from data_prep.readers import Place, Rejects, Rows
from data_prep.tokenizers import Encoded

BATCH_CHARACTERS = 1 << 21
BATCH_DOCUMENTS = 1024
REJECTS, DROPPED = "rejects", "dropped"


def is_held_out(data: bytes, *, seed: int, fraction: float) -> bool:
    """Whether a document of these UTF-8 bytes is for validation: by its content, so that exact copies go the same way, in
    every source and however the files are cut."""
    return xxhash.xxh3_64_intdigest(data, seed=seed % 2**64) < int(fraction * 2**64)


# Rows, before and after the steps


class Documents:
    """The documents of a task that its steps keep, as batches of texts with their places; counts what became of the others."""

    def __init__(self, job: Job, stage: Stage, *, number: int, room: Path):
        self._job, self._stage, self._number = job, stage, number
        self.counts = Counts()
        name = stage.task(number)
        self._rejects = Rejects(room / REJECTS / f"{name}.jsonl", tolerance=job.settings.max_rejected_rows)
        self._samples = room / DROPPED / f"{name}.jsonl"
        for path in (self._rejects.path, self._samples):
            path.unlink(missing_ok=True)  # of an attempt that did not end
        self._copies = self._copies_before() if stage.takes_from else {}

    @property
    def files(self) -> list[Path]:
        return [path for path in (self._rejects.path, self._samples) if path.exists()]

    def __iter__(self) -> Iterator[Rows]:
        """Batches without empty documents. DataError: as the readers', and what a step refuses."""
        rows: Rows
        for rows in self._job.read(self._stage, number=self._number, counts=self.counts, rejects=self._rejects):
            kept = [index for index, text in enumerate(rows.texts) if text]
            self.counts.empty_documents += len(rows.texts) - len(kept)
            if self._job.wants_fields:
                kept = self._filter(rows, kept=kept)
            if len(kept) < len(rows.texts):
                rows = rows.only(kept)
            if rows.texts:
                yield rows

    def _copies_before(self) -> dict[int, frozenset[int]]:
        from data_prep.prepare.dedup import dropped_rows  # it stands on this module

        return dropped_rows(self._job, self._stage, number=self._number)

    def _filter(self, rows: Rows, *, kept: list[int]) -> list[int]:
        """The rows that every step keeps; a step may have changed their texts."""
        wanted, left = set(kept), []
        id_field = ID_FIELD if self._stage.takes_from else self._job.source.id_field
        for index, document in documents_of(rows, id_field=id_field):
            if index in wanted and self._passes(document, place=rows.places[index]):
                rows.texts[index] = document.text
                rows.fields[index][ID_FIELD] = document.id
                left.append(index)
        return left

    def _passes(self, document: Document, *, place: Place) -> bool:
        if self._copies and place.number in self._copies[task_of(place)]:
            return self._drop(document, step=self._job.source.steps[self._stage.first_step - 1].kind, reason="copy")
        for step in self._job.steps[self._stage.first_step : self._stage.last_step]:
            if step is None:
                continue
            try:
                reason = step(document)
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
            if reason:
                return self._drop(document, step=step.name, reason=reason)
        if not document.text:
            return self._drop(document, step="text", reason="nothing_left")
        self._look(document)
        return True

    def _drop(self, document: Document, *, step: str, reason: str) -> bool:
        counts = self.counts
        counts.count(counts.dropped, key=step, value=reason)
        if counts.dropped[step][reason] <= self._job.settings.dropped_samples:
            sample = {"step": step, "reason": reason, "id": document.id, "text": document.text, "metadata": document.metadata}
            self._samples.parent.mkdir(exist_ok=True)
            with naming_full_disk(self._samples), self._samples.open("ab") as file:
                file.write(json.dumps(sample, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n")
        return False

    def _look(self, document: Document) -> None:
        language = document.metadata.get("language")
        if isinstance(language, str):
            self.counts.count(self.counts.found, key="language", value=language)


def batches(documents: Documents, *, shuffle_characters: int, key: str) -> Iterator[tuple[list[str], list[Place]]]:
    """Enough text a call to keep the tokenizer busy, little enough to stay small; mixed within buffers of `shuffle_characters`,
    in an order that `key` decides."""
    for number, (texts, places) in enumerate(_buffers(documents, characters=max(shuffle_characters, BATCH_CHARACTERS))):
        order = range(len(texts))
        if shuffle_characters:
            order = _keyed_permutation(len(texts), key=f"{key}\0{number}").tolist()
        batch: list[int] = []
        size = 0
        for index in order:
            batch.append(index)
            size += len(texts[index])
            if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
                yield [texts[index] for index in batch], [places[index] for index in batch]
                batch, size = [], 0
        if batch:
            yield [texts[index] for index in batch], [places[index] for index in batch]
        texts.clear()  # before the next buffer is read: two at once would be the peak
        places.clear()


def _buffers(documents: Documents, *, characters: int) -> Iterator[tuple[list[str], list[Place]]]:
    texts: list[str] = []
    places: list[Place] = []
    size = 0
    for rows in documents:
        texts += rows.texts
        places += rows.places
        size += sum(map(len, rows.texts))
        if size >= characters:
            yield texts, places
            texts, places, size = [], [], 0
    if texts:
        yield texts, places


def _keyed_permutation(count: int, *, key: str) -> NDArray[np.int64]:
    """Sorted by a hash of each index: the same with any version of numpy, which its generators do not promise."""
    value = np.arange(count, dtype=np.uint64) + np.uint64(xxhash.xxh3_64_intdigest(key.encode()))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64, of which order.py says more
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return (value ^ (value >> np.uint64(31))).argsort(kind="stable")


# Tasks


def curate(job: Job, stage: Stage, *, number: int) -> Receipt:
    """Rows through the steps, to a file of those that are kept and one of their keys."""
    file, keys = f"{stage.name}/{number:05d}{CLEAN}", f"{stage.name}/{number:05d}.npy"
    with job.place.workroom() as room:
        documents = Documents(job, stage, number=number, room=room)
        (room / file).parent.mkdir(exist_ok=True)
        keys_of = KeyWriter(job.source.steps[stage.last_step - 1])
        with naming_full_disk(room / file), zst_file(room / file) as clean:
            for rows in documents:
                clean.write(b"".join(map(_clean_row, rows.texts, rows.fields)))
                keys_of.add(rows.texts)
                documents.counts.documents += len(rows.texts)
                job.tick(stage, number=number, file=rows.places[-1].piece.file.path, counts=documents.counts)
        keys_of.save(room / keys)
        files = [file, keys, *(str(path.relative_to(room)) for path in documents.files)]
        return leave(job, stage, number=number, room=room, counts=documents.counts, files=files)


def _clean_row(text: str, fields: dict[str, Any]) -> bytes:
    return json.dumps({**fields, "text": text}, ensure_ascii=False, default=str).encode() + b"\n"


def task_of(place: Place) -> int:
    """Which task of curation left the file that a row is read from."""
    return int(Path(place.piece.file.path).name.removesuffix(CLEAN))


@contextlib.contextmanager
def zst_file(path: Path) -> Iterator[Any]:
    """A compressed file that takes its name when it is whole."""
    work = partial(path)
    try:
        with work.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as stream:
            yield stream
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def tokenize(job: Job, stage: Stage, *, number: int) -> Receipt:
    """Rows through the last steps and the tokenizer, to shards."""
    tokenizer, settings = job.tokenizer, job.settings
    with contextlib.ExitStack() as stack:
        room = stack.enter_context(job.place.workroom())
        documents = Documents(job, stage, number=number, room=room)
        shards = TaskShards(
            room,
            task=number,
            dtype=np.dtype(dtype_for(tokenizer.vocab_size)),
            eod_id=tokenizer.eod_id,
            shard_tokens=settings.shard_tokens,
            buckets=settings.length_buckets,
        )
        stack.callback(shards.abort)  # does nothing to finished shards
        key = f"{job.seed}\0{job.name}\0{number}"
        for texts, places in batches(documents, shuffle_characters=settings.shuffle_mib << 20, key=key):
            _write(job, texts, places=places, shards=shards, counts=documents.counts)
            job.tick(stage, number=number, file=places[-1].piece.file.path, counts=documents.counts)
        train, held_out = shards.finish()
        files = [f"{shard.file}{suffix}" for shard in (*train, *held_out) for suffix in (".bin", ".idx")]
        files += [str(path.relative_to(room)) for path in documents.files]
        lengths = {
            "length_documents": tuple(shards.lengths.documents.tolist()),
            "length_tokens": tuple(shards.lengths.tokens.tolist()),
        }
        entries = {"shards": tuple(train), "held_out": tuple(held_out), **lengths}
        return leave(job, stage, number=number, room=room, counts=documents.counts, files=files, **entries)


def _write(job: Job, texts: list[str], *, places: list[Place], shards: TaskShards, counts: Counts) -> None:
    encoded = job.tokenizer.encode_batch(texts)
    _refuse_eod(encoded, places=places, eod_id=job.tokenizer.eod_id)
    if job.oracle:
        job.oracle.check(texts, encoded, places=places)
    some = encoded.lengths > 0  # a normaliser may leave nothing of a text
    if not some.all():
        texts = [text for text, kept in zip(texts, some.tolist(), strict=True) if kept]
        counts.empty_documents += int((~some).sum())
        encoded = encoded._replace(lengths=encoded.lengths[some])
    data = [text.encode() for text in texts]
    seed, fraction = job.seed, job.settings.held_out_fraction
    held_out = np.array([is_held_out(content, seed=seed, fraction=fraction) for content in data], dtype=bool)
    shards.add(encoded, held_out=held_out)
    counts.documents += len(texts)
    counts.tokens += len(encoded.ids) + len(texts)
    counts.text_bytes += sum(map(len, data))


def _refuse_eod(encoded: Encoded, *, places: list[Place], eod_id: int) -> None:
    """A special token out of text would end the document there."""
    found = np.flatnonzero(encoded.ids == eod_id)
    if len(found):
        document = int(np.searchsorted(np.cumsum(encoded.lengths), found[0], side="right"))
        raise DataError(
            f"{places[document]}: the tokenizer made an EOD out of text; text holds no special tokens; mend the tokenizer"
        )


def leave(job: Job, stage: Stage, *, number: int, room: Path, counts: Counts, files: list[str], **entries: Any) -> Receipt:
    """Publishes the files of a task, and last its receipt. DataError: a row is neither in nor out."""
    out = counts.documents + counts.empty_documents + counts.rejected_rows + counts.num_dropped
    if counts.rows != out:
        raise DataError(
            f"source '{job.name}', {stage.task(number)}: {counts.rows:,} rows went in, {out:,} came out ({counts.documents:,} "
            f"documents, {counts.empty_documents:,} empty, {counts.rejected_rows:,} rejected, {counts.num_dropped:,} dropped); "
            "every row must come out once; this is a fault of data_prep: report it, with the inputs"
        )
    sizes = {file: (room / file).stat().st_size for file in files}
    job.place.publish(room, files=files)
    receipt = Receipt(task=stage.task(number), plan=job.plan.digest, code=code_version(), counts=counts, files=sizes, **entries)
    write_receipt(job.place, receipt=receipt)
    return receipt
