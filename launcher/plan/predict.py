"""What a stage will do on its cluster: speed, memory, days and cost, as plain data for the plan document."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from launcher.config.schema import RunConfig, StageConfig
from launcher.plan.estimate import Estimator
from launcher.plan.goodput import Goodput, plan_goodput
from launcher.plan.memory import GIB, Memory, StageMemory
from launcher.plan.parameters import count_parameters, flops_per_token
from launcher.plan.rehearsed import read_rehearsals
from launcher.plan.search import COMPONENTS
from launcher.plan.stage import StagePlan
from launcher.plan.timing import StepTime, Timing

# Bytes a parameter in a checkpoint that training can go on from: fp32 weights and both moments, and the weights as they
# compute.
CHECKPOINT_BYTES = 12
UNPREDICTED = (
    "step_time_s",
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "model_tflops_per_gpu",
    "mfu",
    "mfu_peak_tflops",
    "time_s",
    "gemms",
    "pipeline",
    "bubble_s",
    "days",
    "gpu_hours",
    "cost_usd",
    "goodput",
    "checkpoint_s_per_step",
    "hardware",
    "rehearsals",
)


def predict_stage(stage: StageConfig, *, config: RunConfig, plan: StagePlan) -> dict[str, Any]:
    """Keys of the plan document. On CPU ranks only memory is worked out: nothing is known of their speed."""
    hardware = config.hardware
    if hardware is None:
        memory = Memory(stage, model=config.model, cluster=config.cluster, hardware=None)
        rehearsals = read_rehearsals(config, stage=stage)
        known = {"memory_gib": memory_document(memory, capacity=None), "rehearsals": rehearsals, "refusals": []}
        return {**dict.fromkeys(UNPREDICTED), **known}
    estimator = Estimator(stage, config.model, config.cluster, hardware)
    timing, memory = estimator.timing(stage.layout, stage.precision), estimator.memory(stage.layout, stage.precision)
    step_s, world = timing.step.total, config.cluster.world_size
    tokens_per_s = plan.tokens_per_step / step_s
    flops = flops_per_token(config.model, seq_length=stage.stage.seq_length)
    tflops = {name: value * tokens_per_s / world / 1e12 for name, value in flops.items()}
    peak = estimator.device.peak_tflops("fp8" if stage.precision.fp8 else timing.layer.plain)
    interval_s = plan.checkpoint_samples * stage.stage.seq_length / tokens_per_s
    written = count_parameters(config.model).total * (CHECKPOINT_BYTES + timing.layer.width)
    goodput = plan_goodput(config.cluster, checkpoint_bytes=written, interval_s=interval_s)
    return {
        "hardware": hardware.name,
        "step_time_s": step_s,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": tokens_per_s / world,
        "model_tflops_per_gpu": tflops,
        "mfu": tflops["causal"] / peak,
        "mfu_peak_tflops": peak,
        "time_s": time_document(timing.step),
        "gemms": gemm_rows(timing, num_layers=config.model.num_layers),
        "pipeline": asdict(timing.pipeline),
        "bubble_s": timing.step.bubble,
        "memory_gib": memory_document(memory, capacity=hardware.memory_gib),
        **duration(estimator, plan=plan, config=config, goodput=goodput),
        "rehearsals": read_rehearsals(config, stage=stage),
        "refusals": [*refusals(memory, capacity=hardware.memory_gib), *never_ends(goodput)],
    }


def time_document(step: StepTime) -> dict[str, float]:
    """Seconds of a step by component. Data is read ahead of the step: assumed to keep it waiting for nothing (reading a rank's
    dozen windows took 80 microseconds, LOG.md)."""
    return {**{COMPONENTS[field.name]: getattr(step, field.name) for field in fields(step)}, "data": 0.0}


def gemm_rows(timing: Timing, *, num_layers: int) -> list[dict[str, Any]]:
    """Each matrix product of a layer and of the LM head: shape on one rank, precision, seconds and TFLOP/s of one."""
    precision, layer = timing.stage.precision, timing.layer
    shared = list(layer.gemms(compute="fp8" if precision.fp8 else layer.plain))
    return [
        {"name": gemm.name, "m": gemm.m, "n": gemm.n, "k": gemm.k, "precision": gemm.compute, "seconds": gemm.seconds,
         "tflops": gemm.tflops}
        for _, gemm in [*shared, *layer.head_gemms()]
    ]  # fmt: skip


def memory_document(memory: Memory, *, capacity: float | None) -> dict[str, Any]:
    return {
        "peak": memory.peak.total / GIB,
        "capacity": capacity,
        "by_component": in_gib(memory.peak.by_component),
        "by_stage": [stage_document(stage) for stage in memory.stages],
    }


def stage_document(stage: StageMemory) -> dict[str, Any]:
    return {"stage": stage.stage, "total": stage.total / GIB, "by_component": in_gib(stage.by_component)}


def in_gib(sizes: Mapping[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in sizes.items()}


def duration(estimator: Estimator, *, plan: StagePlan, config: RunConfig, goodput: Goodput | None) -> dict[str, Any]:
    """Days of the stage with its checkpoints and failures, GPU-hours and what they cost: null where it would never get from one
    checkpoint to the next."""
    cluster = config.cluster
    part = 1.0 if goodput is None else goodput.goodput
    wall_s = train_s(estimator, plan=plan) / part if part else None
    gpu_hours = None if wall_s is None else wall_s / 3600 * cluster.world_size
    price = cluster.operations.usd_per_gpu_hour if cluster.operations else None
    interval_steps = plan.checkpoint_samples / plan.batches[-1].size
    return {
        "days": None if wall_s is None else wall_s / 86400,
        "gpu_hours": gpu_hours,
        "cost_usd": None if price is None or gpu_hours is None else gpu_hours * price,
        "goodput": None if goodput is None else asdict(goodput),
        "checkpoint_s_per_step": None if goodput is None else goodput.checkpoint_s / interval_steps,
    }


def train_s(estimator: Estimator, *, plan: StagePlan) -> float:
    """Seconds of all steps: a ramp's smaller batches have bubbles and exposed communication of their own."""
    stage, total = estimator.stage, 0.0
    borders = [*(row.first_step for row in plan.batches[1:]), plan.num_steps]
    for row, end in zip(plan.batches, borders, strict=True):
        size = replace(stage, stage=replace(stage.stage, global_batch_size=row.size))
        steps = max(0, min(end, plan.num_steps) - row.first_step)
        if steps:
            total += steps * estimator.timing_of(size).step.total
    return total


def never_ends(goodput: Goodput | None) -> list[str]:
    if goodput is None or goodput.goodput:
        return []
    found = f"a failure every {goodput.failure_interval_s:.0f} s and a checkpoint every {goodput.interval_s:.0f} s"
    return [f"found {found}; the stage would never get from one checkpoint to the next"]


def refusals(memory: Memory, *, capacity: float) -> list[str]:
    """Why the stage must not be started. More than the device has is refused; what comes near is for the page to say."""
    problem = too_large(memory, capacity=capacity)
    return [f"found {problem[0]}; {problem[1]}"] if problem else []


def too_large(memory: Memory, *, capacity: float) -> tuple[str, str] | None:
    """What was found and the rule, where a GPU of some pipeline stage would need more than it has. GiB."""
    peak = memory.peak
    if peak.total / GIB <= capacity:
        return None
    largest = sorted(peak.by_component.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    found = f"pipeline stage {peak.stage} needs {peak.total / GIB:.1f} GiB a GPU ({parts}, ...)"
    return found, f"a GPU has {capacity:.1f} GiB"
