"""Process groups: who this rank is in the layout, and how ranks find each other."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from launcher.config.schema import Layout


@dataclass(frozen=True)
class Rank:
    """This process's place in the layout, fixed for its life."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    device: torch.device
    is_first_stage: bool
    is_last_stage: bool

    @property
    def needs_tokens(self) -> bool:
        """Pipeline stages in the middle read nothing."""
        return self.is_first_stage or self.is_last_stage


def join_world(*, timeout_s: int) -> torch.device:
    """Joins the world torchrun describes in the environment: gloo on CPUs; NCCL on GPUs, with gloo beside it for objects."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return device


def initialize_parallel(layout: Layout, *, seed: int, device: torch.device, timeout_s: int, gloo: bool = True) -> Rank:
    """Builds Megatron's groups over the world and seeds this rank. `gloo`: with groups on the host beside them, for
    checkpoints."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
        create_gloo_process_groups=gloo,
    )
    # Dropout streams differ between pipeline stages and, through the tracker, between tensor-parallel ranks.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    # A captured kernel draws from where the generator stands when it is replayed: transformer-engine's tracker is made for it.
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, te_rng_tracker=layout.cuda_graph_impl != "none")
    return current_rank(device)


def has_gloo_groups() -> bool:
    """Whether Megatron's groups on the host are there."""
    return parallel_state._DATA_PARALLEL_GROUP_WITH_CP_GLOO is not None


def local_device() -> torch.device:
    """The GPU of this local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def current_rank(device: torch.device) -> Rank:
    return Rank(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        device=device,
        is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )


def leave_world() -> None:
    """Destroys the groups in order, so that NCCL and gloo close their connections."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
