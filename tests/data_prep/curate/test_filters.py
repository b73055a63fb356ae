"""Every step beside datatrove's block: the same decision, reason and text, document by document."""

import importlib.util
import random
import string
import sys
import unicodedata

import pytest
from datatrove.pipeline.filters import LanguageFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.utils.word_tokenizers import load_word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from data_prep.curate import runs
from data_prep.curate.blocks import Block, Metadata, theirs
from data_prep.curate.chunks import ChunkTokenizer, harmless
from data_prep.curate.document import Document
from data_prep.curate.spec import PiiSpec, StepSpec
from data_prep.curate.steps import build_step
from data_prep.curate.words import Splitter, splitter_of
from data_prep.errors import DataError

SPEC = TypeAdapter(StepSpec)
# Blocks with their defaults, and so that documents of a few words reach the later rules.
CASES = [
    {"kind": "gopher_repetition"},
    {"kind": "gopher_repetition", "dup_line_frac": None, "dup_para_frac": None, "dup_line_char_frac": 0.9}
    | {
        "dup_para_char_frac": None,
        "top_n_grams": [[1, 0.3], [2, 0.3], [7, 0.6]],
        "dup_n_grams": [[1, 0.9], [2, 0.5], [3, 0.2]],
    },
    {
        "kind": "gopher_repetition",
        "dup_line_char_frac": 0,
        "dup_para_char_frac": 0,
        "top_n_grams": [],
        "dup_n_grams": [[4, 0.01]],
    },
    {"kind": "gopher_quality"},
    {"kind": "gopher_quality", "min_doc_words": 3, "max_doc_words": 60, "min_avg_word_length": 2.5},
    {"kind": "gopher_quality", "min_doc_words": 1, "min_avg_word_length": None, "max_avg_word_length": None}
    | {"max_symbol_word_ratio": None, "max_non_alpha_words_ratio": 0.3, "max_bullet_lines_ratio": 0.5},
    {"kind": "gopher_quality", "min_doc_words": 1, "min_stop_words": 1, "stop_words": ["mr.", "Mr.", "do", "n't", ":)"]}
    | {
        "max_non_alpha_words_ratio": None,
        "max_symbol_word_ratio": None,
        "max_avg_word_length": None,
        "min_avg_word_length": None,
    },
    {"kind": "fineweb"},
    {"kind": "fineweb", "line_punct_thr": 0.0, "short_line_thr": 1.0, "char_duplicates_ratio": 1.0, "new_line_ratio": 0.1},
    {
        "kind": "fineweb",
        "line_punct_exclude_zero": True,
        "short_line_length": 5,
        "char_duplicates_ratio": 0.5,
        "stop_chars": ["o", "."],
    },
    {"kind": "c4"},
    {"kind": "c4", "min_num_sentences": 2, "min_words_per_line": 1, "max_word_length": 12, "remove_citations": False},
    {"kind": "c4", "min_num_sentences": -1, "min_words_per_line": -1, "max_word_length": -1, "filter_no_terminal_punct": False},
    {"kind": "c4", "split_paragraph": False, "min_num_sentences": 1, "filter_curly_bracket": False, "filter_javascript": False},
    {"kind": "gopher_quality", "min_doc_words": 3, "language": "deu", "stop_words": ["und", "z.B."]},
    {"kind": "gopher_repetition", "language": "fra"},
    {"kind": "gopher_repetition", "language": "tha", "top_n_grams": []},
]
NAMES = [f"{case['kind']}-{number}" for number, case in enumerate(CASES)]

