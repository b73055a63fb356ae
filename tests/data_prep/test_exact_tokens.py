"""gigatoken stands in for tiktoken: the same ids for every text, whatever is installed, however large its cache is."""

import functools
import os
import random
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from data_prep import tokenizers
from data_prep.errors import DataError
from data_prep.tokenizers import CL100K_SPECIALS, ExactBpe, Oracle, joined
from data_prep.unicode_differences import (
    PROBES,
    RANGES,
    SURROGATES,
    boundary_ranks,
    differing,
    ranges_of,
    utf8_if_alike,
)

RANKS = [
    Path(path)
    for path in (
        os.environ.get("PHIDIAS_CL100K", ""),
        Path(__file__).resolve().parents[3] / "shared" / "data" / "cl100k_base.tiktoken",
    )
    if path and Path(path).is_file()
]
DIFFERING = [point for first, last in RANGES for point in range(first, last + 1)]
# All code points up to the last one in use but for tags, and of those above, which are all alike, one in 61.
POINTS = [point for point in (*range(0x33500), *range(0x33500, 0x110000, 61)) if point not in SURROGATES]
CONTRACTIONS = ("'", "s", "S", "ſ", "d", "M", "t", "l", "L", "v", "e", "V", "E", "r", "R", "K", "’", " ", "1", "ı", "İ")
SPACES = (
    " ",
    "  ",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\v",
    "\f",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\u200b",
    "a",
    "1",
    ".",
)
DIGITS = ("0", "1", "2", "345", "²", "½", "٣", "一", "Ⅷ", "𝟘", "a", " ", ".", "\n", "é")
PIECES = (
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|",
    "|>",
    "endoftext",
    "it's ",
    "WE'LL ",
    "\0",
    "e\u0301",
    "\ufeff",
    "👩‍💻",
    "中文",
)


@functools.cache
def boundaries():
    """gigatoken and tiktoken with a vocabulary that shows every cut of the text."""
    return ExactBpe(boundary_ranks(), specials={"<|endoftext|>": 60_000})


@functools.cache
def cl100k():
    if not RANKS:
        pytest.skip("needs cl100k_base.tiktoken: set PHIDIAS_CL100K to its path")
    return ExactBpe(RANKS[0].read_bytes(), specials=CL100K_SPECIALS)


vocabularies = pytest.mark.parametrize("bpe", [boundaries, cl100k], ids=["boundaries", "cl100k"])


def assert_exact(bpe, texts):
    encoded = bpe.encode(texts)
    assert encoded.lengths.sum() == len(encoded.ids)
    for text, ids in zip(texts, encoded.documents(), strict=True):
        assert np.array_equal(ids, bpe.reference(text)), ascii(text[:200])


def test_the_stored_ranges_are_sorted_and_apart():
    assert ranges_of(DIFFERING) == RANGES
    assert len(DIFFERING) == 4657


@vocabularies
def test_code_points_of_the_ranges_differ(bpe):
    """Were one of them not to differ, the versions in use would be others than RANGES was derived for."""
    bpe = bpe()
    if bpe is boundaries():
        text = {point: f"a{chr(point)}a {chr(point)}1234" for point in DIFFERING}
        assert all(not np.array_equal(bpe.gigatoken_alone(text[point]), bpe.reference(text[point])) for point in DIFFERING)
    assert_exact(bpe, ["\n".join(PROBES).replace("X", chr(point)) for point in DIFFERING])


def test_no_other_code_point_differs():
    """RANGES derived again, from what tells the four kinds of character apart."""
    bpe = boundaries()
    found = differing(bpe.reference, bpe.gigatoken_alone, probes=["aX's Xa X1234  X  a"], among=POINTS)
    assert ranges_of(found) == RANGES


@vocabularies
def test_every_code_point_in_context(bpe):
    """Two contexts each, another two for every block. Blocks without what differs, so that gigatoken gets them."""
    bpe, known = bpe(), set(DIFFERING)
    points = [point for point in POINTS if point not in known]
    for number, start in enumerate(range(0, len(points), 1024)):
        probes = (PROBES[number % len(PROBES)], PROBES[(7 * number + 5) % len(PROBES)])
        block = map(chr, points[start : start + 1024])
        text = "\n".join(probe.replace("X", character) for character in block for probe in probes)
        assert utf8_if_alike(text) == text.encode()
        assert_exact(bpe, [text])


