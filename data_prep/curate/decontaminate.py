"""Documents that hold the questions of benchmarks are dropped: the rule of phi-4 (arXiv 2412.08905, appendix B.1).

1. A document that shares a 13-gram with a benchmark item is contaminated, unless the 13-gram is on a list of common ones.
2. Otherwise, for each item: the distinct 7-grams shared, divided by the distinct 7-grams of the document or of the item,
   whichever has fewer. From `contaminated_overlap` on the document is contaminated; above `noted_overlap` it is kept and noted.

Where the report is silent: an item is one row of a benchmark, its fields joined in order. Its fields are not compared one by
one: an answer such as `no` would be found everywhere. A text of fewer than 7 words has one feature, all its words, so that a
short item is found only where it is the whole document. Words are those of `ngrams`: no case, accents, punctuation, layout.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import orjson

from data_prep.curate.document import Document
from data_prep.curate.gram_index import GramIndex, distinct
from data_prep.curate.ngrams import Hashes, Numbers, Words, blocks, hash_ngrams, hash_run, hash_words, normal_form
from data_prep.curate.spec import BenchmarkSpec, DecontaminateSpec
from data_prep.errors import DataError
from data_prep.inputs import InputFile, find_inputs
from data_prep.spec import Source

LONG, SHORT = 13, 7  # words
METADATA = "contamination"
NO_HASHES = np.empty(0, dtype=np.uint64)


class Item(NamedTuple):
    """One question of a benchmark; `place` is its file and line."""

    benchmark: str
    place: str
    text: str


@dataclass(frozen=True)
class _Match:
    """The item a document is most like, and how much: the share of 7-grams, 1.0 where a 13-gram decides."""

    item: int
    ngram: int
    overlap: float


class Decontaminate:
    """Reasons: `contaminated_13gram`, `contaminated_7gram`. Metadata: `contamination`, the benchmark and item most like it."""

    name = "decontaminate"

    def __init__(self, spec: DecontaminateSpec):
        """DataError: no benchmark items, a row without its fields, a line of the common grams that is no 13-gram."""
        if spec.noted_overlap > spec.contaminated_overlap:
            raise DataError(
                f"decontaminate: noted_overlap {spec.noted_overlap} is above contaminated_overlap {spec.contaminated_overlap}; "
                "what is dropped is more than what is noted; exchange them"
            )
        self._spec = spec
        self._items = [item for name, benchmark in spec.benchmarks.items() for item in read_items(name, benchmark)]
        common = read_common_grams(Path(spec.common_grams_file)) if spec.common_grams_file else NO_HASHES
        texts = [item.text for item in self._items]
        self._long, self._short = _index(texts, length=LONG, without=common), _index(texts, length=SHORT)

    def __call__(self, document: Document) -> str | None:
        return self.judge_all([document])[0]

    def judge_all(self, documents: Sequence[Document]) -> list[str | None]:
        """As one call each, and quicker: documents that share no 7-gram, most of them, cost no array of their own."""
        matches = (match for texts in blocks([document.text for document in documents]) for match in self._matches(texts))
        return [self._judge(document, match) for document, match in zip(documents, matches, strict=True)]

    def _judge(self, document: Document, match: _Match | None) -> str | None:
        if match is None or match.overlap <= self._spec.noted_overlap:
            return None
        item = self._items[match.item]
        found = {"benchmark": item.benchmark, "item": item.place, "ngram": match.ngram, "overlap": match.overlap}
        document.metadata[METADATA] = found
        return f"contaminated_{match.ngram}gram" if match.overlap >= self._spec.contaminated_overlap else None

    def _matches(self, texts: Sequence[str]) -> Iterator[_Match | None]:
        words = hash_words(texts)
        grams, offsets = hash_ngrams(words, length=SHORT)
        positions, places = self._short.find(grams)
        cuts = np.searchsorted(positions, offsets).tolist()
        for text in range(len(texts)):
            of_text = words.hashes[words.offsets[text] : words.offsets[text + 1]]
            mine = slice(cuts[text], cuts[text + 1])
            if len(of_text) < SHORT:
                whole = hash_run(of_text, length=len(of_text))
                yield self._match(of_text, whole, *self._short.find(whole))
            else:
                yield self._match(of_text, grams[offsets[text] : offsets[text + 1]], positions[mine], places[mine])

    def _match(self, words: Hashes, grams: Hashes, positions: Numbers, places: Numbers) -> _Match | None:
        """`words` [W] and 7-grams [G] of a document; `positions` [F] among these that items have, and where in the index."""
        if not len(positions):
            return None
        if _any_row_of(LONG - SHORT + 1, positions):  # a 13-gram holds seven 7-grams in a row
            _, long_places = self._long.find(hash_run(words, length=LONG))
            if len(long_places):
                return _Match(int(self._long.count_texts(long_places[:1])[0][0]), LONG, 1.0)
        items, counts = self._short.count_texts(distinct(places))
        overlaps = counts / np.minimum(len(distinct(grams)), self._short.sizes[items])
        best = int(np.argmax(overlaps))
        return _Match(int(items[best]), SHORT, float(overlaps[best]))


def common_grams(texts: Sequence[str], *, documents: Iterable[str], min_documents: int) -> list[str]:
    """The 13-grams of benchmark `texts` that at least `min_documents` of `documents` hold, sorted: phrases of the language
    or of a form of question. `documents`: a sample of text that is known to be clean, or the benchmark texts themselves."""
    index = _index(texts, length=LONG)
    seen = np.zeros(len(index.grams), dtype=np.int64)
    for document in documents:
        _, places = index.find(hash_run(hash_words([document]).hashes, length=LONG))
        seen[distinct(places)] += 1
    common = index.grams[seen >= min_documents]
    spelled = {number: gram for text in texts for number, gram in _spell(text, common)}
    return sorted(spelled.values())


def read_common_grams(path: Path) -> Hashes:
    """The 13-grams of a text file, one a line, as `common_grams` gives them."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the common grams {path}: {error}; correct common_grams_file") from error
    grams, offsets = hash_ngrams(hash_words(lines), length=LONG)
    for number, count in enumerate(np.diff(offsets)):
        if count != 1:
            raise DataError(
                f"{path}: '{lines[number][:80]}' is not {LONG} words; a common gram is {LONG} words on one line; repair it"
            )
    return grams