WORDS = r"""
the be to of and that have with The a I you Mr. e.g. U.S. a.m. can't don't he's 's '' ``word'' co-operate well-known LEMMA NOUN
word, word. word; (word) [word] {word} "quoted" 'quoted' …and... ... .. . , : ; ! ? - -- — – • # ### * & @ $5 US$30 5km 10%
:) ): (: :-) :)) :( ;) x:) ) :D 8) =) ^_^ (╯°□°）╯︵┻━┻ <3 http://example.org/a?b=c example.com me@example.com 8.8.8.8
192.168.0.1 foo_bar(baz) x=y; a->b a/b and/or w/o C:\\path x.y.z 0x1F 12:30 10a.m. 2m² 5°C. v1.2 JavaScript [1] [edit]
lorem ipsum cookie policy Terms Use uses cookies straße naïve ÉTÉ 東京 これは。 汉字，汉字。 한국어 русский, слово.
العربية، हिन्दी। ไทย
é ́ 👍🏽 👨‍👩‍👧 Ⅳ ½ ² º ﷺ 3+4 1,000 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
"""
PIECES = [*WORDS.split(), "lorem ipsum", "Terms of Use", "[citation needed]", "\u200b", "\u00ad", "\ufeff", "\0"]
GAPS = [" ", " ", " ", " ", " ", "", "", "  ", "\n", "\n", "\n\n", "\n\n\n", ".\n", "...\n", "\n- ", "\n• ", "\t", "\r\n"]
GAPS += ["\u00a0", "\u3000", "\x85", "\x1c", "\u2028", "\f"]
texts = st.lists(st.sampled_from(PIECES + GAPS) | st.text(max_size=4), max_size=60).map("".join)