@vocabularies
def test_every_pair_and_many_triples_of_ascii(bpe):
    characters = [chr(code) for code in range(128)]
    assert_exact(bpe(), ["".join(f"{left}{right}|" for right in characters) for left in characters])
    rng = random.Random(0)
    assert_exact(bpe(), ["".join(rng.choices(characters, k=rng.randrange(1, 400))) for _ in range(500)])


@vocabularies
@pytest.mark.parametrize(
    "alphabet", [CONTRACTIONS, SPACES, DIGITS, PIECES, ("a", "b"), ("=", "-", " "), None], ids=lambda value: (value or "?")[0]
)
def test_random_texts(bpe, alphabet):
    """Of all lengths around the 64 bytes that gigatoken looks at together; None: any assigned code point."""
    rng = random.Random(str(alphabet))
    characters = alphabet or [
        c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")
    ]
    texts = ["".join(rng.choices(characters, k=rng.choice((1, 2, 5, 20, 60, 65, 130, 300)))) for _ in range(400)]
    assert_exact(bpe(), texts)


@vocabularies
@pytest.mark.parametrize(
    "text", [" ", "a", "\n", "\r\n", "é", "中", "😀", "\u0301", "\0", "0", "=", "'", "ab", " \n", "\u00a0"]
)
def test_long_runs(bpe, text):
    assert_exact(bpe(), [text * 20_000, text * 20_000 + "a", "a" + text * 63, text])


@vocabularies
def test_texts_of_any_size_and_none(bpe):
    bpe = bpe()
    assert_exact(bpe, ["", "a", "", chr(DIFFERING[0]), "", "z" * 100, chr(DIFFERING[-1]) + "\r", ""])
    assert_exact(bpe, ["one long text it's 12345\r\n" * 40_000])
    nothing = bpe.encode([])
    assert (len(nothing.ids), len(nothing.lengths), nothing.lengths.dtype) == (0, 0, np.int64)
    assert nothing.ids.dtype == bpe.encode(["a"]).ids.dtype == bpe.encode(["a", "\u088f"]).ids.dtype == bpe.reference("a").dtype


@vocabularies
def test_batches_do_not_touch_each_other(bpe):
    """What ends a text, and what starts the next, would merge or be cut otherwise were they one text."""
    texts = ["a", "b", " ", " ", "\n", "12", "345", "'", "s", "é", "\u0301", "\u088f", "x", "\u088f"]
    assert_exact(bpe(), texts)


@vocabularies
def test_lone_surrogates_are_tiktokens(bpe):
    bpe = bpe()
    assert utf8_if_alike("a\ud800b") is None
    assert_exact(bpe, ["a\ud800b", "plain"])


def test_all_that_differs_is_found_and_no_more():
    text = "plain é中😀𝟘 \U0001e6e3\U00033480\U0001093f"
    assert [utf8_if_alike(same) for same in (text, "ascii", "")] == [text.encode(), b"ascii", b""]
    assert all(utf8_if_alike(text + chr(point) + text) is None for point in DIFFERING)


def test_a_small_cache_gives_the_same_ids(monkeypatch):
    """Built again before every batch, where the process is too large however little it keeps."""
    monkeypatch.setattr(tokenizers, "REST_BYTES", 0)
    small = ExactBpe(boundary_ranks(), specials={}, memory_bytes=10)
    for start in range(4):
        engine = small._gigatoken._engine
        texts = [f"some {word} text\n" * 3 for word in range(start, start + 50)]
        assert np.array_equal(small.encode(texts).ids, boundaries().encode(texts).ids)
        assert (small._gigatoken._engine is engine) == (start == 0)  # there is nothing to drop before the first


def test_memory_is_known_here():
    assert 10**6 < tokenizers._resident_bytes() < 10**12


