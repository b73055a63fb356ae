"""The contract of the data order: a bijection, exact from anywhere, evenly spread, well shuffled."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.order import ROUNDS, SLOTS, Blend, SourceOrder, StageOrder, carry_over, permute, round_keys

BATCHES = (1, 2, 7, 64, 1000, 5760)


def source_order(num_tokens, *, name="web", seq_length=8, chunk_tokens=32, group_tokens=128, seed=1):
    return SourceOrder(
        name=name,
        num_tokens=num_tokens,
        seq_length=seq_length,
        chunk_tokens=chunk_tokens,
        group_tokens=group_tokens,
        seed=seed,
    )


def epoch_offsets(order, epoch=0):
    epochs, offsets = order.locate(np.arange(order.num_windows, dtype=np.int64) + epoch * order.num_windows)
    assert (epochs == epoch).all()
    return offsets


def tokens_read(offsets, seq_length):
    """Every token that is the input of a window, in reading order; its label is the next token."""
    return (offsets[:, None] + np.arange(seq_length)).ravel()


def random_shares(count, *, seed=0):
    weights = np.random.default_rng(seed).lognormal(sigma=1.5, size=count)
    return (weights / weights.sum()).tolist()


def stage_order(*, sizes=(977, 20_011, 300, 9), shares=(0.3, 0.5, 0.15, 0.05), starts=None, seed=3, **geometry):
    orders = [source_order(size, name=f"source{i}", seed=seed, **geometry) for i, size in enumerate(sizes)]
    return StageOrder(orders=orders, blend=Blend(shares, seed=seed), starts=starts or [0] * len(sizes))


def fields(windows):
    return np.stack([windows.source, windows.epoch, windows.offset, windows.position], axis=1)


@st.composite
def geometries(draw):
    """Lengths of which one divides the other, a chunk that both divide, and a source from one window to many groups."""
    short, factor = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 4]))
    chunk = short * factor * draw(st.integers(1, 5))
    group = draw(st.integers(1, 6 * chunk))
    num_tokens = draw(st.integers(short * factor + 1, 40 * chunk + short * factor + 1))
    return {"num_tokens": num_tokens, "chunk_tokens": chunk, "group_tokens": group, "seq_length": short}, short * factor


# The keyed permutation


def permuted(index, *, size, key):
    keys = np.broadcast_to(key[:, None], (ROUNDS, len(index)))
    return permute(index, size=np.full(len(index), size, dtype=np.int64), keys=keys)


@pytest.mark.parametrize("size", [*range(1, 18), 31, 61, 63, 64, 65, 127, 1009, 4095, 4096, 4097, 65_537, 2**18 + 1])
def test_permutation_is_a_bijection(size):
    for seed in range(5):
        values = permuted(np.arange(size), size=size, key=round_keys(seed, "web", 0, 0))
        assert np.array_equal(np.sort(values), np.arange(size))


@pytest.mark.parametrize("size", [2**32 - 1, 2**32, 2**32 + 1, 2**40 + 15, 2**45 - 55, 2**45])
def test_large_permutation_keeps_values_apart_and_inside(size):
    ends = np.concatenate([np.arange(50_000), np.arange(size - 50_000, size)])
    values = permuted(ends, size=size, key=round_keys(1, "web", 0, 0))
    assert len(np.unique(values)) == len(ends)
    assert values.min() >= 0
    assert values.max() < size


def test_elements_of_one_call_are_permuted_independently():
    sizes = np.array([1, 5, 5, 1000, 2**40], dtype=np.int64)
    index = np.array([0, 4, 3, 999, 2**39], dtype=np.int64)
    keys = np.stack([round_keys(1, "web", 0, group) for group in range(5)], axis=1)
    alone = [int(permuted(index[i : i + 1], size=int(sizes[i]), key=keys[:, i])[0]) for i in range(5)]
    assert permute(index, size=sizes, keys=keys).tolist() == alone


def test_an_index_past_its_size_stays():
    values = permuted(np.arange(10), size=6, key=round_keys(1, "web", 0, 0))
    assert values[6:].tolist() == [6, 7, 8, 9]
    assert sorted(values[:6].tolist()) == list(range(6))


def chi_square_p(counts, expected):
    """Upper tail of chi-square, by Wilson and Hilferty's cube root."""
    freedom = len(counts) - 1
    cube = (((counts - expected) ** 2 / expected).sum() / freedom) ** (1 / 3)
    return 0.5 * math.erfc((cube - 1 + 2 / (9 * freedom)) / math.sqrt(4 / (9 * freedom)))


