"""Canaries: the seams of training.cpu exist in the pinned megatron-core and torch, and behave as what they stand in for."""

import copy
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from tests.training.world import ABSENT, cpu_seams, model, one_rank, stage
from training import cpu

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PATCHED = {
    "torch.cuda": {"current_device", "synchronize", "get_rng_state", "set_rng_state"},
    "megatron.core.tensor_parallel.random": {
        "_get_cuda_rng_state",
        "_set_cuda_rng_state",
        "_CUDA_RNG_STATE_TRACKER",
        "_CUDA_RNG_STATE_TRACKER_INITIALIZED",
    },
    "megatron.core.optimizer": {"Adam", "USING_PYTORCH_OPTIMIZER"},
    "megatron.core.optimizer.distrib_optimizer": {"Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"},
}
ROOT = Path(__file__).resolve().parents[2]
Changed = dict[tuple[str, str], tuple[Any, Any]]


@pytest.fixture
def seams() -> Iterator[Changed]:
    with cpu_seams() as changed:
        yield changed


def test_install_changes_these_names_and_each_existed_before(seams: Changed) -> None:
    found: dict[str, set[str]] = {}
    for module, name in seams:
        found.setdefault(module, set()).add(name)
    assert found == PATCHED
    assert [key for key, (before, _) in seams.items() if before is ABSENT] == []


def test_stand_ins_take_the_arguments_of_what_they_replace(seams: Changed) -> None:
    functions = {key: pair for key, pair in seams.items() if inspect.isfunction(pair[0])}
    assert len(functions) == 6
    for key, (before, after) in functions.items():
        assert list(inspect.signature(after).parameters) == list(inspect.signature(before).parameters), key


def test_the_tracker_overrides_methods_of_megatrons(seams: Changed) -> None:
    from megatron.core.tensor_parallel import random

    ours = type(random._CUDA_RNG_STATE_TRACKER)
    for name in ("add", "fork"):
        theirs = getattr(random.CudaRNGStatesTracker, name)
        assert getattr(ours, name) is not theirs
        assert list(inspect.signature(getattr(ours, name)).parameters) == list(inspect.signature(theirs).parameters)
    state = {"states_", "seeds_", "_is_initialized", "_current_state_name"}
    assert state <= vars(random.CudaRNGStatesTracker()).keys()


def test_what_megatron_builds_with_the_seams(seams: Changed) -> None:
    """The names are not only there: megatron takes its tracker and its Adam from them."""
    from megatron.core import tensor_parallel

    from training.model import build_model
    from training.optimizer import build_optimizer

    tiny = stage()
    with one_rank(tiny.layout):
        optimizer = build_optimizer(tiny, chunks=build_model(tiny, model=model(), seed=7))
        assert isinstance(optimizer.chained_optimizers[0].optimizer, cpu.CpuAdam)
        tracker = tensor_parallel.get_cuda_rng_tracker()
        assert type(tracker).__name__ == "CpuRngStatesTracker"
        assert "model-parallel-rng" in tracker.get_states()


def test_installing_twice_changes_nothing(seams: Changed) -> None:
    stack = list(_get_current_function_mode_stack())
    cpu.install()
    assert len(stack) == 1
    assert _get_current_function_mode_stack() == stack
    for (module, name), (_, after) in seams.items():
        assert vars(importlib.import_module(module))[name] is after


def test_it_is_refused_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="without CUDA"):
        cpu.install()


def test_the_test_process_is_left_as_it_was() -> None:
    """Of the helper these modules share: nothing of the seams stays behind."""
    before = {module: dict(vars(importlib.import_module(module))) for module in PATCHED}
    with cpu_seams():
        assert torch.empty(1, device="cuda").device.type == "cpu"
    assert not _get_current_function_mode_stack()
    for module, names in PATCHED.items():
        after = vars(importlib.import_module(module))
        assert all(after[name] is before[module][name] for name in names)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.empty(1, device="cuda")


