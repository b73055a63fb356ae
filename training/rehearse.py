"""One rank of a job on one device, without the others: `python -m training.rehearse FOLDER --stage S --rank R`.

FOLDER holds a frozen config; what was measured is written there as rehearsal.json (and profile.txt). The rank's chunks, its
share of the optimizer and its micro batches are built and run by the code that trains, in a world of stand-ins
(training/standin.py). launcher/plan/rehearsed.py makes a comparison with the plan of it.
"""

import argparse
import math
import platform
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    # What the libraries say of themselves hides what the rehearsal says.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|training\.cpu)")
    if not torch.cuda.is_available():
        from training import cpu

        cpu.install()

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from launcher.config.schema import ModelConfig, RunConfig, StageConfig
from launcher.plan.stage import plan_stage
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import write_json
from training.batch import MicroBatch, Rows, micro_batches
from training.clocks import BACKWARD, FORWARD
from training.data import StageData, TrainingFeed, needs_rows
from training.errors import PrecisionError, exit_class
from training.kernels import kernel_table
from training.model import build_model
from training.optimizer import build_optimizer, build_schedule, set_schedule
from training.packing import is_packed, row_multiple
from training.parallel import Rank, initialize_parallel, leave_world, local_device
from training.standin import PhaseClock, StandIns, join_pretended_world
from training.step import Flags, Stepper, parts

STEPS = 5
WARMUP_STEPS = {"cuda": 3, "cpu": 1}  # FP8 scales, CUDA graphs, the allocator and the autotuners have settled by then
DOCUMENT_TOKENS = 1000  # mean length of a random document
MEASURED, PROFILE = "rehearsal.json", "profile.txt"
Batches = Callable[[int], list[MicroBatch] | None]


@dataclass
class Memory:
    """Bytes that the device's allocator has handed out, at named moments of building."""

    device: torch.device
    marks: dict[str, int] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """On the CPU: the process's peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.marks[name] = torch.cuda.memory_allocated()
        else:
            self.marks[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Rehearsal:
    """What one rank holds, ready to step."""

    stage: StageConfig
    rank: Rank
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    stepper: Stepper
    world: StandIns
    batches: Batches
    num_microbatches: int
    memory: Memory
    knows_loss: bool  # not where other ranks have some of the labels' logits
    taken: int = 0

    def step(self) -> dict[str, Any]:
        """One global batch of this rank, as it trains. Seconds, with the device waited for at both ends; what stood in for
        others is within them, and told apart."""
        batches = self.batches(self.taken)
        self.taken += 1
        set_schedule(self.schedule, samples=self.taken * self.stage.stage.global_batch_size)
        self.stepper.clocks.take()
        self.world.meter.take()
        if self.rank.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = self._now()
        result = self.stepper.gradients(batches, num_microbatches=self.num_microbatches, flags=Flags())
        computed = self._now()
        peak = torch.cuda.max_memory_allocated() if self.rank.device.type == "cuda" else None
        self.stepper.update(result.grad_norm)
        ended = self._now()
        spent, stand_in = self.stepper.clocks.take(), self.world.meter.take()
        return {
            "step_s": ended - began,
            "gradients_s": computed - began,
            "update_s": ended - computed,
            "forward_s": spent.forward_s,
            "backward_s": spent.backward_s,
            "optimizer_s": spent.optimizer_s,
            "stand_in_s": stand_in,
            "loss": result.sums.loss if self.knows_loss and sum(result.sums.tokens_N) else None,
            "grad_norm": result.grad_norm,
            "peak_bytes": peak,
        }

    def _now(self) -> float:
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def pretended_rank(config: RunConfig, *, stage: StageConfig, rank: int) -> Iterator[tuple[Rank, StandIns]]:
    """This process as that rank of the config's world, on this machine's first GPU or on the CPU."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = StandIns(device, seed=config.run.seed, shape_SBH=activation_shape(stage, hidden_size=config.model.hidden_size))
    join_pretended_world(rank, world_size=config.cluster.world_size, world=world)
    try:
        timeout_s = config.cluster.timeout_s
        yield (
            initialize_parallel(stage.layout, seed=config.run.seed, device=device, timeout_s=timeout_s, gloo=False),
            world,
        )
    finally:
        leave_world()


def rehearsed_stage(stage: StageConfig) -> StageConfig:
    """As it trains, but for buffers that the GPUs of a tensor-parallel group would share: alone there are none to share."""
    return replace(stage, layout=replace(stage.layout, tp_comm_overlap=False))


