"""The steps of curation as the config says them: `kind` is the step, the other fields have datatrove's names and defaults.

`language` of a step chooses the word tokenizer, by datatrove's three-letter code. A threshold of null switches its rule off.
"""

from dataclasses import KW_ONLY
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.fields import STRICT, Float, Int, PositiveInt, Share

Word = Annotated[str, Field(min_length=1)]
Words = Annotated[tuple[Word, ...], Field(min_length=1)]
NGrams = tuple[tuple[PositiveInt, Share], ...]  # (n, largest share of the characters)
Ratio = Annotated[Float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=0)]
CountOrOff = Annotated[Int, Field(ge=-1)]  # -1 is off
Value = str | int | float | bool

EMAILS = ("email@example.com", "firstname.lastname@example.org")
# Of these addresses datatrove says that nobody answered there when it chose them.
IPS = ("22.214.171.124", "126.96.36.199", "188.8.131.52", "184.108.40.206", "220.127.116.11", "18.104.22.168")


@dataclass(config=STRICT, frozen=True)
class LanguageSpec:
    """Keeps documents in one of `languages` (null: any) of which the fastText model is more than `min_score` sure; writes
    `language` and `language_score` into the metadata. `glotlid` splits labels such as `eng_Latn`; `label_only` drops nothing;
    scores above `keep_top_pairs_threshold` go into the metadata too (-1: none)."""

    _: KW_ONLY
    kind: Literal["language"]
    model_file: Word
    languages: Words | None = None
    min_score: Share = 0.65
    backend: Literal["ft176", "glotlid"] = "ft176"
    label_only: bool = False
    keep_top_pairs_threshold: Annotated[Float, Field(ge=-1.0, le=1.0)] = -1.0


@dataclass(config=STRICT, frozen=True)
class GopherRepetitionSpec:
    """Drops documents that repeat paragraphs, lines or runs of words (Gopher, arXiv 2112.11446, table A1)."""

    _: KW_ONLY
    kind: Literal["gopher_repetition"]
    dup_line_frac: Share | None = 0.3
    dup_para_frac: Share | None = 0.3
    dup_line_char_frac: Share | None = 0.2
    dup_para_char_frac: Share | None = 0.2
    top_n_grams: NGrams = ((2, 0.2), (3, 0.18), (4, 0.16))
    dup_n_grams: NGrams = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    language: Word = "eng"


@dataclass(config=STRICT, frozen=True)
class GopherQualitySpec:
    """Drops documents whose words, symbols and lines are not those of prose (Gopher, arXiv 2112.11446, section A.1).

    `max_non_alpha_words_ratio` keeps datatrove's name: it is the smallest share of words with a letter."""

    _: KW_ONLY
    kind: Literal["gopher_quality"]
    min_doc_words: Count | None = 50
    max_doc_words: Count | None = 100_000
    min_avg_word_length: Ratio | None = 3
    max_avg_word_length: Ratio | None = 10
    max_symbol_word_ratio: Ratio | None = 0.1
    max_bullet_lines_ratio: Share | None = 0.9
    max_ellipsis_lines_ratio: Share | None = 0.3
    max_non_alpha_words_ratio: Share | None = 0.8
    min_stop_words: Count | None = 2
    stop_words: tuple[Word, ...] | None = None
    language: Word = "eng"


@dataclass(config=STRICT, frozen=True)
class C4Spec:
    """Keeps the lines that read as sentences, and documents of which enough is left (C4, JMLR 21-074). Changes the text."""

    _: KW_ONLY
    kind: Literal["c4"]
    split_paragraph: bool = True
    remove_citations: bool = True
    filter_no_terminal_punct: bool = True
    min_num_sentences: CountOrOff = 5
    min_words_per_line: CountOrOff = 3
    max_word_length: CountOrOff = 1000
    filter_lorem_ipsum: bool = True
    filter_javascript: bool = True
    filter_curly_bracket: bool = True
    filter_policy: bool = True
    language: Word = "eng"