VALUES = torch.arange(4.0)
FACTORIES: dict[str, Callable[[], torch.Tensor]] = {
    "empty": lambda: torch.empty(2, device="cuda"),
    "empty with index": lambda: torch.empty(2, device="cuda:3"),
    "zeros of torch.device": lambda: torch.zeros(2, device=torch.device("cuda")),
    "ones of torch.device with index": lambda: torch.ones(2, device=torch.device("cuda", 1)),
    "tensor": lambda: torch.tensor([1.0], device="cuda"),
    "arange": lambda: torch.arange(3, device="cuda"),
    "current_device": lambda: torch.zeros(2, device=torch.cuda.current_device()),
    "empty_like": lambda: torch.empty_like(VALUES, device="cuda"),
    "new_empty": lambda: VALUES.new_empty(2, device="cuda"),
    "pinned": lambda: torch.empty(2, pin_memory=True),
    "pinned on cuda": lambda: torch.empty(2, device="cuda", pin_memory=True),
}
MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cuda": lambda t: t.cuda(),
    "cuda with index": lambda t: t.cuda(0, non_blocking=True),
    "to": lambda t: t.to("cuda"),
    "to torch.device": lambda t: t.to(torch.device("cuda", 0)),
    "to keyword": lambda t: t.to(device="cuda"),
    "to current_device": lambda t: t.to(torch.cuda.current_device()),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_tensors_made_on_cuda_lie_on_the_cpu(name: str, seams: Changed) -> None:
    made = FACTORIES[name]()
    assert made.device.type == "cpu"
    assert not made.is_pinned()


@pytest.mark.parametrize("name", MOVES)
def test_moves_to_cuda_stay_on_the_cpu(name: str, seams: Changed) -> None:
    moved = MOVES[name](VALUES)
    assert moved.device.type == "cpu"
    assert torch.equal(moved, VALUES)


def test_moves_still_convert(seams: Changed) -> None:
    assert VALUES.to("cuda", torch.float64).dtype is torch.float64
    assert VALUES.to(device="cuda", dtype=torch.bfloat16).dtype is torch.bfloat16
    assert VALUES.type(torch.int32).dtype is torch.int32
    assert VALUES.to(torch.float16).dtype is torch.float16


def test_modules_stay_on_the_cpu(seams: Changed) -> None:
    module = torch.nn.Linear(2, 2)
    assert {p.device.type for p in (*module.cuda().parameters(), *module.to("cuda").parameters())} == {"cpu"}


def test_type_names_are_those_that_gradient_clipping_sorts_by(seams: Changed) -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"


def test_cuda_calls_that_megatron_makes(seams: Changed) -> None:
    torch.cuda.synchronize()
    torch.cuda.synchronize(torch.cuda.current_device())
    with torch.random.fork_rng(devices=[]):
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)


SETTINGS = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-3)


def adam_pair(*, weight_decay: float) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter], Any, Any]:
    """The same parameters under ours and under torch's AdamW: two groups, of which one decays."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in ((7, 5), (5,), (3, 2, 2))]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    mine = cpu.CpuAdam([dict(params=ours[:2], weight_decay=weight_decay), dict(params=ours[2:])], **SETTINGS)
    groups = [dict(params=theirs[:2], weight_decay=weight_decay), dict(params=theirs[2:], weight_decay=0.0)]
    return ours, theirs, mine, torch.optim.AdamW(groups, foreach=False, **SETTINGS)


def give_gradients(parameters: list[torch.nn.Parameter], *, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        # Some as small as eps, where it matters.
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 4 - 3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torchs_adamw_bit_for_bit(weight_decay: float) -> None:
    ours, theirs, mine, reference = adam_pair(weight_decay=weight_decay)
    for step in range(50):
        for parameters, optimizer in ((ours, mine), (theirs, reference)):
            give_gradients(parameters, step=step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)
        assert torch.equal(mine.state[found]["exp_avg"], reference.state[expected]["exp_avg"])
        assert torch.equal(mine.state[found]["exp_avg_sq"], reference.state[expected]["exp_avg_sq"])


def test_adam_keeps_its_state_as_fused_adam_does() -> None:
    """`step` in the group, two moments in the state and nothing else: what megatron's distributed optimizer saves."""
    ours, _, mine, _ = adam_pair(weight_decay=0.1)
    for step in range(3):
        give_gradients(ours, step=step)
        mine.step()
    assert [group["step"] for group in mine.param_groups] == [3, 3]
    assert {frozenset(state) for state in mine.state.values()} == {frozenset({"exp_avg", "exp_avg_sq"})}
    assert len(mine.state) == 3
    assert all(group["bias_correction"] is True for group in mine.param_groups)


