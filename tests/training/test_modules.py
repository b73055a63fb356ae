"""Core attention on CPU ranks: who sees whom, and that a document is as if it stood alone."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.thd import as_on_gpus
from tests.training.world import cpu_seams, model, one_rank, stage
from training.batch import MicroBatch, micro_batches, stream_rows
from training.model import build_model
from training.modules import causal_mask, query_positions, same_document

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EOD, SEQ_LENGTH = 249, 32
MASKS = dict(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)


@given(size=st.integers(1, 4), half=st.integers(1, 4), data=st.data())
def test_a_query_sees_its_own_document_up_to_itself(size: int, half: int, data: st.DataObject) -> None:
    """All ranks together are the brute-force mask over the whole row."""
    length = 2 * half * size
    documents = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=3))
    document_BT = torch.tensor(documents).cumsum(dim=1)
    seen = torch.zeros(len(documents), length, length, dtype=torch.bool)
    for rank in range(size):
        position_S = query_positions(2 * half, rank=rank, size=size)
        mask_BST = causal_mask(position_S, num_keys=length) & same_document(document_BT, position_S=position_S)
        seen[:, position_S] |= mask_BST
    for row, document in enumerate(document_BT.tolist()):
        expected = [[key <= query and document[key] == document[query] for key in range(length)] for query in range(length)]
        assert seen[row].tolist() == expected


@pytest.fixture
def seams() -> Iterator[None]:
    with cpu_seams():
        yield


def windows() -> np.ndarray:
    """Two rows: documents of lengths 1, 6, 12 and 13; and one document that does not end."""
    tokens = np.random.default_rng(2).integers(0, 240, size=(2, SEQ_LENGTH + 1)).astype(np.int32)
    tokens[0, [0, 6, 18]] = EOD
    return tokens


def batches_of(tokens: np.ndarray, *, micro_batch_size: int = 1) -> list[MicroBatch]:
    source = np.zeros(len(tokens), dtype=np.int32)
    rows = stream_rows(tokens, source=source, eod_id=EOD, reset_attention_mask=True, eod_mask_loss=True)
    config = stage(stage=MASKS, layout=dict(micro_batch_size=micro_batch_size))
    return micro_batches(rows, stage=config, device=torch.device("cpu"))


def losses(batches: list[MicroBatch], *, recompute: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every token, and the norm of the gradient of their sum."""
    config = stage(stage=MASKS, layout=dict(recompute=recompute))
    with one_rank(config.layout):
        (chunk,) = build_model(config, model=model(), seed=7)
        chunk.zero_grad_buffer()
        found = [
            chunk(b.tokens_BS, b.positions_BS, b.document_BT, labels=b.labels_BS, packed_seq_params=b.packed) for b in batches
        ]
        loss = torch.cat([loss.flatten() for loss in found])
        loss.sum().backward()
        return loss.detach(), torch.stack([parameter.main_grad.norm() for parameter in chunk.parameters()])


def test_a_document_in_a_row_is_as_if_alone(seams: None) -> None:
    """Rotary positions are relative, so that where in the row it stands does not matter."""
    row = windows()[:1]
    found, norms = losses(batches_of(row))
    borders = [0, 1, 7, 19, SEQ_LENGTH]
    alone = [batches_of(row[:, start : end + 1])[0] for start, end in pairwise(borders)]
    expected, norms_alone = losses(alone)
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)
    assert torch.allclose(norms, norms_alone, rtol=1e-4)
    whole, _ = losses([MicroBatch(**(vars(batches_of(row)[0]) | dict(document_BT=None)))])
    assert torch.allclose(whole[:1], found[:1], atol=1e-5)
    assert not torch.allclose(whole[1:], found[1:], atol=1e-2)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_rows_of_a_micro_batch_have_their_own_documents(recompute: str, seams: None) -> None:
    together, norms = losses(batches_of(windows(), micro_batch_size=2), recompute=recompute)
    apart, norms_apart = losses(batches_of(windows()))
    assert torch.allclose(together, apart, atol=1e-5, rtol=0)
    assert torch.allclose(norms, norms_apart, rtol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_packed_rows_compute_the_same(recompute: str, seams: None) -> None:
    """Megatron's way for packed rows (rotary positions from each document's start, a batch squeezed out) with our borders."""
    expected, norms = losses(batches_of(windows()))
    with as_on_gpus():
        with one_rank(stage().layout):
            batches = batches_of(windows())
        assert [batch.packed.cu_seqlens_q.tolist() for batch in batches] == [[0, 1, 7, 19, 32], [0, 32]]
        found, norms_packed = losses(batches, recompute=recompute)
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)
    assert torch.allclose(norms_packed, norms, rtol=1e-4)
