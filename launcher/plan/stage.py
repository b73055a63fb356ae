"""The arithmetic of one stage: how its tokens become steps, and its batch microbatches."""

import math
from dataclasses import dataclass

from launcher.config.schema import Cluster, Layout, StageConfig


@dataclass(frozen=True)
class StagePlan:
    """What a stage comes to on a cluster. `num_steps` rounds the token horizon up to whole steps;
    `num_samples` counts sequences over the whole stage."""

    data_parallel_size: int
    num_microbatches: int
    tokens_per_step: int
    num_steps: int
    warmup_steps: int
    validation_interval: int
    checkpoint_interval: int
    num_samples: int


def plan_stage(config: StageConfig, *, cluster: Cluster) -> StagePlan:
    """Steps and microbatches of a stage. The layout must divide (launcher.config.check refuses it otherwise)."""
    stage, layout = config.stage, config.layout
    data_parallel_size = cluster.world_size // layout.model_parallel_size
    tokens_per_step = stage.global_batch_size * stage.seq_length
    num_steps = math.ceil(stage.tokens / tokens_per_step)
    return StagePlan(
        data_parallel_size=data_parallel_size,
        num_microbatches=stage.global_batch_size // (layout.micro_batch_size * data_parallel_size),
        tokens_per_step=tokens_per_step,
        num_steps=num_steps,
        warmup_steps=math.ceil(config.optim.warmup_tokens / tokens_per_step),
        validation_interval=max(1, round(stage.validation.interval_tokens / tokens_per_step)),
        checkpoint_interval=max(1, round(stage.checkpoint.interval_tokens / tokens_per_step)),
        num_samples=num_steps * stage.global_batch_size,
    )


def bubble_fraction(layout: Layout, *, num_microbatches: int) -> float:
    """Idle time of the pipeline over its ideal compute time: (pp - 1) / (m * vpp), Narayanan et al. 2021, section 2.2."""
    return (layout.pp - 1) / (num_microbatches * layout.vpp)
