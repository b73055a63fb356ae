"""One training step and one evaluation: Megatron's pipeline schedules around a loss that is exact per source.

Shapes: B micro batch, S sequence on this rank, T the whole row, N sources.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord
from megatron.core.utils import get_model_config

from launcher.config.schema import StageConfig
from training.batch import MicroBatch
from training.clocks import OPTIMIZER, Clocks
from training.norms import UpdateWatch
from training.parallel import Rank


@dataclass(frozen=True)
class Flags:
    """What ranks tell each other with every step: true where it is of any of them. `stop`: it was asked to; `any_layout`: and
    to save so that any layout can go on; `writing`: its part of a checkpoint is not written yet."""

    stop: bool = False
    any_layout: bool = False
    writing: bool = False


@dataclass(frozen=True)
class Sums:
    """Loss and label tokens of each source over the whole global batch, and the flags of all ranks."""

    loss_N: tuple[float, ...]
    tokens_N: tuple[int, ...]
    flags: Flags = Flags()

    @property
    def loss(self) -> float:
        """Mean loss per token, in nats."""
        return sum(self.loss_N) / max(1, sum(self.tokens_N))

    def loss_by_source(self, names: Sequence[str]) -> dict[str, float]:
        """Mean loss of the sources that had tokens."""
        rows = zip(names, self.loss_N, self.tokens_N, strict=True)
        return {name: loss / tokens for name, loss, tokens in rows if tokens}

    def tokens_by_source(self, names: Sequence[str]) -> dict[str, int]:
        return dict(zip(names, self.tokens_N, strict=True))


@dataclass(frozen=True)
class Result:
    """What a batch came to before the weights are touched: sums and gradient norm (before clipping), the same on all ranks, and
    what this rank added to the loss."""

    sums: Sums
    grad_norm: float
    own_loss: float


def mixture_loss(losses: Mapping[str, float], *, shares: Mapping[str, float]) -> float:
    """Mean of the sources' losses by their shares in the mixture, of those that have one."""
    weights = {name: shares.get(name, 0.0) for name in losses}
    total = sum(weights.values())
    return sum(losses[name] * weight for name, weight in weights.items()) / total if total else math.nan


