"""The unigram entropy against the definition and against distributions whose entropy is known."""

import math
from collections import Counter

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.statistics import unigram_entropy


def test_entropy_is_the_definition() -> None:
    tokens = np.random.default_rng(0).zipf(1.3, 20_000) % 5_000
    parts = [count / len(tokens) for count in Counter(tokens.tolist()).values()]
    assert unigram_entropy(tokens) == pytest.approx(-sum(part * math.log(part) for part in parts), rel=1e-12)


@pytest.mark.parametrize("num_ids", [1, 2, 7, 1000])
def test_equally_frequent_tokens_have_the_entropy_ln_v(num_ids: int) -> None:
    assert unigram_entropy(np.tile(np.arange(num_ids, dtype=np.uint16), 5)) == pytest.approx(math.log(num_ids), abs=1e-12)


def test_entropy_in_nats_of_one_in_four() -> None:
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert unigram_entropy(np.array([9, 3, 3, 3], dtype=np.int32)) == pytest.approx(expected)


def test_a_lone_token_has_no_entropy_and_never_a_negative_one() -> None:
    assert unigram_entropy(np.full(999_983, 17)) == 0.0


def test_no_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="empty stream"):
        unigram_entropy(np.array([], dtype=np.int32))
