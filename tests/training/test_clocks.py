"""Where the seconds of a step go, and what a step does to the weights."""

import time
from collections.abc import Iterator

import pytest
import torch

from tests.training.test_step import batch_of, stepper_of
from tests.training.world import cpu_seams, one_rank, stage
from training import norms
from training.clocks import BACKWARD, FORWARD, GATHER, OPTIMIZER, Clock, Clocks, StepTimes
from training.step import Flags, Stepper

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_the_clock_adds_up_what_lies_between_start_and_stop() -> None:
    clock = Clock(torch.device("cpu"))
    for _ in range(3):
        clock.start()
        time.sleep(0.02)
        clock.stop()
        time.sleep(0.05)
    assert 0.06 <= clock.take() < 0.15
    assert clock.take() == 0.0
    clock.start()  # a step that failed
    time.sleep(0.05)
    clock.start()
    clock.stop()
    assert clock.take() < 0.05


def test_a_row_says_the_means_of_the_steps_since_the_last() -> None:
    """Tokens over seconds, not a mean of speeds: a ramp's last small batch beside a large one."""
    times = StepTimes()
    times.add(tokens=100, seconds=1.0, waited_s=0.5)
    times.add(tokens=800, seconds=3.0, waited_s=0.0)
    assert times.means() == {"tokens_per_s": 225.0, "step_time_s": 2.0, "data_wait_s": 0.25, "checkpoint_s": 0.0}


def test_a_stall_for_a_checkpoint_is_spread_over_the_steps_of_the_row() -> None:
    times = StepTimes()
    times.stall(3.0)
    times.add(tokens=1, seconds=1.0, waited_s=0.0)
    times.add(tokens=1, seconds=1.0, waited_s=0.0)
    assert times.means()["checkpoint_s"] == 1.5 and times.means()["step_time_s"] == 1.0


def test_gathering_parameters_is_not_the_optimizer() -> None:
    clocks = Clocks(torch.device("cpu"))
    for name, seconds in ((FORWARD, 1.0), (BACKWARD, 2.0), (OPTIMIZER, 0.5), (GATHER, 0.125)):
        clocks.clocks[name].seconds = seconds
    clocks("forward-recv", log_level=2).start()  # Megatron's names that nobody reads
    clocks("forward-recv").stop()
    spent = clocks.take() / 2
    assert (spent.forward_s, spent.backward_s, spent.optimizer_s) == (0.5, 1.0, 0.1875)
    assert clocks.take().forward_s == 0.0


def test_a_validation_between_two_rows_is_not_of_their_steps() -> None:
    clocks = Clocks(torch.device("cpu"))
    clocks.clocks[FORWARD].seconds = 1.0
    with clocks.standing():
        clocks.clocks[FORWARD].seconds += 5.0
    clocks.clocks[FORWARD].seconds += 0.5
    assert clocks.take().forward_s == 1.5


@pytest.fixture
def stepper() -> Iterator[Stepper]:
    config = stage()
    with cpu_seams(), one_rank(config.layout) as rank:
        yield stepper_of(config, rank)


def weights(stepper: Stepper) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in stepper.chunks[0].parameters()])


def test_megatron_tells_how_long_forward_and_backward_took(stepper: Stepper) -> None:
    began = time.perf_counter()
    stepper.train([batch_of([0, 1])], num_microbatches=1)
    spent, all_of_it = stepper.clocks.take(), time.perf_counter() - began
    assert min(spent.forward_s, spent.backward_s, spent.optimizer_s) > 0.0
    assert spent.forward_s + spent.backward_s + spent.optimizer_s <= all_of_it


@pytest.mark.parametrize("most", [norms.MAX_COPIED, 4096])
def test_norms_of_weights_and_of_their_change(stepper: Stepper, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all parameters, compared in fp64; of a sample of them nearly so."""
    monkeypatch.setattr(norms, "MAX_COPIED", most)
    result = stepper.gradients([batch_of([0, 1])], num_microbatches=1, flags=Flags())
    before = weights(stepper)
    zeros = [(parameter.main_grad == 0).flatten() for parameter in stepper.chunks[0].parameters()]
    found = stepper.update(result.grad_norm, watch=True)
    after = weights(stepper)
    assert found["weight_norm"] == pytest.approx(float(after.norm()), rel=1e-5)
    expected = float((after - before).norm() / after.norm())
    assert found["update_ratio"] == pytest.approx(expected, rel=1e-4 if most > 4096 else 0.2)
    assert found["zero_grads"] == pytest.approx(float(torch.cat(zeros).double().mean()))
    assert not stepper.watch.copies
    assert stepper.update(result.grad_norm) == {}
