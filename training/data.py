"""From the data order to this rank's micro batches.

Shapes: B micro batch, S sequence on this context-parallel rank (the whole sequence where cp = 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.order import Blend, SourceOrder, StageOrder, carry_over
from data_prep.stream import SourceStream
from launcher.config.schema import RunConfig, StageConfig
from training.parallel import Rank

PADDING = -1  # the source of a row that fills up a batch and counts nowhere


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads. `source_B` indexes the stage's sources; PADDING rows are excluded from every sum."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor
    source_B: torch.Tensor


@dataclass(frozen=True)
class Consumed:
    """How far a source has been read: `position` windows of `seq_length` tokens, over all epochs and stages, of the data that
    `digest` names."""

    position: int
    seq_length: int
    digest: str


Ledger = dict[str, Consumed]


def ledger_to_json(ledger: Ledger) -> dict[str, dict[str, Any]]:
    return {name: asdict(consumed) for name, consumed in ledger.items()}


def ledger_from_json(rows: Mapping[str, Mapping[str, Any]]) -> Ledger:
    return {name: Consumed(**row) for name, row in rows.items()}


class StageData:
    """The sources of a stage, in the order its mixture names them, and which window each global sample is.

    `ledger` is what earlier stages consumed; a source they read goes on where they stopped. `consumed` is what the run has
    consumed by now, on a resume. DataError where a source was prepared anew since: its windows would be other text."""

    def __init__(self, config: RunConfig, stage: StageConfig, *, ledger: Ledger, consumed: Ledger | None = None):
        data_dir, settings, seed = Path(config.run.data_dir), config.data, config.run.seed
        self.names = list(stage.mixture.sources)
        self.seq_length = stage.stage.seq_length
        self.streams = [SourceStream(data_dir / name, name=name) for name in self.names]

        for stream in self.streams:
            refuse_other_data(stream, consumed={**ledger, **(consumed or {})}.get(stream.name))

        def order(index: int, seq_length: int) -> SourceOrder:
            return SourceOrder(
                name=self.names[index],
                num_tokens=self.streams[index].num_tokens,
                seq_length=seq_length,
                chunk_tokens=settings.chunk_tokens,
                group_tokens=settings.group_tokens,
                seed=seed,
            )

        orders = [order(index, self.seq_length) for index in range(len(self.names))]
        starts, self.skipped_tokens = [], {}
        for index, name in enumerate(self.names):
            before = ledger.get(name, Consumed(0, self.seq_length, self.streams[index].digest))
            start, skipped = carry_over(order(index, before.seq_length), before.position, orders[index])
            starts.append(start)
            self.skipped_tokens[name] = skipped
        shares = [source.share for source in stage.mixture.sources.values()]
        self.order = StageOrder(orders=orders, blend=Blend(shares, seed=seed), starts=starts)
        self.start_ledger = ledger

    def ledger(self, samples: int) -> Ledger:
        """What the run has consumed of every source after `samples` sequences of this stage."""
        positions = self.order.positions(samples)
        rows = zip(self.streams, positions, strict=True)
        here = {stream.name: Consumed(int(position), self.seq_length, stream.digest) for stream, position in rows}
        return {**self.start_ledger, **here}

    def read(self, first_sample: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Windows [count, seq_length + 1] of consecutive global samples, and the source of each [count]."""
        windows = self.order.windows(first_sample, count)
        rows = [
            self.streams[source].read(int(offset), self.seq_length + 1)
            for source, offset in zip(windows.source, windows.offset, strict=True)
        ]
        refuse_foreign_ids(rows, names=self.names, sources=windows.source, streams=self.streams)
        return np.stack(rows), windows.source


def refuse_foreign_ids(
    rows: Sequence[NDArray[np.int32]], *, names: Sequence[str], sources: NDArray[np.int32], streams: Sequence[SourceStream]
) -> None:
    """A flipped bit in a shard would index past the embedding, which says nothing of where it was read."""
    for row, source in zip(rows, sources, strict=True):
        size, found = streams[source].manifest.tokenizer.vocab_size, int(row.max())
        if found >= size or row.min() < 0:
            raise DataError(
                f"source {names[source]}: read token ids from {row.min()} to {found}, the vocabulary ends at {size}; "
                "a shard is damaged. Fix: `phidias data action=verify` says which; restore it"
            )


