"""The arithmetic of one stage: how its tokens become steps, and its batch microbatches."""

import math
from dataclasses import dataclass

from launcher.config.schema import Cluster, Layout, StageConfig


@dataclass(frozen=True)
class StagePlan:
    """What a stage comes to on a cluster. Samples (sequences) are what the stage and its warm-up last, whatever the batch;
    `num_steps` and `warmup_steps` round them up to whole steps."""

    data_parallel_size: int
    num_microbatches: int
    tokens_per_step: int
    num_steps: int
    warmup_steps: int
    validation_interval: int
    checkpoint_interval: int
    num_samples: int
    warmup_samples: int


def plan_stage(config: StageConfig, *, cluster: Cluster) -> StagePlan:
    """Steps and microbatches of a stage. The layout must divide (launcher.config.check refuses it otherwise)."""
    stage, layout = config.stage, config.layout
    data_parallel_size = cluster.world_size // layout.model_parallel_size
    tokens_per_step = stage.global_batch_size * stage.seq_length
    num_samples = math.ceil(stage.tokens / stage.seq_length)
    warmup_samples = math.ceil(config.optim.warmup_tokens / stage.seq_length)
    return StagePlan(
        data_parallel_size=data_parallel_size,
        num_microbatches=stage.global_batch_size // (layout.micro_batch_size * data_parallel_size),
        tokens_per_step=tokens_per_step,
        num_steps=math.ceil(num_samples / stage.global_batch_size),
        warmup_steps=math.ceil(warmup_samples / stage.global_batch_size),
        validation_interval=max(1, round(stage.validation.interval_tokens / tokens_per_step)),
        checkpoint_interval=max(1, round(stage.checkpoint.interval_tokens / tokens_per_step)),
        num_samples=num_samples,
        warmup_samples=warmup_samples,
    )


def bubble_fraction(layout: Layout, *, num_microbatches: int) -> float:
    """Idle time of the pipeline over its ideal compute time: (pp - 1) / (m * vpp), Narayanan et al. 2021, section 2.2."""
    return (layout.pp - 1) / (num_microbatches * layout.vpp)
