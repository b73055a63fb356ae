"""Sources to shards: read, tokenize, split off validation, write, prove that nothing went missing, publish."""

import contextlib
import functools
import multiprocessing
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from data_prep.errors import DataError
from data_prep.indexed import Ids, IdsType, ShardWriter
from data_prep.manifest import (
    FORMAT_VERSION,
    Manifest,
    ShardEntry,
    SplitEntry,
    TokenizerEntry,
    dtype_for,
    imported_manifest,
    split_of,
    verify_source,
)
from data_prep.readers import InputFile, Rejects, RowCount, Where, find_inputs, read_documents
from data_prep.spec import DataSettings, Source, TokenizerSpec
from data_prep.tokenizers import TextTokenizer, build_tokenizer, tokenizer_entry
from data_prep.workplace import REJECTS, Settings, existing, publish, remove_contents, settings_of, workplace

__all__ = ["Progress", "is_held_out", "list_inputs", "prepare_source", "prepare_sources", "verify_source"]

BATCH_CHARACTERS = 1 << 21
BATCH_DOCUMENTS = 1024
POLL_S = 0.1

T = TypeVar("T")
Document = tuple[str, Where]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a source is. `done` once its manifest is on disk (at once where it was already)."""

    source: str
    file: str
    documents: int
    tokens: int
    text_bytes: int
    rejected_rows: int
    done: bool


OnProgress = Callable[[Progress], None]
_progress: Any = None  # the queue to the parent, in a worker process


def list_inputs(sources: Mapping[str, Source]) -> dict[str, tuple[InputFile, ...]]:
    """The files each source would read. DataError with every source whose inputs are wrong."""
    return _collect({name: functools.partial(find_inputs, source, name=name) for name, source in sources.items()})


def prepare_sources(
    sources: Mapping[str, Source],
    *,
    tokenizer: TokenizerSpec,
    settings: DataSettings,
    seed: int,
    data_dir: Path,
    on_progress: OnProgress | None = None,
) -> dict[str, Manifest]:
    """Every source, `settings.num_workers` at a time. A source that fails stops no other; DataError names all that failed.

    Sources already prepared are skipped, so that running again after a repair does the rest."""
    list_inputs(sources)  # a wrong glob is known now, not after the hours of the sources before it
    shared: dict[str, Any] = {"tokenizer": tokenizer, "settings": settings, "seed": seed, "data_dir": data_dir}
    if settings.num_workers == 1 or len(sources) == 1:
        prepare = functools.partial(prepare_source, **shared, on_progress=on_progress)
        return _collect({name: functools.partial(prepare, name, source) for name, source in sources.items()})
    return _prepare_in_pool(sources, num_workers=settings.num_workers, shared=shared, on_progress=on_progress)


def prepare_source(
    name: str,
    source: Source,
    *,
    tokenizer: TokenizerSpec,
    settings: DataSettings,
    seed: int,
    data_dir: Path,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Shards and manifest of one source in `data_dir/name`; the manifest that is there, where nothing changed since, or where
    it was imported and there is no text to make it from.

    DataError: inputs or tokenizer unusable, a malformed row too many, prepared before with other settings, disk full."""
    _check_buckets(settings.length_buckets)
    files = () if imported_manifest(data_dir / name) else find_inputs(source, name=name)
    text_tokenizer = build_tokenizer(tokenizer)
    entry = tokenizer_entry(text_tokenizer, kind=tokenizer.kind)
    made_by = settings_of(source, files=files, settings=settings, seed=seed)
    directory = data_dir / name
    check = functools.partial(existing, directory, made_by=made_by, tokenizer=entry, files=files)
    manifest = check()
    if manifest is None:
        with workplace(directory) as work:
            manifest = check()  # another process may have finished it while this one waited for the folder
            if manifest is None:
                remove_contents(work)
                run = _Run(
                    name=name, tokenizer=text_tokenizer, settings=settings, seed=seed, work=work, on_progress=on_progress
                )
                manifest = run.build(source, files=files, made_by=made_by, entry=entry)
                publish(work, directory=directory, manifest=manifest, files=files)
    if on_progress:
        on_progress(_progress_of(manifest))
    return manifest


