"""Questions that are neither too easy nor too hard, by how far several sampled answers agree (phi-4, arXiv 2412.08905, 2.2)."""

import unicodedata
from collections import Counter
from typing import Any

from data_prep.curate.document import Document
from data_prep.curate.spec import DifficultySpec
from data_prep.errors import DataError


class Difficulty:
    """Reasons: `too_few_answers`; `too_hard` (or ambiguous: answers hardly agree); `too_easy` (they nearly all do).
    Metadata: `agreement`, the share of the most common answer."""

    name = "difficulty"

    def __init__(self, spec: DifficultySpec):
        if spec.min_agreement > spec.max_agreement:
            raise DataError(
                f"difficulty: min_agreement {spec.min_agreement} is above max_agreement {spec.max_agreement}; no question lies "
                "between; exchange them"
            )
        self._spec = spec

    def __call__(self, document: Document) -> str | None:
        answers = self._answers(document)
        if len(answers) < self._spec.min_answers:
            return "too_few_answers"
        (_, most), *_ = Counter(map(normal_answer, answers)).most_common(1)
        agreement = document.metadata["agreement"] = most / len(answers)
        if agreement < self._spec.min_agreement:
            return "too_hard"
        return "too_easy" if agreement > self._spec.max_agreement else None

    def _answers(self, document: Document) -> list[str]:
        field = self._spec.answers_field
        found = document.metadata.get(field)
        if not isinstance(found, list) or not all(_is_answer(answer) for answer in found):
            what = f"{found!r:.60}" if field in document.metadata else f"not there (there are: {', '.join(document.metadata)})"
            raise DataError(
                f"document '{document.id}': answers field '{field}' is {what}; the rule is a list of strings or numbers; "
                "sample answers first, or correct difficulty.answers_field"
            )
        return [str(answer) for answer in found]


def normal_answer(answer: str) -> str:
    """Without what does not change an answer: case, white space, full width, a full stop at its end."""
    return " ".join(unicodedata.normalize("NFKC", answer).casefold().split()).rstrip(" .")


def _is_answer(answer: Any) -> bool:
    return isinstance(answer, str | int | float)
