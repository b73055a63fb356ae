"""Packed documents against brute force: every token on one rank, in order, in the chunks transformer-engine expects.

What attention makes of them is in tests/training/test_modules.py and, over several ranks, in the `packed` cases of
tests/training/ranks.py."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.world import stage
from training.packing import FILLER, Packing, is_packed, longest_document, pack, packed_seq_params, row_multiple

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def row_of(lengths: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(lengths), dtype=np.int32) + 5, lengths)


@given(lengths=LENGTHS)
def test_alone_a_rank_takes_the_row_as_it_is(lengths: list[int]) -> None:
    found = pack(row_of(lengths), cp_size=1, cp_rank=0, multiple=1024)
    assert found.token_P.tolist() == list(range(sum(lengths)))
    assert found.position_P.tolist() == [position for length in lengths for position in range(length)]
    assert found.border_D1.tolist() == [0, *np.cumsum(lengths)]
    assert found.border_D1.dtype == np.int32


@given(lengths=LENGTHS, cp_size=st.integers(2, 5), unit=st.sampled_from([1, 8, 48]))
def test_context_parallel_ranks_take_two_chunks_of_every_document(lengths: list[int], cp_size: int, unit: int) -> None:
    multiple = 2 * cp_size * unit
    ranks = [pack(row_of(lengths), cp_size=cp_size, cp_rank=rank, multiple=multiple) for rank in range(cp_size)]
    borders = ranks[0].border_D1.tolist()
    assert all(found.border_D1.tolist() == borders for found in ranks)
    check_borders(borders, lengths=lengths, chunks=2 * cp_size, multiple=multiple)
    padded = brute_force(lengths, borders=borders)
    for rank, found in enumerate(ranks):
        expected = [place for start, end in pairwise(borders) for place in chunks_of(padded[start:end], rank, cp_size)]
        assert list(zip(found.token_P.tolist(), found.position_P.tolist(), strict=True)) == expected
    tokens = [token for found in ranks for token in found.token_P.tolist() if token != FILLER]
    assert sorted(tokens) == list(range(sum(lengths)))


def check_borders(borders: list[int], *, lengths: list[int], chunks: int, multiple: int) -> None:
    """No document is padded more than it must be, but for the last."""
    assert borders[-1] % multiple == 0
    assert borders[-1] < sum(length + chunks for length in lengths) + multiple
    for (start, end), length in zip(list(pairwise(borders))[:-1], lengths[:-1], strict=True):
        assert end - start == next(size for size in range(length, length + chunks) if size % chunks == 0)
    assert (borders[-1] - borders[-2]) % chunks == 0
    assert borders[-1] - borders[-2] >= lengths[-1]


def brute_force(lengths: list[int], *, borders: list[int]) -> list[tuple[int, int]]:
    """Token and position at every place of the padded row."""
    padded, first = [], 0
    for length, (start, end) in zip(lengths, pairwise(borders), strict=True):
        padded += [(first + place if place < length else FILLER, place) for place in range(end - start)]
        first += length
    return padded


def chunks_of(document: list[tuple[int, int]], rank: int, cp_size: int) -> list[tuple[int, int]]:
    size = len(document) // (2 * cp_size)
    other = 2 * cp_size - 1 - rank
    return document[rank * size : (rank + 1) * size] + document[other * size : (other + 1) * size]


def test_the_example_of_transformer_engine() -> None:
    """Documents of 8 and 4 over two ranks, as drawn in attn_forward_func_with_cp."""
    ranks = [pack(row_of([8, 4]), cp_size=2, cp_rank=rank, multiple=4) for rank in range(2)]
    assert ranks[0].position_P.tolist() == [0, 1, 6, 7, 0, 3]
    assert ranks[1].position_P.tolist() == [2, 3, 4, 5, 1, 2]


def test_values_at_places_without_a_token_are_zero() -> None:
    packing = Packing(np.array([2, FILLER, 0]), np.array([0, 1, 0]), np.array([0, 3], dtype=np.int32))
    assert packing.take(np.array([5, 6, 7], dtype=np.int32)).tolist() == [7, 0, 5]
    mask = packing.take(np.array([True, True, True]))
    assert mask.tolist() == [True, False, True]
    assert mask.dtype == np.bool_


def test_numbers_of_documents_are_runs() -> None:
    """Only where the number changes matters: not that it grows, nor where it begins."""
    found = pack(np.array([3, 3, 0, 9, 9], dtype=np.int32), cp_size=1, cp_rank=0, multiple=1)
    assert found.border_D1.tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize(("cp_size", "padded"), [(1, False), (2, True)])
def test_params_for_megatron(cp_size: int, padded: bool) -> None:
    borders = np.array([0, 8, 24], dtype=np.int32)
    found = packed_seq_params(borders, cp_size=cp_size, device=torch.device("cpu"))
    assert found.qkv_format == "thd"
    assert (found.cu_seqlens_q_padded is not None) == (found.cu_seqlens_kv_padded is not None) == padded
    given = [found.cu_seqlens_q, found.cu_seqlens_kv, found.cu_seqlens_q_padded, found.cu_seqlens_kv_padded]
    assert all(border.tolist() == [0, 8, 24] and border.dtype == torch.int32 for border in given if border is not None)
    assert found.max_seqlen_q == found.max_seqlen_kv == 16
    assert (found.local_cp_size, found.cp_group) == (None, None)  # megatron would change transformer-engine's group for them


@pytest.mark.parametrize(("longest", "bound"), [(1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_bound_on_the_longest_document(longest: int, bound: int) -> None:
    assert longest_document(np.array([0, 1, 1 + longest], dtype=np.int32)) == bound


FP8 = dict(params_dtype="bf16", fp8_format="hybrid")


@pytest.mark.parametrize(("tp", "cp", "fp8", "expected"), [
    (1, 2, None, 32), (4, 2, None, 128), (4, 3, "delayed", 192), (1, 2, "blockwise", 256), (8, 2, "blockwise", 256),
    (16, 2, "blockwise", 512), (3, 2, "blockwise", 768),
])  # fmt: skip
def test_multiple_of_a_row(tp: int, cp: int, fp8: str | None, expected: int) -> None:
    config = stage(layout=dict(tp=tp, cp=cp), precision=dict(FP8, fp8=fp8))
    assert row_multiple(config) == expected
    assert expected % (2 * cp) == 0


@pytest.mark.parametrize(("cuda", "masked"), [(False, True), (True, False), (True, True), (False, False)])
def test_rows_are_packed_on_gpus_where_documents_are_apart(cuda: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.packing.torch.cuda", SimpleNamespace(is_available=lambda: cuda))
    assert is_packed(stage(stage=dict(reset_attention_mask=masked))) == (cuda and masked)