def build_rehearsal(
    config: RunConfig,
    *,
    stage: StageConfig,
    rank: Rank,
    world: StandIns,
    real_data: bool = False,
    num_microbatches: int | None = None,
) -> Rehearsal:
    """Model, optimizer and data of the rank that this process is. `stage`: of rehearsed_stage. `num_microbatches`: where a
    whole global batch would last too long; of random data alone."""
    memory = Memory(rank.device)
    memory.mark("start")
    chunks = build_model(stage, model=config.model, seed=config.run.seed, hardware=config.hardware, quick=True)
    memory.mark("model")
    optimizer = build_optimizer(stage, chunks=chunks)
    memory.mark("optimizer")
    plan = plan_stage(stage, cluster=config.cluster)
    stepper = Stepper(stage, chunks=chunks, optimizer=optimizer, rank=rank)
    for name, phase in ((FORWARD, "forward"), (BACKWARD, "backward")):
        stepper.clocks.clocks[name] = PhaseClock(rank.device, meter=world.meter, phase=phase)
    schedule = build_schedule(stage, plan=plan, optimizer=optimizer)
    count = num_microbatches or plan.num_microbatches
    make = real_batches if real_data else random_batches
    batches = make(config, stage=stage, rank=rank, num_microbatches=count)
    knows_loss = not real_data or stage.layout.tp == 1
    return Rehearsal(stage, rank, chunks, optimizer, schedule, stepper, world, batches, count, memory, knows_loss)


def measure(rehearsal: Rehearsal, *, steps: int = STEPS, warmup: int | None = None) -> dict[str, Any]:
    """What `steps` steps took after `warmup` others, and the bytes of what the rank holds; `problems`: what was not finite."""
    warmup = WARMUP_STEPS[rehearsal.rank.device.type] if warmup is None else warmup
    for _ in range(warmup):
        rehearsal.step()
    if rehearsal.rank.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of building
        rehearsal.step()  # reserves anew what a step needs
    rows = [rehearsal.step() for _ in range(steps)]
    return {
        **describe_rank(rehearsal.rank),
        **describe_machine(rehearsal.rank.device),
        "num_microbatches": rehearsal.num_microbatches,
        "warmup_steps": warmup,
        "steps": rows,
        "problems": unsound(rows),
        "num_params": sum(p.numel() for chunk in rehearsal.chunks for p in chunk.parameters()),
        "memory_bytes": memory_bytes(rehearsal, rows=rows),
    }


def unsound(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is not finite, and so not a step as training takes it."""
    return [
        f"{name} is {row[name]} in timed step {number}"
        for number, row in enumerate(rows, 1)
        for name in ("loss", "grad_norm")
        if row[name] is not None and not math.isfinite(row[name])
    ]


def memory_bytes(rehearsal: Rehearsal, *, rows: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """By component; null of what a CPU process cannot tell. `held_besides`: what stays between steps and is none of the others
    (weights cast to FP8, workspaces); `activations`: what a step's forward and backward add to all that stays."""
    gradients = sum(
        buffer.grad_data.numel() * buffer.grad_data.element_size() for chunk in rehearsal.chunks for buffer in chunk.buffers
    )
    states = state_bytes(rehearsal.optimizer)
    marks, on_gpu = rehearsal.memory.marks, rehearsal.rank.device.type == "cuda"
    if not on_gpu:
        rehearsal.memory.mark("end")
        weights = sum(p.numel() * p.element_size() for chunk in rehearsal.chunks for p in chunk.parameters())
        unknown = dict.fromkeys(("held_besides", "activations", "slack", "context"))
        return {
            "weights": weights,
            "gradients": gradients,
            "optimizer": states,
            **unknown,
            "peak": rehearsal.memory.marks["end"] - marks["start"],
        }
    torch.cuda.synchronize()
    weights, resting = marks["model"] - marks["start"] - gradients, torch.cuda.memory_allocated()
    peak, reserved = max(row["peak_bytes"] for row in rows), torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": states,
        "held_besides": resting - marks["start"] - weights - gradients - states,
        "activations": peak - resting,
        "slack": reserved - peak,
        "context": context,
        "peak": reserved + context,
    }


def state_bytes(optimizer: MegatronOptimizer) -> int:
    """Of all that the optimizer holds on this rank: fp32 weights that are no view of the model's own, and the moments."""
    found: dict[int, int] = {}
    for part in parts(optimizer):
        own = [tensor for state in part.optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]
        own += [tensor for tensor in part.get_parameters() if is_copy(part, tensor)]
        found |= {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in own if tensor.numel()}
    return sum(found.values())


def is_copy(part: MegatronOptimizer, tensor: torch.Tensor) -> bool:
    """Whether the optimizer keeps the weight in fp32 apart from the model's, which is in bf16 or FP8."""
    groups = getattr(part, "shard_fp32_from_float16_groups", None) or getattr(part, "fp32_from_float16_groups", None) or ()
    return any(tensor is main for group in groups for main in group)


