"""Keys, pairs, clusters: near-copies are found as often as theory says, whatever the files, the parts and the order."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.curate.dedup_groups import duplicate_pairs, kept_and_dropped, parts_for
from data_prep.curate.dedup_keys import ExactKeys, MinHashKeys, build_key_maker
from data_prep.curate.ngrams import BLOCK_CHARACTERS, hash_ngrams, hash_words
from data_prep.curate.spec import ExactDedupSpec, MinHashDedupSpec
from data_prep.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[3]
WORDS = [f"{first}{middle}{last}" for first in "bdfgklmnprst" for middle in ("a", "ea", "i", "o", "ou") for last in "dglmnrstx"]
MINHASH = MinHashDedupSpec(kind="minhash_dedup")
EXACT = ExactDedupSpec(kind="exact_dedup")
NORMAL = ExactDedupSpec(kind="exact_dedup", normalise=True)
SPECS = (EXACT, NORMAL, MINHASH)
TEXTS = st.lists(st.text("ab cé\n.,'世界ا́😀", max_size=40), max_size=12)


def a_text(rng, *, words=400):
    return " ".join(rng.choices(WORDS, k=words))


def edited(rng, text, *, share):
    """With this share of the words replaced."""
    words = text.split()
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = rng.choice(WORDS)
    return " ".join(words)


def jaccard(one, other, *, ngram=5):
    sets = [
        {tuple(words[place : place + ngram]) for place in range(len(words) - ngram + 1)}
        for words in (one.split(), other.split())
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def share_found(likeness):
    """The share of pairs of these likenesses that 14 bands of 8 rows find."""
    return float(np.mean(1 - (1 - np.asarray(likeness) ** 8) ** 14))


# Words


def words_of(*texts):
    words = hash_words(texts)
    return [words.hashes[first:last].tolist() for first, last in itertools.pairwise(words.offsets)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The café, NAÏVE!", "the cafe naive"),
        ("cafe\u0301 au\tlait", "caf\u00e9 au\n\nlait"),
        ("\uff26\uff55\uff4c\uff4c width", "full width"),
        ("多字", "多 字"),
        ("Straße İstanbul", "straße istanbul"),
        ("हिन्दी में", "हिन्दी। में"),
    ],
)
def test_layout_case_and_accents_are_no_part_of_a_word(one, other):
    first, second = words_of(one, other)
    assert first == second and len(first) >= 2


def test_words_that_differ_differ():
    words = ["form", "from", "a", "aa", "2023", "2024", "字", "学", "한국", "한글", "x" * 1000, "x" * 1001, "𠀀", "𠀁", *WORDS]
    assert len({word for text in words_of(*words) for word in text}) == len(words)
    assert words_of("", "?! :-)", "\ud800") == [[], [], []]


@given(TEXTS)
def test_words_do_not_depend_on_the_texts_beside(texts):
    assert words_of(*texts) == [words_of(text)[0] for text in texts]
    words = hash_words(texts)
    grams, offsets = hash_ngrams(words, length=3)
    for number, text in enumerate(texts):
        alone, _ = hash_ngrams(hash_words([text]), length=3)
        assert grams[offsets[number] : offsets[number + 1]].tolist() == alone.tolist()
        assert len(alone) == max(0, len(words_of(text)[0]) - 2)


# Keys


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@given(texts=TEXTS)
@settings(max_examples=50)
def test_keys_depend_on_the_text_alone(spec, texts):
    maker = build_key_maker(spec)
    keys = maker.keys(texts)
    assert keys.shape == (len(texts), maker.bands * maker.columns_per_band) and keys.dtype == np.uint64
    assert keys.flags.f_contiguous
    for text, row in zip(texts, keys, strict=True):
        assert maker.keys([text]).tolist() == [row.tolist()]


def test_keys_never_move():
    """On disk since version 1: a change here needs another VERSION."""
    text = "A fixed text, of more than five words."
    assert [hex(key) for key in ExactKeys(EXACT).keys([text])[0]] == ["0x168588d852549ccc", "0xf3a5e71b25a77f8d"]
    assert [hex(key) for key in MinHashKeys(MINHASH).keys([text])[0][:2]] == ["0x4e7319230e7323e8", "0xcdb145ba5cd5c199"]


def test_keys_are_the_same_in_another_process():
    code = (
        "from tests.data_prep.curate.test_dedup import *\n"
        "rng = random.Random(3); texts = [a_text(rng) for _ in range(5)]\n"
        "print([build_key_maker(spec).keys(texts).tolist() for spec in SPECS])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) > 1000


def test_fingerprints_name_what_keys_depend_on():
    changed = [MinHashDedupSpec(kind="minhash_dedup", **{name: 3}) for name in ("bands", "rows", "ngram", "seed")]
    makers = [build_key_maker(spec) for spec in (*SPECS, *changed)]
    assert len({maker.fingerprint for maker in makers}) == len(makers)
    text = a_text(random.Random(1))
    assert len({maker.keys([text]).tobytes() for maker in makers}) == len(makers)


def test_exact_keys():
    texts = ["One two.", "one  two", "One two.", "!!!", ":-)", "", ""]
    plain, normal = (build_key_maker(spec).keys(texts).tolist() for spec in (EXACT, NORMAL))
    assert [plain.index(key) for key in plain] == [0, 1, 0, 3, 4, 5, 5]
    assert [normal.index(key) for key in normal] == [0, 0, 0, 3, 4, 5, 5]


def test_short_documents_are_compared_whole():
    texts = ["one two", "One, two!", "two one", "", "!", "one two three four five", "one two three four six"]
    keys = MinHashKeys(MINHASH).keys(texts).tolist()
    assert [keys.index(key) for key in keys] == [0, 0, 2, 3, 4, 5, 6]


def test_long_documents():
    rng = random.Random(1)
    text = a_text(rng, words=BLOCK_CHARACTERS // 2)
    assert len(text) > 2 * BLOCK_CHARACTERS
    keys = MinHashKeys(MINHASH).keys(["short one", text, text.upper(), a_text(rng), text + "."])
    assert keys[1].tolist() == keys[2].tolist() == keys[4].tolist() != keys[3].tolist()


# Near-copies, against theory and against datatrove


def near_copies(*, pairs=150):
    """Pairs of texts with 0.5% to 12% of the words replaced, and how alike they are."""
    rng = random.Random(7)
    made = []
    for share in (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.12):
        texts = [a_text(rng, words=200) for _ in range(pairs)]
        made += [(text, edited(rng, text, share=share)) for text in texts]
    return made, np.array([jaccard(one, other) for one, other in made])


@pytest.fixture(scope="module")
def planted():
    return near_copies()


def found_by_keys(pairs):
    maker = MinHashKeys(MINHASH)
    one, other = (maker.keys(texts) for texts in zip(*pairs, strict=True))
    return (one == other).any(axis=1)


class SplitsAtSpaces:
    """In the place of datatrove's spaCy, which takes long to load; the planted texts are words and spaces."""

    def word_tokenize(self, text):
        return text.split()


