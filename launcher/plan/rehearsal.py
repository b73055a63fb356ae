"""What the measurement of one rank comes to: its speed, and what the plan said of it, component by component.

`measured` is what training.rehearse.measure found of the rank, as JSON has it.
"""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from launcher.config.schema import RunConfig, StageConfig
from launcher.plan.layer import Parts
from launcher.plan.memory import GIB, Memory
from launcher.plan.parameters import flops_by_stage, flops_per_token
from launcher.plan.rehearsed import layout_document
from launcher.plan.timing import Timing

# What of a microbatch a rank computes by itself; the rest of Parts is communication, which has stand-ins.
COMPUTED = ("gemm", "attention", "memory", "host")
TIMED = ("forward", "backward", "microbatch", "optimizer", "step")
# The planner's components that a measured one is compared with.
MEMORY_ROWS: dict[str, tuple[str, ...]] = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer": ("main weights", "optimizer states"),
    "held_besides": ("FP8 weights",),
    "activations": ("activations", "logits and loss", "pipeline outputs"),
    "context": ("CUDA context",),
    "slack": ("allocator slack", "moments in fp32"),
}
COMMUNICATION = "communication buffers"
Measured = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """One quantity as it was measured and as it is predicted; null where either is unknown."""

    name: str
    unit: str
    measured: float | None
    predicted: float | None

    @property
    def difference(self) -> float | None:
        """Of the prediction, as a fraction."""
        if self.measured is None or not self.predicted:
            return None
        return self.measured / self.predicted - 1


def pipeline_stage_of(rank: int, *, stage: StageConfig, world_size: int) -> int:
    """Megatron's order of ranks: the pipeline is the outermost."""
    return rank // (world_size // stage.layout.pp)


def rehearsal_document(
    measured: Measured, *, config: RunConfig, stage: StageConfig, date: str, off: list[str]
) -> dict[str, Any]:
    """The measurement file. `off`: what of the config the rehearsal did without."""
    times = net_times(measured)
    speed = speed_of(times, measured=measured, config=config, stage=stage)
    rows = compare(measured, times=times, config=config, stage=stage)
    return {
        "stage": stage.stage.name,
        "hardware": config.cluster.gpu,
        "layout": layout_document(stage),
        "precision": stage.precision.name,
        "seq_length": stage.stage.seq_length,
        "pipeline_stage": measured["pipeline_stage"],
        "microbatch_s": times["microbatch_s"],
        "peak_gib": measured["memory_bytes"]["peak"] / GIB,
        "date": date,
        "times": times,
        "speed": speed,
        "compared": [asdict(row) | {"difference": row.difference} for row in rows],
        "not_rehearsed": not_rehearsed(measured["pipeline_stage"], config=config, stage=stage),
        "turned_off": off,
        "measured": measured,
    }


def net_times(measured: Measured) -> dict[str, float]:
    """Medians over the timed steps, what stood in for others taken off. Seconds; `forward_s`, `backward_s` and `microbatch_s`
    are of one microbatch, the others of a step. `spread`: of the steps, slowest less fastest over the median."""
    rows, count = measured["steps"], measured["num_microbatches"]
    inside = [sum(row["stand_in_s"].values()) for row in rows]
    steps = [row["step_s"] - own for row, own in zip(rows, inside, strict=True)]
    passes = [step - row["optimizer_s"] for step, row in zip(steps, rows, strict=True)]
    return {
        "step_s": median(steps),
        "spread": (max(steps) - min(steps)) / median(steps),
        "microbatch_s": median(passes) / count,
        "forward_s": median(row["forward_s"] - row["stand_in_s"]["forward"] for row in rows) / count,
        "backward_s": median(row["backward_s"] - row["stand_in_s"]["backward"] for row in rows) / count,
        "optimizer_s": median(row["optimizer_s"] for row in rows),
        "stand_in_s": median(inside),
    }


def speed_of(times: dict[str, float], *, measured: Measured, config: RunConfig, stage: StageConfig) -> dict[str, Any]:
    """Of the rank's own work, its update included, no communication and no bubble. `tokens_per_s`: of a GPU, were all of the
    model computed so; `mfu`: causal FLOPs over the dense peak, null on CPUs."""
    whole = flops_per_token(config.model, seq_length=stage.stage.seq_length)
    own = rank_flops(measured["pipeline_stage"], config=config, stage=stage)
    rate = {name: value * measured["num_microbatches"] / times["step_s"] for name, value in own.items()}
    peak = peak_tflops(config, stage=stage)
    return {
        "tokens_per_s": rate["causal"] / whole["causal"],
        "tflops": {name: value / 1e12 for name, value in rate.items()},
        "mfu": rate["causal"] / (peak * 1e12) if peak else None,
        "mfu_peak_tflops": peak,
    }


def rank_flops(pipeline_stage: int, *, config: RunConfig, stage: StageConfig) -> dict[str, float]:
    """Of one rank of a pipeline stage for one microbatch, forward and backward, in the conventions of flops_per_token."""
    layout, seq_length = stage.layout, stage.stage.seq_length
    of_stage = flops_by_stage(config.model, layout=layout, seq_length=seq_length)[pipeline_stage]
    tokens = layout.micro_batch_size * seq_length / (layout.tp * layout.cp)
    return {name: value * tokens for name, value in of_stage.items()}