@dataclass(config=STRICT, frozen=True)
class FineWebSpec:
    """Drops documents that are lists, have few sentences or repeat lines (FineWeb, arXiv 2406.17557)."""

    _: KW_ONLY
    kind: Literal["fineweb"]
    line_punct_thr: Share = 0.12
    line_punct_exclude_zero: bool = False
    stop_chars: tuple[Word, ...] | None = None
    short_line_thr: Share = 0.67
    short_line_length: Count = 30
    char_duplicates_ratio: Share = 0.01
    new_line_ratio: Ratio = 0.3
    language: Word = "eng"


@dataclass(config=STRICT, frozen=True)
class PiiSpec:
    """Replaces email addresses and public IP addresses, each by the next of its replacements. Drops nothing."""

    _: KW_ONLY
    kind: Literal["pii"]
    remove_emails: bool = True
    remove_ips: bool = True
    only_remove_public_ips: bool = True
    email_replacement: Words = EMAILS
    ip_replacement: Words = IPS


@dataclass(config=STRICT, frozen=True)
class MetadataSpec:
    """Keeps documents whose metadata `field` is `equals`, is one of `one_of`, or lies in `min`..`max`, borders included."""

    _: KW_ONLY
    kind: Literal["metadata"]
    field: Word
    equals: Value | None = None
    one_of: tuple[Value, ...] | None = None
    min: Float | None = None
    max: Float | None = None


# ---- exact_dedup, minhash_dedup, decontaminate, difficulty: their specs go below this line, above StepSpec ----


@dataclass(config=STRICT, frozen=True)
class ExactDedupSpec:
    """Drops documents whose text, or where `normalise` whose words, another document has: see `dedup_keys`."""

    _: KW_ONLY
    kind: Literal["exact_dedup"]
    normalise: bool = False


@dataclass(config=STRICT, frozen=True)
class MinHashDedupSpec:
    """Drops near-copies: documents whose sets of `ngram` words overlap by a share s are found with probability
    1 - (1 - s^rows)^bands. Other `seed`s miss and mistake other documents."""

    _: KW_ONLY
    kind: Literal["minhash_dedup"]
    bands: PositiveInt = 14
    rows: PositiveInt = 8
    ngram: PositiveInt = 5
    seed: Int = 1


@dataclass(config=STRICT, frozen=True)
class BenchmarkSpec:
    """Where the items of a benchmark are: globs of jsonl files, and the fields that make an item's text, joined in order."""

    _: KW_ONLY
    inputs: Words
    text_fields: Words


@dataclass(config=STRICT, frozen=True)
class DecontaminateSpec:
    """Drops documents that hold items of `benchmarks` (by name): see `decontaminate`. `common_grams_file`: 13-grams that are
    no sign of it, one a line. phi-4 does not say which overlaps it used, so there are no defaults."""

    _: KW_ONLY
    kind: Literal["decontaminate"]
    benchmarks: Annotated[dict[Word, BenchmarkSpec], Field(min_length=1)]
    common_grams_file: Word | None = None
    noted_overlap: Share
    contaminated_overlap: Annotated[Float, Field(gt=0.0, le=1.0)]


@dataclass(config=STRICT, frozen=True)
class DifficultySpec:
    """Keeps questions on whose answer sampled `answers_field` agree neither too much nor too little: see `difficulty`."""

    _: KW_ONLY
    kind: Literal["difficulty"]
    answers_field: Word = "answers"
    min_answers: PositiveInt = 4
    min_agreement: Share = 0.3
    max_agreement: Share = 0.95


StepSpec = Annotated[
    LanguageSpec
    | GopherRepetitionSpec
    | GopherQualitySpec
    | C4Spec
    | FineWebSpec
    | PiiSpec
    | MetadataSpec
    | ExactDedupSpec
    | MinHashDedupSpec
    | DecontaminateSpec
    | DifficultySpec,
    Field(discriminator="kind"),
]
