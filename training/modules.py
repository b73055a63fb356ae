"""Modules for the layer spec where transformer-engine is absent: a norm that works with sequence parallelism, and a core
attention that works with context parallelism. Both are injected through ModuleSpec; nothing of megatron is patched.

Shapes: S sequence on this context-parallel rank, T whole sequence, B micro batch, N heads, G key/value groups, D head size.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark by which megatron all-reduces its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with the same mark on weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel


class CausalAttention(MegatronModule):
    """Causal attention by torch's scaled_dot_product_attention. Under context parallelism keys and values are gathered, and
    every rank's queries see the part of the sequence before them (Megatron's load-balanced split: chunks r and 2*CP-1-r)."""

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, pg_collection: Any, **_: Any):
        super().__init__(config=config)
        self.cp_group, self.scale, self.dropout = pg_collection.cp, softmax_scale, config.attention_dropout

    def forward(
        self, query_SBND: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor, attention_mask: Any, **_: Any
    ) -> torch.Tensor:
        size = self.cp_group.size()
        if size > 1:
            key_SBGD, value_SBGD = (gather_sequence(tensor, group=self.cp_group) for tensor in (key_SBGD, value_SBGD))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBGD, value_SBGD))
        mask = causal_mask(len(query_SBND), rank=self.cp_group.rank(), size=size).to(query.device) if size > 1 else None
        dropout = self.dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            context_BNSD = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)


def gather_sequence(tensor_SBGD: torch.Tensor, *, group: Any) -> torch.Tensor:
    """All ranks' chunks in their natural order: [T, B, G, D]. The backward pass reduce-scatters."""
    size = group.size()
    chunks = gather_from_sequence_parallel_region(tensor_SBGD, True, group).chunk(2 * size)
    held = [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]
    return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * size)])


def causal_mask(num_queries: int, *, rank: int, size: int) -> torch.Tensor:
    """Boolean [S, T], true where this rank's query may look."""
    chunk = num_queries // 2
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    position_S = torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])
    return torch.arange(num_queries * size) <= position_S[:, None]
