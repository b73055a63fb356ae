"""C4's rules for lines (Raffel et al., JMLR 21-074): decision, reason and text are those of datatrove's block.

That a line says `lorem ipsum` or has a brace counts only where the rules before it keep the line, as in datatrove."""

from collections.abc import Sequence

from data_prep.curate.chunks import harmless
from data_prep.curate.document import Document
from data_prep.curate.spec import C4Spec

LOREM_IPSUM, JAVASCRIPT = "lorem ipsum", "javascript"


class C4:
    name = "c4"

    def __init__(self, spec: C4Spec):
        from datatrove.pipeline.filters import c4_filters as theirs
        from datatrove.utils.text import split_into_sentences

        self._spec, self._split_into_sentences = spec, split_into_sentences
        self._citation, self._phrases = theirs.CITATION_REGEX, theirs.POLICY_SUBSTRINGS
        self._endings, self._ellipsis = tuple(theirs.END_PUNCTUATION), theirs.ELLIPSIS

    def __call__(self, document: Document) -> str | None:
        spec, kept = self._spec, []
        lines = document.text.splitlines() if spec.split_paragraph else self._sentences(document.text)
        for line in map(str.strip, lines):
            words = line.split()
            if spec.max_word_length != -1 and any(len(word) > spec.max_word_length for word in words):
                continue
            if spec.remove_citations and "[" in line:
                line = self._citation.sub("", line)
            if not self._reads_as_sentence(line, words=len(words)):
                continue
            lower = line.lower()
            if spec.filter_lorem_ipsum and LOREM_IPSUM in lower:
                return "lorem_ipsum"
            if spec.filter_javascript and JAVASCRIPT in lower:
                continue
            if spec.filter_curly_bracket and "{" in line:
                return "curly_bracket"
            if not (spec.filter_policy and any(phrase in lower for phrase in self._phrases)):
                kept.append(line)
        return self._keep(document, lines=kept)

    def _keep(self, document: Document, *, lines: Sequence[str]) -> str | None:
        if not self._has_sentences(lines):
            return "too_few_sentences"
        document.text = ("\n" if self._spec.split_paragraph else " ").join(lines).strip()
        return None

    def _reads_as_sentence(self, line: str, *, words: int) -> bool:
        ended = line.endswith(self._endings) and not line.endswith(self._ellipsis)
        return words >= self._spec.min_words_per_line and (ended or not self._spec.filter_no_terminal_punct)

    def _has_sentences(self, lines: Sequence[str]) -> bool:
        """A line is one sentence at least; they are split only where that is not enough, and only until it is."""
        found = len(lines)
        for line in lines if self._spec.split_paragraph else ():
            if found >= self._spec.min_num_sentences:
                break
            found += len(self._sentences(line)) - 1
        return found >= self._spec.min_num_sentences

    def _sentences(self, text: str) -> list[str]:
        sentences: list[str] = self._split_into_sentences(harmless(text), self._spec.language)
        return sentences
