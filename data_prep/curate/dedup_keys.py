"""Keys of documents: equal keys are how copies and near-copies are found. The first stage of deduplication.

Keys depend on a document's text and on the settings, on nothing else: tasks may run anywhere, in any order. Near-copies are
found by MinHash (Broder, 1997) in bands: two documents whose sets of n-grams overlap by a share s (Jaccard) agree in one of
`bands` keys, each of `rows` minima, with probability 1 - (1 - s^rows)^bands: 0.9 at s = 0.78 for 14 bands of 8 rows.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.curate.ngrams import NORMALISATION, Hashes, Words, blocks, hash_ngrams, hash_words, mix, random_words
from data_prep.curate.spec import ExactDedupSpec, MinHashDedupSpec

VERSION = 1  # of the keys: raised when the same settings give other keys


class KeyMaker(Protocol):
    """Keys for texts. Documents are copies where all `columns_per_band` columns of one of the `bands` are equal.

    `fingerprint` names all that keys depend on: keys are compared only where it is equal."""

    bands: int
    columns_per_band: int
    fingerprint: str

    def keys(self, texts: Sequence[str]) -> Hashes:
        """[N texts] -> [N, bands * columns_per_band], spread evenly over 64 bits. In Fortran order, in which numpy saves and
        maps them, so that a band is read without the others."""
        ...


class ExactKeys:
    """The xxh3-128 of the text's UTF-8, or of its words where `normalise`: the same words in another layout are a copy.

    128 bits: among 10^10 documents two different ones are taken for copies with probability 10^-19."""

    bands, columns_per_band = 1, 2

    def __init__(self, spec: ExactDedupSpec):
        self._normalise = spec.normalise
        self.fingerprint = f"exact {VERSION}" + (f", {NORMALISATION}" if spec.normalise else "")

    def keys(self, texts: Sequence[str]) -> Hashes:
        parts = [self._digests(block) for block in blocks(texts)]
        digests = np.frombuffer(b"".join(digest for part in parts for digest in part), dtype=">u8")
        return np.asfortranarray(digests.reshape(-1, 2), dtype=np.uint64)

    def _digests(self, texts: Sequence[str]) -> list[bytes]:
        if not self._normalise:
            return [xxhash.xxh3_128_digest(_utf8(text)) for text in texts]
        words = hash_words(texts)
        return [xxhash.xxh3_128_digest(_content(words, number, text=text)) for number, text in enumerate(texts)]


class MinHashKeys:
    """A key of 64 bits a band: the hash of `rows` minima of 32 bits over the document's n-grams.

    64 bits are enough here: among 10^10 documents, 5 * 10^19 pairs, 2.7 pairs a band agree by chance, so that of 10^10
    documents some 40 are lost. 32 bits are enough for a minimum, as a key joins eight. The n-grams are hashed once; row r's
    order of them is a[r] * hash + b[r] modulo 2^32, a[r] odd. Documents with less than one n-gram are compared whole."""

    columns_per_band = 1

    def __init__(self, spec: MinHashDedupSpec):
        self.bands, self._rows, self._ngram = spec.bands, spec.rows, spec.ngram
        orders = (random_words(2 * self.bands * self._rows, seed=spec.seed) >> np.uint64(32)).astype(np.uint32)
        self._factors, self._offsets = orders[::2] | np.uint32(1), orders[1::2]
        settings = f"{spec.bands} bands of {spec.rows}, {spec.ngram}-grams, seed {spec.seed}"
        self.fingerprint = f"minhash {VERSION}, {settings}, {NORMALISATION}"

    def keys(self, texts: Sequence[str]) -> Hashes:
        keys = np.empty((len(texts), self.bands), dtype=np.uint64, order="F")
        first = 0
        for block in blocks(texts):
            self._fill(keys[first : first + len(block)], block)
            first += len(block)
        return keys

    def _fill(self, keys: Hashes, texts: Sequence[str]) -> None:
        words = hash_words(texts)
        grams, offsets = hash_ngrams(words, length=self._ngram)
        has_grams = np.diff(offsets) > 0
        if len(grams):
            keys[has_grams] = self._band_keys(self._minima(grams, offsets[:-1][has_grams]))
        for number in np.flatnonzero(~has_grams).tolist():
            keys[number] = xxhash.xxh3_64_intdigest(_content(words, number, text=texts[number]))

    def _minima(self, grams: Hashes, starts: NDArray[np.int64]) -> NDArray[np.uint32]:
        """[G] -> [bands * rows, N]; `starts` [N]: where each document's n-grams begin."""
        hashes = (grams >> np.uint64(32)).astype(np.uint32)
        ordered = np.empty_like(hashes)
        minima = np.empty((len(self._factors), len(starts)), dtype=np.uint32)
        for factor, offset, row in zip(self._factors, self._offsets, minima, strict=True):
            np.multiply(hashes, factor, out=ordered)
            np.add(ordered, offset, out=ordered)
            np.minimum.reduceat(ordered, starts, out=row)
        return minima

    def _band_keys(self, minima: NDArray[np.uint32]) -> Hashes:
        """[bands * rows, N] -> [N, bands]."""
        rows = minima.reshape(self.bands, self._rows, -1).astype(np.uint64)
        keys = np.zeros((self.bands, minima.shape[1]), dtype=np.uint64)
        for place in range(self._rows):
            keys = mix(keys + rows[:, place])
        return keys.T


def build_key_maker(spec: ExactDedupSpec | MinHashDedupSpec) -> KeyMaker:
    return ExactKeys(spec) if isinstance(spec, ExactDedupSpec) else MinHashKeys(spec)


def _content(words: Words, number: int, *, text: str) -> bytes:
    """What a document is compared by as a whole: its words, or its text where it has none (`:-)` is no copy of `!!!`)."""
    hashes = words.hashes[words.offsets[number] : words.offsets[number + 1]]
    return hashes.tobytes() if len(hashes) else _utf8(text)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
