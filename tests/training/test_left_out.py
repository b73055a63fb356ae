"""What is left out, against sets of samples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.left_out import LeftOut

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda pair: (pair[0], sum(pair))), max_size=6)


def members(ranges: list[tuple[int, int]]) -> set[int]:
    return {sample for first, end in ranges for sample in range(first, end)}


@given(ranges=RANGES, sample=st.integers(0, 80))
def test_against_sets(ranges: list[tuple[int, int]], sample: int) -> None:
    left_out, out = LeftOut(ranges), members(ranges)
    assert left_out.past(sample) == next(one for one in range(sample, 200) if one not in out)
    assert left_out.before(sample) == len([one for one in out if one < sample])


@given(ranges=RANGES, sample=st.integers(0, 80), size=st.integers(1, 16))
def test_a_batch_reaches_into_what_begins_within_it(ranges: list[tuple[int, int]], sample: int, size: int) -> None:
    left_out, out = LeftOut(ranges), members(ranges)
    first = left_out.past(sample)
    end = left_out.reaches(first, first + size)
    assert (end is not None) == any(one in out for one in range(first, first + size))
    assert end is None or (end - 1 in out and end > first)


def test_what_is_added_counts_at_once() -> None:
    left_out = LeftOut()
    assert left_out.past(8) == 8 and left_out.reaches(0, 100) is None
    left_out.add(8, 16)
    left_out.add(16, 24)
    assert left_out.past(8) == 24 and left_out.before(20) == 12 and left_out.reaches(4, 12) == 16


@pytest.mark.parametrize(("sample", "before"), [(0, 0), (4, 0), (6, 2), (100, 8)])
def test_overlapping_ranges_count_once(sample: int, before: int) -> None:
    assert LeftOut([(4, 10), (6, 12), (5, 7)]).before(sample) == before