def peak_tflops(config: RunConfig, *, stage: StageConfig) -> float | None:
    """Of the precision that the products run in."""
    if config.hardware is None:
        return None
    timing = timing_of(config, stage=stage)
    return timing.device.peak_tflops("fp8" if stage.precision.fp8 else timing.layer.plain)


def timing_of(config: RunConfig, *, stage: StageConfig) -> Timing:
    assert config.hardware is not None
    return Timing(stage, model=config.model, cluster=config.cluster, hardware=config.hardware)


def compare(measured: Measured, *, times: dict[str, float], config: RunConfig, stage: StageConfig) -> list[Compared]:
    return [
        *compare_times(measured, times=times, config=config, stage=stage),
        *compare_memory(measured, config=config, stage=stage),
    ]


def compare_times(measured: Measured, *, times: dict[str, float], config: RunConfig, stage: StageConfig) -> list[Compared]:
    """Milliseconds, of one microbatch but for the update and the step. By kind of kernel where there was a profile."""
    kernels, count = measured.get("kernels"), measured["num_microbatches"]
    predicted: dict[str, float | None] = dict.fromkeys((*TIMED, *COMPUTED))
    if config.hardware is not None:
        predicted |= predicted_times(measured["pipeline_stage"], config=config, stage=stage, count=count)
    rows = {name: times[f"{name}_s"] for name in TIMED}
    if kernels:
        rows |= {"gemm": kernels["gemm"] / count, "attention": kernels["attention"] / count}
        rows["other kernels"] = max(0.0, kernels["other"] - times["optimizer_s"]) / count
        predicted["other kernels"] = predicted["memory"]
    return [Compared(name, "ms", in_ms(seconds), in_ms(predicted[name])) for name, seconds in rows.items()]


def in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def predicted_times(pipeline_stage: int, *, config: RunConfig, stage: StageConfig, count: int) -> dict[str, float]:
    """What the rank computes by itself, seconds, under the names of compare_times. The update is that of the stage that has
    most parameters."""
    timing = timing_of(config, stage=stage)
    forward = computed_s(sum((passes[0] for passes in timing.chunks[pipeline_stage]), Parts()))
    backward = computed_s(sum((passes[1] for passes in timing.chunks[pipeline_stage]), Parts()))
    work, optimizer = timing.work[pipeline_stage], timing.optimizer_s
    return {
        "forward": forward,
        "backward": backward,
        "microbatch": forward + backward,
        "optimizer": optimizer,
        "step": (forward + backward) * count + optimizer,
        **{name: getattr(work, name) for name in COMPUTED},
    }


def computed_s(parts: Parts) -> float:
    return sum(float(getattr(parts, name)) for name in COMPUTED)


def compare_memory(measured: Measured, *, config: RunConfig, stage: StageConfig) -> list[Compared]:
    """GiB. What is predicted for NCCL is in neither total: stand-ins have no buffers."""
    memory = Memory(stage, model=config.model, cluster=config.cluster, hardware=config.hardware)
    planned = memory.stages[measured["pipeline_stage"]].by_component
    rows = []
    sizes = dict(measured["memory_bytes"])
    wanted = dict(MEMORY_ROWS)
    if stage.precision.fp8_param_gather:  # what is cast is the weight itself
        wanted["weights"] += wanted.pop("held_besides")
        sizes["weights"] = None if sizes["weights"] is None else sizes["weights"] + (sizes["held_besides"] or 0)
    for name, components in wanted.items():
        size = sum(value for key, value in planned.items() if key.split(":")[0] in components)
        own = sizes[name]
        if size or own:
            rows.append(Compared(name.replace("_", " "), "GiB", None if own is None else own / GIB, size / GIB))
    total = sum(value for key, value in planned.items() if key != COMMUNICATION)
    return [*rows, Compared("peak", "GiB", measured["memory_bytes"]["peak"] / GIB, total / GIB)]


def not_rehearsed(pipeline_stage: int, *, config: RunConfig, stage: StageConfig) -> dict[str, float]:
    """What the plan has besides and one rank cannot show: seconds of a step, and GiB. Empty on CPU ranks."""
    if config.hardware is None:
        return {}
    timing = timing_of(config, stage=stage)
    memory = Memory(stage, model=config.model, cluster=config.cluster, hardware=config.hardware)
    step, work = timing.step, timing.work[pipeline_stage]
    return {
        "tp_s": work.tp * timing.num_microbatches,
        "cp_s": work.cp * timing.num_microbatches,
        "contention_s": work.contention * timing.num_microbatches,
        "pp_s": step.pp,
        "bubble_s": step.bubble,
        "dp_s": step.dp,
        "slowest_gpu_s": step.slowest_gpu,
        "other_s": step.other,
        "step_s": step.total,
        "communication_gib": memory.stages[pipeline_stage].by_component.get(COMMUNICATION, 0.0) / GIB,
    }
