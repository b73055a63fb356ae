"""How much of a document is in runs of words that come more than once: Gopher's two measures, over datatrove's words.

Hashes of all runs are sorted; equal hashes can only overstate, and what they would drop is counted again on the strings.
"""

from collections import Counter
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.words import Ints, Words

BASE = 0x9E37_79B9_7F4A_7C15  # odd, so that its powers have an inverse modulo 2**64
MIX = 0xD6E8_FEB8_6659_FD93
KEPT_POWERS = 1 << 20
ROUNDING = 1 - 1e-9  # what is this far from a limit is on the same side of it however a division is rounded

Hashes = NDArray[np.uint64]


class Repeated(NamedTuple):
    """Runs whose hash comes more than once: `places` [repeated], in groups of equal hash, each ascending; `starts` [groups]."""

    places: Ints
    starts: Ints


class RunStatistics:
    """Of the runs of words of one document. Runs are named by the place of their first word."""

    def __init__(self, words: Words):
        self._words = words
        self._bounds = np.concatenate([np.zeros(1, dtype=np.int64), words.ends])
        codes = np.frombuffer(words.joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        powers, inverses = _powers(len(codes) + 1)
        sums = np.zeros(len(codes) + 1, dtype=np.uint64)
        np.cumsum((codes + np.uint64(1)) * powers[:-1], out=sums[1:])
        self._sums, self._inverses = sums[self._bounds], inverses[self._bounds]

    def top_characters(self, n: int, *, limit: float) -> int:
        """Characters, one space between words included, of the run of n words that comes most often (the first such), all its
        copies together; 0 where they surely are not above `limit`, or there is no run."""
        lengths = self._lengths(n) + (n - 1)
        if not len(lengths):
            return 0
        repeated = _repeated(self._hashes_of_lists(n))
        if not len(repeated.starts):
            return int(lengths[0])
        counts = np.diff(repeated.starts, append=len(repeated.places))
        most = int(counts.max())
        if most * int(lengths[repeated.places].max()) <= limit:
            return 0
        firsts = repeated.starts[counts == most]
        first = firsts[repeated.places[firsts].argmin()]
        places = repeated.places[first : first + most].tolist()
        if len({tuple(self._strings(place, n)) for place in places}) > 1:  # two runs of one hash
            return self._top_by_strings(n)
        return most * int(lengths[places[0]])

    def repeated_characters(self, n: int, *, limit: float) -> int:
        """Characters, without spaces, of the runs of n words that came before; a run counted is stepped over, and runs are
        equal when they are without the spaces. 0 where they surely are not above `limit`."""
        if len(self._words) < n:
            return 0
        lengths = self._lengths(n)
        repeated = _repeated(self._hashes_of_joined(n))
        again = np.ones(len(repeated.places), dtype=bool)
        again[repeated.starts] = False
        if int(lengths[repeated.places[again]].sum()) <= limit:
            return 0
        return self._count_again(np.sort(repeated.places).tolist(), n)

    def _count_again(self, places: list[int], n: int) -> int:
        joined, bounds = self._words.joined, self._bounds
        characters = free = 0
        seen: set[str] = set()
        for place, start, end in zip(places, bounds[places].tolist(), bounds[np.add(places, n)].tolist(), strict=True):
            if place < free:
                continue
            run = joined[start:end]
            if run in seen:
                characters += len(run)
                free = place + n
            else:
                seen.add(run)
        return characters

    def _top_by_strings(self, n: int) -> int:
        words = self._words.strings()
        run, count = Counter(" ".join(words[place : place + n]) for place in range(len(words) - n + 1)).most_common(1)[0]
        return len(run) * count

    def _strings(self, place: int, n: int) -> list[str]:
        bounds = self._bounds[place : place + n + 1].tolist()
        return [self._words.joined[start:end] for start, end in pairwise(bounds)]

    def _lengths(self, n: int) -> Ints:
        lengths: Ints = self._bounds[n:] - self._bounds[:-n]
        return lengths

    def _hashes_of_joined(self, n: int) -> Hashes:
        """[runs], equal where the characters are, wherever cut: differences of sums, moved to the start of the text."""
        hashes: Hashes = (self._sums[n:] - self._sums[:-n]) * self._inverses[:-n]
        return hashes

    def _hashes_of_lists(self, n: int) -> Hashes:
        """[runs], equal where the words are, one by one."""
        words = self._hashes_of_joined(1)
        words = (words ^ (words >> np.uint64(29))) * np.uint64(MIX)
        hashes = words[: len(words) - n + 1].copy()
        for step in range(1, n):
            hashes = hashes * np.uint64(BASE) + words[step : len(words) - n + 1 + step]
        return hashes


def _repeated(hashes: Hashes) -> Repeated:
    """The high bits of a hash and the place in one number: one sort of plain numbers groups and orders them."""
    bits = np.uint64(len(hashes).bit_length())
    keys = np.sort((hashes >> bits << bits) | np.arange(len(hashes), dtype=np.uint64))
    equal = np.zeros(len(keys) + 1, dtype=bool)  # to the one before
    equal[1:-1] = keys[1:] >> bits == keys[:-1] >> bits
    member = equal[:-1] | equal[1:]
    places = (keys[member] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    return Repeated(places=places, starts=np.flatnonzero(~equal[:-1][member]))


def _powers(count: int) -> tuple[Hashes, Hashes]:
    """BASE ** 0, 1, ... [count] and their inverses [count], modulo 2**64."""
    powers, inverses = _make_powers(KEPT_POWERS) if count <= KEPT_POWERS else _make_powers.__wrapped__(count)
    return powers[:count], inverses[:count]


@lru_cache(maxsize=1)
def _make_powers(count: int) -> tuple[Hashes, Hashes]:
    bases = np.full((2, count), [[BASE], [pow(BASE, -1, 2**64)]], dtype=np.uint64)
    bases[:, 0] = 1
    powers = np.cumprod(bases, axis=1, dtype=np.uint64)
    return powers[0], powers[1]
