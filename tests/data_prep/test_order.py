"""The contract of the data order: a bijection, exact from anywhere, evenly spread, well shuffled.

What is arithmetic in the code is counted one by one here."""

import hashlib
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.order import (
    GOLDEN_STEP,
    ROUNDS,
    SLOTS,
    Blend,
    Schedule,
    SourceOrder,
    StageOrder,
    carry_over,
    permute,
    quantise,
    round_keys,
)

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


def blend_of(shares, *, seed):
    return Blend(quantise(shares), seed=seed)


def stage_order(*, sizes=(977, 20_011, 300, 9), shares=(0.3, 0.5, 0.15, 0.05), phases=None, starts=None, seed=3, **geometry):
    """`phases`: (first sample, shares) of each; without it `shares` hold throughout."""
    orders = [source_order(size, name=f"source{i}", seed=seed, **geometry) for i, size in enumerate(sizes)]
    schedule = Schedule([(start, quantise(row)) for start, row in phases or [(0, shares)]], seed=seed)
    return StageOrder(orders=orders, schedule=schedule, starts=starts or [0] * len(sizes))


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
    slots = blend_of(shares, seed=1).slots
    assert slots.sum() == SLOTS
    assert np.abs(slots - np.array(shares) * SLOTS).max() <= 1


def test_a_tiny_share_keeps_a_slot():
    slots = blend_of([1 - 2e-12, 1e-12, 1e-12], seed=1).slots
    assert slots.tolist() == [SLOTS - 2, 1, 1]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 3000), st.integers(0, 300), st.integers(0, 2**64))
def test_positions_are_counts_of_earlier_samples(count, first, batch, seed):
    blend = blend_of(random_shares(count, seed=seed), seed=seed)
    source, position = blend.assign(first, batch)
    whole, _ = blend.assign(0, first + batch)
    seen = Counter(whole[:first].tolist())
    assert blend.counts(first).tolist() == [seen[i] for i in range(count)]
    for s, p in zip(source.tolist(), position.tolist(), strict=True):
        assert p == seen[s]
        seen[s] += 1
    assert source.tolist() == whole[first:].tolist()


def test_a_blend_is_exact_and_periodic_past_2_to_32_samples():
    blend = blend_of(random_shares(20), seed=5)
    assert np.array_equal(blend.counts(SLOTS), blend.slots)
    for turns in (1, 3, 2**20):
        near, far = blend.assign(12_345, 500), blend.assign(12_345 + turns * SLOTS, 500)
        assert np.array_equal(near[0], far[0])
        assert np.array_equal(near[1] + turns * blend.slots[near[0]], far[1])


@pytest.mark.parametrize("count", [5, 17, 50, 200, 500])
@pytest.mark.parametrize("batch", [256, 1024, 5760])
def test_every_batch_has_every_source_in_its_share(count, batch):
    shares = np.array(random_shares(count, seed=count))
    blend = blend_of(shares.tolist(), seed=count)
    for first in (0, 10 * batch, 10**6 * batch):
        sources, _ = blend.assign(first, 20 * batch)
        for start in range(0, 20 * batch, batch):
            counts = np.bincount(sources[start : start + batch], minlength=count)
            assert np.abs(counts - batch * shares).max() < 4


