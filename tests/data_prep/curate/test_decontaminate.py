"""Benchmark items in documents: whole, in part, reworded; and documents that only sound like them."""

import gzip
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.curate.decontaminate import Decontaminate, common_grams, read_common_grams, read_items
from data_prep.curate.document import Document
from data_prep.curate.ngrams import BLOCK_CHARACTERS
from data_prep.curate.spec import BenchmarkSpec, DecontaminateSpec
from data_prep.errors import DataError

WORDS = [f"{first}{middle}{last}" for first in "bdfgklmnprst" for middle in ("a", "ea", "i", "o", "ou") for last in "dglmnrstx"]
STOCK = "a i only b ii only c iii only d ii and iii"  # a form of answer that many questions share


def some_words(rng, count):
    return " ".join(rng.choices(WORDS, k=count))


def benchmark(folder, rows, *, name="exam", fields=("question", "answer")):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return BenchmarkSpec(inputs=(str(path),), text_fields=fields)


def decontaminate(folder, rows, *, common=None, noted=0.2, contaminated=0.4):
    common_file = None
    if common is not None:
        common_file = folder / "common.txt"
        common_file.write_text("\n".join(common))
    spec = DecontaminateSpec(
        kind="decontaminate",
        benchmarks={"exam": benchmark(folder, rows)},
        common_grams_file=common_file and str(common_file),
        noted_overlap=noted,
        contaminated_overlap=contaminated,
    )
    return Decontaminate(spec)


def ask(step, text):
    document = Document(text=text, id="1", metadata={})
    return step(document), document.metadata.get("contamination")