def refuse_other_data(stream: SourceStream, *, consumed: Consumed | None) -> None:
    if consumed and consumed.digest != stream.digest:
        raise DataError(
            f"source {stream.name}: {stream.directory} was prepared anew since this run read from it; going on would repeat "
            "and skip text unseen. Fix: restore the shards, or start another run.name on the new ones"
        )


def micro_batches(
    windows: NDArray[np.int32], sources: NDArray[np.int32], *, micro_batch_size: int, device: torch.device
) -> list[MicroBatch]:
    """Splits windows [N, seq_length + 1] into micro batches in order; each context-parallel rank takes its chunks."""
    whole = torch.from_numpy(windows).to(device, torch.int64)
    source_N = torch.from_numpy(sources).to(device, torch.int64)
    position_S = torch.arange(whole.shape[1] - 1, device=device)
    batches = []
    for rows in torch.arange(len(whole), device=device).split(micro_batch_size):
        sliced = get_batch_on_this_cp_rank(
            {
                "tokens": whole[rows, :-1].contiguous(),
                "labels": whole[rows, 1:].contiguous(),
                "positions": position_S.expand(len(rows), -1).contiguous(),
            }
        )
        batches.append(MicroBatch(sliced["tokens"], sliced["labels"], sliced["positions"], source_N[rows]))
    return batches


class TrainingFeed:
    """This data-parallel rank's contiguous slice of every global batch. Stages in the middle of a pipeline read nothing."""

    def __init__(self, data: StageData, stage: StageConfig, *, rank: Rank):
        self.data, self.rank = data, rank
        self.global_batch_size = stage.stage.global_batch_size
        self.micro_batch_size = stage.layout.micro_batch_size

    def batch(self, first_sample: int) -> list[MicroBatch] | None:
        """Micro batches of the global batch that begins at `first_sample` of the stage."""
        if not self.rank.needs_tokens:
            return None
        count = self.global_batch_size // self.rank.dp_size
        windows, sources = self.data.read(first_sample + self.rank.dp_rank * count, count)
        return micro_batches(windows, sources, micro_batch_size=self.micro_batch_size, device=self.rank.device)


class HeldOutFeed:
    """The held-out windows of a stage: each source's held-out documents as one stream, cut into windows from its start, up to
    `validation.max_tokens`; the same at every evaluation. Padded so that every rank runs as many micro batches."""

    def __init__(self, config: RunConfig, stage: StageConfig, *, rank: Rank):
        self.rank, self.seq_length, self.micro_batch_size = rank, stage.stage.seq_length, stage.layout.micro_batch_size
        self.names = list(stage.mixture.sources)
        data_dir = Path(config.run.data_dir)
        self.streams = [SourceStream(data_dir / name, name=name, split="held_out") for name in self.names]
        counts = [held_out_windows(s.num_tokens, stage=stage) for s in self.streams]
        self.rows = [(source, index) for source, count in enumerate(counts) for index in range(count)]
        # The interleaved schedule wants the micro batches to be a multiple of the pipeline size.
        multiple = self.micro_batch_size * rank.dp_size * stage.layout.pp
        self.rows += [(PADDING, 0)] * (-len(self.rows) % multiple)
        self.num_microbatches = len(self.rows) // (self.micro_batch_size * rank.dp_size)

    def batches(self) -> list[MicroBatch] | None:
        if not self.rank.needs_tokens:
            return None
        count = len(self.rows) // self.rank.dp_size
        rows = self.rows[self.rank.dp_rank * count : (self.rank.dp_rank + 1) * count]
        windows = np.stack([self._window(source, index) for source, index in rows])
        sources = np.array([source for source, _ in rows], dtype=np.int32)
        return micro_batches(windows, sources, micro_batch_size=self.micro_batch_size, device=self.rank.device)

    def _window(self, source: int, index: int) -> NDArray[Any]:
        if source == PADDING:
            return np.zeros(self.seq_length + 1, dtype=np.int32)
        return self.streams[source].read(index * self.seq_length, self.seq_length + 1)


def held_out_windows(num_tokens: int, *, stage: StageConfig) -> int:
    """Held-out windows of a source that are evaluated."""
    seq_length = stage.stage.seq_length
    return max(0, min(stage.stage.validation.max_tokens, num_tokens - 1) // seq_length)