def test_a_share_of_0_has_no_slots_and_is_never_read():
    blend = blend_of([0.0, 0.75, 0.0, 0.25, 0.0], seed=2)
    assert blend.slots.tolist() == [0, 3 * SLOTS // 4, 0, SLOTS // 4, 0]
    source, _ = blend.assign(0, 20_000)
    assert set(source.tolist()) == {1, 3}
    assert blend.counts(2**40)[[0, 2, 4]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("batch", [256, 512, 1024, 1536, 5760])
def test_no_source_of_any_share_can_be_4_samples_off_in_a_batch(batch):
    """Of all arcs of slots that a source can have, the one that its batch misses the most; where a batch begins only turns
    the circle."""
    slot = np.sort(np.arange(batch, dtype=np.uint64) * np.uint64(GOLDEN_STEP) % np.uint64(SLOTS)).astype(np.float64)
    excess = np.arange(batch) - batch * (slot / SLOTS)
    assert excess.max() - excess.min() + 1 < 4


def test_a_thousand_sources_of_seven_orders_of_magnitude():
    weights = 10 ** np.random.default_rng(0).uniform(-7, 0, size=1000)
    weights[:5] = 1e-7
    shares = weights / weights.sum()
    slots = quantise(shares.tolist())
    blend = Blend(slots, seed=9)
    assert sum(slots) == SLOTS
    assert np.abs(np.array(slots) - shares * SLOTS).max() <= 1
    assert min(slots) >= 1
    assert blend.counts(SLOTS).tolist() == slots  # one turn gives each its slots, the tiny ones too
    for first in (0, 10**9, SLOTS - 3000):
        sources, _ = blend.assign(first, 5760)
        assert np.abs(np.bincount(sources, minlength=1000) - 5760 * shares).max() < 4


# Phases


def walked(phases, *, seed, first, count):
    """(source, earlier samples of it) of samples first..first+count-1, by a walk through all samples from 0."""
    turn, seen, rows = Blend(phases[0][1], seed=seed).phase, Counter(), []
    for sample in range(first + count):
        slots = [slots for start, slots in phases if start <= sample][-1]
        slot = (sample * GOLDEN_STEP + turn) % SLOTS
        source = next(s for s in range(len(slots)) if slot < sum(slots[: s + 1]))
        rows.append((source, seen[source]))
        seen[source] += 1
    return rows[first:], [seen[source] for source in range(len(phases[0][1]))]


@st.composite
def schedules(draw, *, max_sources=8, max_phases=5):
    """Phases (first sample, slots) of one to a few hundred samples; sources come and go."""
    count = draw(st.integers(1, max_sources))
    lengths = draw(st.lists(st.integers(1, 300), max_size=max_phases - 1))
    weights = st.lists(st.integers(0, 5), min_size=count, max_size=count).filter(any)
    starts = [0, *np.cumsum(lengths).tolist()]
    return [(start, quantise([Fraction(w, sum(row)) for w in row])) for start in starts for row in [draw(weights)]]


@settings(deadline=None, max_examples=100)
@given(schedules(), st.integers(0, 1300), st.integers(0, 900), st.integers(0, 2**64))
def test_a_schedule_is_a_walk_through_its_phases(phases, first, count, seed):
    schedule = Schedule(phases, seed=seed)
    rows, seen = walked(phases, seed=seed, first=first, count=count)
    source, position = schedule.assign(first, count)
    assert list(zip(source.tolist(), position.tolist(), strict=True)) == rows
    assert schedule.counts(first + count).tolist() == seen
    assert (source.dtype, position.dtype) == (np.int32, np.int64)


@settings(deadline=None, max_examples=60)
@given(schedules(), st.integers(0, 2**34), st.integers(0, 200), st.integers(0, 2**64), st.randoms(use_true_random=False))
def test_a_phase_cut_in_two_is_the_same_order(phases, first, count, seed, random):
    index = random.randrange(len(phases))
    begin, end = phases[index][0], phases[index + 1][0] if index + 1 < len(phases) else 2**34
    if end - begin < 2:
        return
    cut = [*phases[: index + 1], (random.randrange(begin + 1, end), phases[index][1]), *phases[index + 1 :]]
    one, two = Schedule(phases, seed=seed), Schedule(cut, seed=seed)
    assert np.array_equal(one.assign(first, count), two.assign(first, count))
    assert np.array_equal(one.counts(first), two.counts(first))


@settings(deadline=None, max_examples=60)
@given(schedules(), st.integers(0, 1300), st.integers(0, 500), st.integers(0, 2**64))
def test_samples_before_a_phase_do_not_know_of_it(phases, first, count, seed):
    """A longer horizon, or a mixture changed later on, leaves what came before as it was."""
    for shorter in range(1, len(phases)):
        end = phases[shorter][0]
        low, high = min(first, end), min(first + count, end)
        with_it, without = Schedule(phases, seed=seed), Schedule(phases[:shorter], seed=seed)
        assert np.array_equal(with_it.assign(low, high - low), without.assign(low, high - low))
        assert np.array_equal(with_it.counts(high), without.counts(high))


def test_phases_are_counted_in_closed_form_past_2_to_32_samples():
    """Counts of a long stretch are those of its ends; in between, phases of billions of samples."""
    slots = [quantise(random_shares(6, seed=s)) for s in range(3)]
    schedule = Schedule([(0, slots[0]), (5 * SLOTS + 17, slots[1]), (9 * SLOTS + 4, slots[2])], seed=8)
    for border in (SLOTS, 5 * SLOTS + 17, 9 * SLOTS + 4):
        source, position = schedule.assign(border - 400, 800)
        assert np.array_equal(schedule.counts(border + 400) - schedule.counts(border - 400), np.bincount(source, minlength=6))
        for s in range(6):
            here = position[source == s]
            assert np.array_equal(here, schedule.counts(border - 400)[s] + np.arange(len(here)))


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


AWKWARD = [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 127, 128, 129, 1009, 1024, 1025]


@settings(deadline=None, max_examples=60)
@given(st.data(), schedules(max_sources=6), st.integers(1, 1500), st.integers(0, 2**32))
def test_reads_through_phases_are_a_bijection(data, phases, count, seed):
    """The first n reads of every source, those that a later phase adds too, are its next n windows: each one once an epoch."""
    num_sources = len(phases[0][1])
    windows = data.draw(st.lists(st.sampled_from(AWKWARD), min_size=num_sources, max_size=num_sources))
    starts = data.draw(st.lists(st.integers(0, 3000), min_size=num_sources, max_size=num_sources))
    orders = [source_order(8 * size + 1, name=f"source{i}", seed=seed) for i, size in enumerate(windows)]
    stage = StageOrder(orders=orders, schedule=Schedule(phases, seed=seed), starts=starts)
    rows = fields(stage.windows(0, count))
    for source, order in enumerate(orders):
        epochs, offsets, positions = rows[rows[:, 0] == source].T[1:]
        assert np.array_equal(positions, starts[source] + np.arange(len(positions)))
        assert np.array_equal(epochs, positions // order.num_windows)
        for epoch in set(epochs.tolist()):
            here = np.sort(offsets[epochs == epoch])
            assert len(np.unique(here)) == len(here)
            assert set(here.tolist()) <= set(range(0, 8 * order.num_windows, 8))
            if epoch * order.num_windows >= starts[source] and (epoch + 1) * order.num_windows <= positions[-1] + 1:
                assert np.array_equal(here, np.arange(order.num_windows) * 8)


def test_a_source_of_more_than_2_to_32_windows_through_the_blend():
    """Reads on both sides of position 2^32 and of the end of the first epoch."""
    geometry = {"seq_length": 2**10, "chunk_tokens": 2**17, "group_tokens": 2**31}
    for start in (2**32 - 700, 2**40 - 700):
        stage = stage_order(
            sizes=(2**50 + 77, 2**43 + 1), phases=[(0, (1.0, 0.0)), (100, (0.7, 0.3))], starts=[start, 2**33 - 150], **geometry
        )
        rows = fields(stage.windows(0, 2000))
        for source, order in enumerate(stage.orders):
            epochs, offsets, positions = rows[rows[:, 0] == source].T[1:]
            assert np.array_equal(positions, stage.starts[source] + np.arange(len(positions)))
            assert np.array_equal(epochs, positions // order.num_windows)
            assert len(set(zip(epochs.tolist(), offsets.tolist(), strict=True))) == len(offsets)
            assert (offsets % 2**10 == 0).all() and offsets.max() + 2**10 < order.num_tokens
            assert len(positions) > 500
    assert set(rows[:, 1].tolist()) == {0, 1}


THREE_PHASES = [(0, (0.3, 0.5, 0.2, 0.0)), (1500, (0.6, 0.0, 0.15, 0.25)), (2777, (0.1, 0.2, 0.3, 0.4))]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 4000), st.lists(st.integers(0, 400), min_size=1, max_size=6), st.sampled_from([1, 2, 4, 8]))
def test_a_batch_through_phases_is_the_same_in_pieces_and_over_ranks(first, pieces, dp):
    cold = fields(stage_order(phases=THREE_PHASES).windows(first, sum(pieces)))
    warm, at, parts = stage_order(phases=THREE_PHASES), first, []
    for count in pieces:
        parts.append(fields(warm.windows(at, count)))
        at += count
    assert np.array_equal(np.concatenate(parts), cold)
    share = -(-sum(pieces) // dp)
    ranks = [
        fields(stage_order(phases=THREE_PHASES).windows(first + d * share, max(0, min(share, sum(pieces) - d * share))))
        for d in range(dp)
    ]
    assert np.array_equal(np.concatenate(ranks), cold)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(BATCHES[:5]), st.integers(1, 30)), min_size=1, max_size=5))
