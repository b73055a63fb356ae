"""Keys to pairs of copies, pairs to clusters, clusters to the documents to drop: the second and third stage of deduplication.

Documents are numbered by (task, row): those of the first key file first. Of every cluster the smallest number is kept, so that
what is kept depends on the documents and their order alone: not on how pairs are cut into files, in which order files are
read, or on `parts`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.ngrams import Hashes, Numbers
from data_prep.errors import DataError

CHUNK_PAIRS = 1 << 20
PAIRING_BYTES, COLUMN_BYTES = 40, 16  # a document of the part, and each column past the first (measured: 37 and 15)
Pairs = NDArray[np.int64]
Integers = NDArray[np.integer[Any]]


def parts_for(num_documents: int, *, memory_bytes: int, columns_per_band: int = 1) -> int:
    """Into how many parts a band is cut, so that `duplicate_pairs` stays below `memory_bytes`. Keys are spread evenly, but all
    documents of one key lie in one part: leave room where a single text makes up much of the data."""
    each = PAIRING_BYTES + COLUMN_BYTES * (columns_per_band - 1)
    return max(1, -(-num_documents * each // memory_bytes))


def duplicate_pairs(key_files: Sequence[Path], *, band: int, part: int, parts: int, columns_per_band: int = 1) -> Pairs:
    """[P, 2]: (first, copy) for every document whose keys of `band` equal those of a smaller number, the first that has them;
    sorted by copy. Of the documents whose key lies in `part` of `parts` equal ranges; every key lies in one.

    DataError: a file that holds no keys, a band it does not have."""
    columns = range(band * columns_per_band, (band + 1) * columns_per_band)
    numbers, keys = _read_part(key_files, columns=columns, low=-(-(part << 64) // parts), high=-(-((part + 1) << 64) // parts))
    suspects = _recurring(keys[0])
    numbers, keys = numbers[suspects], [column[suspects] for column in keys]
    order = np.lexsort([numbers, *keys])
    numbers = numbers[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = np.any([np.diff(column[order]) != 0 for column in keys], axis=0)
    firsts = numbers[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    pairs = np.stack([firsts, numbers], axis=1)[~begins]
    return pairs[np.argsort(pairs[:, 1])]


def kept_and_dropped(pair_files: Sequence[Path], *, num_documents: int) -> Numbers:
    """[D], ascending: the documents to drop, all but the smallest number of each cluster that the pairs connect.

    Memory: 8 bytes a document (4 below 2^32 documents), and 100 MB; the pairs are read piece by piece.
    DataError: a file that holds no pairs, or a pair beyond the documents."""
    parents: Integers = np.arange(num_documents, dtype=np.uint32 if num_documents < 2**32 else np.int64)
    for path in pair_files:
        for pairs in _read_pairs(path, num_documents=num_documents):
            _unite(parents, *pairs.T)
    dropped = [first + np.flatnonzero(piece != np.arange(first, first + len(piece))) for first, piece in _pieces(parents)]
    return np.concatenate([np.empty(0, dtype=np.int64), *dropped])


def _read_part(key_files: Sequence[Path], *, columns: range, low: int, high: int) -> tuple[Numbers, list[Hashes]]:
    """Numbers and keys, a column each, of the documents with low <= first key < high."""
    numbers: list[Numbers] = [np.empty(0, dtype=np.int64)]
    keys: list[list[Hashes]] = [[np.empty(0, dtype=np.uint64)] for _ in columns]
    first = 0
    for path in key_files:
        table = _load(path, dtype=np.uint64)
        if columns[-1] >= table.shape[1]:
            raise DataError(
                f"{path} has {table.shape[1]} columns of keys, number {columns[-1]} was asked for; all tasks make keys "
                "with the same settings; run them again"
            )
        leading = table[:, columns[0]]
        rows = np.flatnonzero((leading >= np.uint64(low)) & (leading <= np.uint64(high - 1)))
        numbers.append(rows + first)
        for column, found in zip(columns, keys, strict=True):
            found.append(table[rows, column])
        first += len(table)
    return np.concatenate(numbers), [np.concatenate(found) for found in keys]


def _recurring(keys: Hashes) -> NDArray[np.bool_]:
    """[N]: whether a key occurs more than once. Most do not, and only those that do need the slower sort by all columns."""
    order = np.argsort(keys)
    ordered = keys[order]
    equal = ordered[1:] == ordered[:-1]
    recurring = np.zeros(len(keys), dtype=bool)
    recurring[order[1:][equal]] = True
    recurring[order[:-1][equal]] = True
    return recurring


def _unite(parents: Integers, left: Numbers, right: Numbers) -> None:
    """Joins the trees of each pair: the larger root goes below the smaller, so that a root is its tree's smallest number."""
    one, other = _roots(parents, left), _roots(parents, right)
    while len(apart := np.flatnonzero(one != other)):
        one, other = one[apart], other[apart]
        np.minimum.at(
            parents, np.maximum(one, other), np.minimum(one, other)
        )  # of several that a root should go below, one wins
        one, other = _roots(parents, one), _roots(parents, other)


def _roots(parents: Integers, documents: Integers) -> Integers:
    """Two steps at a time, and each document passed points two steps up from now on: a chain of n takes log n turns."""
    roots: Integers = parents[documents]
    while (roots != (above := parents[roots])).any():
        above = parents[above]
        parents[roots] = above
        roots = above
    parents[documents] = roots
    return roots


def _pieces(array: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    for first in range(0, len(array), CHUNK_PAIRS):
        yield first, array[first : first + CHUNK_PAIRS]


def _read_pairs(path: Path, *, num_documents: int) -> Iterator[Pairs]:
    table = _load(path, dtype=np.int64)
    for _, pairs in _pieces(table):
        if pairs.min() < 0 or pairs.max() >= num_documents:
            raise DataError(
                f"{path} pairs document {pairs.max():,} of {num_documents:,}; pairs and key files are of one run; pair again"
            )
        yield pairs


def _load(path: Path, *, dtype: type) -> NDArray[Any]:
    """[rows, columns] of `dtype`, mapped."""
    try:
        table: NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {path}: {error}; a task's file is written whole or not at all; run the task again"
        ) from error
    if table.ndim != 2 or table.dtype != dtype:
        raise DataError(
            f"{path} holds {table.dtype}{list(table.shape)}; the rule is {np.dtype(dtype)}[rows, columns]; remove it"
        )
    return table