def some_texts(count):
    """Documents of pieces, some of them with much said again: words, lines, paragraphs."""
    random.seed(count)
    for number in range(count):
        pieces = random.sample(PIECES, k=random.randint(1, 40))
        text = "".join(random.choice(pieces) + random.choice(GAPS) for _ in range(random.randint(0, 120)))
        lines = text.splitlines(keepends=True)
        again = random.choices(lines, k=random.randint(0, len(lines))) if lines and number % 3 == 0 else []
        yield text + "".join(again) + (text[: len(text) // 2] if number % 7 == 0 else "")


def outcome(step, text):
    """Reason and text; None where datatrove divides by zero: a document without words."""
    document = Document(text=text, id="a", metadata={})
    try:
        return step(document), document.text
    except ZeroDivisionError:
        return None


def check_equal(case, text):
    spec = SPEC.validate_python(case)
    expected = outcome(theirs(spec), text)
    found = outcome(build_step(spec, place="steps[0]"), text)
    assert found == expected or (expected is None and found[0] in {"gopher_short_doc", "list_ratio"})
    return expected


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_steps_are_equal_to_datatroves(case):
    if case.get("language") == "tha" and importlib.util.find_spec("pythainlp") is None:
        with pytest.raises(DataError, match=r"steps\[2\] \(gopher_repetition\), language 'tha': .*pythainlp"):
            build_step(SPEC.validate_python(case), place="steps[2]")
        return
    reasons = {outcome and outcome[0] for outcome in (check_equal(case, text) for text in some_texts(300))}
    assert len(reasons) > 1


@pytest.mark.parametrize("case", CASES[:14], ids=NAMES[:14])
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_steps_are_equal_on_any_text(case, text):
    check_equal(case, text)


@pytest.mark.parametrize("text", ["", " ", "\n", "\n\n \n", "\u3000\x1c", "a", ".", "\ud83d\ude00"])
@pytest.mark.parametrize("case", CASES[:14], ids=NAMES[:14])
def test_small_texts(case, text):
    check_equal(case, text.encode("utf-16", "surrogatepass").decode("utf-16"))


@pytest.mark.parametrize("language", ["eng", "deu", "fra", "fin", "ita"])
def test_words_are_those_of_datatrove(language):
    splitter, original = splitter_of(language), load_word_tokenizer(language)
    assert splitter.local
    for text in some_texts(200):
        assert splitter.words(text).strings() == original.word_tokenize(text)


def test_languages_with_rules_across_words_are_left_to_datatrove():
    """`в т.ч.` is one word in Russian."""
    step = build_step(SPEC.validate_python({"kind": "gopher_quality", "language": "rus"}), place="steps[0]")
    assert isinstance(step, Block) and step.name == "gopher_quality"


@settings(max_examples=400, deadline=None)
@given(text=texts | st.text(alphabet=string.ascii_letters + string.punctuation + string.digits + "  \n’“”—–…é²°", max_size=40))
def test_words_of_any_english_text(text):
    assert splitter_of("eng").words(text).strings() == load_word_tokenizer("eng").word_tokenize(text)


def test_no_letter_is_split_off():
    """What `_split_quickly` takes for granted of a chunk of letters alone."""
    rules = load_word_tokenizer("eng").tokenizer.tokenizer
    letters = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("L")]
    finders = (rules.prefix_search, rules.suffix_search, rules.infix_finditer)
    assert [letter for letter in letters if finders[0](letter) or finders[1](letter) or any(finders[2](f"a{letter}b"))] == []


@pytest.mark.parametrize(
    "text", ["x:) )", "a x:) ) b", "x:)\n)", "x:)  )", "x:) ) y:) z", "f(x): (", "see ): ) )", "a x'' ' b", "): ( :) ) :( ( (:"]
)
def test_special_cases_across_chunks(text):
    for variant in (text, f"the {text} of\nand {text}", text * 3):
        assert splitter_of("eng").words(variant).strings() == load_word_tokenizer("eng").word_tokenize(variant)


def test_special_cases_stay_as_they_are():
    """What `_split_quickly` takes for granted of the chunks that spaCy's table of exceptions holds."""
    tokenizer = ChunkTokenizer("eng")
    cases = [case for case in tokenizer._rules if not case.isspace()]
    assert tokenizer._split_together(cases) == [tokenizer._rules[case] for case in cases]


def test_the_word_that_breaks_spacy_is_left_out():
    for text in ("IS_ALPHA", "the IS_ALPHA of", "(IS_IS_ALPHAALPHA)", "a.IS_ALPHA\nb"):
        assert splitter_of("eng").words(text).strings() == load_word_tokenizer("eng").word_tokenize(harmless(text))
    for case in CASES[3:4] + CASES[7:8]:
        assert outcome(build_step(SPEC.validate_python(case), place="steps[0]"), "IS_ALPHA")[0] is not None
    text = "One IS_ALPHA of it. Two! Three? So it is. And the end of it."
    assert outcome(build_step(SPEC.validate_python({"kind": "c4"}), place="steps[0]"), text) == (None, text)


def test_a_full_table_is_emptied():
    small = Splitter(ChunkTokenizer("eng"), table_bytes=20_000)
    for text in some_texts(200):
        assert small.words(text) is small.words(text)
        assert small.words(text).strings() == splitter_of("eng").words(text).strings()
        assert small._bytes < 20_000 + 400 * 300


def test_runs_of_one_hash_are_told_apart(monkeypatch):
    """Were all hashes equal, the reasons would be the same."""
    monkeypatch.setattr(runs.RunStatistics, "_hashes_of_lists", lambda self, n: self._lengths(n).astype("uint64") * 0)
    monkeypatch.setattr(runs.RunStatistics, "_hashes_of_joined", lambda self, n: self._lengths(n).astype("uint64") * 0)
    for case in CASES[:3]:
        for text in some_texts(60):
            check_equal(case, text)


def test_pii_replacements_go_round_as_datatroves_in_a_new_process():
    for options in (
        {},
        {"remove_ips": False},
        {"remove_emails": False},
        {"only_remove_public_ips": False, "ip_replacement": ["0"]},
    ):
        step = build_step(PiiSpec(kind="pii", **options), place="steps[0]")
        options = {name: tuple(value) if name == "ip_replacement" else value for name, value in options.items()}
        for text in [*some_texts(100), "a@b.org, c@d.org at 8.8.8.8; 1.1.1.1 and 10.0.0.1"]:
            assert outcome(step, text) == (None, PIIFormatter(**options).format(text))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A fastText model of two made-up languages."""
    import fasttext

    folder = tmp_path_factory.mktemp("fasttext")
    random.seed(1)
    lines = [
        f"__label__{name} " + " ".join("".join(random.choices(letters, k=5)) for _ in range(12))
        for name, letters in (("en", "abcdefg"), ("de", "tuvwxyz"))
        for _ in range(200)
    ]
    random.shuffle(lines)
    (folder / "lines.txt").write_text("\n".join(lines))
    model = fasttext.train_supervised(str(folder / "lines.txt"), dim=8, minn=1, maxn=2, epoch=5, lr=0.05, thread=1, verbose=0)
    model.save_model(str(folder / "model.bin"))
    return str(folder / "model.bin")


@pytest.mark.parametrize(
    "options",
    [
        {"languages": ["en"]},
        {"languages": ["en", "de"], "min_score": 0.9},
        {"min_score": 0.999},
        {"label_only": True},
        {"languages": ["en"], "keep_top_pairs_threshold": 0.01},
    ],
)
def test_language(model_file, options):
    from fasttext.FastText import _FastText

    step = build_step(SPEC.validate_python({"kind": "language", "model_file": model_file} | options), place="steps[0]")
    others = {name: value for name, value in options.items() if name != "min_score"}
    block = LanguageFilter(language_threshold=options.get("min_score", 0.65), **others)
    block.model._model = _FastText(model_file)
    for text in ["abcde fgabc\ncdefg", "tuvwx yzxyz", "abc xyz abcd wxyz", "", "\n", "12 ?"]:
        ours, their = (Document(text=text, id="a", metadata={"kept": 1}) for _ in range(2))
        kept = block.filter(their)
        assert step(ours) == (None if kept else "language") and ours == their


def test_model_files_that_cannot_be_used(tmp_path):
    (tmp_path / "bad.bin").write_bytes(b"no model" * 10)
    for name, message in (("none.bin", "there is no such file"), ("bad.bin", "wrong file format")):
        spec = SPEC.validate_python({"kind": "language", "model_file": str(tmp_path / name)})
        with pytest.raises(DataError, match=rf"steps\[1\]\.model_file is .*{name}: .*{message}.*; download"):
            build_step(spec, place="steps[1]")


@pytest.mark.parametrize(
    ("rule", "reasons"),
    [
        ({"equals": "en"}, {"en": None, "de": "metadata_value", None: "metadata_missing", 1: "metadata_value"}),
        ({"equals": 1}, {1: None, 2: "metadata_value"}),
        ({"equals": True}, {True: None, False: "metadata_value"}),
        ({"one_of": ["a", 2]}, {"a": None, 2: None, 3: "metadata_value", True: "metadata_value"}),
        ({"min": 2}, {2: None, 1.9: "metadata_value", 10**30: None, "3": "metadata_type", float("nan"): "metadata_value"}),
        ({"min": 0, "max": 1}, {0: None, 0.5: None, 1.01: "metadata_value", -1: "metadata_value"}),
    ],
)
def test_metadata(rule, reasons):
    step = build_step(SPEC.validate_python({"kind": "metadata", "field": "score"} | rule), place="steps[0]")
    assert {value: step(Document("", "a", {"score": value})) for value in reasons} == reasons
    assert step(Document("", "a", {"other": 1})) == "metadata_missing"


@pytest.mark.parametrize("rule", [{}, {"equals": 1, "min": 1}, {"equals": 1, "one_of": [1]}])
def test_metadata_needs_one_rule(rule):
    with pytest.raises(DataError, match=r"steps\[4\] says nothing, or too much, of what `score` must be; .*set one of them"):
        Metadata(SPEC.validate_python({"kind": "metadata", "field": "score"} | rule), place="steps[4]")


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(DataError, match=r"steps\[0\]\.language: datatrove has no word tokenizer for the language 'english'"):
        build_step(SPEC.validate_python({"kind": "c4", "language": "english"}), place="steps[0]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind in ("gopher_quality", "c4", "pii"):
        with pytest.raises(
            DataError, match=rf"steps\[0\] \({kind}\): the package 'datatrove' .*; pip install 'phidias\[curate\]'"
        ):
            build_step(SPEC.validate_python({"kind": kind}), place="steps[0]")
