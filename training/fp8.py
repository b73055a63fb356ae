"""FP8 scaling as a metrics row says it: what transformer-engine keeps in its modules, read at the row.

Delayed scaling keeps a history of each tensor's largest values (amax), the newest last, and takes the next scale from the
largest of it: a newest one above all before it has overflowed the scale it was cast with. Tensorwise current scaling keeps the
last scale and amax, and cannot overflow. Blockwise scaling keeps nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from training.parallel import Rank

# Of a tensor that was never cast; such are passed over.
UNUSED_AMAX = 0.0


@dataclass(frozen=True)
class Scaled:
    """One group of tensors: their scales [T], their newest amax [T], and the largest amax their scales came from [T]."""

    scale: torch.Tensor
    amax: torch.Tensor
    before: torch.Tensor


class Fp8Watch:
    """Of the modules on this rank. `is_on`: the stage computes in FP8."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], *, rank: Rank, is_on: bool):
        self.chunks, self.rank, self.is_on = chunks, rank, is_on

    @torch.no_grad()
    def take(self) -> dict[str, float]:
        """Fields of a metrics row, the same on every rank; empty without FP8, and where nothing keeps scales. Collective over
        the world. `fp8_overflows`: tensors whose newest values were cut off."""
        if not self.is_on:
            return {}
        least, most, overflows, count = summarise(scaled_tensors(self.chunks))
        extremes = torch.tensor([-least, most], dtype=torch.float64, device=self.rank.device)
        counts = torch.tensor([overflows, count], dtype=torch.float64, device=self.rank.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        dist.all_reduce(counts)
        if not counts[1]:
            return {}
        return {"fp8_scale_min": -float(extremes[0]), "fp8_amax_max": float(extremes[1]), "fp8_overflows": float(counts[0])}


def summarise(groups: Iterator[Scaled]) -> tuple[float, float, float, float]:
    """Least scale, largest amax, tensors that overflowed, and tensors counted."""
    least, most, overflows, count = math.inf, -math.inf, 0.0, 0.0
    for group in groups:
        used = group.amax > UNUSED_AMAX
        if not used.any():
            continue
        least, most = min(least, float(group.scale[used].min())), max(most, float(group.amax[used].max()))
        # Nothing came before the first step: its scale is 1, a start and no overflow.
        overflows += float(((group.amax > group.before) & (group.before > UNUSED_AMAX) & used).sum())
        count += float(used.sum())
    return least, most, overflows, count


def scaled_tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[Scaled]:
    for chunk in chunks:
        for module in chunk.modules():
            held: dict[str, Any] = getattr(module, "fp8_meta", None) or {}
            for way in ("scaling_fwd", "scaling_bwd"):
                yield from delayed(held.get(way))
                yield from current((getattr(module, "quantizers", None) or {}).get(way) or ())


def delayed(meta: Any) -> Iterator[Scaled]:
    """Of transformer-engine's state of delayed scaling: `scale` [T], `amax_history` [length, T], rolled after each step: row 0
    is to be filled, the last one is the newest."""
    history = getattr(meta, "amax_history", None)
    if history is None or len(history) < 2:
        return
    older = history[1:-1]
    before = older.amax(dim=0) if len(older) else torch.zeros_like(history[-1])
    yield Scaled(meta.scale, history[-1], before)


def current(quantizers: Sequence[Any]) -> Iterator[Scaled]:
    """Of its quantizers of current scaling: `scale` and `amax` [1], of the tensor cast last."""
    for quantizer in quantizers:
        if type(quantizer).__name__ == "Float8CurrentScalingQuantizer":
            yield Scaled(quantizer.scale, quantizer.amax, torch.full_like(quantizer.amax, math.inf))