def neighbour_gaps(size, *, seed, samples=20_000):
    """Gaps modulo size between neighbours; of one permutation, or of enough epochs of a small one."""
    take = min(size, samples)
    epochs = -(-samples // take)
    keys = np.repeat(np.stack([round_keys(seed, "web", epoch, 0) for epoch in range(epochs)], axis=1), take, axis=1)
    index = np.tile(np.arange(take), epochs)
    values = permute(index, size=np.full(len(index), size, dtype=np.int64), keys=keys).reshape(epochs, take)
    return (np.diff(values, axis=1) % size).ravel()


@pytest.mark.parametrize("size", [16, 17, 31, 64, 65, 257, 1009, 4096, 65_537, 2**20, 2**24 + 1, 2**32, 2**32 + 1, 2**33])
def test_neighbours_have_no_structure(size):
    bins = min(size - 1, 64)
    borders = np.array([-(-i * (size - 1) // bins) for i in range(bins + 1)])
    for seed in range(20):
        gaps = neighbour_gaps(size, seed=seed)
        counts = np.bincount(np.searchsorted(borders, gaps - 1, side="right") - 1, minlength=bins)
        assert chi_square_p(counts, len(gaps) * np.diff(borders) / (size - 1)) > 0.001


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_order_of_a_tiny_source_is_as_likely(size):
    epochs = 12_000
    keys = np.repeat(np.stack([round_keys(1, "web", epoch, 0) for epoch in range(epochs)], axis=1), size, axis=1)
    values = permute(np.tile(np.arange(size), epochs), size=np.full(epochs * size, size, dtype=np.int64), keys=keys)
    counts = np.array(list(Counter(map(tuple, values.reshape(epochs, size).tolist())).values()))
    assert len(counts) == math.factorial(size)
    assert chi_square_p(counts, epochs / len(counts)) > 0.001


# One source


@settings(deadline=None, max_examples=150)
@given(geometries(), st.integers(0, 5), st.integers(0, 2**40))
def test_an_epoch_reads_every_token_once(geometry, epoch, seed):
    order = source_order(**geometry[0], seed=seed)
    tokens = tokens_read(epoch_offsets(order, epoch), order.seq_length)
    assert np.array_equal(np.sort(tokens), np.arange(len(tokens)))
    assert 0 <= order.num_tokens - 1 - len(tokens) < order.seq_length  # the last token is only a label


@settings(deadline=None, max_examples=50)
@given(geometries(), st.integers(0, 2**20), st.randoms(use_true_random=False))
def test_positions_of_one_call_may_lie_anywhere(geometry, far, random):
    order = source_order(**geometry[0])
    positions = [random.randrange(4 * order.num_windows) + random.choice([0, far]) for _ in range(20)]
    together = np.stack(order.locate(np.array(positions, dtype=np.int64)), axis=1)
    alone = [np.concatenate(order.locate(np.array([p], dtype=np.int64))) for p in positions]
    assert np.array_equal(together, np.array(alone))


def test_epochs_seeds_and_names_have_orders_of_their_own():
    orders = [source_order(2001), source_order(2001, seed=2), source_order(2001, name="code")]
    offsets = [tuple(epoch_offsets(order, epoch)) for order in orders for epoch in range(3)]
    assert len(set(offsets)) == 9


def test_neighbours_come_from_different_chunks():
    order = source_order(2**20 + 1, seq_length=8, chunk_tokens=256, group_tokens=2**16)
    chunks = epoch_offsets(order) // 256
    assert np.mean(np.diff(chunks) == 0) < 2 / order.group_chunks


def test_a_source_of_more_than_2_to_32_windows():
    order = source_order(2**50 + 77, seq_length=2**10, chunk_tokens=2**17, group_tokens=2**31)
    positions = np.concatenate([np.arange(5000), np.arange(order.num_windows - 5000, order.num_windows + 5000)])
    epochs, offsets = order.locate(positions)
    assert len(set(zip(epochs.tolist(), offsets.tolist(), strict=True))) == len(positions)
    assert offsets.max() + order.seq_length < order.num_tokens
    assert epochs.tolist() == [0] * 10_000 + [1] * 5000


@settings(deadline=None, max_examples=100)
@given(geometries(), st.integers(0, 3))
def test_borders_are_where_groups_begin(geometry, epoch):
    order = source_order(**geometry[0])
    other = source_order(**{**geometry[0], "seq_length": geometry[1]})
    assert order.num_groups == other.num_groups
    border = epoch * order.num_groups
    for position in range(epoch * order.num_windows, (epoch + 1) * order.num_windows + 1):
        while order.position_of_border(border) < position:
            border += 1
        assert order.border_after(position) == border
    assert border == (epoch + 1) * order.num_groups
    assert order.position_of_border(border) == (epoch + 1) * order.num_windows


def test_epochs_count_windows():
    order = source_order(2001)
    assert order.epochs(0) == 0
    assert order.epochs(order.num_windows) == 1
    assert order.epochs(order.num_windows * 5 // 2) == 2.5


# The blend


@pytest.mark.parametrize("count", [1, 2, 3, 50, 500])
def test_slots_follow_the_shares(count):
    shares = random_shares(count)
    slots = Blend(shares, seed=1).slots
    assert slots.sum() == SLOTS
    assert np.abs(slots - np.array(shares) * SLOTS).max() <= 1


def test_a_tiny_share_keeps_a_slot():
    slots = Blend([1 - 2e-12, 1e-12, 1e-12], seed=1).slots
    assert slots.tolist() == [SLOTS - 2, 1, 1]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 3000), st.integers(0, 300), st.integers(0, 2**64))
def test_positions_are_counts_of_earlier_samples(count, first, batch, seed):
    blend = Blend(random_shares(count, seed=seed), seed=seed)
    source, position = blend.assign(first, batch)
    whole, _ = blend.assign(0, first + batch)
    seen = Counter(whole[:first].tolist())
    assert blend.counts(first).tolist() == [seen[i] for i in range(count)]
    for s, p in zip(source.tolist(), position.tolist(), strict=True):
        assert p == seen[s]
        seen[s] += 1
    assert source.tolist() == whole[first:].tolist()


def test_a_blend_is_exact_and_periodic_past_2_to_32_samples():
    blend = Blend(random_shares(20), seed=5)
    assert np.array_equal(blend.counts(SLOTS), blend.slots)
    for turns in (1, 3, 2**20):
        near, far = blend.assign(12_345, 500), blend.assign(12_345 + turns * SLOTS, 500)
        assert np.array_equal(near[0], far[0])
        assert np.array_equal(near[1] + turns * blend.slots[near[0]], far[1])


@pytest.mark.parametrize("count", [5, 17, 50, 200, 500])
@pytest.mark.parametrize("batch", [256, 1024, 5760])
def test_every_batch_has_every_source_in_its_share(count, batch):
    shares = np.array(random_shares(count, seed=count))
    blend = Blend(shares.tolist(), seed=count)
    for first in (0, 10 * batch, 10**6 * batch):
        sources, _ = blend.assign(first, 20 * batch)
        for start in range(0, 20 * batch, batch):
            counts = np.bincount(sources[start : start + batch], minlength=count)
            assert np.abs(counts - batch * shares).max() < 4


# Stages


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(9, 3000), min_size=1, max_size=6),
    st.integers(0, 500),
    st.integers(1, 2000),
    st.integers(0, 2**32),
)
def test_reads_of_a_source_are_distinct_windows_in_sequence(sizes, first, count, seed):
    stage = stage_order(sizes=sizes, shares=random_shares(len(sizes), seed=seed), starts=list(range(len(sizes))), seed=seed)
    rows = fields(stage.windows(first, count))
    before = stage.positions(first)
    for source, order in enumerate(stage.orders):
        epochs, offsets, positions = rows[rows[:, 0] == source].T[1:]
        assert np.array_equal(positions, before[source] + np.arange(len(positions)))
        assert np.array_equal(epochs, positions // order.num_windows)
        assert len(set(zip(epochs.tolist(), offsets.tolist(), strict=True))) == len(offsets)
        assert (offsets + order.seq_length < order.num_tokens).all()
    assert np.array_equal(stage.positions(first + count) - before, np.bincount(rows[:, 0], minlength=len(sizes)))


def test_first_epoch_through_the_blend_is_whole():
    stage = stage_order()
    rows = fields(stage.windows(0, 5000))
    for source, order in enumerate(stage.orders[:3:2]):
        offsets = rows[(rows[:, 0] == 2 * source) & (rows[:, 1] == 0)][:, 2]
        assert np.array_equal(np.sort(offsets), np.arange(order.num_windows) * order.seq_length)


@pytest.mark.parametrize("batch", BATCHES)
def test_order_does_not_depend_on_the_batch_size_or_on_history(batch):
    run = fields(stage_order().windows(0, 6000))
    for first in range(0, 6000 - batch + 1, max(batch, 997 // batch * batch)):
        assert np.array_equal(fields(stage_order().windows(first, batch)), run[first : first + batch])


def test_no_samples():
    stage = stage_order()
    assert len(stage.windows(10, 0).source) == 0
    assert stage.positions(0).tolist() == [0, 0, 0, 0]


def test_the_ledger_through_phases_is_a_count():
    """Three mixtures one after another: each source goes on where the last left it, and no window is skipped or read again."""
    starts, seen = [0, 0, 0, 0], []
    for shares, samples in [((0.3, 0.5, 0.15, 0.05), 801), ((0.7, 0.1, 0.1, 0.1), 333), ((0.25,) * 4, 1500)]:
        stage = stage_order(shares=shares, starts=starts)
        seen.append(fields(stage.windows(0, samples)))
        starts = stage.positions(samples).tolist()
    rows = np.concatenate(seen)
    assert starts == np.bincount(rows[:, 0], minlength=4).tolist()
    for source in range(4):
        assert np.array_equal(rows[rows[:, 0] == source][:, 3], np.arange(starts[source]))


def test_golden():
    """The order of a mixture, fixed for ever. A change here reshuffles every run under way: it needs a new format version."""
    sizes = (10**12, 3 * 10**9, 40_000_001, 5000, 123_457)
    stage = stage_order(
        sizes=sizes,
        shares=(0.6, 0.25, 0.1, 0.01, 0.04),
        starts=[10**6, 0, 5, 0, 17],
        seed=1234,
        seq_length=4096,
        chunk_tokens=131_072,
        group_tokens=2**31,
    )
    digest = hashlib.sha256(fields(stage.windows(0, 10_000)).astype("<i8").tobytes()).hexdigest()
    assert digest == "095c258af129f365515b667a5cef32c887b8e8979662e92bd87804c9d1360f78"


# A new sequence length


@settings(deadline=None, max_examples=150)
@given(geometries(), st.booleans(), st.integers(0, 2), st.floats(0, 1))
def test_a_new_sequence_length_rereads_nothing_within_an_epoch(geometry, grow, epoch, part):
    lengths = (geometry[0]["seq_length"], geometry[1])
    before, after = (source_order(**{**geometry[0], "seq_length": s}) for s in (lengths if grow else lengths[::-1]))
    position = epoch * before.num_windows + round(part * before.num_windows)
    start, skipped = carry_over(before, position, after)
    reached = position // before.num_windows  # the epoch that the source is in, one further if it just ended
    old = epoch_offsets(before, reached)[: position - reached * before.num_windows]
    new = epoch_offsets(after, reached)[max(0, start - reached * after.num_windows) :]
    read = np.concatenate([tokens_read(old, before.seq_length), tokens_read(new, after.seq_length)])
    assert len(np.unique(read)) == len(read)
    assert start >= reached * after.num_windows
    if before.seq_length == after.seq_length:
        assert (start, skipped) == (position, 0)
    else:
        remainder = before.num_tokens - 1 - len(read) - skipped  # what no window of either length reads: < S at the end
        assert 0 <= remainder < max(lengths)


def test_tokens_skipped_by_a_new_length_are_those_to_the_border():
    before = source_order(32 * 16 + 1, seq_length=8)  # four groups of four chunks of four windows
    after = source_order(32 * 16 + 1, seq_length=16)
    assert [carry_over(before, position, after) for position in (0, 1, 15, 16, 17, 63, 64, 65)] == [
        (0, 0), (8, 120), (8, 8), (8, 0), (16, 120), (32, 8), (32, 0), (40, 120),
    ]  # fmt: skip


def test_a_source_below_a_group_goes_on_with_its_next_epoch():
    before, after = source_order(100, seq_length=8), source_order(100, seq_length=16)
    assert carry_over(before, 5, after) == (after.num_windows, (before.num_windows - 5) * 8)


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_tokens": 30}, ["web", "30", "8", "multiple", "32"]),
        ({"num_tokens": 8}, ["web", "8 tokens", "needs 9"]),
        ({"num_tokens": 0}, ["web", "0 tokens"]),
        ({"seq_length": 0}, ["web", "seq_length 0"]),
        ({"group_tokens": -1}, ["web", "group_tokens -1"]),
    ],
)
def test_refused_sources(change, words):
    with pytest.raises(DataError) as error:
        source_order(**{"num_tokens": 1000, **change})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "shares", [[], [0.5, float("nan")], [float("inf")], [1.0, 0.0], [1.5, -0.5], [0.5, 0.4], [0.5, 0.500002]]
)
def test_refused_shares(shares):
    with pytest.raises(DataError, match=r"share|sum"):
        Blend(shares, seed=1)


def test_shares_may_miss_1_by_rounding():
    assert Blend([0.3333333, 0.3333333, 0.3333333], seed=1).slots.sum() == SLOTS


def test_refused_stages():
    orders = [source_order(1000), source_order(1000, name="code", seq_length=16)]
    with pytest.raises(DataError, match=r"seq_lengths \[8, 16\]"):
        StageOrder(orders=orders, blend=Blend([0.5, 0.5], seed=1), starts=[0, 0])
    with pytest.raises(DataError, match="1 source orders, 2 shares and 1 starts"):
        StageOrder(orders=orders[:1], blend=Blend([0.5, 0.5], seed=1), starts=[0])
    with pytest.raises(DataError, match="start -1"):
        StageOrder(orders=orders[:1], blend=Blend([1.0], seed=1), starts=[-1])


def test_refused_positions():
    with pytest.raises(DataError, match="first sample -1"):
        stage_order().windows(-1, 5)
    with pytest.raises(DataError, match="position -2"):
        source_order(1000).locate(np.array([3, -2]))


@pytest.mark.parametrize("change", [{"num_tokens": 1001}, {"name": "code"}, {"seed": 2}, {"group_tokens": 64}])
def test_a_position_is_not_carried_into_another_order(change):
    with pytest.raises(DataError, match=f"{next(iter(change))} .*would go on with"):
        carry_over(source_order(1000), 7, source_order(**{"num_tokens": 1000, **change}))