def found_by_datatrove(pairs, monkeypatch):
    minhash = pytest.importorskip("datatrove.pipeline.dedup.minhash")
    monkeypatch.setattr(minhash, "load_word_tokenizer", lambda language: SplitsAtSpaces())
    hashing = minhash.HashConfig(hash_fc="sha1")  # its xxhash fails with xxhash 4
    config = minhash.MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=hashing)
    block = minhash.MinhashDedupSignature("unused", config=config)
    signatures = [[block.get_signature(block.get_shingles(text)) for text in pair] for pair in pairs]
    return np.array([any(a == b for a, b in zip(one, other, strict=True)) for one, other in signatures])


def bins(likeness):
    for low in np.arange(0.3, 1.0, 0.1):
        inside = (likeness >= low) & (likeness < low + 0.1)
        if inside.sum() >= 50:
            yield low, inside


def test_near_copies_are_found_as_often_as_theory_says(planted):
    pairs, likeness = planted
    found = found_by_keys(pairs)
    tested = 0
    for low, inside in bins(likeness):
        expected, count = share_found(likeness[inside]), inside.sum()
        error = 4 * (expected * (1 - expected) / count) ** 0.5 + 1 / count
        assert abs(found[inside].mean() - expected) < error, f"{low:.1f}: {found[inside].mean():.3f}, expected {expected:.3f}"
        tested += 1
    assert tested >= 6
    assert found[likeness > 0.9].mean() > 0.99


