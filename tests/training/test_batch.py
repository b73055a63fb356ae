"""Rows of a token stream, what of them counts, and the micro batches made of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state

from data_prep.errors import DataError
from tests.training.world import cpu_seams, model, one_rank, stage
from training import batch
from training.batch import PADDING, MicroBatch, Rows, micro_batches, stream_rows
from training.errors import exit_class
from training.model import build_model
from training.optimizer import build_optimizer
from training.step import Stepper, token_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CPU, EOD = torch.device("cpu"), 7
NUM_SOURCES = 3
WINDOWS = st.integers(1, 12).flatmap(
    lambda length: st.lists(
        st.tuples(st.integers(PADDING, NUM_SOURCES - 1), st.lists(st.integers(4, 9), min_size=length, max_size=length)),
        min_size=1,
        max_size=5,
    )
)


def rows_of(rows: list[tuple[int, list[int]]], *, masks: bool = True, **changes: Any) -> Rows:
    windows = np.array([[*window, EOD] for _, window in rows], dtype=np.int32)
    wanted = dict(eod_id=EOD, reset_attention_mask=masks, eod_mask_loss=masks) | changes
    return stream_rows(windows, source=np.array([source for source, _ in rows], dtype=np.int32), **wanted)


@given(rows=WINDOWS, reset=st.booleans(), eod_mask_loss=st.booleans())
def test_stream_rows(rows: list[tuple[int, list[int]]], reset: bool, eod_mask_loss: bool) -> None:
    found = rows_of(rows, reset_attention_mask=reset, eod_mask_loss=eod_mask_loss)
    assert found.tokens.tolist() == [window for _, window in rows]
    assert found.labels.tolist() == [[*window[1:], EOD] for _, window in rows]
    assert found.source.tolist() == [source for source, _ in rows]
    assert (found.document is not None) == reset
    for row, (source, window) in enumerate(rows):
        for place, token in enumerate(window):
            counts = source != PADDING and not (eod_mask_loss and token == EOD)
            assert found.counted[row, place] == found.is_in_loss[row, place] == counts
            if reset:
                assert found.document[row, place] == (window[:place].count(EOD) if source != PADDING else 0)


def test_a_row_of_padding_is_one_document() -> None:
    """Zero may be the EOD; a document a token would be padded to many times its length on GPUs."""
    rows = rows_of([(PADDING, [0, 0, 0]), (1, [0, 0, 0])], eod_id=0)
    assert rows.document.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert rows.counted.tolist() == [[False] * 3, [False] * 3]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_micro_batches(micro_batch_size: int) -> None:
    rows = rows_of([(0, [5, EOD, 6, 8]), (2, [4, 5, 6, EOD]), (PADDING, [0, 0, 0, 0])])
    config = stage(layout=dict(micro_batch_size=micro_batch_size), stage=dict(reset_position_ids=True))
    batches = micro_batches(rows, stage=config, device=CPU)
    assert [len(found.source_B) for found in batches] == {1: [1, 1, 1], 2: [2, 1], 5: [3]}[micro_batch_size]
    whole = {name: torch.cat([getattr(found, name) for found in batches]).tolist() for name in TENSORS}
    assert whole == dict(
        tokens_BS=rows.tokens.tolist(),
        labels_BS=rows.labels.tolist(),
        positions_BS=[[0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]],
        loss_mask_BS=[[True, False, True, True], [True, True, True, False], [False] * 4],
        source_B=[0, 2, PADDING],
        document_BT=[[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
    )
    dtypes = {found.tokens_BS.dtype for found in batches} | {found.labels_BS.dtype for found in batches}
    assert dtypes == {torch.int64}
    assert all(found.packed is None for found in batches)


TENSORS = ("tokens_BS", "labels_BS", "positions_BS", "loss_mask_BS", "source_B", "document_BT")


def test_without_masks_there_are_no_documents() -> None:
    rows = rows_of([(0, [5, EOD, 6, 8])], masks=False)
    (found,) = micro_batches(rows, stage=stage(stage=dict(reset_position_ids=True)), device=CPU)
    assert found.document_BT is None
    assert found.packed is None
    assert found.positions_BS.tolist() == [[0, 1, 2, 3]]
    assert found.loss_mask_BS.all()


@pytest.mark.parametrize("packed", [False, True])
def test_context_parallel_ranks_share_what_counts(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and loss mask stay together, no label is counted twice, and every rank knows all documents."""
    tokens = np.random.default_rng(3).integers(4, 10, size=(6, 32)).tolist()
    rows = rows_of(list(zip([0, 1, 2, PADDING, 1, 0], tokens, strict=True)))
    monkeypatch.setattr(batch, "is_packed", lambda _: packed)
    counted = torch.zeros(NUM_SOURCES)
    seen: list[tuple[int, int, int]] = []
    for cp_rank in range(2):
        monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 2)
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda cp_rank=cp_rank: cp_rank)
        for row, found in enumerate(micro_batches(rows, stage=stage(layout=dict(cp=2)), device=CPU)):
            counted += token_loss(found, NUM_SOURCES, torch.zeros(found.tokens_BS.shape))[2][NUM_SOURCES:]
            pairs = torch.stack([found.tokens_BS, found.labels_BS])[:, found.loss_mask_BS]
            seen += [(row, *pair) for pair in pairs.T.tolist()]
            if not packed:
                assert found.document_BT.tolist() == rows.document[row : row + 1].tolist()
    expected = [int(rows.counted[rows.source == source].sum()) for source in range(NUM_SOURCES)]
    assert counted.tolist() == expected
    row_of, place = np.nonzero(rows.counted)
    assert sorted(seen) == sorted(zip(row_of, rows.tokens[row_of, place], rows.labels[row_of, place], strict=True))