def is_held_out(data: bytes, *, seed: int, fraction: float) -> bool:
    """Whether a document of these UTF-8 bytes is for validation: by its content, so that exact copies go the same way, in
    every source and however the files are cut."""
    return xxhash.xxh3_64_intdigest(data, seed=seed % 2**64) < int(fraction * 2**64)


def _check_buckets(buckets: Sequence[int]) -> None:
    if list(buckets) != sorted(set(buckets)):
        raise DataError(f"data.length_buckets is {list(buckets)}; each length is larger than the one before; sort the list")


class _Shards:
    """One sequence of shards, closed at the first document border at or past `shard_tokens`."""

    def __init__(self, work: Path, *, prefix: str, dtype: IdsType, shard_tokens: int, min_document_tokens: int):
        self._work, self._prefix, self._dtype, self._shard_tokens = work, prefix, dtype, shard_tokens
        self._min_document_tokens = min_document_tokens
        self._closed: list[ShardEntry] = []
        self._writer: ShardWriter | None = None

    def add(self, ids: Ids) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self._work / f"{self._prefix}_{len(self._closed):05d}", dtype=self._dtype)
        self._writer.add_document(ids)
        if self._writer.tokens >= self._shard_tokens:
            self._close_shard()

    def finish(self) -> list[ShardEntry]:
        self._close_shard()
        return self._closed

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._closed.append(replace(self._writer.close(), min_document_tokens=self._min_document_tokens))
        self._writer = None


class _Split:
    """The shards of one split: a sequence for the documents below the first of `buckets`, and one from each of them up."""

    def __init__(self, work: Path, *, prefix: str, dtype: IdsType, shard_tokens: int, buckets: Sequence[int]):
        self._buckets = buckets
        shards = functools.partial(_Shards, work, dtype=dtype, shard_tokens=shard_tokens)
        of_bucket = [shards(prefix=f"{prefix}_b{bucket}", min_document_tokens=bucket) for bucket in buckets]
        self._sequences = [shards(prefix=prefix, min_document_tokens=0), *of_bucket]

    def add(self, ids: Ids) -> None:
        self._sequences[bisect_right(self._buckets, len(ids))].add(ids)

    def finish(self) -> SplitEntry:
        return split_of([shard for sequence in self._sequences for shard in sequence.finish()])

    def abort(self) -> None:
        for sequence in self._sequences:
            sequence.abort()


