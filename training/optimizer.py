"""AdamW over Megatron's distributed optimizer, and the learning rate as a function of samples read."""

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from launcher.config.schema import StageConfig
from launcher.plan.stage import StagePlan
from training.model import DTYPES
from training.parallel import has_gloo_groups


def build_optimizer(stage: StageConfig, *, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW. Weight decay skips parameters of one dimension (norms) and biases: Megatron's standard override."""
    optim, precision, layout = stage.optim, stage.precision, stage.layout
    in_bf16 = precision.moments_dtype == "bf16"
    moments = DTYPES[precision.moments_dtype]
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        decoupled_weight_decay=True,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=precision.params_dtype == "bf16",
        fp16=False,
        params_dtype=DTYPES[precision.params_dtype],
        # With moments in bf16, main weights would otherwise move into transformer-engine's optimizer, out of reach of what
        # looks at them; for a recipe that scales each tensor by itself they stay. Nothing else is made of the name here
        # (distrib_optimizer.py:364 asks for delayed scaling's weights in FP8, which check_moments refuses).
        fp8_recipe="tensorwise" if in_bf16 and precision.fp8 in (None, "delayed") else precision.fp8,
        use_precision_aware_optimizer=in_bf16,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=layout.overlap_param_gather,
    )
    return get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=has_gloo_groups())


def build_schedule(stage: StageConfig, *, plan: StagePlan, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up from zero, then the stage's schedule down to min_lr at its last step. Counted in samples, so that the
    batch size may change without moving the schedule."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=stage.optim.lr,
        min_lr=stage.optim.min_lr,
        lr_warmup_steps=plan.warmup_samples,
        lr_decay_steps=plan.num_samples,
        lr_decay_style=stage.optim.schedule,
        start_wd=stage.optim.weight_decay,
        end_wd=stage.optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def set_schedule(schedule: OptimizerParamScheduler, *, samples: int) -> float:
    """Sets and returns the learning rate of the step that brings the stage to `samples`. The first step of a warm-up
    therefore has lr / warmup_steps, not zero, and the last step of the stage has min_lr. No state: a resume needs none."""
    schedule.num_steps = samples
    schedule.step(increment=0)
    return float(schedule.get_lr({}))