def test_packed_micro_batches_are_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "is_packed", lambda _: True)
    config = stage(layout=dict(micro_batch_size=2))
    with pytest.raises(DataError, match=r"layout\.micro_batch_size: found 2; .* Fix: layout\.micro_batch_size=1") as caught:
        micro_batches(rows_of([(0, [5, 6]), (1, [5, 6])]), stage=config, device=CPU)
    assert exit_class(caught.value).name == "REFUSED"


# The loss


@given(rows=WINDOWS, seed=st.integers(0, 1000))
def test_loss_and_gradient_are_of_the_counted_labels(rows: list[tuple[int, list[int]]], seed: int) -> None:
    made = rows_of(rows)
    (found,) = micro_batches(made, stage=stage(layout=dict(micro_batch_size=5)), device=CPU)
    loss_BS = torch.rand(made.tokens.shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    total, count, report = token_loss(found, NUM_SOURCES, loss_BS)
    total.backward()
    assert loss_BS.grad.tolist() == made.counted.astype(float).tolist()
    assert int(count) == made.counted.sum()
    for source in range(NUM_SOURCES):
        mine = made.counted & (made.source == source)[:, None]
        assert int(report[NUM_SOURCES + source]) == mine.sum()
        assert float(report[source]) == pytest.approx(float(loss_BS.detach()[torch.from_numpy(mine)].sum()), rel=1e-5)


@pytest.fixture
def stepper() -> Iterator[Stepper]:
    config = stage()
    with cpu_seams(), one_rank(config.layout) as rank:
        chunks = build_model(config, model=model(), seed=7)
        yield Stepper(config, chunks=chunks, optimizer=build_optimizer(config, chunks=chunks), rank=rank)


def gradients(stepper: Stepper, batches: list[MicroBatch]) -> list[torch.Tensor]:
    for group in stepper.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    stepper.train(batches, num_microbatches=len(batches))
    return [parameter.main_grad.clone() for parameter in stepper.chunks[0].parameters()]


def test_labels_outside_of_the_mask_move_no_weight(stepper: Stepper) -> None:
    """Whatever they are, and even where nothing at all is counted."""
    tokens = np.random.default_rng(5).integers(0, 10, size=(1, 32)).tolist()
    (one,) = micro_batches(rows_of([(1, tokens[0])]), stage=stage(), device=CPU)
    assert 0 < int(one.loss_mask_BS.sum()) < 32
    other = MicroBatch(**(vars(one) | dict(labels_BS=torch.where(one.loss_mask_BS, one.labels_BS, 0))))
    assert not torch.equal(one.labels_BS, other.labels_BS)
    found, expected = gradients(stepper, [other]), gradients(stepper, [one])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(gradient.any() for gradient in found)
    nothing = MicroBatch(**(vars(one) | dict(loss_mask_BS=torch.zeros_like(one.loss_mask_BS))))
    assert not any(gradient.any() for gradient in gradients(stepper, [nothing]))