@dataclass(kw_only=True)
class _Run:
    """One source on its way through, and what has been counted so far."""

    name: str
    tokenizer: TextTokenizer
    settings: DataSettings
    seed: int
    work: Path
    on_progress: OnProgress | None
    counts: RowCount = field(default_factory=RowCount)
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def build(self, source: Source, *, files: tuple[InputFile, ...], made_by: Settings, entry: TokenizerEntry) -> Manifest:
        rejects = Rejects(self.work / REJECTS, tolerance=self.settings.max_rejected_rows)
        with contextlib.ExitStack() as stack:
            train = self._open_split(stack, prefix="shard", buckets=self.settings.length_buckets)
            held_out = self._open_split(stack, prefix="held_out")
            for batch in _batches(read_documents(files, source=source, counts=self.counts, rejects=rejects)):
                self._write(batch, train=train, held_out=held_out)
                self._report(file=batch[-1][1].file, rejected=rejects.count)
            self._check_complete(rejected=rejects.count)
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                source=self.name,
                dtype=dtype_for(entry.vocab_size),
                tokenizer=entry,
                text_bytes=self.text_bytes,
                train=train.finish(),
                held_out=held_out.finish(),
                settings=made_by,
                rejected_rows=rejects.count,
                empty_documents=self.empty_documents,
            )
        if not manifest.train.documents:
            raise DataError(
                f"source '{self.name}' has no document to train on: {self.counts.rows:,} rows, "
                f"{self.empty_documents:,} empty, {rejects.count:,} rejected, {self.documents:,} held out; "
                "correct its inputs, or lower data.held_out_fraction"
            )
        return manifest

    def _open_split(self, stack: contextlib.ExitStack, *, prefix: str, buckets: Sequence[int] = ()) -> _Split:
        dtype = np.dtype(dtype_for(self.tokenizer.vocab_size))
        split = _Split(self.work, prefix=prefix, dtype=dtype, shard_tokens=self.settings.shard_tokens, buckets=buckets)
        stack.callback(split.abort)  # does nothing to a finished split
        return split

    def _write(self, batch: list[Document], *, train: _Split, held_out: _Split) -> None:
        for (text, where), ids in zip(batch, self.tokenizer.encode_documents([text for text, _ in batch]), strict=True):
            if not len(ids):
                self.empty_documents += 1
                continue
            if (ids == self.tokenizer.eod_id).any():
                raise DataError(
                    f"{where}: the tokenizer made an EOD out of text; text holds no special tokens; mend the tokenizer"
                )
            data = text.encode()
            split = held_out if is_held_out(data, seed=self.seed, fraction=self.settings.held_out_fraction) else train
            split.add(np.append(ids, ids.dtype.type(self.tokenizer.eod_id)))
            self.documents += 1
            self.tokens += len(ids) + 1
            self.text_bytes += len(data)

    def _check_complete(self, *, rejected: int) -> None:
        out = self.documents + self.empty_documents + rejected
        if self.counts.rows != out:
            raise DataError(
                f"source '{self.name}': {self.counts.rows:,} rows went in, {out:,} came out ({self.documents:,} documents, "
                f"{self.empty_documents:,} empty, {rejected:,} rejected); every row must come out once; "
                "this is a fault of data_prep: report it, with the inputs"
            )

    def _report(self, *, file: str, rejected: int) -> None:
        if self.on_progress:
            counted = {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes}
            self.on_progress(Progress(source=self.name, file=file, rejected_rows=rejected, done=False, **counted))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Enough text a call to keep the tokenizer busy, little enough to stay small; a document is never cut."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress_of(manifest: Manifest) -> Progress:
    return Progress(
        source=manifest.source,
        file="",
        documents=manifest.train.documents + manifest.held_out.documents,
        tokens=manifest.train.tokens + manifest.held_out.tokens,
        text_bytes=manifest.text_bytes,
        rejected_rows=manifest.rejected_rows,
        done=True,
    )


def _prepare_in_pool(
    sources: Mapping[str, Source], *, num_workers: int, shared: dict[str, Any], on_progress: OnProgress | None
) -> dict[str, Manifest]:
    """One process a source: ids never cross a process border, only manifests and progress do."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of the tokenizers
    progress = context.SimpleQueue()
    workers = min(num_workers, len(sources))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(progress,)) as pool:
        futures = {name: pool.submit(_prepare_in_worker, name, source, shared) for name, source in sources.items()}
        pending: set[Future[Manifest]] = set(futures.values())
        while pending:
            _, pending = wait(pending, timeout=POLL_S)
            while not progress.empty():
                update = progress.get()
                if on_progress:
                    on_progress(update)
    return _collect({name: functools.partial(_result_of, future, name=name) for name, future in futures.items()})


def _start_worker(progress: Any) -> None:
    global _progress
    _progress = progress
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _prepare_in_worker(name: str, source: Source, shared: dict[str, Any]) -> Manifest:
    return prepare_source(name, source, **shared, on_progress=_progress.put)


def _result_of(future: Future[Manifest], *, name: str) -> Manifest:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"source '{name}' is unfinished: a worker process was killed, often for memory; "
            "nothing finished is lost; lower data.num_workers and start again"
        ) from error


def _collect(tasks: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Runs every task; then one DataError with all that failed."""
    done: dict[str, T] = {}
    errors: list[DataError] = []
    for name, task in tasks.items():
        try:
            done[name] = task()
        except DataError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise DataError("\n".join([f"{len(errors)} of {len(tasks)} sources failed:", *map(str, errors)]))
    return done
