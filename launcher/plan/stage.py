"""The arithmetic of one stage: how its tokens become steps, and its batch microbatches."""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from launcher.config.schema import Cluster, Layout, StageConfig, StageSettings


@dataclass(frozen=True)
class Batches:
    """Batches of one size: from which sample and which step on, and how many sequences each has."""

    first_sample: int
    first_step: int
    size: int


@dataclass(frozen=True)
class StagePlan:
    """What a stage comes to on a cluster. Samples (sequences) are what the stage, its warm-up and its intervals last, whatever
    the batch; `num_steps` and `warmup_steps` round them up to whole steps. `batches` has a row for each size of a ramp."""

    data_parallel_size: int
    num_microbatches: int
    tokens_per_step: int
    num_steps: int
    warmup_steps: int
    validation_samples: int
    checkpoint_samples: int
    num_samples: int
    warmup_samples: int
    batches: tuple[Batches, ...]

    def batch_size_at(self, samples: int) -> int:
        """Sequences of the batch that begins there: a function of the samples alone, so that a resume needs no state."""
        return self._batches_at(samples).size

    def microbatches_at(self, samples: int) -> int:
        """Of each data-parallel rank, in the batch that begins there."""
        return self.num_microbatches * self.batch_size_at(samples) // self.batches[-1].size

    def steps_at(self, samples: int) -> int:
        """Steps that a run from the stage's start has taken when it has read so many samples, the one under way included."""
        row = self._batches_at(samples)
        return row.first_step + math.ceil((samples - row.first_sample) / row.size)

    def _batches_at(self, samples: int) -> Batches:
        return self.batches[max(0, bisect_right(self.batches, samples, key=lambda row: row.first_sample) - 1)]


def plan_stage(config: StageConfig, *, cluster: Cluster) -> StagePlan:
    """Steps and microbatches of a stage. The layout must divide (launcher.config.check refuses it otherwise)."""
    stage, layout = config.stage, config.layout
    data_parallel_size = cluster.world_size // layout.model_parallel_size
    warmup_samples = math.ceil(config.optim.warmup_tokens / stage.seq_length)
    plan = StagePlan(
        data_parallel_size=data_parallel_size,
        num_microbatches=stage.global_batch_size // (layout.micro_batch_size * data_parallel_size),
        tokens_per_step=stage.global_batch_size * stage.seq_length,
        num_steps=0,
        warmup_steps=0,
        validation_samples=max(1, round(stage.validation.interval_tokens / stage.seq_length)),
        checkpoint_samples=max(1, round(stage.checkpoint.interval_tokens / stage.seq_length)),
        num_samples=stage.num_samples,
        warmup_samples=warmup_samples,
        batches=plan_batches(stage),
    )
    return replace(plan, num_steps=plan.steps_at(plan.num_samples), warmup_steps=plan.steps_at(warmup_samples))


def plan_batches(stage: StageSettings) -> tuple[Batches, ...]:
    """The batch sizes of a stage. A ramp takes equally many samples at each size, as Megatron's does, rounded up to batches."""
    ramp, rows = stage.rampup_batch_size, [Batches(0, 0, stage.global_batch_size)]
    sizes = range(ramp.start, stage.global_batch_size, ramp.increment) if ramp else range(0)
    samples, steps = 0, 0
    for level, size in enumerate(sizes, start=1):
        border = math.ceil((ramp.tokens if ramp else 0) / stage.seq_length * level / len(sizes))
        here = math.ceil(max(0, border - samples) / size)
        rows.insert(-1, Batches(samples, steps, size))
        samples, steps = samples + here * size, steps + here
        rows[-1] = Batches(samples, steps, stage.global_batch_size)
    return tuple(rows)


def bubble_fraction(layout: Layout, *, num_microbatches: int) -> float:
    """Idle time of the pipeline over its ideal compute time: (pp - 1) / (m * vpp), Narayanan et al. 2021, section 2.2."""
    return (layout.pp - 1) / (num_microbatches * layout.vpp)
