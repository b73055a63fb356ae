"""Documents in another order: mixed in buffers of bounded size, by a key."""

from collections.abc import Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.indexed import Ids
from data_prep.prepare.shards import TaskShards

AT_ONCE = 1024  # documents that are written together


class Mixer:
    """Takes tokenized documents and hands them to the shards, each buffer of `tokens` tokens in an order that `key` decides; in
    the order in which they came, where `tokens` is 0. A buffer ends at the document that fills it, so that what is read or
    tokenized at a time does not show in the shards."""

    def __init__(self, shards: TaskShards, *, tokens: int, key: str):
        self._shards, self._tokens, self._key, self._number = shards, tokens, key, 0
        self._documents: list[Ids] = []
        self._held_out: list[bool] = []
        self._size = 0

    def add(self, documents: list[Ids], *, held_out: list[bool]) -> None:
        for ids, kept in zip(documents, held_out, strict=True):
            self._documents.append(ids)
            self._held_out.append(kept)
            self._size += len(ids)
            if self._size >= self._tokens > 0:
                self.flush()
        if not self._tokens:
            self.flush()

    def flush(self) -> None:
        """What is in the buffer, to the shards."""
        for order in self._orders():
            documents = [self._documents[index] for index in order]
            self._shards.add(documents, held_out=np.array([self._held_out[index] for index in order], dtype=bool))
        self._documents, self._held_out, self._size = [], [], 0
        self._number += 1

    def _orders(self) -> Iterator[list[int]]:
        count = len(self._documents)
        order = keyed_permutation(count, key=f"{self._key}\0{self._number}") if self._tokens else np.arange(count)
        for start in range(0, count, AT_ONCE):
            yield order[start : start + AT_ONCE].tolist()


def keyed_permutation(count: int, *, key: str) -> NDArray[np.int64]:
    """Sorted by a hash of each index: the same with any version of numpy, which its generators do not promise."""
    value = np.arange(count, dtype=np.uint64) + np.uint64(xxhash.xxh3_64_intdigest(key.encode()))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64, of which order.py says more
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return (value ^ (value >> np.uint64(31))).argsort(kind="stable")
