"""What our loop adds to bare megatron-core: the same model, optimizer and micro batches, a step of each in turn."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from benchmarks.gpu_configs import compose, single_words
from benchmarks.gpu_device import Figures, Keep, seconds
from benchmarks.gpu_layer import forget_engine
from training.batch import MicroBatch
from training.rehearse import Rehearsal, build_rehearsal, pretended_rank
from training.step import Stepper, parts

GOAL = 0.005  # of a bare step
LAYERS, MICROBATCHES, LENGTH = 4, 8, 4096
PAIRS, WARMUP = 15, 4


def measure_loop(keep: Keep, *, tiny: bool) -> None:
    for precision in ("fp32", "bf16") if tiny else ("bf16", "fp8_tensorwise"):
        try:
            keep(precision, measure_case(precision, tiny=tiny))
        except Exception as error:
            keep(precision, {"failed": f"{type(error).__name__}: {error}"[:500]})
        forget_engine()


def measure_case(precision: str, *, tiny: bool) -> Figures:
    size: dict[str, int] = dict(length=32, layers=2, microbatches=2) if tiny else {}
    size = {"length": LENGTH, "layers": LAYERS, "microbatches": MICROBATCHES} | size
    config = compose(single_words(tiny=tiny, precision=precision, **size))
    stage = config.stages[0]
    with pretended_rank(config, stage=stage, rank=0) as (rank, world):
        rehearsal = build_rehearsal(config, stage=stage, rank=rank, world=world)
        batches = rehearsal.batches(0)
        assert batches is not None
        stepper = Stepper(stage, chunks=rehearsal.chunks, optimizer=rehearsal.optimizer, rank=rank)
        ours = lambda: stepper.train(batches, num_microbatches=len(batches))  # noqa: E731
        return {**size, **compare(ours, bare_loop(rehearsal, batches=batches), stepper=stepper)}


def bare_loop(rehearsal: Rehearsal, *, batches: list[MicroBatch]) -> Callable[[], object]:
    """A step as megatron-core's own examples take it."""
    chunks, optimizer, stage = rehearsal.chunks, rehearsal.optimizer, rehearsal.stage
    forward_backward = get_forward_backward_func()

    def step() -> float:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=bare_forward_step,
            data_iterator=iter(batches),
            model=chunks[0],
            num_microbatches=len(batches),
            seq_length=stage.stage.seq_length,
            micro_batch_size=stage.layout.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        return float(torch.stack([report["loss"] for report in reports]).mean())

    return step


def bare_forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(iterator)
    output = model(
        input_ids=batch.tokens_BS,
        position_ids=batch.positions_BS,
        attention_mask=batch.document_BT,
        labels=batch.labels_BS,
        packed_seq_params=batch.packed,
    )
    return output, partial(bare_loss, batch)


def bare_loss(batch: MicroBatch, loss_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total = (loss_BS.float() * batch.loss_mask_BS).sum()
    tokens = batch.loss_mask_BS.sum().to(torch.int32)
    return total, tokens, {"loss": total.detach() / tokens}


def compare(ours: Callable[[], object], bare: Callable[[], object], *, stepper: Stepper) -> Figures:
    """Medians, and of the pairs' differences; without Megatron's timers in the bare step, as it comes."""
    clocks = stepper.clocks

    def timed(act: Callable[[], object], timers: Any) -> float:
        set_timers(stepper, timers)
        took = seconds(act)
        clocks.take()
        return took

    rows = []
    for number in range(WARMUP + PAIRS):
        order = [(ours, clocks), (bare, None)][:: -1 if number % 2 else 1]
        first, second = (timed(*one) for one in order)
        rows.append((second, first) if number % 2 else (first, second))
    rows = rows[WARMUP:]
    plain = statistics.median(bare for _, bare in rows)
    overhead = statistics.median(own - bare for own, bare in rows) / plain
    return {
        "ours, ms": round(1e3 * statistics.median(own for own, _ in rows), 3),
        "bare, ms": round(1e3 * plain, 3),
        "spread of bare": round((max(bare for _, bare in rows) - min(bare for _, bare in rows)) / plain, 4),
        "overhead": round(overhead, 5),
        "goal": GOAL,
        "met": overhead <= GOAL,
    }


def set_timers(stepper: Stepper, clocks: Any) -> None:
    get_model_config(stepper.chunks[0]).timers = clocks
    for part in parts(stepper.optimizer):
        part.config.timers = clocks
