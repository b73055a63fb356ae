"""Which n-grams occur in which of many short texts, as sorted arrays: most grams of a document are turned away by two bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.ngrams import Hashes, Numbers

BITS_PER_GRAM = 16  # at least, of the Bloom filter that is asked first: two set bits a gram let 1 absent gram in 64 pass


class GramIndex:
    """The distinct grams of `num_texts` texts. Memory: 18 to 20 bytes a gram of a text, four times that while it is made."""

    def __init__(self, grams: Hashes, texts: Numbers, *, num_texts: int, without: Hashes):
        """`grams` [G] with the number of the text each was found in, `texts` [G], ascending for equal grams; the grams
        `without` are left out."""
        grams, owners = _distinct_pairs(grams, texts.astype(np.int32), without=without)
        firsts = np.flatnonzero(np.diff(grams, prepend=~grams[:1]))
        self.grams, self._texts = grams[firsts], owners
        self._bounds: NDArray[Any] = np.append(firsts, len(grams)).astype(np.int32 if len(grams) < 2**31 else np.int64)
        self.sizes = np.bincount(owners, minlength=num_texts)  # distinct grams a text
        self._bits = max(3, (BITS_PER_GRAM * len(self.grams)).bit_length())
        self._table = np.zeros(1 << (self._bits - 3), dtype=np.uint8)
        for place in (self._high(self.grams), self._low(self.grams)):
            np.bitwise_or.at(self._table, place >> 3, _bit(place))

    def find(self, grams: Hashes) -> tuple[Numbers, Numbers]:
        """[G] -> [F], [F]: the positions of those that are in `self.grams`, ascending, and where each is there."""
        positions = np.flatnonzero(self._passes(self._high(grams)))
        positions = positions[self._passes(self._low(grams[positions])) > 0]
        candidates = grams[positions]
        places = np.searchsorted(self.grams, candidates)
        places[places == len(self.grams)] = 0
        here = np.flatnonzero(self.grams[places] == candidates) if len(places) else places
        return positions[here], places[here]

    def count_texts(self, places: Numbers) -> tuple[Numbers, Numbers]:
        """For distinct grams, by place: the texts that have any, ascending, and how many of the grams each has."""
        firsts = self._bounds[places]
        counts = self._bounds[places + 1] - firsts
        before = np.cumsum(counts) - counts
        return np.unique(self._texts[np.arange(counts.sum()) + np.repeat(firsts - before, counts)], return_counts=True)

    def _high(self, grams: Hashes) -> Numbers:
        """A place in the filter by a gram's first bits, and below another by its last."""
        return (grams >> np.uint64(64 - self._bits)).astype(np.int64)

    def _low(self, grams: Hashes) -> Numbers:
        return (grams & np.uint64((1 << self._bits) - 1)).astype(np.int64)

    def _passes(self, place: Numbers) -> NDArray[Any]:
        passes: NDArray[Any] = self._table[place >> 3] & _bit(place)
        return passes


def _bit(place: Numbers) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (place & 7).astype(np.uint8))


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """[N] -> [D], ascending: np.unique without its overhead, which is what counts for the few grams of a document."""
    values = np.sort(values)
    return values[np.flatnonzero(np.concatenate([values[:1] == values[:1], values[1:] != values[:-1]]))]


def _distinct_pairs(grams: Hashes, texts: NDArray[np.int32], *, without: Hashes) -> tuple[Hashes, NDArray[np.int32]]:
    """Sorted by gram, then by text; each pair once."""
    order = np.argsort(grams, kind="stable")
    grams, texts = grams[order], texts[order]
    keep = ~np.isin(grams, without)
    keep[1:] &= (grams[1:] != grams[:-1]) | (texts[1:] != texts[:-1])
    return grams[keep], texts[keep]
