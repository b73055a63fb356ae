"""Rows of tokens in host memory, and the micro batches a forward pass reads.

Shapes: N rows, B micro batch, S sequence (of a MicroBatch this context-parallel rank's part), T the whole row, P places of a
packed row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank
from numpy.typing import NDArray

from data_prep.errors import DataError
from launcher.config.schema import StageConfig
from training.packing import is_packed, pack, packed_seq_params, row_multiple

PADDING = -1  # the source of a row that fills up a batch and counts nowhere


@dataclass(frozen=True)
class Rows:
    """Consecutive samples of one data-parallel rank in host memory."""

    tokens: NDArray[np.int32]  # [N, S]
    labels: NDArray[np.int32]  # [N, S]
    counted: NDArray[np.bool_]  # [N, S] whether the label counts in loss and ledger
    document: NDArray[np.int32] | None  # [N, S] a run of equal numbers is a document; None: one attention over the whole row
    source: NDArray[np.int32]  # [N]; PADDING: a row that counts nowhere

    @property
    def is_in_loss(self) -> NDArray[np.bool_]:
        """[N, S] counted, and not of a PADDING row."""
        return self.counted & (self.source != PADDING)[:, None]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads. `source_B` indexes the stage's sources. Labels outside of the loss mask, and with them
    PADDING rows, are excluded from every sum. Documents are in `document_BT` (the whole row under context parallelism too) or,
    on GPUs, in `packed`; both None: one attention over the row."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    source_B: torch.Tensor
    document_BT: torch.Tensor | None = None
    packed: PackedSeqParams | None = None


def stream_rows(
    windows: NDArray[np.int32], *, source: NDArray[np.int32], eod_id: int, reset_attention_mask: bool, eod_mask_loss: bool
) -> Rows:
    """Rows of a token stream's windows [N, S + 1], of sources [N]: labels are the next tokens. An EOD is its document's last
    token; with `eod_mask_loss` what follows it, the next document's first token, is not predicted."""
    tokens, is_real = windows[:, :-1], (source != PADDING)[:, None]
    # A row of PADDING is one document: it is of zeros, and zero may be the EOD.
    ends = (tokens == eod_id) & is_real
    counted = is_real & ~ends if eod_mask_loss else np.broadcast_to(is_real, tokens.shape)
    document = (np.cumsum(ends, axis=1) - ends).astype(np.int32) if reset_attention_mask else None
    return Rows(tokens, windows[:, 1:], counted, document, source)


def micro_batches(rows: Rows, *, stage: StageConfig, device: torch.device) -> list[MicroBatch]:
    """Splits the rows into micro batches in order; each context-parallel rank takes its chunks."""
    if not is_packed(stage):
        return dense_batches(rows, stage=stage, device=device)
    if stage.layout.micro_batch_size > 1:
        # megatron-core squeezes the batch out of packed activations (transformer/attention.py:1066).
        raise DataError(
            f"layout.micro_batch_size: found {stage.layout.micro_batch_size}; with stage.reset_attention_mask a micro batch on "
            "GPUs is one packed row. Fix: layout.micro_batch_size=1"
        )
    return [packed_batch(rows, row, stage=stage, device=device) for row in range(len(rows.tokens))]


def dense_batches(rows: Rows, *, stage: StageConfig, device: torch.device) -> list[MicroBatch]:
    """Micro batches with the documents' numbers. The rows reach the device, and are sliced for this rank, in one go."""
    sliced = get_batch_on_this_cp_rank(
        {
            "tokens": to_device(rows.tokens, device=device),
            "labels": to_device(rows.labels, device=device),
            "positions": to_device(positions(rows, reset=stage.stage.reset_position_ids), device=device),
            "loss_mask": to_device(rows.is_in_loss, device=device),
        }
    )
    fields = [*sliced.values(), to_device(rows.source, device=device)]
    if rows.document is not None:
        fields.append(torch.from_numpy(rows.document).to(device))
    split = (field.split(stage.layout.micro_batch_size) for field in fields)
    return [MicroBatch(*some) for some in zip(*split, strict=True)]


def packed_batch(rows: Rows, row: int, *, stage: StageConfig, device: torch.device) -> MicroBatch:
    """One row as packed documents: the places [1, P] of this context-parallel rank."""
    cp_size, cp_rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    assert rows.document is not None
    packing = pack(rows.document[row], cp_size=cp_size, cp_rank=cp_rank, multiple=row_multiple(stage))
    taken = (
        packing.take(rows.tokens[row]),
        packing.take(rows.labels[row]),
        packing.position_P,
        packing.take(rows.is_in_loss[row]),
    )
    return MicroBatch(
        *(to_device(places[None], device=device) for places in taken),
        source_B=to_device(rows.source[row : row + 1], device=device),
        packed=packed_seq_params(packing.border_D1, cp_size=cp_size, device=device),
    )


def positions(rows: Rows, *, reset: bool) -> NDArray[np.int64]:
    """Position [N, S] of each token in its row or, with `reset`, in its document. (Rotary embeddings do not read it.)"""
    place = np.broadcast_to(np.arange(rows.tokens.shape[1]), rows.tokens.shape)
    if not reset or rows.document is None:
        return place
    begins = np.diff(rows.document, axis=1, prepend=rows.document[:, :1]) != 0
    return place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)


def to_device(values: NDArray[Any], *, device: torch.device) -> torch.Tensor:
    """A contiguous tensor: booleans as they are, numbers as the int64 that embeddings index with."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(device)
    return tensor if tensor.dtype is torch.bool else tensor.to(torch.int64)
