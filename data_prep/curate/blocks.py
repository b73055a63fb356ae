"""Steps that ask datatrove's own blocks, and the choice by metadata."""

from pathlib import Path
from typing import Any

from data_prep.curate.document import Document
from data_prep.curate.spec import (
    C4Spec,
    FineWebSpec,
    GopherQualitySpec,
    GopherRepetitionSpec,
    LanguageSpec,
    MetadataSpec,
    PiiSpec,
)
from data_prep.errors import DataError


class Block:
    """One of datatrove's filters, as a step. Its reason, or the step's name where it gives none."""

    def __init__(self, name: str, *, block: Any):
        self.name, self._block = name, block

    def __call__(self, document: Document) -> str | None:
        result = self._block.filter(document)
        kept, reason = result if isinstance(result, tuple) else (result, self.name)
        return None if kept else str(reason)


def theirs(spec: GopherRepetitionSpec | GopherQualitySpec | FineWebSpec | C4Spec) -> Block:
    """datatrove's block of the spec: its fields, but for `kind`, are the block's arguments."""
    from datatrove.pipeline import filters

    block = {
        "gopher_repetition": filters.GopherRepetitionFilter,
        "gopher_quality": filters.GopherQualityFilter,
        "fineweb": filters.FineWebQualityFilter,
        "c4": filters.C4QualityFilter,
    }[spec.kind]
    return Block(spec.kind, block=block(**{name: value for name, value in vars(spec).items() if name != "kind"}))


def language_step(spec: LanguageSpec, *, place: str) -> Block:
    """datatrove's language filter over the model in `model_file`, read here: left alone, the filter would download one."""
    from datatrove.pipeline.filters import LanguageFilter
    from fasttext.FastText import _FastText

    languages = None if spec.languages is None else list(spec.languages)
    block = LanguageFilter(
        languages=languages,
        language_threshold=spec.min_score,
        backend=spec.backend,
        label_only=spec.label_only,
        keep_top_pairs_threshold=spec.keep_top_pairs_threshold,
    )
    try:
        if not Path(spec.model_file).is_file():
            raise ValueError("there is no such file")
        block.model._model = _FastText(spec.model_file)
    except ValueError as error:
        raise DataError(
            f"{place}.model_file is {spec.model_file}: {error}; the rule is a fastText model on this machine; download "
            "lid.176.bin from https://fasttext.cc/docs/en/language-identification.html and set its path"
        ) from error
    return Block("language", block=block)


class Pii:
    """datatrove's replacements, without a search where there is no `@`. They go round in each document anew: in datatrove
    they go on from one to the next, so that a text would depend on what the process read before."""

    name = "pii"

    def __init__(self, spec: PiiSpec):
        from datatrove.pipeline.formatters import PIIFormatter

        self._spec = spec
        self._block = PIIFormatter(
            remove_emails=spec.remove_emails,
            remove_ips=spec.remove_ips,
            only_remove_public_ips=spec.only_remove_public_ips,
            email_replacement=spec.email_replacement,
            ip_replacement=spec.ip_replacement,
        )

    def __call__(self, document: Document) -> str | None:
        self._block.emails_replacer._replace_i = self._block.ip_replacer._replace_i = 0
        if self._spec.remove_emails and "@" in document.text:
            document.text = self._block.emails_replacer.replace(document.text)
        if self._spec.remove_ips:
            document.text = self._block.ip_replacer.replace(document.text)
        return None


class Metadata:
    """Reasons: `metadata_missing` (no such field, or null), `metadata_type` (not a number, for a range), `metadata_value`."""

    name = "metadata"

    def __init__(self, spec: MetadataSpec, *, place: str):
        in_range = spec.min is not None or spec.max is not None
        if (spec.equals is not None) + (spec.one_of is not None) + in_range != 1:
            raise DataError(
                f"{place} says nothing, or too much, of what `{spec.field}` must be; the rule is one of `equals`, `one_of`, "
                "and `min` or `max` or both; set one of them"
            )
        self._field = spec.field
        self._allowed = None if in_range else [spec.equals] if spec.one_of is None else list(spec.one_of)
        self._min = float("-inf") if spec.min is None else spec.min
        self._max = float("inf") if spec.max is None else spec.max

    def __call__(self, document: Document) -> str | None:
        value = document.metadata.get(self._field)
        if value is None:
            return "metadata_missing"
        if self._allowed is not None:
            return None if any(_is_same(value, other) for other in self._allowed) else "metadata_value"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "metadata_type"
        return None if self._min <= value <= self._max else "metadata_value"


def _is_same(value: Any, other: Any) -> bool:
    """1 equals 1.0; true, which Python counts as 1, equals true only."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
