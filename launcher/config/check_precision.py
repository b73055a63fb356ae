"""Precision rules. megatron-core without transformer-engine ignores FP8 and says nothing, so it is refused here."""

from collections.abc import Callable, Iterator

from launcher.config.errors import Problem
from launcher.config.schema import RunConfig, StageConfig

# What the dimensions of a GEMM must divide by.
FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128}


def check_fp8_fields(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    precision = stage.precision
    if precision.fp8 is None:
        if precision.fp8_format is not None:
            yield Problem("precision.fp8_format", precision.fp8_format, "precision.fp8 is null", "precision.fp8_format=null")
        if precision.fp8_param_gather:
            yield Problem("precision.fp8_param_gather", "true", "precision.fp8 is null", "precision.fp8_param_gather=false")
        return
    if precision.fp8_format is None:
        yield Problem("precision.fp8_format", "null", "precision.fp8 needs one", "e4m3 or hybrid")
    if precision.params_dtype != "bf16":
        rule = "what FP8 leaves out is computed in bf16"
        yield Problem("precision.params_dtype", precision.params_dtype, rule, "precision.params_dtype=bf16")
    if precision.fp8_param_gather and not stage.layout.distributed_optimizer:
        rule = "weights in FP8 are kept and gathered by the distributed optimizer"
        yield Problem("precision.fp8_param_gather", "true", rule, "false, or layout.distributed_optimizer=true")
    yield from check_bf16_layers(stage, config=config)


def check_bf16_layers(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """Layers kept in bf16 are at most as many as an even pipeline stage has, however uneven the stages are; delayed scaling
    has none (megatron-core 0.16.1)."""
    per_stage = config.model.num_layers // stage.layout.pp
    for field in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(stage.precision, field)
        if count and stage.precision.fp8 == "delayed":
            rule = "delayed scaling keeps no layers in bf16"
            yield Problem(f"precision.{field}", str(count), rule, f"precision.{field}=0, or fp8_tensorwise")
        elif count > per_stage:
            rule = f"Megatron allows num_layers / pp, {per_stage}"
            yield Problem(f"precision.{field}", str(count), rule, f"at most {per_stage}, or precision=bf16")


def check_fp8_device(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    if stage.precision.fp8 and config.cluster.gpu is None:
        rule = f"cluster {config.cluster.name} is CPU ranks, where megatron-core would silently train in higher precision"
        yield Problem(
            "precision.fp8", stage.precision.fp8, rule, "precision=bf16 or precision=fp32, or a cluster of Hopper GPUs"
        )


def check_fp8_recipe(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    recipe, hardware = stage.precision.fp8, config.hardware
    if recipe and hardware and recipe not in hardware.fp8:
        known = ", ".join(hardware.fp8)
        rule = f"{hardware.name} computes " + (f"the FP8 recipes {known}" if known else "no FP8")
        fix = f"precision=fp8_{hardware.fp8[0]}, or precision=bf16" if known else "precision=bf16"
        yield Problem("precision.fp8", recipe, rule, fix)


def check_moments(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """Moments in bf16 are kept and updated by transformer-engine's FusedAdam (Megatron's precision-aware optimizer)."""
    if stage.precision.moments_dtype == "fp32":
        return
    found, fix = stage.precision.moments_dtype, "precision.moments_dtype=fp32"
    if config.cluster.gpu is None:
        rule = f"transformer-engine's optimizer keeps them so, and cluster {config.cluster.name} is CPU ranks"
        yield Problem("precision.moments_dtype", found, rule, fix)
    if not stage.layout.distributed_optimizer:
        rule = "Megatron's precision-aware optimizer is a distributed optimizer"
        yield Problem("precision.moments_dtype", found, rule, f"{fix}, or layout.distributed_optimizer=true")
    if stage.precision.fp8 == "delayed" and stage.precision.fp8_param_gather:
        rule = "with delayed scaling and weights in FP8 they would need main weights inside transformer-engine's optimizer"
        yield Problem("precision.moments_dtype", found, rule, f"{fix}, or precision=fp8_tensorwise")


def check_fp8_shapes(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """FP8 GEMMs take dimensions in multiples of 16 (transformer-engine); blockwise scales cover 128 values."""
    layout, recipe = stage.layout, stage.precision.fp8
    if recipe is None or config.model.num_attention_heads % layout.tp or config.model.ffn_hidden_size % layout.tp:
        return
    unit = FP8_MULTIPLES[recipe]
    for name, size in fp8_dimensions(stage, config=config).items():
        if size % unit:
            rule = f"FP8 {recipe} needs each rank's dimensions in multiples of {unit}: {name} is {size}"
            yield Problem("precision.fp8", recipe, rule, "another layout.tp or model size, or precision=bf16")


def fp8_dimensions(stage: StageConfig, *, config: RunConfig) -> dict[str, int]:
    """Dimensions of the linear layers on one rank, and the tokens of one micro batch."""
    model, layout = config.model, stage.layout
    return {
        "model.hidden_size": model.hidden_size,
        "(num_attention_heads + 2 * num_query_groups) * kv_channels / tp": model.qkv_size // layout.tp,
        "num_attention_heads * kv_channels / tp": model.num_attention_heads // layout.tp * model.kv_channels,
        "model.ffn_hidden_size / tp": model.ffn_hidden_size // layout.tp,
        "micro_batch_size * seq_length / cp": layout.micro_batch_size * stage.stage.seq_length // layout.cp,
    }


PRECISION_RULES: tuple[Callable[..., Iterator[Problem]], ...] = (
    check_fp8_fields,
    check_fp8_device,
    check_fp8_recipe,
    check_fp8_shapes,
    check_moments,
)
