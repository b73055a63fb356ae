"""FP8 scaling in figures: transformer-engine's state, as its modules lay it out (tests/gpu reads it from a real one)."""

from types import SimpleNamespace

import pytest
import torch

from training.fp8 import scaled_tensors, summarise

FP8_MAX = 448.0  # of E4M3


def delayed_meta(*history: list[float]) -> SimpleNamespace:
    """Rows oldest first, the newest last, after an update: row 0 is to be filled."""
    rows = torch.tensor([[0.0] * len(history[0]), *history])
    return SimpleNamespace(amax_history=rows, scale=FP8_MAX / rows.amax(dim=0).clamp(min=1e-9))


class Linear(torch.nn.Module):
    def __init__(self, **state: object):
        super().__init__()
        self.__dict__ |= state


class Float8CurrentScalingQuantizer(SimpleNamespace):
    pass


def test_delayed_scaling_tells_what_was_cut_off() -> None:
    meta = delayed_meta(
        [1.0, 2.0, 0.0], [1.5, 4.0, 0.0], [1.2, 8.0, 0.0]
    )  # the second grew past its scale, the third is unused
    model = torch.nn.Sequential(Linear(fp8_meta={"scaling_fwd": meta}), torch.nn.Linear(2, 2))
    least, most, overflows, count = summarise(scaled_tensors([model]))
    assert (least, most, overflows, count) == (FP8_MAX / 8.0, 8.0, 1.0, 2.0)


def test_a_first_step_and_a_gradient_of_zeros_are_no_overflow() -> None:
    meta = delayed_meta([0.0, 0.0], [0.0, 0.0], [3.0, 0.0])
    (_, most, overflows, count) = summarise(scaled_tensors([Linear(fp8_meta={"scaling_bwd": meta})]))
    assert (most, overflows, count) == (3.0, 0.0, 1.0)


def test_current_scaling_has_scales_and_no_overflow() -> None:
    quantizers = [Float8CurrentScalingQuantizer(scale=torch.tensor([56.0]), amax=torch.tensor([8.0]))]
    found = summarise(scaled_tensors([Linear(quantizers={"scaling_fwd": quantizers})]))
    assert found == (56.0, 8.0, 0.0, 1.0)


def test_without_fp8_there_is_nothing() -> None:
    least, most, overflows, count = summarise(scaled_tensors([torch.nn.Linear(4, 4)]))
    assert (overflows, count) == (0.0, 0.0) and least > most


@pytest.mark.parametrize("length", [0, 1])
def test_a_history_of_one_row_cannot_be_judged(length: int) -> None:
    meta = SimpleNamespace(amax_history=torch.ones(length, 3), scale=torch.ones(3))
    assert not list(scaled_tensors([Linear(fp8_meta={"scaling_fwd": meta})]))