def benchmark_files(name: str, benchmark: BenchmarkSpec) -> tuple[InputFile, ...]:
    """DataError: a glob without a match."""
    return find_inputs(Source(inputs=benchmark.inputs, format="jsonl"), name=f"benchmark {name}")


def read_items(name: str, benchmark: BenchmarkSpec) -> list[Item]:
    """The items of a benchmark in order of file and line; texts inside lists and objects count, in order.

    DataError: a glob without a match, a row that is no object or lacks a field, no item with a word."""
    items = [
        item for file in benchmark_files(name, benchmark) for item in _rows(file.path, name=name, fields=benchmark.text_fields)
    ]
    if not any(len(hash_words([item.text]).hashes) for item in items):
        raise DataError(
            f"benchmark '{name}' has {len(items)} items and no words; set its text_fields to those with the question"
        )
    return items


def _rows(path: str, *, name: str, fields: Sequence[str]) -> Iterator[Item]:
    with fsspec.open(path, "rb", compression="infer") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{Path(path).name}:{number}"
            try:
                row = orjson.loads(line)
                yield Item(name, place, "\n".join(itertools.chain.from_iterable(_strings(row[field]) for field in fields)))
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                has = ", ".join(row) if isinstance(error, KeyError) else "no fields"
                raise DataError(
                    f"{path}, line {number}, has {has}; a row of benchmark '{name}' is a JSON object with "
                    f"{', '.join(fields)}; repair it or correct text_fields"
                ) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
    elif value is not None:
        yield str(value)


def _any_row_of(length: int, positions: Numbers) -> bool:
    """Whether `length` of the ascending positions follow one another without a gap."""
    return bool((positions[length - 1 :] - positions[: 1 - length] == length - 1).any())


def _index(texts: Sequence[str], *, length: int, without: Hashes = NO_HASHES) -> GramIndex:
    grams, numbers, first = [NO_HASHES], [np.empty(0, dtype=np.int64)], 0
    for block in blocks(texts):
        found, text_of = _features(hash_words(block), length=length)
        grams.append(found)
        numbers.append(text_of + first)
        first += len(block)
    return GramIndex(np.concatenate(grams), np.concatenate(numbers), num_texts=len(texts), without=without)


def _features(words: Words, *, length: int) -> tuple[Hashes, Numbers]:
    """Hashes [G] of the n-grams, and the number of the text each is of [G]; see above for texts of less than 7 words."""
    grams, offsets = hash_ngrams(words, length=length)
    texts = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    word_counts = np.diff(words.offsets)
    short = np.flatnonzero((word_counts > 0) & (word_counts < SHORT) & (length == SHORT)).tolist()
    whole = [hash_run(words.hashes[words.offsets[text] : words.offsets[text + 1]], length=word_counts[text]) for text in short]
    return np.concatenate([grams, *whole]), np.append(texts, short).astype(np.int64)


def _spell(text: str, common: Hashes) -> Iterator[tuple[int, str]]:
    """Hash and words, as they stand in the text, of each 13-gram of it that is common."""
    words = hash_words([text])
    grams = hash_run(words.hashes, length=LONG)
    ends = np.append(words.starts, len(normal_form(text)))[LONG:]
    for place in np.flatnonzero(np.isin(grams, common)):
        yield int(grams[place]), " ".join(normal_form(text)[words.starts[place] : ends[place]].split())
