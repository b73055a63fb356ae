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
    every rank's queries see the part of the sequence before them (Megatron's load-balanced split: chunks r and 2*CP-1-r).

    `document_BT`, in the place of Megatron's attention mask, numbers the document of each token of the whole sequence: a query
    sees the keys of its own document at or before it. None: all keys before it."""

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, pg_collection: Any, **_: Any):
        super().__init__(config=config)
        self.cp_group, self.scale, self.dropout = pg_collection.cp, softmax_scale, config.attention_dropout

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        document_BT: torch.Tensor | None,
        **_: Any,
    ) -> torch.Tensor:
        size = self.cp_group.size()
        if size > 1:
            key_SBGD, value_SBGD = (gather_sequence(tensor, group=self.cp_group) for tensor in (key_SBGD, value_SBGD))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBGD, value_SBGD))
        mask = self.mask(len(query_SBND), document_BT=document_BT)
        dropout = self.dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            context_BNSD = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)

    def mask(self, num_queries: int, *, document_BT: torch.Tensor | None) -> torch.Tensor | None:
        """Boolean [S, T] or, of documents, [B, 1, S, T], true where this rank's query may look; None: the whole is causal."""
        rank, size = self.cp_group.rank(), self.cp_group.size()
        if size == 1 and document_BT is None:
            return None
        position_S = query_positions(num_queries, rank=rank, size=size)
        mask_ST = causal_mask(position_S, num_keys=num_queries * size)
        return mask_ST if document_BT is None else mask_ST & same_document(document_BT, position_S=position_S)[:, None]


def gather_sequence(tensor_SBGD: torch.Tensor, *, group: Any) -> torch.Tensor:
    """All ranks' chunks in their natural order: [T, B, G, D]. The backward pass reduce-scatters."""
    size = group.size()
    chunks = gather_from_sequence_parallel_region(tensor_SBGD, True, group).chunk(2 * size)
    held = [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]
    return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * size)])


def query_positions(num_queries: int, *, rank: int, size: int) -> torch.Tensor:
    """Where in the whole sequence this rank's queries stand: [S]."""
    if size == 1:
        return torch.arange(num_queries)
    chunk = num_queries // 2
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


def causal_mask(position_S: torch.Tensor, *, num_keys: int) -> torch.Tensor:
    """Boolean [S, T], true where the key is at the query or before it."""
    return torch.arange(num_keys) <= position_S[:, None]


def same_document(document_BT: torch.Tensor, *, position_S: torch.Tensor) -> torch.Tensor:
    """Boolean [B, S, T], true where query and key are of one document."""
    return document_BT[:, position_S, None] == document_BT[:, None, :]
