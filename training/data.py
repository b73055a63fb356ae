"""From the data order to this rank's micro batches."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.mixing import PhaseRow, names_of, plan_phases, schedule_of
from data_prep.order import SourceOrder, StageOrder, Windows, carry_over
from data_prep.storage import FileState
from data_prep.stream import SourceStream
from data_prep.windows import WindowTable
from launcher.config.reading import SourceSize, extent_of, source_order
from launcher.config.schema import RunConfig, StageConfig
from launcher.plan.prepared import folder_of, open_source, open_table
from launcher.plan.stage import plan_stage
from launcher.rundir.records import append_record
from training.batch import PADDING, MicroBatch, Rows, micro_batches, stream_rows
from training.left_out import LeftOut
from training.parallel import Rank
from training.rows import join_rows, packed_rows

Read = TypeVar("Read")


@dataclass(frozen=True)
class Consumed:
    """How far a source has been read: `position` windows of `seq_length` tokens, over all epochs and stages, of the data that
    `digest` names. `windows` is how it was cut; of a window table `num_windows` are an epoch."""

    position: int
    seq_length: int
    digest: str
    windows: str = "stream"
    num_windows: int | None = None


Ledger = dict[str, Consumed]


def ledger_to_json(ledger: Ledger) -> dict[str, dict[str, Any]]:
    return {name: asdict(consumed) for name, consumed in ledger.items()}


def ledger_from_json(rows: Mapping[str, Mapping[str, Any]]) -> Ledger:
    return {name: Consumed(**row) for name, row in rows.items()}


class StageData:
    """The sources of a stage, in the order its mixture names them, and which window each global sample is.

    `ledger` is what earlier stages consumed; a source they read goes on where they stopped. `consumed` is what the run has
    consumed by now, on a resume. `phases` and `shards` are what the run directory recorded of the mixture and of the files;
    without them, the phases of the config and the files as they are. `left_out` are samples [first, end) that no step is taken
    on: they count as consumed. DataError where a source was prepared anew, or a shard
    replaced, since: its windows would be other text."""

    def __init__(
        self,
        config: RunConfig,
        stage: StageConfig,
        *,
        ledger: Ledger,
        consumed: Ledger | None = None,
        phases: Sequence[PhaseRow] | None = None,
        shards: Mapping[str, Mapping[str, FileState]] | None = None,
        left_out: Sequence[tuple[int, int]] = (),
    ):
        self.left_out = LeftOut(left_out)
        self.config, self.stage, self.seq_length = config, stage, stage.stage.seq_length
        self.names = names_of(phases or (), first=stage.mixture.sources)
        self.streams = [open_source(config, name) for name in self.names]
        for stream in self.streams:
            refuse_other_data(stream, consumed={**ledger, **(consumed or {})}.get(stream.name))
            stream.refuse_replaced((shards or {}).get(stream.name, {}))
        self.tables = [self._open_table(stream) for stream in self.streams]
        sizes = {stream.name: self._size(stream, table) for stream, table in zip(self.streams, self.tables, strict=True)}
        orders = [source_order(name, stage=stage, config=config, size=sizes[name]) for name in self.names]
        carried = [self._carry_over(order, ledger=ledger) for order in orders]
        self.skipped_tokens = {order.name: skipped for order, (_, skipped) in zip(orders, carried, strict=True)}
        self.phases = phases or plan_phases(stage.mixture, extent=extent_of(stage, sizes=sizes))
        schedule = schedule_of(self.phases, names=self.names, seed=config.run.seed)
        self.order = StageOrder(orders=orders, schedule=schedule, starts=[start for start, _ in carried])
        self.start_ledger = ledger

    def _open_table(self, stream: SourceStream) -> WindowTable | None:
        kind = self.stage.mixture.windows_of(stream.name)
        return None if kind == "stream" else open_table(self.config, stream, kind=kind, seq_length=self.seq_length)

    def _size(self, stream: SourceStream, table: WindowTable | None) -> SourceSize:
        if table is None:
            return SourceSize(stream.num_tokens)
        return SourceSize(stream.num_tokens, {(table.kind, self.seq_length): (table.num_windows, table.tokens)})

    def _carry_over(self, order: SourceOrder, *, ledger: Ledger) -> tuple[int, int]:
        """Where a source goes on, and the tokens that are skipped by that."""
        before = ledger.get(order.name)
        return carry_over(self._order_before(before, now=order), before.position, order) if before else (0, 0)

    def _order_before(self, before: Consumed, *, now: SourceOrder) -> SourceOrder:
        """The order by which a source was read so far."""
        stream = self.streams[self.names.index(now.name)]
        of_table = (before.num_windows or 0) * before.seq_length + 1
        return SourceOrder(
            name=now.name,
            num_tokens=stream.num_tokens if before.windows == "stream" else of_table,
            seq_length=before.seq_length,
            chunk_tokens=now.chunk_tokens,
            group_tokens=now.group_tokens,
            seed=now.seed,
            windows=before.windows,
        )

    def ledger(self, samples: int) -> Ledger:
        """What the run has consumed of every source after `samples` sequences of this stage."""
        here: Ledger = {}
        for stream, table, order, position in zip(
            self.streams, self.tables, self.order.orders, self.order.positions(samples).tolist(), strict=True
        ):
            num_windows = table.num_windows if table else None
            here[stream.name] = Consumed(position, self.seq_length, stream.digest, order.windows, num_windows)
        return {**self.start_ledger, **here}

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the run has read each source after `samples` sequences of this stage, over all its stages so far."""
        positions = self.order.positions(samples).tolist()
        return {
            order.name: round(order.epochs(position), 6) for order, position in zip(self.order.orders, positions, strict=True)
        }

    def shares_at(self, samples: int) -> dict[str, float]:
        """The share of each source in the phase that the sample before lies in."""
        row = [row for row in self.phases if row.start_sample < max(1, samples)][-1]
        return {name: slots / sum(row.slots.values()) for name, slots in row.slots.items()}

    def read(self, first_sample: int, count: int) -> tuple[Rows, Windows]:
        """The rows of consecutive global samples, and which windows they are."""
        windows = self.order.windows(first_sample, count)
        places = [np.flatnonzero(windows.source == source) for source in range(len(self.names))]
        parts = [self._read_source(source, windows.offset[at]) for source, at in enumerate(places) if len(at)]
        return join_rows(parts, order=np.concatenate([at for at in places if len(at)])), windows

    def _read_source(self, source: int, offsets: NDArray[np.int64]) -> Rows:
        """Rows of one source, by their windows' places in its order."""
        stream, table, settings = self.streams[source], self.tables[source], self.stage.stage
        index = np.full(len(offsets), source, dtype=np.int32)
        if table is not None and table.kind == "best_fit":
            row, start, length = table.pieces(offsets // self.seq_length)
            pieces = list(zip(row.tolist(), start.tolist(), length.tolist(), strict=True))
            rows = packed_rows(stream, pieces=pieces, source=index, stage=settings)
        else:
            starts = offsets if table is None else table.pieces(offsets // self.seq_length)[1]
            windows = stream.read_windows(starts, self.seq_length + 1)
            rows = masked_rows(windows, source=index, eod_id=stream.eod_id, stage=self.stage)
        refuse_foreign_ids(rows, stream=stream)
        return rows


def refuse_foreign_ids(rows: Rows, *, stream: SourceStream) -> None:
    """A flipped bit in a shard would index past the embedding, which says nothing of where it was read."""
    size = stream.manifest.tokenizer.vocab_size
    low, high = (int(edge) for edge in (min(rows.tokens.min(), rows.labels.min()), max(rows.tokens.max(), rows.labels.max())))
    if high >= size or low < 0:
        raise DataError(
            f"source {stream.name}: read token ids from {low} to {high}, the vocabulary ends at {size}; "
            "a shard is damaged. Fix: `phidias data action=verify` says which; restore it"
        )


def refuse_other_data(stream: SourceStream, *, consumed: Consumed | None) -> None:
    if consumed and consumed.digest != stream.digest:
        raise DataError(
            f"source {stream.name}: {stream.folder.path('')} was prepared anew since this run read from it; going on would "
            "repeat and skip text unseen. Fix: restore the shards, or start another run.name on the new ones"
        )


def masked_rows(windows: NDArray[np.int32], *, source: NDArray[np.int32], eod_id: int, stage: StageConfig) -> Rows:
    """Rows of windows [N, seq_length + 1] under the stage's masks."""
    masks = stage.stage
    return stream_rows(
        windows,
        source=source,
        eod_id=eod_id,
        reset_attention_mask=masks.reset_attention_mask,
        eod_mask_loss=masks.eod_mask_loss,
    )


def needs_rows(stage: StageConfig, *, rank: Rank) -> bool:
    """Where documents begin matters to every pipeline stage; tokens only to the first and the last."""
    return rank.needs_tokens or stage.stage.reset_attention_mask


class ReadAhead(Generic[Read]):
    """Reads what comes next while the step computes. One thread: the order of reads is the order of use.

    `following`: the sample after the batch that begins at one, None at the end. A read that failed raises when it is asked
    for."""

    def __init__(self, read: Callable[[int], Read], *, following: Callable[[int], int | None], depth: int):
        self._read, self._following, self._depth = read, following, depth
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") if depth else None
        self._pending: dict[int, Future[Read]] = {}

    def get(self, first_sample: int) -> Read:
        if self._pool is None:
            return self._read(first_sample)
        wanted: list[int] = [first_sample]
        while len(wanted) <= self._depth and (after := self._following(wanted[-1])) is not None:
            wanted.append(after)
        for sample in [sample for sample in self._pending if sample not in wanted]:
            self._pending.pop(sample).cancel()
        for sample in wanted:
            if sample not in self._pending:
                self._pending[sample] = self._pool.submit(self._read, sample)
        return self._pending.pop(first_sample).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class TrainingFeed:
    """This data-parallel rank's contiguous slice of every global batch, read ahead in the background. Stages in the middle of
    a pipeline read nothing, unless they must know where documents begin.

    `trace`: a file that gets a row for each batch the step took: which windows this rank read."""

    def __init__(self, data: StageData, stage: StageConfig, *, rank: Rank, trace: Path | None = None):
        self.data, self.stage, self.rank = data, stage, rank
        self.plan = plan_stage(stage, cluster=data.config.cluster)
        self.trace = trace if rank.is_first_stage and rank.tp_rank == 0 and rank.cp_rank == 0 else None
        depth = data.config.data.prefetch_batches if needs_rows(stage, rank=rank) else 0
        self.ahead = ReadAhead(self._read, following=self._following, depth=depth)

    def batch(self, first_sample: int) -> list[MicroBatch] | None:
        """Micro batches of the global batch that begins at `first_sample` of the stage."""
        if not needs_rows(self.stage, rank=self.rank):
            return None
        rows, windows = self.ahead.get(first_sample)
        if self.trace:
            self._write_trace(first_sample, windows=windows)
        return micro_batches(rows, stage=self.stage, device=self.rank.device)

    def close(self) -> None:
        self.ahead.close()

    def _following(self, sample: int) -> int | None:
        after = self.data.left_out.past(sample + self.plan.batch_size_at(sample))
        return after if after < self.plan.num_samples else None

    def _slice(self, first_sample: int) -> tuple[int, int]:
        """First sample and number of samples of this rank in a global batch."""
        count = self.plan.batch_size_at(first_sample) // self.rank.dp_size
        return first_sample + self.rank.dp_rank * count, count

    def _read(self, first_sample: int) -> tuple[Rows, Windows]:
        return self.data.read(*self._slice(first_sample))

    def _write_trace(self, first_sample: int, *, windows: Windows) -> None:
        assert self.trace is not None
        names = [self.data.names[source] for source in windows.source.tolist()]
        rows = list(zip(names, windows.epoch.tolist(), windows.offset.tolist(), strict=True))
        first, _ = self._slice(first_sample)
        append_record(self.trace, "windows", stage=self.stage.stage.name, first_sample=first, windows=rows)


class HeldOutFeed:
    """The held-out windows of a stage: each source's held-out documents as one stream, cut into windows from its start, up to
    `validation.max_tokens`; the same at every evaluation. Padded so that every rank runs as many micro batches.

    A bucket is evaluated on the held-out documents of its parent, where the stage does not read the parent itself."""

    def __init__(self, config: RunConfig, stage: StageConfig, *, rank: Rank):
        self.stage, self.rank, self.seq_length = stage, rank, stage.stage.seq_length
        self.names = list(stage.mixture.sources)
        self.streams = [SourceStream(folder_of(config, name), name=name, split="held_out") for name in self.names]
        counts = [self._num_windows(stream) for stream in self.streams]
        self.rows = [(source, index) for source, count in enumerate(counts) for index in range(count)]
        # The interleaved schedule wants the micro batches to be a multiple of the pipeline size.
        rows_at_once = stage.layout.micro_batch_size * rank.dp_size
        multiple = rows_at_once * stage.layout.pp
        self.rows += [(PADDING, 0)] * (-len(self.rows) % multiple)
        self.num_microbatches = len(self.rows) // rows_at_once

    def batches(self) -> list[MicroBatch] | None:
        if not needs_rows(self.stage, rank=self.rank):
            return None
        count = len(self.rows) // self.rank.dp_size
        rows = self.rows[self.rank.dp_rank * count : (self.rank.dp_rank + 1) * count]
        windows = np.stack([self._window(source, index) for source, index in rows])
        sources = np.array([source for source, _ in rows], dtype=np.int32)
        eod_id = self.streams[0].eod_id  # one tokenizer has made every source
        held_out = masked_rows(windows, source=sources, eod_id=eod_id, stage=self.stage)
        return micro_batches(held_out, stage=self.stage, device=self.rank.device)

    def _num_windows(self, stream: SourceStream) -> int:
        if self.stage.mixture.sources[stream.name].parent in self.names:
            return 0
        return held_out_windows(stream.num_tokens, stage=self.stage)

    def _window(self, source: int, index: int) -> NDArray[Any]:
        if source == PADDING:
            return np.zeros(self.seq_length + 1, dtype=np.int32)
        return self.streams[source].read(index * self.seq_length, self.seq_length + 1)


def held_out_windows(num_tokens: int, *, stage: StageConfig) -> int:
    """Held-out windows of a source that are evaluated."""
    seq_length = stage.stage.seq_length
    return max(0, min(stage.stage.validation.max_tokens, num_tokens - 1) // seq_length)
