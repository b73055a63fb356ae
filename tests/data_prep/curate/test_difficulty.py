"""Questions by how far their sampled answers agree."""

import pytest

from data_prep.curate.difficulty import Difficulty, normal_answer
from data_prep.curate.document import Document
from data_prep.curate.spec import DifficultySpec
from data_prep.errors import DataError


def ask(answers, **settings):
    step = Difficulty(DifficultySpec(kind="difficulty", **settings))
    document = Document(text="What is it?", id="a.jsonl, line 7", metadata={"source": "exam", "answers": answers})
    return step(document), document.metadata.get("agreement")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["4"] * 8, ("too_easy", 1.0)),
        (["4"] * 7 + ["5"], (None, 0.875)),
        (["4", "5", "6", "7"], ("too_hard", 0.25)),
        (["4", "5", "6"] + ["7"] * 2 + ["8"], (None, 2 / 6)),
        ([" Paris. ", "paris", "PARIS", "Ｐａｒｉｓ"], ("too_easy", 1.0)),
        ([4, "4", 4.5, "x"], (None, 0.5)),
        (["4"] * 3, ("too_few_answers", None)),
        ([], ("too_few_answers", None)),
    ],
)
def test_agreement(answers, expected):
    assert ask(answers) == expected


def test_borders_are_inside():
    half = ["4"] * 2 + ["5", "6"]
    assert ask(half, min_agreement=0.5, max_agreement=0.5) == (None, 0.5)
    assert ask(half, min_agreement=0.51)[0] == "too_hard" and ask(half, max_agreement=0.49)[0] == "too_easy"
    assert ask(half[:2], min_answers=2)[0] == "too_easy"


def test_answers_keep_what_matters():
    assert len({normal_answer(answer) for answer in ("3.5", "35", "-35", "3 5", "x²", "x", "", "(a)", "a")}) == 9


@pytest.mark.parametrize("answers", [None, "4", ["4", None], [["4"]], {"a": "4"}])
def test_malformed_answers_are_refused(answers):
    with pytest.raises(
        DataError, match=r"document 'a\.jsonl, line 7': answers field 'answers' is .*; the rule is a list of strings"
    ):
        ask(answers)


def test_missing_answers_are_refused():
    with pytest.raises(DataError, match=r"field 'samples' is not there \(there are: source, answers\)"):
        ask(["4"], answers_field="samples")


def test_borders_in_the_wrong_order_are_refused():
    with pytest.raises(DataError, match=r"min_agreement 0\.9 is above max_agreement 0\.5"):
        ask([], min_agreement=0.9, max_agreement=0.5)
