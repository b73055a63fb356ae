"""Loss and tokens by source against brute force, and the windows that training and evaluation read."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.stream import SourceStream
from launcher.config.schema import RunConfig, StageConfig
from tests.training.shards import write_sources
from tests.training.tiny import SHARES, run_config, stage_config
from tests.training.world import cpu_seams, model, one_rank, stage
from training import batch as training_batch
from training.batch import PADDING, MicroBatch
from training.clocks import Clocks
from training.data import (
    Consumed,
    HeldOutFeed,
    StageData,
    TrainingFeed,
    held_out_windows,
    ledger_from_json,
    ledger_to_json,
)
from training.model import build_model
from training.optimizer import build_optimizer
from training.parallel import Rank
from training.step import Flags, Stepper, Sums, connect, token_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
NUM_SOURCES = len(SHARES)


def place(dp_rank: int = 0, dp_size: int = 1, *, is_first: bool = True, is_last: bool = True) -> Rank:
    return Rank(
        rank=dp_rank, world_size=dp_size, dp_rank=dp_rank, dp_size=dp_size, tp_rank=0, pp_rank=0, cp_rank=0, device=CPU,
        is_first_stage=is_first, is_last_stage=is_last,
    )  # fmt: skip


def batch_of(sources: list[int], *, seq_length: int = 32, seed: int = 0) -> MicroBatch:
    """Random tokens, a row for each of `sources`."""
    tokens = torch.randint(250, (len(sources), seq_length + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(seq_length).expand(len(sources), -1)
    source_B = torch.tensor(sources, dtype=torch.int64)
    loss_mask_BS = (source_B != PADDING)[:, None].expand(-1, seq_length)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], positions, loss_mask_BS, source_B)


# The loss


@given(sources=st.lists(st.integers(PADDING, NUM_SOURCES - 1), min_size=1, max_size=9), seed=st.integers(0, 1000))
def test_token_loss_sums_by_source(sources: list[int], seed: int) -> None:
    loss_BS = torch.rand(len(sources), 5, generator=torch.Generator().manual_seed(seed)) * 9
    total, count, report = token_loss(batch_of(sources, seq_length=5), NUM_SOURCES, loss_BS)
    rows = [(source, value) for source, row in zip(sources, loss_BS.tolist(), strict=True) for value in row]
    counted = [value for source, value in rows if source != PADDING]
    assert float(total) == pytest.approx(math.fsum(counted), rel=1e-5)
    assert int(count) == len(counted)
    assert count.dtype is torch.int32  # megatron adds it up as an integer
    for source in range(NUM_SOURCES):
        values = [value for found, value in rows if found == source]
        assert float(report[source]) == pytest.approx(math.fsum(values), rel=1e-5)
        assert int(report[NUM_SOURCES + source]) == len(values)


def test_token_loss_lets_no_gradient_into_padding() -> None:
    loss_BS = torch.ones(3, 4, requires_grad=True)
    total, _, report = token_loss(batch_of([1, PADDING, 0], seq_length=4), NUM_SOURCES, loss_BS)
    total.backward()
    assert loss_BS.grad.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]
    assert report.dtype is torch.float64
    assert not report.requires_grad


def test_sums() -> None:
    sums = Sums((6.0, 0.0, 3.0), (2, 0, 4))
    assert sums.loss == pytest.approx(1.5)
    assert sums.loss_by_source(["a", "b", "c"]) == {"a": 3.0, "c": 0.75}
    assert sums.tokens_by_source(["a", "b", "c"]) == {"a": 2, "b": 0, "c": 4}
    assert Sums((0.0,), (0,)).loss == 0.0
    assert math.isnan(Sums((math.nan, 1.0), (1, 1)).loss)
    with pytest.raises(ValueError, match="zip"):
        sums.loss_by_source(["a", "b"])


# Whole steps on one rank


@pytest.fixture
def seams() -> Iterator[None]:
    with cpu_seams():
        yield


def stepper_of(config: StageConfig, rank: Rank) -> Stepper:
    chunks = build_model(config, model=model(), seed=7)
    return Stepper(config, chunks=chunks, optimizer=build_optimizer(config, chunks=chunks), rank=rank)


@pytest.fixture
def stepper(seams: None) -> Iterator[Stepper]:
    config = stage()
    with one_rank(config.layout) as rank:
        yield stepper_of(config, rank)


def brute_force(stepper: Stepper, batches: list[MicroBatch]) -> Sums:
    losses, tokens = [0.0] * NUM_SOURCES, [0] * NUM_SOURCES
    for batch in batches:
        with torch.no_grad():
            loss_BS = stepper.chunks[0](batch.tokens_BS, batch.positions_BS, None, labels=batch.labels_BS)
        for source, row in zip(batch.source_B.tolist(), loss_BS.tolist(), strict=True):
            if source != PADDING:
                losses[source] += math.fsum(row)
                tokens[source] += len(row)
    return Sums(tuple(losses), tuple(tokens))


BATCHES = [
    batch_of([0, 2], seed=1),
    batch_of([PADDING, 1], seed=2),
    batch_of([PADDING, PADDING], seed=3),
    batch_of([0], seed=4),
]


def test_evaluation_is_the_brute_force_sum(stepper: Stepper) -> None:
    found, expected = stepper.evaluate(BATCHES, num_microbatches=len(BATCHES)), brute_force(stepper, BATCHES)
    assert found.tokens_N == expected.tokens_N == (64, 32, 32)
    assert found.loss_N == pytest.approx(expected.loss_N, rel=1e-6)
    assert not found.flags.stop
    assert stepper.chunks[0].module.training


def test_training_reports_the_loss_before_its_step(stepper: Stepper) -> None:
    expected = brute_force(stepper, BATCHES)
    before = next(stepper.chunks[0].parameters()).detach().clone()
    found, grad_norm = stepper.train(BATCHES, num_microbatches=len(BATCHES), flags=Flags(stop=True))
    assert found.loss_N == pytest.approx(expected.loss_N, rel=1e-6)
    assert found.tokens_N == expected.tokens_N
    assert found.flags == Flags(stop=True)
    assert grad_norm > 0
    assert not torch.equal(next(stepper.chunks[0].parameters()), before)


def grad_norm_of(stepper: Stepper, batches: list[MicroBatch]) -> Any:
    for group in stepper.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    return stepper.train(batches, num_microbatches=len(batches))[1]


def test_the_gradient_is_of_the_mean_over_tokens(stepper: Stepper) -> None:
    """Neither padding nor how rows are grouped into micro batches changes it; a second copy of the data does not either."""
    rows = [batch_of([source], seed=source) for source in range(3)]
    expected = grad_norm_of(stepper, rows)
    padded = grad_norm_of(stepper, [*rows, batch_of([PADDING], seed=9)])
    twice = grad_norm_of(stepper, rows + rows)
    fields = ("tokens_BS", "labels_BS", "positions_BS", "loss_mask_BS", "source_B")
    grouped = MicroBatch(*(torch.cat([getattr(row, name) for row in rows]) for name in fields))
    assert padded == pytest.approx(expected, rel=1e-5)
    assert twice == pytest.approx(expected, rel=1e-5)
    assert grad_norm_of(stepper, [grouped]) == pytest.approx(expected, rel=1e-5)
    assert grad_norm_of(stepper, rows[:1]) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_seen_before_the_weights_change(value: float, stepper: Stepper) -> None:
    parameters = list(stepper.chunks[0].parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[-1].register_hook(lambda gradient: torch.full_like(gradient, value))
    found = stepper.gradients(BATCHES, num_microbatches=len(BATCHES), flags=Flags())
    assert math.isfinite(found.sums.loss) and not math.isfinite(found.grad_norm)
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


def test_computing_again_comes_to_the_same(stepper: Stepper) -> None:
    """What tells hardware that computed wrong from arithmetic."""
    first, again = (stepper.gradients(BATCHES, num_microbatches=len(BATCHES), flags=Flags()) for _ in range(2))
    assert first == again and first.own_loss == pytest.approx(sum(first.sums.loss_N))


def test_the_update_is_megatrons_own_step(seams: None) -> None:
    """Parted where the norm is known, bit for bit what ChainedOptimizer.step does in one."""
    config = stage(optim=dict(clip_grad=0.1))
    with one_rank(config.layout) as rank:
        parted, whole = stepper_of(config, rank), stepper_of(config, rank)
        norm = parted.train(BATCHES, num_microbatches=len(BATCHES))[1]
        whole.gradients(BATCHES, num_microbatches=len(BATCHES), flags=Flags())
        _, expected, _ = whole.optimizer.step()
        assert norm == expected > 0.1
        pairs = zip(parted.chunks[0].parameters(), whole.chunks[0].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("overlap", [False, True])
def test_connect_sets_what_the_schedules_call(overlap: bool, seams: None) -> None:
    config = stage(layout=dict(overlap_grad_reduce=overlap, overlap_param_gather=overlap))
    with one_rank(config.layout):
        chunks = build_model(config, model=model(), seed=7)
        optimizer = SimpleNamespace(scale_loss=object(), config=SimpleNamespace())
        connect(chunks, optimizer=optimizer, clocks=(clocks := Clocks(CPU)))
    found = chunks[0].module.config
    assert found.finalize_model_grads_func.__name__ == "finalize_model_grads"
    assert found.timers is clocks and optimizer.config.timers is clocks
    assert found.grad_scale_func is optimizer.scale_loss
    assert found.no_sync_func == (chunks[0].no_sync if overlap else None)
    assert found.grad_sync_func is None  # only for virtual pipeline stages
    assert found.param_sync_func is None


# What is read


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("step")
    write_sources(root / "data")
    return root


def feeding(root: Path, **changes: dict[str, Any]) -> tuple[RunConfig, StageConfig]:
    config = run_config(root, stages=[stage_config(**changes)])
    return config, config.stages[0]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (8, 1)])
def test_data_parallel_ranks_share_the_global_batch(micro_batch_size: int, dp_size: int, root: Path) -> None:
    config, settings = feeding(root, layout=dict(micro_batch_size=micro_batch_size))
    data = StageData(config, settings, ledger={})
    for first_sample in (0, 8, 45):
        rows, _ = data.read(first_sample, 8)
        batches = [
            batch
            for rank in range(dp_size)
            for batch in TrainingFeed(data, settings, rank=place(rank, dp_size)).batch(first_sample) or []
        ]
        assert {len(batch.tokens_BS) for batch in batches} == {micro_batch_size}
        assert torch.cat([batch.tokens_BS for batch in batches]).tolist() == rows.tokens.tolist()
        assert torch.cat([batch.labels_BS for batch in batches]).tolist() == rows.labels.tolist()
        assert torch.cat([batch.source_B for batch in batches]).tolist() == rows.source.tolist()
        assert all(torch.equal(batch.positions_BS, torch.arange(32).expand(micro_batch_size, -1)) for batch in batches)


def test_windows_are_what_the_streams_hold(root: Path) -> None:
    config, settings = feeding(root)
    data = StageData(config, settings, ledger={})
    rows, located = data.read(0, 200)
    for tokens, labels, source, offset in zip(rows.tokens, rows.labels, rows.source, located.offset, strict=True):
        assert [*tokens.tolist(), int(labels[-1])] == data.streams[source].read(int(offset), 33).tolist()
        assert labels[:-1].tolist() == tokens[1:].tolist()
    found = np.bincount(rows.source, minlength=3) / len(rows.source)
    assert found == pytest.approx(list(SHARES.values()), abs=0.02)


def test_the_middle_of_a_pipeline_reads_nothing(root: Path) -> None:
    config, settings = feeding(root)
    data = StageData(config, settings, ledger={})
    for first, last in ((False, False), (True, False), (False, True)):
        rank = place(is_first=first, is_last=last)
        held_out = HeldOutFeed(config, settings, rank=rank)
        reads = first or last
        assert (TrainingFeed(data, settings, rank=rank).batch(0) is not None) == reads
        assert (held_out.batches() is not None) == reads
        assert held_out.num_microbatches > 0


def test_the_middle_of_a_pipeline_reads_where_documents_begin(root: Path) -> None:
    """Every stage has attention; a stage that read nothing would let it cross documents."""
    config, settings = feeding(root, stage=dict(reset_attention_mask=True))
    middle, last = place(is_first=False, is_last=False), place(is_first=False)
    data = StageData(config, settings, ledger={})
    for found, expected in zip(
        [*TrainingFeed(data, settings, rank=middle).batch(0), *HeldOutFeed(config, settings, rank=middle).batches()],
        [*TrainingFeed(data, settings, rank=last).batch(0), *HeldOutFeed(config, settings, rank=last).batches()],
        strict=True,
    ):
        assert found.document_BT.tolist() == expected.document_BT.tolist()


def test_context_parallel_ranks_share_the_sequence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes an early and a late chunk; tokens, labels and positions stay together."""
    config, settings = feeding(root)
    data = StageData(config, settings, ledger={})
    whole = TrainingFeed(data, settings, rank=place()).batch(0)[0]
    state = training_batch.get_batch_on_this_cp_rank.__globals__["parallel_state"]
    monkeypatch.setattr(state, "get_context_parallel_world_size", lambda: 2)
    seen = []
    for cp_rank in range(2):
        monkeypatch.setattr(state, "get_context_parallel_rank", lambda cp_rank=cp_rank: cp_rank)
        part = TrainingFeed(data, settings, rank=place()).batch(0)[0]
        positions = part.positions_BS[0].tolist()
        assert positions == ([*range(8), *range(24, 32)] if cp_rank == 0 else [*range(8, 24)])
        assert torch.equal(part.tokens_BS, whole.tokens_BS[:, positions])
        assert torch.equal(part.labels_BS, whole.labels_BS[:, positions])
        assert torch.equal(part.source_B, whole.source_B)
        seen += positions
    assert sorted(seen) == list(range(32))


