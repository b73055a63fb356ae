"""A source as one stream of tokens: its shards laid end to end. The windows of order.py are read here."""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.indexed import ShardEntry, read_index
from data_prep.manifest import read_manifest

MAX_OPEN_SHARDS = 512  # over all sources of a process: every open map holds a file descriptor, and the usual limit is 1,024


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(path: Path, dtype: str, modified_ns: int) -> NDArray[np.integer[Any]]:
    """The token ids [tokens] of a .bin, memory-mapped. `modified_ns` tells a shard written anew from its predecessor."""
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")


class SourceStream:
    """The tokens of one split of a source, in the order of the manifest's shards. A split may be empty.

    Opening it reads the manifest and the size of each shard, not their tokens. DataError: no manifest, a shard that is
    missing or not as long as the manifest says."""

    def __init__(self, directory: Path, *, name: str, split: Literal["train", "held_out"] = "train"):
        self.name, self.directory = name, directory
        self.manifest = read_manifest(directory)
        self.shards: tuple[ShardEntry, ...] = (self.manifest.train if split == "train" else self.manifest.held_out).shards
        self._borders = np.cumsum([0, *(shard.tokens for shard in self.shards)], dtype=np.int64)  # [shards + 1], in tokens
        self.num_tokens = int(self._borders[-1])
        self._modified_ns = [self._check_shard(shard) for shard in self.shards]

    @property
    def digest(self) -> str:
        """Equal where the stream holds the same tokens in the same order, by the checksums of its shards."""
        return blake2b("\n".join(shard.bin_xxh3 for shard in self.shards).encode(), digest_size=16).hexdigest()

    def read(self, offset: int, count: int) -> NDArray[np.int32]:
        """Tokens offset..offset+count-1 of the stream, in memory of their own. DataError: not all of them are in the stream."""
        end = offset + count
        if offset < 0 or count < 0 or end > self.num_tokens:
            raise DataError(
                f"source {self.name}: asked for tokens {offset} to {end}, the stream has {self.num_tokens}; the data changed "
                "under the run, or the offset comes from another order; plan the run again on this data"
            )
        tokens = np.empty(count, dtype=np.int32)
        first = int(np.searchsorted(self._borders, offset, side="right")) - 1
        for shard in range(first, len(self.shards)):
            start, stop = int(self._borders[shard]), int(self._borders[shard + 1])
            if start >= end:
                break
            low, high = max(offset, start), min(end, stop)
            if low < high:
                tokens[low - offset : high - offset] = self._tokens(shard)[low - start : high - start]
        return tokens

    def documents(self) -> Iterator[NDArray[np.int32]]:
        """Every document, its EOD included, in stream order."""
        for shard, start in zip(self.shards, self._borders[:-1].tolist(), strict=True):
            index = read_index(self.directory / f"{shard.file}.idx")
            ends = np.concatenate([[0], np.cumsum(index.sequence_lengths, dtype=np.int64)])
            if ends[-1] != shard.tokens:
                raise DataError(
                    f"source {self.name}: {shard.file}.idx describes {ends[-1]} tokens, the manifest {shard.tokens}; "
                    "the two must come from one run; run `phidias data` again"
                )
            for low, high in pairwise(ends[index.document_indices].tolist()):
                yield self.read(start + low, high - low)

    def _tokens(self, shard: int) -> NDArray[np.integer[Any]]:
        return _open_shard(self._bin(self.shards[shard]), self.manifest.dtype, self._modified_ns[shard])

    def _bin(self, shard: ShardEntry) -> Path:
        return self.directory / f"{shard.file}.bin"

    def _check_shard(self, shard: ShardEntry) -> int:
        """Compares the size on disk, and gives the time of the last change [ns]. A shorter map would be a bus error mid-run."""
        path, expected = self._bin(shard), shard.tokens * np.dtype(self.manifest.dtype).itemsize
        found = path.stat() if path.exists() else None
        if found is None or found.st_size != expected:
            what = f"holds {found.st_size} bytes" if found else "is missing"
            raise DataError(
                f"source {self.name}: {path} {what}; the manifest says {shard.tokens} tokens of {self.manifest.dtype}, "
                f"{expected} bytes; run `phidias data` again"
            )
        return found.st_mtime_ns