def questions(count=300):
    rng = random.Random(1)
    return [
        {"question": some_words(rng, rng.randrange(15, 80)), "answer": some_words(rng, rng.randrange(1, 30))}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    return decontaminate(tmp_path_factory.mktemp("exam"), questions())


def whole(row):
    return f"{row['question']}\n{row['answer']}"


def inside(rng, text, *, words=400):
    around = some_words(rng, words).split()
    return " ".join([*around[: words // 3], text, *around[words // 3 :]])


def reworded(text, *, every):
    """With every so-manieth word replaced."""
    return " ".join("other" if place % every == every - 1 else word for place, word in enumerate(text.split()))


WHOLE = (1.0, 1.0, 0.0)
PLANTED = {
    "whole": (whole, WHOLE),
    "question only": (lambda row: row["question"], WHOLE),
    "other layout": (lambda row: whole(row).upper().replace(" ", " -\n"), WHOLE),
    "13 words": (lambda row: " ".join(row["question"].split()[:13]), WHOLE),
    "every 25th word": (lambda row: reworded(whole(row), every=25), (1.0, 1.0, 0.05)),
    "every 13th word": (lambda row: reworded(whole(row), every=13), (0.9, 1.0, 1.0)),
    "every 9th word": (lambda row: reworded(whole(row), every=9), (0.0, 0.1, 1.0)),
    "12 words": (lambda row: " ".join(row["question"].split()[:12]), (0.0, 0.1, 1.0)),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_items_are_found(exam, kind):
    """The share that is found, at least and at most, and the most of it by 7-grams. What is reworded every 9th word the rule
    does not find: phi-4's is one of copies."""
    make, (least, most, by_short) = PLANTED[kind]
    rng = random.Random(kind)
    answers = [ask(exam, inside(rng, make(row))) for row in questions()]
    found = [(number, metadata) for number, (said, metadata) in enumerate(answers) if said]
    assert least <= len(found) / len(answers) <= most
    assert all(metadata["item"] == f"exam.jsonl:{number + 1}" and metadata["benchmark"] == "exam" for number, metadata in found)
    assert sum(metadata["ngram"] == 7 for _, metadata in found) <= by_short * len(found)


def test_innocent_documents_are_kept(exam):
    rng = random.Random(4)
    rows = questions()
    phrases = [" ".join(rng.choice(rows)["question"].split()[:6]) for _ in range(2000)]
    texts = [inside(rng, phrase) for phrase in phrases]
    assert [ask(exam, text) for text in texts] == [(None, None)] * len(texts)


def rule_by_hand(text, items, *, allowed=frozenset(), noted=0.2, contaminated=0.4):
    """The rule over sets of tuples."""

    def grams(words, length):
        return {tuple(words[place : place + length]) for place in range(len(words) - length + 1)}

    def features(words):
        return grams(words, 7) if len(words) >= 7 else {tuple(words)} - {()}

    words = text.split()
    if any(grams(words, 13) & grams(item.split(), 13) - allowed for item in items):
        return "contaminated_13gram"
    shared = [(features(words) & features(item.split()), features(item.split())) for item in items]
    overlap = max(len(both) / min(len(features(words)), len(of_item)) for both, of_item in shared if of_item) if words else 0
    return "contaminated_7gram" if overlap >= contaminated else "noted" if overlap > noted else None


FEW_WORDS = st.lists(st.sampled_from("ab"), min_size=1, max_size=30).map(" ".join)


@given(st.lists(FEW_WORDS, min_size=1, max_size=4), st.lists(FEW_WORDS, min_size=1, max_size=10), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_the_rule_is_that_of_sets(tmp_path_factory, items, texts, num_allowed):
    words = items[0].split()
    allowed = {tuple(words[place : place + 13]) for place in range(len(words) - 12)[:num_allowed]}
    rows = [{"question": item, "answer": ""} for item in items]
    step = decontaminate(tmp_path_factory.mktemp("rule"), rows, common=[" ".join(gram) for gram in allowed])
    for text in texts:
        said, metadata = ask(step, text)
        assert (said or (metadata and "noted")) == rule_by_hand(text, items, allowed=allowed)


def test_documents_are_judged_together_as_one_by_one(exam):
    rng = random.Random(6)
    texts = [make(row) for make, _ in PLANTED.values() for row in questions(20)] + ["", "one", some_words(rng, 13)]
    texts = [inside(rng, text, words=rng.choice((0, 3, 9, 300))) for text in rng.sample(texts * 8, len(texts) * 8)]
    assert sum(map(len, texts)) > 2 * BLOCK_CHARACTERS
    documents = [Document(text=text, id="1", metadata={}) for text in texts]
    reasons = exam.judge_all(documents)
    found = [document.metadata.get("contamination") for document in documents]
    assert list(zip(reasons, found, strict=True)) == [ask(exam, text) for text in texts]
    assert len(set(reasons)) == 3 and exam.judge_all([]) == []


def test_short_items_and_short_documents(tmp_path):
    step = decontaminate(
        tmp_path,
        [{"question": "What is 2 + 2?", "answer": "4"}, {"question": "one two three four five six seven eight", "answer": ""}],
    )
    assert ask(step, "what is 2+2 = 4")[0] == "contaminated_7gram"
    assert ask(step, "Somebody asked: what is 2 + 2? 4, of course.") == (None, None)
    assert ask(step, "two three four five six seven eight") == (
        "contaminated_7gram",
        {"benchmark": "exam", "item": "exam.jsonl:2", "ngram": 7, "overlap": 1.0},
    )
    assert ask(step, "one two three four five six") == ask(step, "") == ask(step, "?!") == (None, None)


def test_part_of_an_item_is_noted(tmp_path):
    item = some_words(random.Random(1), 40)  # 34 7-grams
    step = decontaminate(tmp_path, [{"question": item, "answer": ""}], noted=0.05, contaminated=0.9)
    said, metadata = ask(step, inside(random.Random(2), " ".join(item.split()[:9])))
    assert said is None and metadata == {"benchmark": "exam", "item": "exam.jsonl:1", "ngram": 7, "overlap": 3 / 34}


def test_common_grams_are_no_contamination(tmp_path):
    rng = random.Random(2)
    rows = [{"question": f"{some_words(rng, 60)} {STOCK}", "answer": ""} for _ in range(5)]
    texts = [whole(row) for row in rows]
    document = inside(rng, STOCK)
    assert ask(decontaminate(tmp_path, rows), document)[0] == "contaminated_13gram"
    common = common_grams(texts, documents=texts, min_documents=2)
    assert common == [STOCK]
    step = decontaminate(tmp_path, rows, common=["", *common])
    assert ask(step, document) == (None, None)
    assert ask(step, inside(rng, texts[3]))[0] == "contaminated_13gram"
    assert common_grams(texts, documents=[document, "(A) I only; (B) II only"], min_documents=2) == []
    assert len(common_grams(texts[:1], documents=texts, min_documents=1)) == 61


def test_common_grams_survive_being_written(tmp_path):
    text = "The café -- naïve! -- says: 多字 a, b. c d\ne f “g” h i J K."
    (tmp_path / "common.txt").write_text("\n".join(common_grams([text], documents=[text], min_documents=1)))
    assert (
        len(read_common_grams(tmp_path / "common.txt"))
        == len(common_grams([text], documents=[text.upper()], min_documents=1))
        == 5
    )


def test_items_are_read_from_nested_fields_and_compressed_files(tmp_path):
    rows = [
        {"q": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "n": 3, "none": None},
        {"q": "Why", "choices": {}, "n": 1},
    ]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n\n".join(json.dumps(row | {"none": None}) for row in rows).encode()))
    items = read_items("arc", BenchmarkSpec(inputs=(str(tmp_path / "*.gz"),), text_fields=("q", "choices", "n", "none")))
    assert [(item.benchmark, item.place, item.text.split("\n")) for item in items] == [
        ("arc", "a.jsonl.gz:1", ["Which?", "one", "two", "A", "B", "3"]),
        ("arc", "a.jsonl.gz:3", ["Why", "1"]),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"question": "a"}',
            r"exam\.jsonl, line 1, has question; a row of benchmark 'exam' is a JSON object with question, answer",
        ),
        ("[1]", r"line 1, has no fields"),
        ("bad", r"line 1, has no fields"),
        ('{"question": "?", "answer": "!"}', r"benchmark 'exam' has 1 items and no words; set its text_fields"),
    ],
)
def test_benchmarks_that_cannot_be_used(tmp_path, row, message):
    spec = benchmark(tmp_path, [])
    (tmp_path / "exam.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match=message):
        read_items("exam", spec)


def test_settings_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match=r"'one two three' is not 13 words; a common gram is 13 words on one line"):
        decontaminate(tmp_path, questions(3), common=["one two three"])
    with pytest.raises(DataError, match=r"noted_overlap 0\.6 is above contaminated_overlap 0\.4"):
        decontaminate(tmp_path, questions(3), noted=0.6)
    with pytest.raises(DataError, match="cannot read the common grams"):
        read_common_grams(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"'benchmark exam': input .* matches no file"):
        read_items("exam", BenchmarkSpec(inputs=(str(tmp_path / "gone"),), text_fields=("a",)))
