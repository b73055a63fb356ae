"""FineWeb's rules (Penedo et al., arXiv 2406.17557): decision and reason are those of datatrove's block."""

from data_prep.curate.document import Document
from data_prep.curate.gopher import duplicates
from data_prep.curate.runs import ROUNDING
from data_prep.curate.spec import FineWebSpec
from data_prep.curate.words import Splitter


class FineWeb:
    name = "fineweb"

    def __init__(self, spec: FineWebSpec, *, splitter: Splitter):
        from datatrove.utils.text import TERMINAL_PUNCTUATION

        self._spec, self._splitter = spec, splitter
        self._stop_chars = tuple(TERMINAL_PUNCTUATION if spec.stop_chars is None else spec.stop_chars)

    def __call__(self, document: Document) -> str | None:
        text = document.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return "empty"
        return self._drop_for_lines(lines, characters=len(text) - text.count("\n")) or self._drop_for_list(text)

    def _drop_for_lines(self, lines: list[str], *, characters: int) -> str | None:
        spec = self._spec
        ended = sum(line.endswith(self._stop_chars) for line in lines) / len(lines)
        if ended < spec.line_punct_thr and (ended or not spec.line_punct_exclude_zero):
            return "line_punct_ratio"
        if sum(len(line) <= spec.short_line_length for line in lines) / len(lines) > spec.short_line_thr:
            return "short_line_ratio"
        if duplicates(lines)[1] / characters > spec.char_duplicates_ratio:
            return "char_dup_ratio"
        return None

    def _drop_for_list(self, text: str) -> str | None:
        most, feeds = self._spec.new_line_ratio, text.count("\n")
        if feeds <= most * self._splitter.fewest_words(text) * ROUNDING:
            return None
        words = len(self._splitter.words(text))
        return "list_ratio" if not words or feeds / words > most else None