def test_adam_does_not_count_steps_of_an_empty_group() -> None:
    """A rank may hold no part of a group; megatron reads `step` of the groups that have parameters."""
    adam = cpu.CpuAdam([dict(params=[torch.nn.Parameter(torch.ones(1))]), dict(params=[])])
    adam.step()
    assert ["step" in group for group in adam.param_groups] == [True, False]


def test_adam_skips_parameters_without_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    adam = cpu.CpuAdam([parameter], weight_decay=0.5)
    adam.step()
    assert torch.equal(parameter, torch.ones(2))
    assert not adam.state


def test_adam_goes_on_from_its_state_dict() -> None:
    ours, others, mine, _ = adam_pair(weight_decay=0.1)
    resumed = cpu.CpuAdam([dict(params=others[:2], weight_decay=0.1), dict(params=others[2:])], **SETTINGS)
    for step in range(6):
        if step == 3:
            resumed.load_state_dict(copy.deepcopy(mine.state_dict()))
            for parameter, value in zip(others, ours, strict=True):
                parameter.data.copy_(value)
        for parameters, optimizer in ((ours, mine), (others, resumed))[: 1 if step < 3 else 2]:
            give_gradients(parameters, step=step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def test_adam_refuses_what_it_is_not() -> None:
    for wrong in (dict(adam_w_mode=False), dict(bias_correction=False)):
        with pytest.raises(ValueError, match="AdamW"):
            cpu.CpuAdam([torch.nn.Parameter(torch.ones(1))], **wrong)


@pytest.fixture
def tracker(seams: Changed) -> Iterator[Any]:
    from megatron.core import tensor_parallel

    with torch.random.fork_rng(devices=[]):
        found = tensor_parallel.get_cuda_rng_tracker()
        found.reset()
        found.add("a", 1)
        found.add("b", 2)
        yield found


def draw(tracker: Any, name: str) -> torch.Tensor:
    with tracker.fork(name):
        return torch.rand(4)


def test_streams_are_reproducible_and_go_on(tracker: Any) -> None:
    first, second = draw(tracker, "a"), draw(tracker, "a")
    assert not torch.equal(first, second)
    tracker.reset()
    tracker.add("a", 1)
    assert torch.equal(draw(tracker, "a"), first)
    assert torch.equal(draw(tracker, "a"), second)


def test_streams_are_independent_of_each_other_and_of_the_outside(tracker: Any) -> None:
    alone = [draw(tracker, "a") for _ in range(2)]
    tracker.reset()
    tracker.add("a", 1)
    tracker.add("b", 2)
    mixed = [draw(tracker, "a")]
    other = draw(tracker, "b")
    torch.rand(100)
    torch.manual_seed(123)
    mixed.append(draw(tracker, "a"))
    assert all(torch.equal(x, y) for x, y in zip(alone, mixed, strict=True))
    assert not any(torch.equal(other, x) for x in alone)


def test_the_outside_goes_on_as_if_nothing_had_been_drawn(tracker: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2, 4)
    torch.manual_seed(5)
    found = [torch.rand(4)]
    draw(tracker, "a")
    with pytest.raises(KeyboardInterrupt), tracker.fork("b"):
        torch.rand(1)
        raise KeyboardInterrupt
    found.append(torch.rand(4))
    assert torch.equal(torch.stack(found), expected)


def test_forks_nest(tracker: Any) -> None:
    expected_a, expected_b = [draw(tracker, "a") for _ in range(3)], draw(tracker, "b")
    tracker.reset()
    tracker.add("a", 1)
    tracker.add("b", 2)
    with tracker.fork("a"):
        found = [torch.rand(4)]
        with tracker.fork("b"):
            inner = torch.rand(4)
        with tracker.fork("a"):
            found.append(torch.rand(4))
        found.append(torch.rand(4))
    assert torch.equal(inner, expected_b)
    assert all(torch.equal(x, y) for x, y in zip(found, expected_a, strict=True))


def test_a_name_or_seed_is_tracked_once(tracker: Any) -> None:
    for name, seed in (("a", 9), ("c", 1)):
        with pytest.raises(ValueError, match="already tracked"):
            tracker.add(name, seed)
    with pytest.raises(KeyError), tracker.fork("unknown"):
        pass


def test_dropout_differs_between_tensor_parallel_ranks_only(seams: Changed) -> None:
    from megatron.core import tensor_parallel

    layout = stage(layout=dict(tp=2)).layout
    states = []
    for rank in range(2):
        with one_rank(layout, rank=rank, world_size=2):
            states.append(tensor_parallel.get_cuda_rng_tracker().get_states())
    assert not torch.equal(states[0]["model-parallel-rng"], states[1]["model-parallel-rng"])
    assert torch.equal(states[0]["data-parallel-rng"], states[1]["data-parallel-rng"])


def test_dropout_differs_between_pipeline_stages(seams: Changed) -> None:
    from megatron.core import tensor_parallel

    layout, drawn = stage(layout=dict(pp=2)).layout, []
    for rank in range(2):
        with one_rank(layout, rank=rank, world_size=2):
            drawn.append([torch.rand(8), *(draw(tensor_parallel.get_cuda_rng_tracker(), n) for n in TRACKED)])
    assert not any(torch.equal(first, second) for first, second in zip(*drawn, strict=True))


TRACKED = ("model-parallel-rng", "data-parallel-rng")


def test_recomputation_draws_the_same_dropout_again(tracker: Any) -> None:
    """Megatron's activation checkpointing restores the generators through the seams."""
    from megatron.core import tensor_parallel

    def forward(x: torch.Tensor) -> torch.Tensor:
        with tracker.fork("a"):
            inner = torch.nn.functional.dropout(x, 0.5)
        return torch.nn.functional.dropout(inner, 0.5)

    value = torch.ones(256, requires_grad=True)
    out = tensor_parallel.checkpoint(forward, False, value)
    after = torch.rand(3), draw(tracker, "a")
    out.sum().backward()
    assert torch.equal(value.grad, out.detach())
    assert 20 < int((out > 0).sum()) < 110
    # and what is drawn after the backward pass goes on where the forward pass left off
    assert not torch.equal(torch.rand(3), after[0])
    assert not torch.equal(draw(tracker, "a"), after[1])


def test_a_cpu_rank_loads_no_compiler() -> None:
    """Three to four seconds of a core, of each rank at each start: Inductor, Dynamo, and wandb before it is asked for."""
    code = """
import sys, torch
from training import cpu
cpu.install()
import training.loop
weight = torch.nn.Parameter(torch.ones(3))
optimizer = cpu.CpuAdam([weight])
weight.sum().backward()
optimizer.step(); optimizer.zero_grad(); optimizer.load_state_dict(optimizer.state_dict())
print(*(name for name in ("torch._inductor", "torch._dynamo", "wandb") if name in sys.modules))
print(torch.compile(lambda x: x) is not None)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["", "True"]
