"""Loss by position and needles, on models of which the answer is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from training.interop.long_context import DEPTHS, FACT, TRIALS, LongContext, borders, by_position, find_needles, table

VOCABULARY = 256


class Bytes:
    """A tokenizer: a byte is a token."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}


class Reader:
    """A model that looks up what stood behind the last `memory` bytes of what it reads, at most `reach` tokens ago; else it
    knows nothing."""

    device = torch.device("cpu")

    def __init__(self, *, memory: int, reach: int = 1 << 30):
        self.memory, self.reach = memory, reach

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        text, logits = bytes(input_ids[0].tolist()), torch.zeros(1, logits_to_keep, VOCABULARY)
        for place in range(logits_to_keep):
            end = len(text) - logits_to_keep + place + 1
            begin = max(0, end - self.reach)
            found = text.find(text[end - self.memory : end], begin, end - 1)
            if found >= 0 and found + self.memory < end:
                logits[0, place, text[found + self.memory]] = 20.0
        return SimpleNamespace(logits=logits)


def haystack(length: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(97, 123, length).astype(np.int32)


def test_a_model_that_reads_back_finds_every_needle() -> None:
    found = list(find_needles(Reader(memory=12), Bytes(), haystack=haystack(4000), window=2048))
    assert sorted({one.length for one in found}) == [256, 512, 1024, 2048]
    assert [one.depth for one in found[:5]] == list(DEPTHS)
    assert all(one.recalled == one.trials == TRIALS and one.gain > 20.0 for one in found)


def test_one_that_reaches_back_half_the_window_finds_those_that_are_near() -> None:
    found = list(find_needles(Reader(memory=12, reach=1100), Bytes(), haystack=haystack(4000), window=2048))
    at_full = {one.depth: one.recalled for one in found if one.length == 2048}
    assert at_full == {0.0: 0, 0.25: 0, 0.5: TRIALS, 0.75: TRIALS, 1.0: TRIALS}


def test_one_that_knows_nothing_finds_none() -> None:
    found = list(find_needles(Reader(memory=1000), Bytes(), haystack=haystack(4000), window=1024))
    assert found and all((one.recalled, one.gain) == (0, 0.0) for one in found)


def test_lengths_without_room_or_text_are_left_out() -> None:
    question = len(FACT)
    assert [one.length for one in find_needles(Reader(memory=9), Bytes(), haystack=haystack(600), window=1024)][-1] == 512
    assert list(find_needles(Reader(memory=9), Bytes(), haystack=haystack(4000), window=3 * question)) == []


def test_buckets_double_up_to_the_window() -> None:
    assert borders(32) == [16, 32]
    assert borders(16384) == [256, 512, 1024, 2048, 4096, 8192, 16384]
    assert borders(3000) == [46, 92, 184, 368, 736, 1472, 2944, 3000]


@pytest.mark.parametrize(("later", "rises"), [(0.0, False), (-0.2, False), (0.05, True)])
def test_a_rise_past_the_trained_length_is_told(later: float, rises: bool) -> None:
    """Documents differ by far more than that: each is compared with itself."""
    random = np.random.default_rng(1)
    losses = 3.0 + random.normal(size=(20, 1)) + 0.1 * random.normal(size=(20, 16384))
    losses[:, 4096:] += later
    found = by_position(losses, documents={"long": 20}, trained_length=4096)
    assert found.reference == 4096 and found.rises is rises
    assert [bucket.rise is None for bucket in found.buckets] == [True] * 5 + [False] * 2
    assert found.buckets[-1].rise == pytest.approx(later, abs=0.01)
    assert ("RISES" in table(LongContext(found, ()))) is rises


def test_one_document_says_nothing_of_its_error() -> None:
    found = by_position(np.full((1, 64), 2.0), documents={"long": 1}, trained_length=None)
    assert found.reference == 32 and not found.rises and all(bucket.rise is None for bucket in found.buckets)
