"""Gopher's rules (Rae et al., arXiv 2112.11446): decision and reason of every document are those of datatrove's two blocks.

Where datatrove divides by zero, a document without words, the reason is `gopher_short_doc`.
"""

import re
from collections.abc import Collection, Sequence

from data_prep.curate.document import Document
from data_prep.curate.runs import ROUNDING, RunStatistics
from data_prep.curate.spec import GopherQualitySpec, GopherRepetitionSpec
from data_prep.curate.words import Splitter, Words

PARAGRAPH_BORDER = re.compile(r"\n{2,}")
LINE_BORDER = re.compile(r"\n+")
BULLETS, ELLIPSES = ("•", "-"), ("...", "…")
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
FIRST_CHARACTERS = 2000  # stop words are looked for here first


class GopherRepetition:
    name = "gopher_repetition"

    def __init__(self, spec: GopherRepetitionSpec, *, splitter: Splitter):
        self._spec, self._splitter = spec, splitter

    def __call__(self, document: Document) -> str | None:
        text = document.text
        if not text:
            return "empty"
        return self._drop_for_pieces(text) or self._drop_for_runs(text)

    def _drop_for_pieces(self, text: str) -> str | None:
        spec = self._spec
        again, characters = duplicates(PARAGRAPH_BORDER.split(text.strip()))
        if spec.dup_para_frac and again > spec.dup_para_frac:
            return "dup_para_frac"
        if spec.dup_para_char_frac and characters / len(text) > spec.dup_para_char_frac:
            return "dup_para_char_frac"
        again, characters = duplicates(LINE_BORDER.split(text))
        if spec.dup_line_frac and again > spec.dup_line_frac:
            return "dup_line_frac"
        if spec.dup_line_char_frac and characters / len(text) > spec.dup_line_char_frac:
            return "dup_line_char_frac"
        return None

    def _drop_for_runs(self, text: str) -> str | None:
        runs, characters = RunStatistics(self._splitter.words(text)), len(text) * ROUNDING
        for n, most in self._spec.top_n_grams:
            if runs.top_characters(n, limit=most * characters) / len(text) > most:
                return f"top_{n}_gram"
        for n, most in self._spec.dup_n_grams:
            if runs.repeated_characters(n, limit=most * characters) / len(text) > most:
                return f"duplicated_{n}_n_grams"
        return None


class GopherQuality:
    name = "gopher_quality"

    def __init__(self, spec: GopherQualitySpec, *, splitter: Splitter):
        self._spec, self._splitter = spec, splitter
        self._stop_words = frozenset(STOP_WORDS if spec.stop_words is None else spec.stop_words)
        self._plain_stop_words = {word for word in self._stop_words if splitter.words(word).strings() == [word]}

    def __call__(self, document: Document) -> str | None:
        text, words = document.text, self._splitter.words(document.text)
        return (
            self._drop_for_words(words)
            or self._drop_for_symbols(text, words=len(words))
            or self._drop_for_lines(text.splitlines())
            or self._drop_for_language(text, words=words)
        )

    def _drop_for_words(self, words: Words) -> str | None:
        spec = self._spec
        if not len(words) or (spec.min_doc_words and words.non_symbol < spec.min_doc_words):
            return "gopher_short_doc"
        if spec.max_doc_words and words.non_symbol > spec.max_doc_words:
            return "gopher_long_doc"
        if words.non_symbol:
            mean = words.non_symbol_characters / words.non_symbol
            if spec.min_avg_word_length and mean < spec.min_avg_word_length:
                return "gopher_below_avg_threshold"
            if spec.max_avg_word_length and mean > spec.max_avg_word_length:
                return "gopher_above_avg_threshold"
        return None

    def _drop_for_symbols(self, text: str, *, words: int) -> str | None:
        most = self._spec.max_symbol_word_ratio
        if most and text.count("#") / words > most:
            return "gopher_too_many_hashes"
        if most and sum(map(text.count, ELLIPSES)) / words > most:
            return "gopher_too_many_ellipsis"
        return None

    def _drop_for_lines(self, lines: Sequence[str]) -> str | None:
        bullets, ellipses = self._spec.max_bullet_lines_ratio, self._spec.max_ellipsis_lines_ratio
        if bullets and sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines) > bullets:
            return "gopher_too_many_bullets"
        if ellipses and sum(line.rstrip().endswith(ELLIPSES) for line in lines) / len(lines) > ellipses:
            return "gopher_too_many_end_ellipsis"
        return None

    def _drop_for_language(self, text: str, *, words: Words) -> str | None:
        spec = self._spec
        if spec.max_non_alpha_words_ratio and words.with_letter / len(words) < spec.max_non_alpha_words_ratio:
            return "gopher_below_alpha_threshold"
        if spec.min_stop_words and not self._has_stop_words(text, words=words, fewest=spec.min_stop_words):
            return "gopher_enough_stop_words"
        return None

    def _has_stop_words(self, text: str, *, words: Words, fewest: int) -> bool:
        """Most documents show them at their start, as chunks of their own; the last chunk of a cut may be a part of one."""
        first = text[:FIRST_CHARACTERS].split()
        if len(text) > FIRST_CHARACTERS:
            del first[-1:]
        if len(self._plain_stop_words.intersection(first)) >= fewest:
            return True
        return len(self._stop_words.intersection(words.strings())) >= fewest


def duplicates(pieces: Collection[str]) -> tuple[float, int]:
    """The share of the pieces that came before, and the characters in them."""
    different = set(pieces)
    if len(different) == len(pieces):
        return 0.0, 0
    characters = sum(map(len, pieces)) - sum(map(len, different))
    return (len(pieces) - len(different)) / len(pieces), characters