# The ledger between stages


def test_the_ledger_goes_on_at_the_same_sequence_length(root: Path) -> None:
    """Two stages read what one twice as long would have read, source by source."""
    config, settings = feeding(root)
    first = StageData(config, settings, ledger={})
    second = StageData(config, settings, ledger=first.ledger(96))
    assert second.skipped_tokens == dict.fromkeys("abc", 0)
    counts = {name: consumed.position for name, consumed in first.ledger(96).items()}
    assert sum(counts.values()) == 96
    positions = second.order.windows(0, 96)
    for source, name in enumerate("abc"):
        found = positions.position[positions.source == source]
        assert found.tolist() == list(range(counts[name], counts[name] + len(found)))
    assert sum(c.position for c in second.ledger(96).values()) == 192


@pytest.mark.parametrize("samples", [24, 96, 300])
def test_the_ledger_goes_on_at_another_sequence_length(samples: int, root: Path) -> None:
    """No token is read twice in an epoch, and those that the change leaves out are reported."""
    config, short = feeding(root)
    before = StageData(config, short, ledger={})
    config, long = feeding(root, stage=dict(seq_length=64))
    after = StageData(config, long, ledger=before.ledger(samples))
    read = before.order.windows(0, samples)
    for source, name in enumerate("abc"):
        ours = read.source == source
        start = int(after.order.starts[source])
        order = after.order.orders[source]
        epoch, inside = divmod(start, order.num_windows)
        old = {(int(e), int(o) + t) for e, o in zip(read.epoch[ours], read.offset[ours], strict=True) for t in range(32)}
        rest = np.arange(start, (epoch + 1) * order.num_windows)
        epochs, offsets = order.locate(rest)
        new = {(int(e), int(o) + t) for e, o in zip(epochs, offsets, strict=True) for t in range(64)}
        assert old.isdisjoint(new)
        assert inside < order.num_windows
        # Every token that the short windows reach, in the epochs that have begun on either side of the change.
        reached = {(e, t) for e in range(epoch + bool(inside)) for t in range(before.order.orders[source].num_windows * 32)}
        # The long windows leave the last few tokens of an epoch to no one; that is not a skip.
        tail = (before.order.orders[source].num_windows * 32 - order.num_windows * 64) if inside else 0
        assert after.skipped_tokens[name] == len(reached - old - new) - tail, name
    assert any(after.skipped_tokens.values())