def test_near_copies_are_found_as_often_as_by_datatrove(planted, monkeypatch):
    pairs, likeness = planted
    pairs, likeness = pairs[::3], likeness[::3]
    ours, theirs = found_by_keys(pairs), found_by_datatrove(pairs, monkeypatch)
    expected = share_found(likeness)
    error = 4 * (2 * expected * (1 - expected) / len(pairs)) ** 0.5
    assert abs(ours.mean() - theirs.mean()) < error
    assert (ours[likeness > 0.9] & theirs[likeness > 0.9]).all()


def test_texts_that_share_little_are_no_copies():
    rng = random.Random(9)
    boilerplate = a_text(rng, words=60)
    texts = [f"{boilerplate} {a_text(rng, words=340)}" for _ in range(1000)]
    keys = MinHashKeys(MINHASH).keys(texts)
    assert all(len(np.unique(column)) == len(texts) for column in keys.T)  # of half a million pairs, 14 bands each


# Pairs


def write_keys(folder, tables):
    paths = [folder / f"keys_{number}.npy" for number in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        np.save(path, np.asfortranarray(table, dtype=np.uint64))
    return paths


def pairs_by_dict(rows):
    first = {}
    return [[first[row], number] for number, row in enumerate(rows) if first.setdefault(row, number) != number]


def some_keys(rng, *, rows, columns):
    """Few different ones, all over 64 bits."""
    values = rng.integers(0, 2**64, size=12, dtype=np.uint64)
    values[:2] = 0, 2**64 - 1
    return values[rng.integers(0, len(values), size=(rows, columns))]


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(0, 60),
    parts=st.integers(1, 5),
    files=st.integers(1, 4),
    width=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_pairs_are_those_of_a_dict(tmp_path_factory, seed, rows, parts, files, width):
    rng = np.random.default_rng(seed)
    keys = some_keys(rng, rows=rows, columns=2 * width)
    cuts = np.sort(rng.integers(0, rows + 1, size=files - 1))
    paths = write_keys(tmp_path_factory.mktemp("keys"), np.split(keys, cuts))
    for band in range(2):
        found = [duplicate_pairs(paths, band=band, part=part, parts=parts, columns_per_band=width) for part in range(parts)]
        assert all(pairs.dtype == np.int64 and (np.diff(pairs[:, 1]) > 0).all() for pairs in found)
        together = sorted(pair for pairs in found for pair in pairs.tolist())
        assert together == sorted(pairs_by_dict(map(tuple, keys[:, band * width : (band + 1) * width].tolist())))


def test_parts_fit_in_memory():
    assert parts_for(1000, memory_bytes=10**9) == 1 == parts_for(0, memory_bytes=1)
    assert parts_for(10**10, memory_bytes=8 * 10**9) == 50
    assert parts_for(10**10, memory_bytes=8 * 10**9, columns_per_band=2) == 70


def test_key_files_that_cannot_be_used(tmp_path):
    (good,) = write_keys(tmp_path, [np.zeros((3, 2))])
    with pytest.raises(DataError, match=r"keys_0\.npy has 2 columns of keys, number 2 was asked for"):
        duplicate_pairs([good], band=2, part=0, parts=1)
    torn = tmp_path / "torn.npy"
    torn.write_bytes(good.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"cannot read .*torn\.npy"):
        duplicate_pairs([good, torn], band=0, part=0, parts=1)
    np.save(tmp_path / "other.npy", np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"holds float64\[3, 2\]; the rule is uint64\[rows, columns\]"):
        duplicate_pairs([tmp_path / "other.npy"], band=0, part=0, parts=1)


# Clusters


def write_pairs(folder, pieces):
    paths = [folder / f"pairs_{number}.npy" for number in range(len(pieces))]
    for path, piece in zip(paths, pieces, strict=True):
        np.save(path, np.asarray(piece, dtype=np.int64).reshape(-1, 2))
    return paths


def dropped_by_hand(pairs, *, num_documents):
    cluster = list(range(num_documents))
    for one, other in pairs:
        low, high = sorted((cluster[one], cluster[other]))
        cluster = [low if number == high else number for number in cluster]
    return [document for document in range(num_documents) if cluster[document] != document]


@given(
    num_documents=st.integers(1, 40),
    data=st.data(),
    shuffle=st.randoms(use_true_random=False),
    files=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_clusters_are_those_of_hand(tmp_path_factory, num_documents, data, shuffle, files):
    number = st.integers(0, num_documents - 1)
    pairs = data.draw(st.lists(st.tuples(number, number), max_size=50))
    expected = dropped_by_hand(pairs, num_documents=num_documents)
    shuffle.shuffle(pairs)
    paths = write_pairs(tmp_path_factory.mktemp("pairs"), [pairs[first::files] for first in range(files)])
    dropped = kept_and_dropped(paths, num_documents=num_documents)
    assert dropped.dtype == np.int64 and dropped.tolist() == expected


@pytest.mark.parametrize("step", [1, -1])
def test_long_chains(tmp_path, step):
    numbers = np.arange(300_000)[::step]
    paths = write_pairs(tmp_path, [np.stack([numbers[:-1], numbers[1:]], axis=1)])
    assert kept_and_dropped(paths, num_documents=300_001).tolist() == list(range(1, 300_000))


def test_nothing_to_drop(tmp_path):
    assert kept_and_dropped([], num_documents=5).tolist() == []
    assert kept_and_dropped(write_pairs(tmp_path, [[]]), num_documents=0).tolist() == []


def test_pairs_of_another_run_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"pairs_0\.npy pairs document 7 of 7; pairs and key files are of one run"):
        kept_and_dropped(write_pairs(tmp_path, [[(0, 7)]]), num_documents=7)


# All three stages


def deduplicate(folder, texts, *, spec, files, parts):
    maker = build_key_maker(spec)
    cuts = [len(texts) * number // files for number in range(files + 1)]
    keys = write_keys(folder, [maker.keys(texts[first:last]) for first, last in itertools.pairwise(cuts)])
    shared = {"parts": parts, "columns_per_band": maker.columns_per_band}
    found = [duplicate_pairs(keys, band=band, part=part, **shared) for band in range(maker.bands) for part in range(parts)]
    return kept_and_dropped(write_pairs(folder, found), num_documents=len(texts))


def planted_corpus():
    """2,000 texts with a copy each, of which 0 to 30% of the words are replaced; then all in any order."""
    rng = random.Random(5)
    base = [a_text(rng, words=rng.randrange(80, 600)) for _ in range(2000)]
    copies = [
        edited(rng, text, share=share)
        for text, share in zip(base, itertools.cycle((0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)))
    ]
    order = rng.sample(range(4000), 4000)
    likeness = np.array([jaccard(one, other) for one, other in zip(base, copies, strict=True)])
    return [(base + copies)[place] for place in order], np.array(order), likeness


def test_planted_copies_are_dropped_and_nothing_else(tmp_path):
    texts, order, likeness = planted_corpus()
    dropped = deduplicate(tmp_path, texts, spec=MINHASH, files=7, parts=3)
    pair_of = order % 2000
    copies = np.bincount(pair_of[dropped], minlength=2000)
    assert copies.max() == 1  # one of a pair is kept, and texts of different pairs are never taken for copies
    expected = share_found(likeness)
    assert abs(copies.mean() - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5
    assert copies[likeness > 0.9].mean() > 0.99 and copies[likeness < 0.3].mean() < 0.01
    first = {}
    for place, pair in enumerate(pair_of.tolist()):
        first.setdefault(pair, place)
    assert all(first[pair_of[place]] != place for place in dropped.tolist())  # the first stays
    again = deduplicate(tmp_path, texts, spec=MINHASH, files=1, parts=1)
    assert again.tolist() == dropped.tolist()


def test_exact_copies_are_dropped_and_nothing_else(tmp_path):
    texts, order, likeness = planted_corpus()
    dropped = deduplicate(tmp_path, texts, spec=EXACT, files=3, parts=2)
    assert np.bincount(order[dropped] % 2000, minlength=2000).tolist() == (likeness == 1.0).astype(int).tolist()
    spaced = [text.replace(" ", "\n").upper() if number % 2 else text for number, text in enumerate(texts)]
    assert deduplicate(tmp_path, spaced, spec=NORMAL, files=3, parts=2).tolist() == dropped.tolist()
