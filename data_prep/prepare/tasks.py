"""What a worker does with one task: curate (filter rows), or tokenize (rows to shards). Each leaves its files and a receipt."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from data_prep.errors import DataError
from data_prep.indexed import naming_full_disk, partial
from data_prep.manifest import dtype_for
from data_prep.prepare.documents import Documents, batches, encode_row
from data_prep.prepare.job import CLEAN, Job
from data_prep.prepare.keys import KeyWriter, is_dedup
from data_prep.prepare.mixer import Mixer
from data_prep.prepare.plan import Plan, Stage
from data_prep.prepare.receipt import Counts, Receipt, code_version, write_receipt
from data_prep.prepare.shards import TaskShards
from data_prep.readers import Place
from data_prep.tokenizers import Encoded


def is_held_out(data: bytes, *, seed: int, fraction: float) -> bool:
    """Whether a document of these UTF-8 bytes is for validation: by its content, so that exact copies go the same way, in
    every source and however the files are cut."""
    return xxhash.xxh3_64_intdigest(data, seed=seed % 2**64) < int(fraction * 2**64)


def curate(job: Job, stage: Stage, *, number: int) -> Receipt:
    """Rows through the steps, to a file of those that are kept and one of their keys."""
    file, keys = f"{stage.name}/{number:05d}{CLEAN}", f"{stage.name}/{number:05d}.npy"
    with job.place.workroom() as room:
        documents = Documents(job, stage, number=number, room=room)
        (room / file).parent.mkdir(exist_ok=True)
        last = job.source.steps[stage.last_step - 1]
        keys_of = KeyWriter(last) if is_dedup(last) else None
        with naming_full_disk(room / file), zst_file(room / file) as clean:
            for rows in documents:
                clean.write(b"".join(map(encode_row, rows.fields)))
                if keys_of:
                    keys_of.add(rows.texts)
                documents.counts.documents += len(rows.texts)
        files = [file, *(str(path.relative_to(room)) for path in documents.files)]
        if keys_of:
            keys_of.save(room / keys)
            files.append(keys)
        return leave(job, stage, number=number, room=room, counts=documents.counts, files=files)


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
        mixer = Mixer(shards, tokens=settings.shuffle_mib << 18, key=f"{job.seed}\0{job.name}\0{number}")  # ids take 4 bytes
        for texts, places in batches(documents):
            encoded, kept_out = _encode(job, texts, places=places, counts=documents.counts)
            mixer.add(encoded.documents(), held_out=kept_out)
            job.tick(stage, number=number, counts=documents.counts)
        mixer.flush()
        train, held_out = shards.finish()
        files = [f"{shard.file}{suffix}" for shard in (*train, *held_out) for suffix in (".bin", ".idx")]
        files += [str(path.relative_to(room)) for path in documents.files]
        lengths = {
            "length_documents": tuple(shards.lengths.documents.tolist()),
            "length_tokens": tuple(shards.lengths.tokens.tolist()),
        }
        entries = {"shards": tuple(train), "held_out": tuple(held_out), **lengths}
        return leave(job, stage, number=number, room=room, counts=documents.counts, files=files, **entries)


def _encode(job: Job, texts: list[str], *, places: list[Place], counts: Counts) -> tuple[Encoded, list[bool]]:
    """The documents that gave tokens, and which of them are for validation."""
    encoded = job.tokenizer.encode_batch(texts)
    _refuse_eod(encoded, places=places, eod_id=job.tokenizer.eod_id)
    if job.oracle:
        job.oracle.check(texts, encoded, places=places)
    data = encoded.utf8 or [text.encode() for text in texts]
    some = encoded.lengths > 0  # a normaliser may leave nothing of a text
    if not some.all():
        data = [text for text, kept in zip(data, some.tolist(), strict=True) if kept]
        counts.empty_documents += int((~some).sum())
        encoded = Encoded(encoded.ids, encoded.lengths[some])
    counts.documents += len(data)
    counts.tokens += len(encoded.ids) + len(data)
    counts.text_bytes += sum(map(len, data))
    return encoded, [is_held_out(text, seed=job.seed, fraction=job.settings.held_out_fraction) for text in data]


def _refuse_eod(encoded: Encoded, *, places: list[Place], eod_id: int) -> None:
    """A special token out of text would end the document there."""
    found = encoded.ids == eod_id
    if found.any():
        document = int(np.searchsorted(np.cumsum(encoded.lengths), np.argmax(found), side="right"))
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
    if Plan.read_digest(job.place) != job.plan.digest:
        raise DataError(f"source '{job.name}' was planned anew while this process worked on it; run `phidias data` again")
    sizes = {file: (room / file).stat().st_size for file in files}
    job.place.publish(room, files=files)
    receipt = Receipt(task=stage.task(number), plan=job.plan.digest, code=code_version(), counts=counts, files=sizes, **entries)
    write_receipt(job.place, receipt=receipt)
    return receipt
