"""From the config to the steps. datatrove and what it stands on are imported only for the steps that need them."""

import importlib.util
from collections.abc import Callable
from typing import Any

from data_prep.curate.document import Step
from data_prep.curate.spec import (
    C4Spec,
    DecontaminateSpec,
    DifficultySpec,
    FineWebSpec,
    GopherQualitySpec,
    GopherRepetitionSpec,
    LanguageSpec,
    MetadataSpec,
    PiiSpec,
)
from data_prep.errors import DataError

WordSpec = GopherRepetitionSpec | GopherQualitySpec | FineWebSpec
SPLITTING = ("datatrove", "spacy", "regex")
NEEDS: dict[type, tuple[str, ...]] = {
    LanguageSpec: ("datatrove", "fasttext", "fasteners"),
    GopherRepetitionSpec: SPLITTING,
    GopherQualitySpec: SPLITTING,
    C4Spec: SPLITTING,
    FineWebSpec: SPLITTING,
    PiiSpec: ("datatrove",),
}


def build_step(spec: Any, *, place: str) -> Step:
    """The step of a spec; `place` is where the config says it, such as `steps[3]`. Deduplication is no step: it needs all
    documents.

    DataError: a package is missing, a model file cannot be used, datatrove has no words for the language."""
    for package in NEEDS.get(type(spec), ()):
        if importlib.util.find_spec(package) is None:
            raise DataError(f"{place} ({spec.kind}): the package '{package}' is not installed; pip install 'phidias[curate]'")
    try:
        return BUILDERS[type(spec)](spec, place)
    except ImportError as error:  # some languages need more than the extra brings; datatrove's message says what
        raise DataError(f"{place} ({spec.kind}), language '{getattr(spec, 'language', '')}': {error}") from error


def _language(spec: LanguageSpec, place: str) -> Step:
    from data_prep.curate.blocks import language_step

    return language_step(spec, place=place)


def _pii(spec: PiiSpec, place: str) -> Step:
    from data_prep.curate.blocks import Pii

    return Pii(spec)


def _metadata(spec: MetadataSpec, place: str) -> Step:
    from data_prep.curate.blocks import Metadata

    return Metadata(spec, place=place)


def _decontaminate(spec: DecontaminateSpec, place: str) -> Step:
    from data_prep.curate.decontaminate import Decontaminate

    return Decontaminate(spec)


def _difficulty(spec: DifficultySpec, place: str) -> Step:
    from data_prep.curate.difficulty import Difficulty

    return Difficulty(spec)


def _c4(spec: C4Spec, place: str) -> Step:
    from data_prep.curate.c4 import C4

    _splitter(spec.language, place=place)
    return C4(spec)


def _words(spec: WordSpec, place: str) -> Step:
    """Ours where the words of the language are found chunk by chunk; datatrove's block where they are not."""
    from data_prep.curate.blocks import theirs
    from data_prep.curate.fineweb import FineWeb
    from data_prep.curate.gopher import GopherQuality, GopherRepetition

    splitter = _splitter(spec.language, place=place)
    if not splitter.local:
        return theirs(spec)
    match spec:
        case GopherRepetitionSpec():
            return GopherRepetition(spec, splitter=splitter)
        case GopherQualitySpec():
            return GopherQuality(spec, splitter=splitter)
        case FineWebSpec():
            return FineWeb(spec, splitter=splitter)


def _splitter(language: str, *, place: str) -> Any:
    from data_prep.curate.words import splitter_of

    try:
        return splitter_of(language)
    except DataError as error:
        raise DataError(f"{place}.language: {error}") from error


BUILDERS: dict[type, Callable[[Any, str], Step]] = {
    LanguageSpec: _language,
    GopherRepetitionSpec: _words,
    GopherQualitySpec: _words,
    FineWebSpec: _words,
    C4Spec: _c4,
    PiiSpec: _pii,
    MetadataSpec: _metadata,
    DecontaminateSpec: _decontaminate,
    DifficultySpec: _difficulty,
}