def digest(root: Path, name: str) -> str:
    return SourceStream(root / "data" / name, name=name).digest


def test_a_source_that_is_new_starts_at_its_beginning_and_one_left_out_stays_in_the_ledger(root: Path) -> None:
    config, settings = feeding(root)
    ledger = {"a": Consumed(10, 32, digest(root, "a")), "gone": Consumed(5, 128, "of another time")}
    data = StageData(config, settings, ledger=ledger)
    assert data.order.starts.tolist() == [10, 0, 0]
    after = data.ledger(40)
    assert after["gone"] == ledger["gone"]
    assert after["a"].position - 10 + after["b"].position + after["c"].position == 40
    assert data.ledger(0)["a"] == ledger["a"]


@pytest.mark.parametrize("field", ["ledger", "consumed"])
def test_a_source_prepared_anew_is_refused(field: str, root: Path) -> None:
    """Whether an earlier stage read it or this one did: position 10 would be other text."""
    config, settings = feeding(root)
    row = {"b": Consumed(10, 32, digest(root, "a"))}
    with pytest.raises(DataError, match=r"source b: .* was prepared anew .*restore the shards"):
        StageData(config, settings, **{"ledger": {}, field: row})


def test_the_ledger_survives_a_checkpoint(root: Path) -> None:
    config, settings = feeding(root)
    ledger = StageData(config, settings, ledger={}).ledger(17)
    rows = json.loads(json.dumps(ledger_to_json(ledger)))
    stream = {"windows": "stream", "num_windows": None}
    assert rows["a"] == {"position": ledger["a"].position, "seq_length": 32, "digest": digest(root, "a"), **stream}
    assert ledger_from_json(rows) == ledger


