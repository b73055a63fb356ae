"""Documents packed one behind the other for transformer-engine's thd attention: borders in place of a mask.

Used on GPU ranks where `reset_attention_mask` is set; CPU ranks take the documents' numbers (training.modules). What it must
obey was read in transformer-engine 2.11 and megatron-core 0.16.1. NOT YET RUN ON A GPU (as of 2026-11-21).

Shapes: T tokens of a row, D documents, P places of the row on this context-parallel rank (P = T where cp = 1).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray

from launcher.config.schema import StageConfig

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
FILLER = -1  # a place that holds no token of the row


@dataclass(frozen=True)
class Packing:
    """Where a row's tokens lie on one context-parallel rank."""

    token_P: Int64s  # the row's token at each place, or FILLER
    position_P: Int64s  # within its document
    border_D1: Int32s  # [D + 1] where documents begin in the padded row, over all ranks; the last is its length

    @property
    def filled_P(self) -> NDArray[np.bool_]:
        return self.token_P != FILLER

    def take(self, row_T: NDArray[Any]) -> NDArray[Any]:
        """The row's values at this rank's places [P]; 0 where there is no token."""
        return np.where(self.filled_P, row_T[self.token_P], row_T.dtype.type(0))


def is_packed(stage: StageConfig) -> bool:
    """Whether the stage's rows go to transformer-engine as packed documents."""
    return stage.stage.reset_attention_mask and torch.cuda.is_available()


def pack(document_T: Int32s, *, cp_size: int, cp_rank: int, multiple: int) -> Packing:
    """Packs one row whose documents are runs of equal numbers. Under context parallelism every document is padded to a multiple
    of 2 * cp_size, the last one further, so that the row is a multiple of `multiple` (itself one of 2 * cp_size), and the rank
    takes chunks cp_rank and 2 * cp_size - 1 - cp_rank of each document. Alone it takes the row as it is."""
    start_D, length_D = document_runs(document_T)
    padded_D = length_D if cp_size == 1 else padded_lengths(length_D, chunks=2 * cp_size, multiple=multiple)
    border_D1 = np.concatenate([[0], np.cumsum(padded_D)])
    document = np.repeat(np.arange(len(length_D)), padded_D)
    position = np.arange(border_D1[-1]) - border_D1[document]
    token = np.where(position < length_D[document], start_D[document] + position, FILLER)
    if cp_size > 1:
        chunk = position // (padded_D[document] // (2 * cp_size))
        mine = (chunk == cp_rank) | (chunk == 2 * cp_size - 1 - cp_rank)
        token, position = token[mine], position[mine]
    return Packing(token, position, border_D1.astype(np.int32))


def document_runs(document_T: Int32s) -> tuple[Int64s, Int64s]:
    """Start and length [D] of each run of equal numbers."""
    start_D = np.concatenate([[0], np.flatnonzero(np.diff(document_T)) + 1])
    return start_D, np.diff(np.append(start_D, len(document_T)))


def padded_lengths(length_D: Int64s, *, chunks: int, multiple: int) -> Int64s:
    """Lengths [D] in multiples of `chunks`, the last one longer, so that their sum is one of `multiple`."""
    padded_D = -(-length_D // chunks) * chunks
    padded_D[-1] += -padded_D.sum() % multiple
    return padded_D


def row_multiple(stage: StageConfig) -> int:
    """What the length of a row padded for context parallelism must be a multiple of. A context-parallel rank's part is split
    over tp under sequence parallelism; FP8 GEMMs want 16 rows in each split (transformer_engine/pytorch/utils.py:441) and
    blockwise scales 128 in the part, as launcher/config/check_precision.py asks of rows without padding."""
    unit = 128 if stage.precision.fp8 == "blockwise" else 16
    return math.lcm(unit, 16 * stage.layout.tp) * stage.layout.cp


def packed_seq_params(border_D1: Int32s, *, cp_size: int, device: torch.device) -> PackedSeqParams:
    """Megatron's description of a packed row.

    Padding counts as the tail of its document: under a causal mask no token before it sees it. True lengths in cu_seqlens_q
    would go wrong where only the last document is padded: TE 2.11 takes that for no padding (dot_product_attention.py:1298
    compares all borders but the last) and divides the true length by cp_size (cp_p2p_fwd_prepare_qkv, context_parallel.py),
    though a rank's chunks do not share it evenly. Padding in between would cost FlashAttention (utils.py:676). The borders are
    given a second time because TE asserts padded ones under context parallelism (context_parallel.py:4019)."""
    border = torch.from_numpy(border_D1).to(device)
    padded = border if cp_size > 1 else None
    longest = longest_document(border_D1)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=border,
        cu_seqlens_kv=border,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def longest_document(border_D1: Int32s) -> int:
    """An upper bound on the padded lengths, a power of two: Megatron caches 32 tables of rotary angles by it."""
    return 1 << (int(np.diff(border_D1).max()) - 1).bit_length()
