"""The keys that a stage of curation leaves, by which the documents of a source are compared."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.dedup_groups import parts_for
from data_prep.curate.dedup_keys import KeyMaker, build_key_maker
from data_prep.curate.spec import ExactDedupSpec, MinHashDedupSpec, StepSpec
from data_prep.indexed import naming_full_disk, partial

DEDUPLICATIONS = (ExactDedupSpec, MinHashDedupSpec)
DOCUMENT_TOKENS = 500  # of an average document, where nothing was read yet
PAIRING_BYTES = 256 << 20


def is_dedup(step: StepSpec) -> bool:
    """Whether a step compares documents with each other, so that it ends a stage."""
    return isinstance(step, DEDUPLICATIONS)


def groups_of(step: StepSpec, *, tokens: float) -> int:
    """How many tasks pair the documents of a source of about so many tokens: the bands, each in parts that fit in memory."""
    maker = key_maker(step)
    each = parts_for(int(tokens / DOCUMENT_TOKENS) + 1, memory_bytes=PAIRING_BYTES, columns_per_band=maker.columns_per_band)
    return maker.bands * each


def key_maker(step: StepSpec) -> KeyMaker:
    assert isinstance(step, DEDUPLICATIONS)  # a stage of curation ends with one
    return build_key_maker(step)


class KeyWriter:
    """The keys of a task's documents, as they come."""

    def __init__(self, step: StepSpec):
        self._maker = key_maker(step)
        self._keys = [self._maker.keys([])]

    def add(self, texts: Sequence[str]) -> None:
        self._keys.append(self._maker.keys(texts))

    def save(self, path: Path) -> None:
        save_array(path, np.asfortranarray(np.concatenate(self._keys)))  # a band is then read without the others


def save_array(path: Path, array: NDArray[Any]) -> None:
    """A .npy that takes its name when it is whole."""
    try:
        content = io.BytesIO()
        np.save(content, array)
        with naming_full_disk(path), partial(path).open("wb") as file:
            file.write(content.getbuffer())  # np.save does not say that a disk is full
        partial(path).replace(path)
    finally:
        partial(path).unlink(missing_ok=True)