def test_a_batch_size_changed_on_resume_keeps_positions_exact(legs):
    """Each leg is a resume from cold with a batch of its own; positions are what was read by then."""
    seen, read = np.zeros(4, dtype=np.int64), []
    samples = 0
    for batch, steps in legs:
        stage = stage_order(phases=THREE_PHASES)
        assert np.array_equal(stage.positions(samples), seen)
        for _ in range(min(steps, 3000 // batch)):
            windows = stage.windows(samples, batch)
            seen += np.bincount(windows.source, minlength=4)
            samples += batch
            read.append(fields(windows))
    assert np.array_equal(stage.positions(samples), seen)
    assert np.array_equal(np.concatenate(read), fields(stage_order(phases=THREE_PHASES).windows(0, samples)))


def group_of(order, position):
    """Epoch and group that a window lies in, by the walk that an epoch is: groups of whole chunks, the rest in the last."""
    epoch, rest = divmod(position, order.num_windows)
    in_group = order.group_chunks * (order.chunk_tokens // order.seq_length)
    return epoch, min(rest // in_group, order.num_groups - 1)


def goes_on_at(before, position, after):
    """Where `after` takes a source up, and the tokens skipped, window by window: at the first group not begun."""
    start = position
    while start % before.num_windows and group_of(before, start) == group_of(before, start - 1):
        start += 1
    wanted, new = group_of(before, start), group_of(before, start)[0] * after.num_windows
    while group_of(after, new) < wanted:
        new += 1
    return new, (start - position) * before.seq_length


@settings(deadline=None, max_examples=60)
@given(
    st.data(),
    st.lists(st.sampled_from([4, 8, 16, 32]), min_size=2, max_size=4),
    st.lists(st.integers(33, 2500), min_size=1, max_size=4),
    st.integers(0, 2**20),
)
def test_the_ledger_through_stages_and_phases_is_a_count(data, lengths, sizes, seed):
    """Positions after every stage are the windows counted; a new length goes on at the next group, whatever the phases."""
    position, before = [0] * len(sizes), None
    for seq_length in lengths:
        orders = [source_order(size, name=f"source{i}", seq_length=seq_length, seed=seed) for i, size in enumerate(sizes)]
        if before is not None:
            for i, (old, new) in enumerate(zip(before, orders, strict=True)):
                expected = (position[i], 0) if old.seq_length == seq_length else goes_on_at(old, position[i], new)
                assert carry_over(old, position[i], new) == expected
                position[i] = expected[0]
        weights = st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)).filter(any)
        starts = [0, *sorted(data.draw(st.sets(st.integers(1, 300), max_size=2)))]
        rows = [[Fraction(w, sum(row)) for w in row] for row in [data.draw(weights) for _ in starts]]
        stage = StageOrder(
            orders=orders,
            schedule=Schedule(list(zip(starts, map(quantise, rows), strict=True)), seed=seed),
            starts=list(position),
        )
        read = data.draw(st.integers(0, 400))
        position = [p + n for p, n in zip(position, np.bincount(stage.windows(0, read).source, minlength=len(sizes)).tolist(),
                                          strict=True)]  # fmt: skip
        assert stage.positions(read).tolist() == position
        before = orders


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


@pytest.mark.parametrize(("before", "after"), [("stream", "anchored"), ("anchored", "stream"), ("best_fit", "anchored")])
def test_windows_of_another_kind_begin_with_the_next_epoch(before, after):
    old = SourceOrder(name="web", num_tokens=10 * 8 + 1, seq_length=8, chunk_tokens=32, group_tokens=64, seed=1, windows=before)
    new = SourceOrder(name="web", num_tokens=7 * 8 + 1, seq_length=8, chunk_tokens=32, group_tokens=64, seed=1, windows=after)
    assert [carry_over(old, position, new) for position in (0, 1, 9, 10, 13, 20)] == [
        (0, 0), (7, 72), (7, 8), (7, 0), (14, 56), (14, 0),
    ]  # fmt: skip


def test_a_table_at_another_length_begins_with_the_next_epoch():
    old, new = (
        SourceOrder(
            name="web", num_tokens=n * s + 1, seq_length=s, chunk_tokens=32, group_tokens=64, seed=1, windows="best_fit"
        )
        for n, s in ((10, 8), (6, 16))
    )
    assert carry_over(old, 4, new) == (6, 48)
    assert carry_over(old, 10, new) == (6, 0)
    assert carry_over(old, 4, old) == (4, 0)


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
    "shares", [[], [0.5, float("nan")], [float("inf")], [0.0, 0.0], [1.5, -0.5], [0.5, 0.4], [0.5, 0.500002]]
)
def test_refused_shares(shares):
    with pytest.raises(DataError, match=r"share|sum"):
        quantise(shares)


@pytest.mark.parametrize("slots", [[], [SLOTS - 1], [SLOTS + 1, -1]])
def test_refused_slots(slots):
    with pytest.raises(DataError, match=rf"slots sum to {sum(slots)} over {len(slots)} sources"):
        Blend(slots, seed=1)


@pytest.mark.parametrize("starts", [[], [5], [0, 7, 7], [0, 9, 4]])
def test_refused_phases(starts):
    with pytest.raises(DataError, match="phases start at samples"):
        Schedule([(start, [SLOTS]) for start in starts], seed=1)


def test_shares_may_miss_1_by_rounding():
    assert blend_of([0.3333333, 0.3333333, 0.3333333], seed=1).slots.sum() == SLOTS


def test_refused_stages():
    orders = [source_order(1000), source_order(1000, name="code", seq_length=16)]
    halves = Schedule([(0, quantise([0.5, 0.5]))], seed=1)
    with pytest.raises(DataError, match=r"seq_lengths \[8, 16\]"):
        StageOrder(orders=orders, schedule=halves, starts=[0, 0])
    with pytest.raises(DataError, match="1 source orders, 2 in the schedule and 1 starts"):
        StageOrder(orders=orders[:1], schedule=halves, starts=[0])
    with pytest.raises(DataError, match="start -1"):
        StageOrder(orders=orders[:1], schedule=Schedule([(0, [SLOTS])], seed=1), starts=[-1])


def test_refused_positions():
    with pytest.raises(DataError, match="first sample -1"):
        stage_order().windows(-1, 5)
    with pytest.raises(DataError, match="position -2"):
        source_order(1000).locate(np.array([3, -2]))


@pytest.mark.parametrize("change", [{"num_tokens": 1001}, {"name": "code"}, {"seed": 2}, {"group_tokens": 64}])
def test_a_position_is_not_carried_into_another_order(change):
    with pytest.raises(DataError, match=f"{next(iter(change))} .*would go on with"):
        carry_over(source_order(1000), 7, source_order(**{"num_tokens": 1000, **change}))
