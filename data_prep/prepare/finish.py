"""The last task of a source: every receipt is there, so the manifest is written, and what was needed on the way is removed."""

from collections.abc import Iterable

from data_prep.errors import DataError
from data_prep.manifest import FORMAT_VERSION, Manifest, Statistics, dtype_for, encode_manifest, split_of
from data_prep.prepare.documents import REJECTS
from data_prep.prepare.job import Job
from data_prep.prepare.place import CLAIMS, FAILED, Place
from data_prep.prepare.plan import Plan
from data_prep.prepare.receipt import FOLDER, Counts, Receipt, merged, read_receipt
from data_prep.tokenizers import tokenizer_entry

MANIFEST, ALL_REJECTS = "manifest.json", "rejects.jsonl"


def finish(job: Job) -> None:
    """Writes the manifest; or forgets the receipts that are of another plan, so that their tasks are done again.

    DataError: a row is neither in nor out, too many rejects, no documents."""
    by_stage = {stage.name: _receipts(job, tasks=[stage.task(n) for n in range(len(stage.parts))]) for stage in job.plan.stages}
    if None in by_stage.values():
        return
    _write_manifest(job, by_stage={name: receipts for name, receipts in by_stage.items() if receipts})


def _write_manifest(job: Job, *, by_stage: dict[str, list[Receipt]]) -> None:
    everything = [receipt for receipts in by_stage.values() for receipt in receipts]
    counts, final = merged(everything), by_stage["tokenize"]
    first, last = merged(next(iter(by_stage.values()))), merged(final)
    counts.rows, counts.blank_lines, counts.documents, counts.found = first.rows, first.blank_lines, last.documents, last.found
    _check_complete(job, counts=counts)
    rejects = b"".join(
        job.place.read(file) or b""
        for file in sorted(f for receipt in everything for f in receipt.files if f.startswith(REJECTS))
    )
    if rejects:
        job.place.write(ALL_REJECTS, rejects)
    manifest = _manifest(job, counts=counts, receipts=final, code=sorted({receipt.code for receipt in everything}))
    _refuse_unusable(job, manifest=manifest, counts=counts)
    job.place.write(MANIFEST, encode_manifest(manifest))
    tidy(job.place, plan=job.plan)


def tidy(place: Place, *, plan: Plan) -> None:
    """Removes what was only needed on the way; what a process that was killed left of it, when the source is opened again."""
    for folder in (CLAIMS, FAILED, REJECTS, *(stage.name for stage in plan.stages)):
        place.remove(folder)


def _receipts(job: Job, *, tasks: list[str]) -> list[Receipt] | None:
    found = {task: read_receipt(job.place, task=task, plan=job.plan.digest) for task in tasks}
    for task, receipt in found.items():
        if receipt is None:
            job.place.remove(f"{FOLDER}/{task}.json")
    receipts = [receipt for receipt in found.values() if receipt]
    return receipts if len(receipts) == len(tasks) else None


def _check_complete(job: Job, *, counts: Counts) -> None:
    """Over all stages: what a stage writes is what the next reads."""
    out = counts.documents + counts.empty_documents + counts.rejected_rows + counts.num_dropped
    if counts.rows != out:
        raise DataError(
            f"source '{job.name}': {counts.rows:,} rows went in, {out:,} came out ({counts.documents:,} documents, "
            f"{counts.empty_documents:,} empty, {counts.rejected_rows:,} rejected, {counts.num_dropped:,} dropped); every row "
            "must come out once; this is a fault of data_prep: report it, with the inputs"
        )


def _manifest(job: Job, *, counts: Counts, receipts: list[Receipt], code: list[str]) -> Manifest:
    """Shards by bucket, the shortest first, and within it by task."""
    tokenizer = job.tokenizer
    shards = [shard for receipt in receipts for shard in receipt.shards]
    return Manifest(
        format_version=FORMAT_VERSION,
        source=job.name,
        dtype=dtype_for(tokenizer.vocab_size),
        tokenizer=tokenizer_entry(tokenizer, kind=job.tokenizer_spec.kind),
        text_bytes=counts.text_bytes,
        train=split_of(sorted(shards, key=lambda shard: shard.min_document_tokens)),
        held_out=split_of([shard for receipt in receipts for shard in receipt.held_out]),
        settings=job.plan.settings,
        rejected_rows=counts.rejected_rows,
        empty_documents=counts.empty_documents,
        statistics=Statistics(
            rows=counts.rows,
            dropped=counts.dropped,
            kept=_kept(job.labels, counts=counts),
            found=counts.found,
            length_documents=_sums(receipt.length_documents for receipt in receipts),
            length_tokens=_sums(receipt.length_tokens for receipt in receipts),
            code=tuple(code),
        ),
    )


def _kept(labels: list[str], *, counts: Counts) -> dict[str, int]:
    """What passed a step: the documents in the end, and what later steps dropped."""
    dropped = [sum(counts.dropped.get(label, {}).values()) for label in labels]
    return {label: counts.documents + sum(dropped[index + 1 :]) for index, label in enumerate(labels)}


def _sums(columns: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*columns, strict=True)))


def _refuse_unusable(job: Job, *, manifest: Manifest, counts: Counts) -> None:
    if counts.rejected_rows > job.settings.max_rejected_rows:
        raise DataError(
            f"source '{job.name}': {counts.rejected_rows:,} malformed rows, listed in {job.place.path(ALL_REJECTS)}; "
            f"data.max_rejected_rows tolerates {job.settings.max_rejected_rows:,} a source; raise it and run again (what is "
            "done stays done), or repair the input"
        )
    if not manifest.train.documents:
        raise DataError(
            f"source '{job.name}' has no document to train on: {counts.rows:,} rows, {counts.empty_documents:,} empty, "
            f"{counts.rejected_rows:,} rejected, {counts.num_dropped:,} dropped, {manifest.held_out.documents:,} held out; "
            "correct its inputs or steps, or remove its folder and lower data.held_out_fraction"
        )