class Stepper:
    """Drives the model chunks of this rank through whole global batches."""

    def __init__(
        self, stage: StageConfig, *, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, rank: Rank
    ):
        self.stage, self.chunks, self.optimizer, self.rank = stage, list(chunks), optimizer, rank
        self.num_sources, self.clocks = len(stage.mixture.sources), Clocks(rank.device)
        self.watch = UpdateWatch(optimizer, rank=rank, is_sharded=stage.layout.distributed_optimizer)
        self.forward_backward = get_forward_backward_func()
        connect(self.chunks, optimizer=optimizer, clocks=self.clocks)

    def train(self, batches: list[MicroBatch] | None, *, num_microbatches: int, flags: Flags = Flags()) -> tuple[Sums, float]:
        """One optimizer step, whatever comes of it. Returns the batch's sums and the gradient norm."""
        result = self.gradients(batches, num_microbatches=num_microbatches, flags=flags)
        self.update(result.grad_norm)
        return result.sums, result.grad_norm

    def gradients(self, batches: list[MicroBatch] | None, *, num_microbatches: int, flags: Flags) -> Result:
        """Forward and backward. The weights are as they were, and so may be computed again on."""
        with self.clocks.around(OPTIMIZER):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        reports = self._run(batches, num_microbatches=num_microbatches, forward_only=False)
        with self.clocks.around(OPTIMIZER):
            self.optimizer.prepare_grads()
        return self.reduce(reports, grad_norm=float(self.optimizer.get_grad_norm()), flags=flags)

    @torch.no_grad()
    def update(self, grad_norm: float, *, watch: bool = False) -> dict[str, float]:
        """Clips the gradients and takes the optimizer's step: ChainedOptimizer's own, parted where its norm is known. What
        `watch` looks at is for a metrics row."""
        if watch:
            self.watch.before()
        with self.clocks.around(OPTIMIZER):
            self._update(grad_norm)
        return self.watch.after() if watch else {}

    def _update(self, grad_norm: float) -> None:
        for optimizer in parts(self.optimizer):
            if self.stage.optim.clip_grad > 0 and (parameters := optimizer.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, max_norm=self.stage.optim.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch] | None, *, num_microbatches: int) -> Sums:
        """Sums over held-out micro batches; dropout is off."""
        for chunk in self.chunks:
            chunk.eval()
        with eagerly():
            reports = self._run(batches, num_microbatches=num_microbatches, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return self.reduce(reports, grad_norm=0.0, flags=Flags()).sums

    def reduce(self, reports: list[torch.Tensor], *, grad_norm: float, flags: Flags) -> Result:
        """One all-reduce over the world: every rank learns every sum. Tensor-parallel twins count once. The norm is the mean of
        what the ranks made of it, so that they all judge the same number."""
        own = torch.zeros(2 * self.num_sources, dtype=torch.float64, device=self.rank.device)
        if reports and self.rank.tp_rank == 0:
            own += torch.stack(reports).sum(dim=0)
        told = torch.tensor([grad_norm / self.rank.world_size, *astuple(flags)], dtype=torch.float64, device=self.rank.device)
        total = torch.cat([own, told])
        dist.all_reduce(total)
        values = total.tolist()
        losses, tokens = values[: self.num_sources], values[self.num_sources : 2 * self.num_sources]
        norm, *raised = values[2 * self.num_sources :]
        sums = Sums(tuple(losses), tuple(round(count) for count in tokens), Flags(*(flag > 0 for flag in raised)))
        return Result(sums, norm, float(own[: self.num_sources].sum()))

    def _run(self, batches: list[MicroBatch] | None, *, num_microbatches: int, forward_only: bool) -> list[torch.Tensor]:
        iterators = [iter(batches) if batches else None for _ in self.chunks]
        interleaved = len(self.chunks) > 1
        reports: list[torch.Tensor] = self.forward_backward(
            forward_step_func=partial(forward_step, num_sources=self.num_sources),
            data_iterator=iterators if interleaved else iterators[0],
            model=self.chunks if interleaved else self.chunks[0],
            num_microbatches=num_microbatches,
            seq_length=self.stage.stage.seq_length,
            micro_batch_size=self.stage.layout.micro_batch_size,
            forward_only=forward_only,
        )
        return reports


@contextmanager
def eagerly() -> Iterator[None]:
    """No CUDA graph is replayed: those of layers were captured in training, with dropout, and do not wait for parameters that
    are still being gathered."""
    captured, _CudagraphGlobalRecord.cudagraph_created = _CudagraphGlobalRecord.cudagraph_created, False
    try:
        yield
    finally:
        _CudagraphGlobalRecord.cudagraph_created = captured


def connect(chunks: list[DistributedDataParallel], *, optimizer: MegatronOptimizer, clocks: Clocks) -> None:
    """Tells the schedules how to reduce gradients and gather parameters, and what to measure: Megatron passes these through the
    config."""
    config, ddp = get_model_config(chunks[0]), chunks[0].ddp_config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.timers = clocks
    for part in parts(optimizer):
        part.config.timers = clocks
    if ddp.overlap_grad_reduce:
        no_sync, grad_sync = [chunk.no_sync for chunk in chunks], [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        if len(chunks) > 1:
            config.grad_sync_func = grad_sync
    if ddp.overlap_param_gather and len(chunks) > 1:
        config.param_sync_func = [chunk.start_param_sync for chunk in chunks]


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def forward_step(iterator: Iterator[MicroBatch] | None, model: Any, *, num_sources: int) -> tuple[torch.Tensor, Any]:
    """Megatron's forward step: the model's output (on the last stage, the loss of each token [B, S]) and the loss function. A
    stage in the middle of a pipeline reads of the batch where documents begin; without a batch there is one attention."""
    batch = next(iterator) if iterator is not None else None
    if batch is None:
        output = model(input_ids=None, position_ids=None, attention_mask=None)
    else:
        output = model(
            input_ids=batch.tokens_BS,
            position_ids=batch.positions_BS,
            attention_mask=batch.document_BT,
            labels=batch.labels_BS,
            packed_seq_params=batch.packed,
        )
    return output, partial(token_loss, batch, num_sources)


def token_loss(batch: MicroBatch, num_sources: int, loss_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the loss, number of tokens, and [loss by source, tokens by source] in fp64 [2N]; of the labels in the loss mask.
    Under context parallelism they are those of this rank's part."""
    loss_B = torch.where(batch.loss_mask_BS, loss_BS.float(), 0.0).sum(dim=1)
    tokens_B = batch.loss_mask_BS.sum(dim=1)
    report = torch.zeros(2, num_sources, dtype=torch.float64, device=loss_B.device)
    index_B = batch.source_B.clamp(min=0)
    report[0].index_add_(0, index_B, loss_B.detach().double())
    report[1].index_add_(0, index_B, tokens_B.double())
    return loss_B.sum(), tokens_B.sum().to(torch.int32), report.flatten()
