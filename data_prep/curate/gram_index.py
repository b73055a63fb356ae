"""Which n-grams occur in which of many short texts, as sorted arrays: most grams of a document are turned away by one bit."""

import numpy as np

from data_prep.curate.ngrams import Hashes, Numbers

BITS_PER_GRAM = 16  # of the table that is asked first: it lets one absent gram in 16 pass, and stays in the cache


class GramIndex:
    """The distinct grams of `num_texts` texts. Memory: 22 to 26 bytes for each gram of a text."""

    def __init__(self, grams: Hashes, texts: Numbers, *, num_texts: int, without: Hashes):
        """`grams` [G] with the number of the text each was found in, `texts` [G], ascending for equal grams; the grams
        `without` are left out."""
        grams, owners = _distinct_pairs(grams, texts.astype(np.int32), without=without)
        firsts = np.flatnonzero(np.diff(grams, prepend=~grams[:1]))
        self.grams, self._texts = grams[firsts], owners
        self._bounds = np.append(firsts, len(grams)).astype(np.int32 if len(grams) < 2**31 else np.int64)
        self.sizes = np.bincount(owners, minlength=num_texts)  # distinct grams a text
        bits = max(3, (BITS_PER_GRAM * len(self.grams)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << (bits - 3), dtype=np.uint8)
        byte, mask = self._place(self.grams)
        np.bitwise_or.at(self._table, byte, mask)

    def find(self, grams: Hashes) -> tuple[Numbers, Numbers]:
        """[G] -> [F], [F]: the positions of those that are in `self.grams`, ascending, and where each is there."""
        byte, mask = self._place(grams)
        positions = np.flatnonzero(self._table[byte] & mask)
        candidates = grams[positions]
        places = np.searchsorted(self.grams, candidates)
        places[places == len(self.grams)] = 0
        here = self.grams[places] == candidates if len(places) else slice(0)
        return positions[here], places[here]

    def count_texts(self, places: Numbers) -> tuple[Numbers, Numbers]:
        """For distinct grams, by place: the texts that have any, ascending, and how many of the grams each has."""
        firsts = self._bounds[places]
        counts = self._bounds[places + 1] - firsts
        before = np.cumsum(counts) - counts
        return np.unique(self._texts[np.arange(counts.sum()) + np.repeat(firsts - before, counts)], return_counts=True)

    def _place(self, grams: Hashes) -> tuple[Numbers, np.ndarray]:
        """The byte of the table and the bit in it that stand for each gram."""
        place = (grams >> self._shift).astype(np.int64)
        return place >> 3, np.left_shift(1, place & 7).astype(np.uint8)


def distinct(values: np.ndarray) -> np.ndarray:
    """[N] -> [D], ascending: np.unique without its overhead, which is what counts for the few grams of a document."""
    values = np.sort(values)
    return values[np.flatnonzero(np.concatenate([values[:1] == values[:1], values[1:] != values[:-1]]))]


def _distinct_pairs(grams: Hashes, texts: np.ndarray, *, without: Hashes) -> tuple[Hashes, np.ndarray]:
    """Sorted by gram, then by text; each pair once."""
    order = np.argsort(grams, kind="stable")
    grams, texts = grams[order], texts[order]
    keep = ~np.isin(grams, without)
    keep[1:] &= (grams[1:] != grams[:-1]) | (texts[1:] != texts[:-1])
    return grams[keep], texts[keep]
