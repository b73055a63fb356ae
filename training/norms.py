"""How large the weights are, by how much a step changes them, and how much of the gradient is zero. For metrics rows alone: the
steps between cost nothing."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from training.parallel import Rank

# Elements that are copied before a step to compare with after, at most: 64 MiB in fp32. A rank that owns more compares every
# n-th.
MAX_COPIED = 1 << 24


class UpdateWatch:
    """Looks at the optimizer's own parameters (fp32 where it keeps such) on this rank. `is_sharded`: data-parallel ranks have
    each their own; else they hold the same, which count once."""

    def __init__(self, optimizer: MegatronOptimizer, *, rank: Rank, is_sharded: bool):
        self.optimizer, self.rank = optimizer, rank
        self.counts = is_sharded or (rank.dp_rank == 0 and rank.cp_rank == 0)
        self.zeros = self.elements = 0
        self.stride = 1
        self.copies: list[torch.Tensor] = []

    @torch.no_grad()
    def before(self) -> None:
        """Gradients are ready, the update is not taken."""
        own = list(self._parameters())
        gradients = [gradient for parameter in own if (gradient := gradient_of(parameter)) is not None]
        self.elements = sum(gradient.numel() for gradient in gradients)
        self.zeros = self.elements - int(sum(torch.count_nonzero(gradient) for gradient in gradients))
        # Odd, so that it does not pick the same columns of every row.
        self.stride = math.ceil(sum(parameter.numel() for parameter in own) / MAX_COPIED) | 1
        self.copies = [self._some(parameter).clone() for parameter in own]

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """Fields of a metrics row, the same on every rank. Collective over the world. `weight_norm`: of all weights;
        `update_ratio`: the norm of their change over it; `zero_grads`: the fraction of zeros in the gradient."""
        device = self.rank.device
        weights, updates = (
            torch.zeros((), dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )
        for parameter, copy in zip(self._parameters(), self.copies, strict=True):
            weights += torch.linalg.vector_norm(parameter, dtype=torch.float32).double() ** 2
            if len(copy):
                change = torch.linalg.vector_norm(self._some(parameter).float() - copy.float()).double() ** 2
                updates += change * (parameter.numel() / len(copy))
        self.copies = []
        told = torch.stack([weights, updates, weights.new_tensor(self.zeros), weights.new_tensor(self.elements)])
        dist.all_reduce(told)
        weight, update, zeros, elements = told.tolist()
        return {
            "weight_norm": math.sqrt(weight),
            "update_ratio": math.sqrt(update / weight) if weight else 0.0,
            "zero_grads": zeros / max(1.0, elements),
        }

    def _some(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().view(-1)[:: self.stride]

    def _parameters(self) -> Iterator[torch.Tensor]:
        """What this rank counts, each parameter of the model once over the world: as Megatron's gradient norm does."""
        if not self.counts:
            return
        for parameter in self.optimizer.get_parameters():
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                yield parameter


def gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """Where Megatron's precision-aware optimizer keeps it, or where all others do."""
    decoupled: torch.Tensor | None = getattr(parameter, "decoupled_grad", None)
    return decoupled if decoupled is not None else parameter.grad
