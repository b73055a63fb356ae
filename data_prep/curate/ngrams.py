"""Words and n-grams of many texts at once, as 64-bit hashes: what near-duplicates and contamination are recognised by.

A word is a run of letters and digits of any script, in lower case and without accents; a character of a script that puts no
spaces between words (Chinese, Japanese, Thai ...) is a word of its own. Numbers count: questions that differ in theirs differ.
"""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]

NORMALISATION = f"words 1, Unicode {unicodedata.unidata_version}"  # keys of other tables must not be compared
BLOCK_CHARACTERS = 1 << 16  # what is in work at once stays in the cache; a longer text is a block of its own

_BETWEEN, _IN_WORD, _ALONE = 0, 1, 2
_PLANES_WITH_CASE = 0x20000  # beyond them there are only ideographs
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
             (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x20000, 0x3FFFF))  # fmt: skip
_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: as in splitmix64 (Steele, Lea and Flood, 2014)
_WORD_BASE, _GRAM_BASE = 0xD1342543DE82EF95, 0xAF251AF3B0F025B5  # odd, and 5 modulo 8: their powers repeat as late as may be


class Words(NamedTuple):
    """The words of N texts, one after the other."""

    hashes: Hashes  # [W]
    starts: Numbers  # [W], where each begins in its text's normal form (see `normal_form`), all joined by one character
    offsets: Numbers  # [N + 1], words before each text


def mix(values: Hashes) -> Hashes:
    """[...] -> [...], one to one: every bit of a result depends on every bit of its value (the finaliser of splitmix64)."""
    mixed = values + np.uint64(_STEP)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def random_words(count: int, *, seed: int) -> Hashes:
    """[count], the same on every machine and with every version of numpy."""
    first = np.uint64((seed * _STEP + 1) % 2**64)
    return mix(mix(np.arange(count, dtype=np.uint64) + first))


def blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, as many at once as are worked on at once."""
    first, size = 0, 0
    for number, text in enumerate(texts):
        if size and size + len(text) > BLOCK_CHARACTERS:
            yield texts[first:number]
            first, size = number, 0
        size += len(text) + 1
    if texts:
        yield texts[first:]


def normal_form(text: str) -> str:
    """Unicode's NFC: one way to write each character."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def hash_words(texts: Sequence[str]) -> Words:
    """The words of [N] texts; about 60 bytes of memory a character while it runs."""
    forms = [normal_form(text) for text in texts]
    codes = np.frombuffer("\n".join(["", *forms]).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds, letters = _tables()
    kind = kinds[codes]
    begins = kind == _ALONE
    begins[1:] |= (kind[1:] == _IN_WORD) & (kind[:-1] != _IN_WORD)  # every text comes after a line break
    starts = np.flatnonzero(begins)
    text_starts = np.cumsum([1, *(len(form) + 1 for form in forms)])
    return Words(_sum_letters(letters[codes], starts), starts - 1, np.searchsorted(starts, text_starts))


def hash_ngrams(words: Words, *, length: int) -> tuple[Hashes, Numbers]:
    """Hashes [G] of every `length` words in a row of one text, and the grams before each text [N + 1]; a text of fewer words
    has none."""
    counts = np.maximum(np.diff(words.offsets) - (length - 1), 0)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if not offsets[-1]:
        return np.empty(0, dtype=np.uint64), offsets
    whole = hash_run(words.hashes, length=length)
    if len(whole) != offsets[-1]:  # those that reach into the next text
        text = np.repeat(np.arange(len(counts)), np.diff(words.offsets))
        whole = whole[text[: len(whole)] == text[length - 1 :]]
    return whole, offsets


def hash_run(hashes: Hashes, *, length: int) -> Hashes:
    """[W] -> [W - length + 1], at least none: one hash of every `length` in a row."""
    count = max(0, len(hashes) - length + 1)
    total = hashes[:count].copy()
    for place in range(1, length):
        total *= np.uint64(_GRAM_BASE)
        total += hashes[place:][:count]
    return mix(total)


def _sum_letters(letters: Hashes, starts: Numbers) -> Hashes:
    """[C] -> [W]: for each start s the sum over i of letters[s + i] * base^i, up to the next start; between words there are 0s.

    From differences of one running sum, so that nothing is done word by word: modulo 2^64 an odd base has an inverse."""
    powers, inverses = _powers(max(2 * BLOCK_CHARACTERS, 1 << len(letters).bit_length()))
    letters *= powers[: len(letters)]
    running = np.cumsum(letters)
    sums = np.diff(running[starts - 1], append=running[-1:])
    return mix(sums * inverses[starts])


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """base^i and base^-i, [count] each."""
    inverse = pow(_WORD_BASE, -1, 2**64)
    return _powers_of(_WORD_BASE, count=count), _powers_of(inverse, count=count)


def _powers_of(base: int, *, count: int) -> Hashes:
    """base^0 to base^(count - 1), modulo 2^64."""
    return np.multiply.accumulate(np.append(np.uint64(1), np.full(count - 1, base, dtype=np.uint64)))


@functools.cache
def _tables() -> tuple[NDArray[np.uint8], Hashes]:
    """Kind and hash of each code point. The pages of planes that no text uses are never touched."""
    kinds, letters = np.zeros(0x110000, dtype=np.uint8), np.zeros(0x110000, dtype=np.uint64)
    characters = [chr(code) for code in range(_PLANES_WITH_CASE)]
    in_word = [character.isalnum() or unicodedata.category(character)[0] == "M" for character in characters]
    kinds[:_PLANES_WITH_CASE] = in_word
    letters[:_PLANES_WITH_CASE] = [ord(_fold(character)) for character in characters]
    for first, last in _UNSPACED:
        kinds[first : last + 1] *= _ALONE
    kinds[_PLANES_WITH_CASE:0x40000] = _ALONE
    letters[_PLANES_WITH_CASE:0x40000] = np.arange(_PLANES_WITH_CASE, 0x40000)
    letters[:0x40000] = mix(letters[:0x40000]) * (kinds[:0x40000] != _BETWEEN)
    return kinds, letters


def _fold(character: str) -> str:
    """The plain lower case: no accents, no full width. What is made of several letters, as Hangul is, stays as it is."""
    lower = character.lower()[0]
    base, *marks = list(unicodedata.normalize("NFKD", lower))
    return base if all(unicodedata.category(mark) == "Mn" for mark in marks) else lower
