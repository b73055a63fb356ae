"""The shards that one task writes: training documents by length bucket, held-out ones apart."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import Ids, IdsType, ShardEntry, ShardWriter

HISTOGRAM_BINS = 32  # of powers of two, in tokens: documents of 2^31 tokens and more do not exist


@dataclass
class Lengths:
    """How long documents are, EOD included: `documents` and `tokens` of those of 2^b to 2^(b+1) - 1 tokens, for each b."""

    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @classmethod
    def none(cls) -> "Lengths":
        return cls(np.zeros(HISTOGRAM_BINS, dtype=np.int64), np.zeros(HISTOGRAM_BINS, dtype=np.int64))

    def add(self, lengths: NDArray[np.int64]) -> None:
        bins = np.frexp(lengths)[1] - 1  # exact, where a logarithm rounds
        self.documents += np.bincount(bins, minlength=HISTOGRAM_BINS)
        self.tokens += np.bincount(bins, weights=lengths, minlength=HISTOGRAM_BINS).astype(np.int64)


class _Sequence:
    """Shards of one name, closed at the first document border at or past `shard_tokens`."""

    def __init__(self, folder: Path, *, stem: str, dtype: IdsType, shard_tokens: int, min_document_tokens: int):
        self._folder, self._stem, self._dtype, self._shard_tokens = folder, stem, dtype, shard_tokens
        self._min_document_tokens = min_document_tokens
        self._closed: list[ShardEntry] = []
        self._writer: ShardWriter | None = None

    def add(self, ids: Ids, *, lengths: NDArray[np.int64]) -> None:
        """Documents that lie end to end in `ids`, their EODs included."""
        while len(lengths):
            if self._writer is None:
                number = f"r{len(self._closed)}" if self._closed else ""
                self._writer = ShardWriter(self._folder / f"{self._stem}{number}", dtype=self._dtype)
            room, ends = self._shard_tokens - self._writer.tokens, np.cumsum(lengths)
            count = int(np.searchsorted(ends, room)) + 1  # with the document that reaches the size
            taken = int(ends[min(count, len(ends)) - 1])
            self._writer.add_documents(ids[:taken], lengths=lengths[:count])
            ids, lengths = ids[taken:], lengths[count:]
            if self._writer.tokens >= self._shard_tokens:
                self._close()

    def finish(self) -> list[ShardEntry]:
        self._close()
        return self._closed

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()

    def _close(self) -> None:
        if self._writer is not None:
            self._closed.append(replace(self._writer.close(), min_document_tokens=self._min_document_tokens))
        self._writer = None


class TaskShards:
    """What one task writes into `folder`; its number is in every name. A shard that grows past `shard_tokens` by half, where
    the plan guessed wrong, goes on in another."""

    def __init__(self, folder: Path, *, task: int, dtype: IdsType, eod_id: int, shard_tokens: int, buckets: Sequence[int]):
        self._eod, self._buckets = np.array([eod_id], dtype=dtype), np.array(buckets, dtype=np.int64)
        shards = functools.partial(_Sequence, folder, dtype=dtype, shard_tokens=shard_tokens + shard_tokens // 2)
        self._train = [
            shards(stem=f"shard_b{least}_{task:05d}" if least else f"shard_{task:05d}", min_document_tokens=least)
            for least in (0, *buckets)
        ]
        self._held_out = shards(stem=f"held_out_{task:05d}", min_document_tokens=0)
        self.lengths = Lengths.none()

    def add(self, documents: Sequence[Ids], *, held_out: NDArray[np.bool_]) -> None:
        """Documents without their EODs, none of them empty, and which are for validation [documents]."""
        lengths = np.array([len(ids) for ids in documents], dtype=np.int64) + 1
        self.lengths.add(lengths[~held_out])
        goes_to = np.where(held_out, -1, np.searchsorted(self._buckets, lengths, side="right"))
        for number, sequence in ((-1, self._held_out), *enumerate(self._train)):
            chosen = np.flatnonzero(goes_to == number)
            if len(chosen):
                parts = [part for index in chosen.tolist() for part in (documents[index], self._eod)]
                sequence.add(np.concatenate(parts), lengths=lengths[chosen])

    def finish(self) -> tuple[list[ShardEntry], list[ShardEntry]]:
        """The shards for training, the shortest bucket first, and those for validation."""
        return [shard for sequence in self._train for shard in sequence.finish()], self._held_out.finish()

    def abort(self) -> None:
        for sequence in (*self._train, self._held_out):
            sequence.abort()
