"""What transformer-engine does with packed documents, in plain torch, so that CPU ranks can go the way of GPU ranks.

Shapes: P places on this context-parallel rank, T of the padded row, N heads, G key/value groups, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from launcher.config.schema import Layout, StageConfig
from training import batch, model


class ThdAttention(torch.nn.Module):
    """Causal attention inside each document that PackedSeqParams names, over all ranks of the group."""

    def __init__(self, config: Any, *, pg_collection: Any, **_: Any):
        super().__init__()
        self.cp_group, self.scale = pg_collection.cp, config.softmax_scale

    def forward(
        self,
        query_PND: Any,
        key_PGD: Any,
        value_PGD: Any,
        attention_mask: None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> torch.Tensor:
        assert attention_mask is None
        size, borders = self.cp_group.size(), packed_seq_params.cu_seqlens_q.tolist()
        assert packed_seq_params.max_seqlen_q >= max(end - start for start, end in pairwise(borders))
        assert (packed_seq_params.cu_seqlens_q_padded is None) == (size == 1)
        held = [places(borders, rank=rank, size=size) for rank in range(size)]
        order = torch.cat(held).argsort()
        key, value = (gather_from_sequence_parallel_region(x, True, self.cp_group)[order] for x in (key_PGD, value_PGD))
        document = torch.arange(len(borders) - 1).repeat_interleave(torch.tensor(borders).diff())
        query_P, key_T = held[self.cp_group.rank()], torch.arange(borders[-1])
        mask_PT = (document[query_P, None] == document) & (key_T <= query_P[:, None])
        query, key, value = (x.transpose(0, 1) for x in (query_PND, key, value))
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask_PT, scale=self.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)


def places(borders: list[int], *, rank: int, size: int) -> torch.Tensor:
    """Places [P] of the padded row that a rank holds: two chunks of every document."""
    if size == 1:
        return torch.arange(borders[-1])
    chunks = [torch.arange(start, end).chunk(2 * size) for start, end in pairwise(borders)]
    return torch.cat([half for chunk in chunks for half in (chunk[rank], chunk[2 * size - 1 - rank])])


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Rows are packed where documents are apart, attention is ThdAttention, and interleaved stages overlap what they send."""
    plain = model._layout_fields

    def wanted(stage: StageConfig) -> bool:
        return stage.stage.reset_attention_mask

    def fields(layout: Layout, *, has_variable_lengths: bool) -> dict[str, Any]:
        # Megatron frees an output while it is being sent (schedules.py:1600 comes before the wait in 1634). Over gloo the next
        # stage then computes with something else: losses of pp2_vpp2 were off by 2%; without freeing they agree to 1e-8.
        overlap = dict(overlap_p2p_comm=layout.vpp > 1, deallocate_pipeline_outputs=layout.vpp == 1)
        return plain(layout, has_variable_lengths=has_variable_lengths) | overlap

    with (
        mock.patch.object(batch, "is_packed", wanted),
        mock.patch.object(model, "is_packed", wanted),
        mock.patch.object(model, "_layout_fields", fields),
        mock.patch.object(model, "CausalAttention", ThdAttention),
    ):
        yield
