"""The words of a document, split once for all steps: where they end, and what the quality rules count of them.

Chunks between white space come again and again; what is known of a chunk is kept in a table of bounded size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.chunks import ChunkTokenizer, harmless

TABLE_BYTES = 1 << 28
ENTRY_BYTES = 300  # of a chunk in the table, about, without its characters
START, COUNT, NON_SYMBOL, NON_SYMBOL_CHARACTERS, WITH_LETTER, MERGED = range(6)

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """`joined`: the words with nothing between; `ends` [words]: where each ends in it. The counts are of words that are not all
    punctuation, of their characters, and of words with a letter."""

    joined: str
    ends: Ints
    non_symbol: int
    non_symbol_characters: int
    with_letter: int

    def __len__(self) -> int:
        return len(self.ends)

    def strings(self) -> list[str]:
        ends = self.ends.tolist()
        return [self.joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@cache
def splitter_of(language: str) -> "Splitter":
    """One for all steps of a process. DataError: no such language."""
    return Splitter(ChunkTokenizer(language))


class Splitter:
    """Texts to Words; the last text and its words are kept for the next step."""

    def __init__(self, tokenizer: ChunkTokenizer, *, table_bytes: int = TABLE_BYTES):
        from datatrove.utils.text import PUNCTUATION_SET

        self._tokenizer, self._table_bytes, self._symbols = tokenizer, table_bytes, frozenset(PUNCTUATION_SET)
        self._text: str | None = None
        self._words: Words | None = None
        self._index: dict[str, int] = {}
        self._table: Ints = np.empty((1024, 6), dtype=np.int64)
        self._lengths: Ints = np.empty(1024, dtype=np.int64)
        self._known_words = self._bytes = 0

    @property
    def local(self) -> bool:
        """Whether the words of this language are found chunk by chunk."""
        return self._tokenizer.local

    def words(self, text: str) -> Words:
        if self._words is None or text is not self._text:
            self._text, self._words = text, self._split(text)
        return self._words

    def fewest_words(self, text: str) -> int:
        """A number of words that the text has at least, without splitting it: every chunk is one or more."""
        return len(harmless(text).split())

    def _split(self, text: str) -> Words:
        text = harmless(text)
        chunks = text.split()
        rows = self._look_up(chunks)
        merged = np.flatnonzero(rows[:, MERGED]).tolist()
        if merged:
            chunks = self._tokenizer.rejoin(text, chunks=chunks, merged=merged)
            rows = self._look_up(chunks)
        lengths = self._lengths[_ranges(rows[:, START], counts=rows[:, COUNT])]
        joined = "".join(chunks)
        non_symbol, characters, with_letter = rows[:, NON_SYMBOL : WITH_LETTER + 1].sum(axis=0).tolist()
        return Words(
            joined=joined.replace(" ", "") if merged else joined,
            ends=np.cumsum(lengths),
            non_symbol=non_symbol,
            non_symbol_characters=characters,
            with_letter=with_letter,
        )

    def _look_up(self, chunks: Sequence[str]) -> Ints:
        """The rows [chunks, 6] of the chunks."""
        indices = list(map(self._index.get, chunks))
        if None in indices:
            if self._bytes > self._table_bytes:
                self.clear()
            self._learn([chunk for chunk in dict.fromkeys(chunks) if chunk not in self._index])
            indices = list(map(self._index.get, chunks))
        rows: Ints = self._table[np.array(indices, dtype=np.int64)]
        return rows

    def _learn(self, chunks: Sequence[str]) -> None:
        rows: list[tuple[int, ...]] = []
        lengths: list[int] = []
        for words, merged in self._tokenizer.split(chunks):
            rows.append((self._known_words + len(lengths), len(words), *self._count(words), merged))
            lengths.extend(map(len, words))
        self._table = _put(self._table, at=len(self._index), values=np.array(rows, dtype=np.int64))
        self._lengths = _put(self._lengths, at=self._known_words, values=np.array(lengths, dtype=np.int64))
        self._known_words += len(lengths)
        self._index.update(zip(chunks, range(len(self._index), len(self._index) + len(chunks)), strict=True))
        self._bytes += sum(map(len, chunks)) + ENTRY_BYTES * len(chunks)

    def _count(self, words: Iterable[str]) -> tuple[int, int, int]:
        non_symbol = [word for word in words if not self._symbols.issuperset(word)]
        with_letter = [word for word in words if word.isalpha() or any(map(str.isalpha, word))]
        return len(non_symbol), sum(map(len, non_symbol)), len(with_letter)

    def clear(self) -> None:
        """Forgets all chunks, and the last text. The arrays keep their size."""
        self._index.clear()
        self._text = self._words = None
        self._known_words = self._bytes = 0


def _put(array: Ints, *, at: int, values: Ints) -> Ints:
    """`array` with `values` from `at` on; a longer one where they do not fit."""
    if at + len(values) > len(array):
        array = np.concatenate([array[:at], np.empty((at + len(values), *array.shape[1:]), dtype=array.dtype)])
    array[at : at + len(values)] = values
    return array


def _ranges(starts: Ints, *, counts: Ints) -> Ints:
    """start, start + 1, ... of each start, as many as its count, one after the other."""
    stops = np.cumsum(counts)
    return np.repeat(starts - (stops - counts), counts) + np.arange(stops[-1] if len(stops) else 0)