# Held-out windows


@pytest.mark.parametrize(("num_tokens", "max_tokens", "expected"), [
    (0, 256, 0), (1, 256, 0), (32, 256, 0), (33, 256, 1), (64, 256, 1), (65, 256, 2),
    (10_000, 256, 8), (10_000, 255, 7), (10_000, 33, 1), (257, 256, 8), (256, 256, 7), (10_000, 31, 0),
])  # fmt: skip
def test_held_out_windows(num_tokens: int, max_tokens: int, expected: int) -> None:
    config = stage(stage=dict(validation=dict(interval_tokens=1.0, max_tokens=max_tokens)))
    assert held_out_windows(num_tokens, stage=config) == expected


@pytest.mark.parametrize(("dp_size", "layout"), [
    (1, {}), (2, {}), (4, dict(micro_batch_size=2)), (1, dict(micro_batch_size=5)), (1, dict(pp=2, vpp=2, micro_batch_size=5)),
], ids=str)  # fmt: skip
def test_held_out_rows_are_shared_and_padded(dp_size: int, layout: dict[str, int], root: Path) -> None:
    validation = dict(interval_tokens=1.0, max_tokens=160)
    config, settings = feeding(root, layout=layout, stage=dict(validation=validation))
    feeds = [HeldOutFeed(config, settings, rank=place(rank, dp_size)) for rank in range(dp_size)]
    (num_microbatches,) = {feed.num_microbatches for feed in feeds}
    assert num_microbatches % settings.layout.pp == 0
    rows = []
    for feed in feeds:
        batches = feed.batches() or []
        assert [len(batch.tokens_BS) for batch in batches] == [settings.layout.micro_batch_size] * num_microbatches
        for batch in batches:
            rows += zip(batch.source_B.tolist(), batch.tokens_BS.tolist(), batch.labels_BS.tolist(), strict=True)
    real = [row for row in rows if row[0] != PADDING]
    expected = [
        (source, tokens[:-1].tolist(), tokens[1:].tolist())
        for source, stream in enumerate(feeds[0].streams)
        for tokens in (stream.read(index * 32, 33) for index in range(5))
    ]
    assert real == expected
    assert 0 <= len(rows) - len(real) < settings.layout.micro_batch_size * dp_size * settings.layout.pp
