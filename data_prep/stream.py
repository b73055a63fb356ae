"""A source as one stream of tokens: its shards laid end to end. The windows of order.py are read here."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prep.errors import DataError
from data_prep.indexed import ShardEntry, read_index
from data_prep.manifest import accepted_states, digest_of, read_manifest
from data_prep.storage import FileState, Folder, Row, Run, as_folder


class SourceStream:
    """The tokens of one split of a source, in the order of the manifest's shards: of those whose documents all have at least
    `min_document_tokens`. It may be empty.

    Opening it reads the manifest and lists the shards, not their tokens; `states` is what it found, by file. DataError: no
    manifest, a shard that is missing or not as long as the manifest says."""

    def __init__(
        self,
        place: Path | Folder,
        *,
        name: str,
        split: Literal["train", "held_out"] = "train",
        min_document_tokens: int = 0,
    ):
        self.name, self.folder = name, as_folder(place)
        self.directory = self.folder.local
        self.manifest = read_manifest(self.folder)
        whole = self.manifest.train if split == "train" else self.manifest.held_out
        self.shards: tuple[ShardEntry, ...] = tuple(s for s in whole.shards if s.min_document_tokens >= min_document_tokens)
        self._borders = list(accumulate((shard.tokens for shard in self.shards), initial=0))  # [shards + 1], in tokens
        self.num_tokens = self._borders[-1]
        self._files = [f"{shard.file}.bin" for shard in self.shards]
        self.states: dict[str, FileState] = self._checked_states()

    @property
    def digest(self) -> str:
        """Equal where the stream holds the same tokens in the same order."""
        return digest_of(self.shards)

    @property
    def eod_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.tokenizer.eod_id

    def read(self, offset: int, count: int) -> Row:
        """Tokens offset..offset+count-1 of the stream, in memory of their own. DataError: not all of them are in the stream."""
        row: Row = self.read_windows([offset], count)[0]
        return row

    def read_windows(self, offsets: ArrayLike, length: int) -> NDArray[np.int32]:
        """The windows [N, length] that begin at `offsets` [N], in memory of their own. DataError: one is not in the stream, or
        a shard is not what it was at opening."""
        starts = np.asarray(offsets, dtype=np.int64)
        order = starts.argsort(kind="stable")  # so that every shard is opened once
        ordered = starts[order].tolist()
        self._refuse_outside(ordered, length=length)
        out = np.empty((len(starts), length), dtype=np.int32)
        if out.size:
            self.folder.read(self._runs(ordered, rows=[out[row] for row in order.tolist()]), dtype=self.manifest.dtype)
        return out

    def documents(self) -> Iterator[Row]:
        """Every document, its EOD included, in stream order. DataError: the source is not in a folder of this machine."""
        if self.directory is None:
            raise DataError(
                f"source {self.name}: documents were asked of {self.folder.place}; they are read in folders of this machine; "
                "copy the source here"
            )
        for shard, start in zip(self.shards, self._borders[:-1], strict=True):
            index = read_index(self.directory / f"{shard.file}.idx")
            ends = np.concatenate([[0], np.cumsum(index.sequence_lengths, dtype=np.int64)])
            if ends[-1] != shard.tokens:
                raise DataError(
                    f"source {self.name}: {shard.file}.idx describes {ends[-1]} tokens, the manifest {shard.tokens}; "
                    "the two must come from one run; run `phidias data` again"
                )
            for low, high in pairwise(ends[index.document_indices].tolist()):
                yield self.read(start + low, high - low)

    def refuse_replaced(self, recorded: Mapping[str, FileState]) -> None:
        """DataError where a shard is not the file that `recorded` says, nor the one that `phidias data action=verify` accepted:
        as when one was restored, wrongly perhaps, under a manifest that stayed."""
        changed = [file for file, state in self.states.items() if recorded.get(file, state) != state]
        accepted = accepted_states(self.directory) if changed and self.directory else {}
        for file in changed:
            state = self.states[file]
            if accepted.get(file) != [state.size, state.version]:
                raise DataError(
                    f"source {self.name}: {self.folder.path(file)} was {recorded[file]} at launch, it is {state}; "
                    "the shards of a run stay as they are; `phidias data action=verify` reads every shard, and accepts the new "
                    "file where its checksum is right"
                )

    def _refuse_outside(self, ordered: list[int], *, length: int) -> None:
        low, high = (ordered[0], ordered[-1]) if ordered else (0, -length)
        if low < 0 or length < 0 or high + length > self.num_tokens:
            offset = low if low < 0 else high
            raise DataError(
                f"source {self.name}: asked for tokens {offset} to {offset + length}, the stream has {self.num_tokens}; "
                "the data changed under the run, or the offset comes from another order; plan the run again on this data"
            )

    def _runs(self, offsets: list[int], *, rows: list[Row]) -> list[Run]:
        """Where each row comes from, by shard; `offsets` rises. What of a row lies in the next shards is in runs of its own."""
        runs: list[Run] = []
        start = end = -1
        for offset, row in zip(offsets, rows, strict=True):
            if offset >= end:
                shard = bisect_right(self._borders, offset) - 1
                start, end = self._borders[shard], self._borders[shard + 1]
                run = self._run(shard)
                runs.append(run)
            if offset + len(row) > end:
                runs += self._rest(row[end - offset :], after=shard)
                row = row[: end - offset]
            run.rows.append(row)
            run.starts.append(offset - start)
        return runs

    def _rest(self, row: Row, *, after: int) -> Iterator[Run]:
        """A row from the beginning of the shard that follows `after`, over as many shards as it takes."""
        for shard in range(after + 1, len(self.shards)):
            head = min(len(row), self.shards[shard].tokens)
            if head:
                run = self._run(shard)
                run.rows.append(row[:head])
                run.starts.append(0)
                yield run
            row = row[head:]
            if not len(row):
                return

    def _run(self, shard: int) -> Run:
        file = self._files[shard]
        return Run(file, self.states[file], [], [])

    def _checked_states(self) -> dict[str, FileState]:
        """The files of the shards. One that is shorter than the manifest says would be a bus error mid-run."""
        found, itemsize = self.folder.states(self._files), np.dtype(self.manifest.dtype).itemsize
        for file, shard in zip(self._files, self.shards, strict=True):
            expected, state = shard.tokens * itemsize, found.get(file)
            if state is None or state.size != expected:
                what = f"holds {state.size} bytes" if state else "is missing"
                raise DataError(
                    f"source {self.name}: {self.folder.path(file)} {what}; the manifest says {shard.tokens} tokens of "
                    f"{self.manifest.dtype}, {expected} bytes; run `phidias data` again"
                )
        return found