def describe_rank(rank: Rank) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "world_size": rank.world_size,
        "pipeline_stage": rank.pp_rank,
        "tp_rank": rank.tp_rank,
        "cp_rank": rank.cp_rank,
        "dp_rank": rank.dp_rank,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    packages = {}
    for name in ("torch", "megatron-core", "transformer-engine"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {"device": name, "packages": packages}


# Data


def activation_shape(stage: StageConfig, *, hidden_size: int) -> tuple[int, int, int]:
    """Of what a pipeline stage sends on of one micro batch: this rank's part of the sequence."""
    layout, length = stage.layout, stage.stage.seq_length
    if is_packed(stage) and layout.cp > 1:
        length = math.ceil(length / row_multiple(stage)) * row_multiple(stage)
    return length // layout.cp // (layout.tp if layout.sequence_parallel else 1), layout.micro_batch_size, hidden_size


def real_batches(config: RunConfig, *, stage: StageConfig, rank: Rank, num_microbatches: int) -> Batches:
    """The rank's slices of the stage's first global batches of full size, from the prepared shards."""
    feed = TrainingFeed(StageData(config, stage, ledger={}), stage, rank=rank)
    first = feed.plan.batches[-1].first_sample
    return lambda step: feed.batch(first + step * stage.stage.global_batch_size)


def random_batches(config: RunConfig, *, stage: StageConfig, rank: Rank, num_microbatches: int) -> Batches:
    """One batch of random tokens, again and again."""
    if not needs_rows(stage, rank=rank):
        return lambda step: None
    count = num_microbatches * stage.layout.micro_batch_size
    rows = random_rows(stage, model=config.model, rank=rank, count=count, seed=config.run.seed + rank.dp_rank)
    batches = micro_batches(rows, stage=stage, device=rank.device)
    return lambda step: batches


def random_rows(stage: StageConfig, *, model: ModelConfig, rank: Rank, count: int, seed: int) -> Rows:
    """Rows [N, S] of random tokens and sources and, where attention ends with documents, of documents of random lengths. Labels
    are of this rank's part of the vocabulary: of others no other rank would give the logit, and the loss would be infinite."""
    generator, shape = np.random.default_rng(seed), (count, stage.stage.seq_length)
    tokens = generator.integers(model.vocab_size, size=shape, dtype=np.int32)
    part = model.padded_vocab_size // stage.layout.tp
    first = min(rank.tp_rank * part, model.vocab_size - 1)
    labels = generator.integers(first, min(first + part, model.vocab_size), size=shape, dtype=np.int32)
    source = generator.integers(len(stage.mixture.sources), size=count, dtype=np.int32)
    counted = np.ones(shape, dtype=np.bool_)
    document = None
    if stage.stage.reset_attention_mask:
        document = np.stack([random_documents(stage, generator=generator) for _ in range(count)])
    return Rows(tokens, labels, counted, document, source)


def random_documents(stage: StageConfig, *, generator: np.random.Generator) -> NDArray[np.int32]:
    """Numbers [S] of documents. Under context parallelism their lengths need no padding, so that every row is as long as the
    next pipeline stage expects."""
    length, unit = stage.stage.seq_length, 2 * stage.layout.cp
    drawn = generator.exponential(DOCUMENT_TOKENS, size=length // unit)
    lengths = np.maximum(1, np.round(drawn / unit)).astype(np.int64) * unit
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:length]


# The process


def main() -> ExitClass:
    parser = argparse.ArgumentParser(prog="python -m training.rehearse", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--real-data", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    try:
        rehearse(arguments)
    except KeyboardInterrupt:
        return ExitClass.INTERRUPTED
    except BaseException as error:  # some of torch's are no Exception
        traceback.print_exc()
        return exit_class(error)
    return ExitClass.DONE


def rehearse(arguments: argparse.Namespace) -> None:
    config = read_config(RunDir(arguments.folder))
    if config.cluster.gpu and not torch.cuda.is_available():
        raise PrecisionError(
            f"cluster.gpu: found {config.cluster.gpu} and no CUDA device. Fix: see nvidia-smi, or cluster=local"
        )
    stage = rehearsed_stage(config.stage(arguments.stage))
    began = time.perf_counter()
    with pretended_rank(config, stage=stage, rank=arguments.rank) as (rank, world):
        rehearsal = build_rehearsal(config, stage=stage, rank=rank, world=world, real_data=arguments.real_data)
        print(f"built rank {rank.rank} in {time.perf_counter() - began:.1f} s", flush=True)
        measured = measure(rehearsal, steps=arguments.steps)
        measured["kernels"] = None
        if arguments.profile:
            table, measured["kernels"] = profiled(rehearsal)
            (arguments.folder / PROFILE).write_text(table)
    measured["data"] = "real" if arguments.real_data else "random"
    write_json(arguments.folder / MEASURED, measured)


def profiled(rehearsal: Rehearsal) -> tuple[str, dict[str, float]]:
    """One more step under torch's profiler: a table of kernels for people, and seconds by group."""
    on_gpu = rehearsal.rank.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        rehearsal.step()
    return kernel_table(profiler.key_averages(), on_gpu=on_gpu)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