@pytest.mark.parametrize("found", [{"gigatoken": "0.99.0"}, {"tiktoken": "0.99.0"}, {"gigatoken": None}])
def test_other_versions_are_not_trusted(monkeypatch, found):
    """tiktoken alone, and it says so."""
    monkeypatch.setattr(tokenizers, "_version", lambda name: {**tokenizers.VERSIONS, **found}[name])
    with pytest.warns(UserWarning, match=re.escape(str(*found.values()))):
        bpe = ExactBpe(boundary_ranks(), specials={})
    assert bpe._gigatoken is None
    texts = ["some text", "\u088f", ""]
    assert np.array_equal(bpe.encode(texts).ids, boundaries().encode(texts).ids)
    with pytest.raises(DataError, match="gigatoken is not in use"):
        bpe.gigatoken_alone("a")


class Wrong:
    """A tokenizer of code points whose engine is wrong on every `x`."""

    def encode_batch(self, texts):
        return joined([self.encode_reference(text.replace("x", "y")) for text in texts], dtype=np.dtype(np.int32))

    def encode_reference(self, text):
        return np.array([ord(character) for character in text], dtype=np.int32)

    def decode(self, ids):
        return "".join(map(chr, ids))


def check(texts, *, fraction=1.0, seed=1, **places):
    tokenizer = Wrong()
    Oracle(tokenizer, fraction=fraction, seed=seed).check(texts, tokenizer.encode_batch(texts), **places)


def test_the_oracle_names_the_difference():
    check(["all is well", ""])
    with pytest.raises(
        DataError, match=r"document 1 of the batch: token 3 of document [0-9a-f]{16} is 121, and 120 in the ref"
    ):
        check(["all is well", "a, x, b"])
    with pytest.raises(DataError, match=r"file\.jsonl:7: token 0 .* near character 0: 'x'"):
        check(["x"], places=["file.jsonl:7"])


@pytest.mark.parametrize(("found", "message"), [("abc", "is missing, and 100 in"), ("abcde", "is 101, and missing in")])
def test_the_oracle_sees_ids_that_are_missing_or_too_many(found, message):
    with pytest.raises(DataError, match=message):
        Oracle(Wrong(), fraction=1.0, seed=1).check(["abcd"], Wrong().encode_batch([found]))


def test_the_oracle_sees_a_lost_text():
    with pytest.raises(DataError, match="2 texts came out as 1 lengths"):
        Oracle(Wrong(), fraction=0.0, seed=1).check(["a", "b"], Wrong().encode_batch(["a"]))


def test_the_sample_is_by_content_and_seed():
    texts = [f"document {number}" for number in range(5000)]
    oracle, other = (Oracle(Wrong(), fraction=0.1, seed=seed) for seed in (1, 2))
    sample = [text for text in texts if oracle.samples(text)]
    assert 400 < len(sample) < 600
    assert sample == [text for text in texts if Oracle(Wrong(), fraction=0.1, seed=1).samples(text)]
    assert sample != [text for text in texts if other.samples(text)]
    check(["x"], fraction=0.0)
    assert Oracle(Wrong(), fraction=1.0, seed=1).samples("")


def test_the_oracle_reads_nothing_outside_its_sample(monkeypatch):
    read = []
    monkeypatch.setattr(Wrong, "encode_reference", lambda self, text: read.append(text) or np.zeros(0, dtype=np.int32))
    texts = [f"document {number}" for number in range(1000)]
    oracle = Oracle(Wrong(), fraction=0.05, seed=1)
    oracle.check(texts, joined([np.zeros(0, dtype=np.int32)] * 1000, dtype=np.dtype(np.int32)))
    assert read == [text for text in texts if oracle.samples(text)]


@vocabularies
def test_the_oracle_catches_an_engine_that_knows_another_unicode(bpe, monkeypatch):
    """Were RANGES empty, the sample would show it."""
    monkeypatch.setattr(tokenizers, "utf8_if_alike", str.encode)
    texts = ["all is well", "a\u088fb\u088f's \U0001e6c0\U0001e6c0 \U00011de01234"]
    bpe = bpe()
    monkeypatch.setattr(bpe, "encode_reference", bpe.reference, raising=False)
    with pytest.raises(DataError, match="document 1 of the batch: token "):
        Oracle(bpe, fraction=1.0, seed=1).check(texts, bpe.encode(texts))
