"""Megatron inside the test process: training.cpu's seams installed and taken out again, and any one rank of a layout.

Both leave the process as they found it, so that a module using them can run beside any other.
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch.overrides import _get_current_function_mode_stack, _pop_mode
from torch.testing._internal.distributed.fake_pg import FakeStore

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that transformer-engine and apex are absent is the point of these tests
    from megatron.core import parallel_state, rerun_state_machine
    from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401  (it and what it imports warn once, when first imported)
    from megatron.core.optimizer import distrib_optimizer  # noqa: F401

from launcher.config.schema import Layout, ModelConfig, StageConfig
from tests.training import tiny
from training import cpu
from training.parallel import Rank, initialize_parallel

SEAMED = (
    "torch.cuda",
    "megatron.core.tensor_parallel.random",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
)
ABSENT = object()
STAGE, MODEL = TypeAdapter(StageConfig), TypeAdapter(ModelConfig)


@contextmanager
def cpu_seams() -> Iterator[dict[tuple[str, str], tuple[Any, Any]]]:
    """The CPU support for the length of the block. Yields what it changed: (module, name) -> (before, after)."""
    if torch.cuda.is_available():
        pytest.skip("training.cpu is for machines without CUDA")
    modules = {name: importlib.import_module(name) for name in SEAMED}
    before = {name: dict(vars(module)) for name, module in modules.items()}
    cpu.install()
    changed = {
        (name, key): (before[name].get(key, ABSENT), value)
        for name, module in modules.items()
        for key, value in vars(module).items()
        if before[name].get(key, ABSENT) is not value
    }
    try:
        yield changed
    finally:
        for (name, key), (original, _) in changed.items():
            if original is ABSENT:
                delattr(modules[name], key)
            else:
                setattr(modules[name], key, original)
        assert isinstance(_pop_mode(), cpu.CudaToCpu)
        assert not _get_current_function_mode_stack()


@contextmanager
def one_rank(layout: Layout, *, rank: int = 0, world_size: int = 1, seed: int = 7) -> Iterator[Rank]:
    """This process as one rank of a world. Alone it is a real gloo world; of several, the others are not there: what is built
    is what that rank would build, and collectives return without having communicated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if world_size == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with torch.random.fork_rng(devices=[]):
            yield initialize_parallel(layout, seed=seed, device=torch.device("cpu"), timeout_s=60, gloo=world_size == 1)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        rerun_state_machine.destroy_rerun_state_machine()
        torch.set_num_threads(threads)


def stage(**changes: dict[str, Any]) -> StageConfig:
    """The tiny stage; `changes` per section, as in tiny.stage_config."""
    return STAGE.validate_python(tiny.stage_config(**changes))


def model(**changes: Any) -> ModelConfig:
    """The tiny model with some fields changed."""
    return MODEL.validate_python({**tiny.MODEL, **changes})
