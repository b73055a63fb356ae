"""From amounts to an exact table of phases, and what may be changed of it once a run has read by it."""

import json
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.mixing import (
    AmountError,
    Extent,
    UnknownSize,
    amend_phases,
    mean_shares,
    names_of,
    plan_phases,
    rows_from_json,
    rows_to_json,
    samples_by_source,
    schedule_of,
)
from data_prep.order import SLOTS, SourceOrder, StageOrder
from data_prep.spec import Amount, Mixture, Phase, Source

S = 8  # tokens of a window


def mixture(first, *phases):
    """`first`: amounts by source; then (first sample, amounts) of each later phase."""
    sources = {name: Source(inputs=("x",), format="text", **amount) for name, amount in first.items()}
    for _, amounts in phases:
        sources |= {name: Source(inputs=("x",), format="text") for name in amounts if name not in sources}
    later = [
        Phase(start_tokens=float(start * S), sources={name: Amount(**amount) for name, amount in amounts.items()})
        for start, amounts in phases
    ]
    return Mixture(name="test", sources=sources, phases=tuple(later))


def shares(**parts):
    return {name: {"share": part} for name, part in parts.items()}


def tokens(samples):
    return {"tokens": float(samples * S)}


def extent(num_samples, **num_windows):
    return Extent(S, num_samples, num_windows)


def planned(num_samples, *arguments, **num_windows):
    return plan_phases(mixture(*arguments), extent=extent(num_samples, **num_windows))


def amended(rows, num_samples, *arguments, read, seed=1, **num_windows):
    return amend_phases(rows, mixture(*arguments), extent=extent(num_samples, **num_windows), samples_read=read, seed=seed)


def sources_of(rows, *, end, seed=1):
    """The name that each of the first `end` samples reads."""
    names = names_of(rows)
    return [names[source] for source in schedule_of(rows, names=names, seed=seed).assign(0, end)[0].tolist()]


def counted(rows, *, end, first=0, seed=1):
    """Reads of each source from sample `first` to `end`, one by one."""
    return Counter(sources_of(rows, end=end, seed=seed)[first:])


def windows_of(rows, *, first, count, seed=1, names=("a", "b", "c", "d", "e")):
    """What samples of the stage read, whatever the table calls first: (source, epoch, offset) of each."""
    orders = [
        SourceOrder(name=name, num_tokens=97 * (i + 1) * S + 3, seq_length=S, chunk_tokens=32, group_tokens=128, seed=seed)
        for i, name in enumerate(names)
    ]
    stage = StageOrder(orders=orders, schedule=schedule_of(rows, names=names, seed=seed), starts=[0] * len(names))
    windows = stage.windows(first, count)
    return np.stack([windows.source, windows.epoch, windows.offset], axis=1)


# Amounts


@st.composite
def mixed_amounts(draw, *, num_samples):
    """Amounts of 1 to 6 sources that come to known samples each (the last is what is left); sizes of the epochs."""
    parts = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=6))
    kinds = draw(st.lists(st.sampled_from(["share", "epochs", "tokens"]), min_size=len(parts), max_size=len(parts)))
    expected = {f"s{i}": Fraction(num_samples * part, sum(parts)) for i, part in enumerate(parts)}
    shared = sum(part for part, kind in zip(parts, kinds, strict=True) if kind == "share")
    amounts, sizes = {}, {}
    for (name, samples), part, kind in zip(expected.items(), parts, kinds, strict=True):
        sizes[name] = draw(st.integers(1, 2000))
        values = {"share": part / shared if shared else 0, "epochs": samples / sizes[name], "tokens": samples * S}
        amounts[name] = {kind: float(values[kind])}
    return amounts, sizes, expected


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 1800), st.integers(1, 1800), st.integers(0, 2**64))
def test_every_source_is_read_as_much_as_was_said(data, length, more, seed):
    """Of up to 1800 samples no source of any share can be 4 off: each phase by itself, counted sample by sample."""
    first, sizes, expected = data.draw(mixed_amounts(num_samples=length))
    second, other_sizes, then = data.draw(mixed_amounts(num_samples=more))
    later = {f"later_{name}": amount for name, amount in second.items()}
    sizes |= {f"later_{name}": size for name, size in other_sizes.items()}
    rows = planned(length + more, first, (length, later), **sizes)
    assert [row.start_sample for row in rows] == [0, length]
    assert [sum(row.slots.values()) for row in rows] == [SLOTS, SLOTS]
    here = counted(rows, end=length, seed=seed)
    assert all(abs(here[name] - samples) < 4 for name, samples in expected.items())
    there = counted(rows, first=length, end=length + more, seed=seed)
    assert all(abs(there[f"later_{name}"] - samples) < 4 for name, samples in then.items())
    assert samples_by_source(rows, first=length, end=length + more, seed=seed) == {
        **dict.fromkeys(rows[0].slots, 0), **{name: there[name] for name in later},
    }  # fmt: skip


def test_shares_divide_what_tokens_and_epochs_leave():
    (row,) = planned(1000, {"a": tokens(300), "b": {"epochs": 2.0}, **shares(c=0.75, d=0.25)}, b=100)
    parts = {name: slots / SLOTS for name, slots in row.slots.items()}
    assert parts == pytest.approx({"a": 0.3, "b": 0.2, "c": 0.375, "d": 0.125}, abs=1e-9)


def test_amounts_without_shares_fill_the_phase():
    (row,) = planned(1000, {"a": tokens(300), "b": {"epochs": 7.0}}, b=100)
    assert {name: slots / SLOTS for name, slots in row.slots.items()} == pytest.approx({"a": 0.3, "b": 0.7}, abs=1e-9)


def test_a_source_without_an_amount_waits_for_its_phase():
    rows = planned(1000, {**shares(a=1.0), "b": {}}, (400, shares(b=1.0)))
    assert [row.slots for row in rows] == [{"a": SLOTS}, {"b": SLOTS}]
    assert sources_of(rows, end=1000) == ["a"] * 400 + ["b"] * 600


def test_a_share_of_0_is_not_read():
    (row,) = planned(1000, shares(a=1.0, b=0.0))
    assert row.slots == {"a": SLOTS, "b": 0}


def test_a_phase_begins_with_the_first_whole_sample():
    said = [399 * S + 1, 400 * S, 400 * S + 1]
    starts = [planned(1000, shares(a=1.0), (tokens / S, shares(b=1.0)))[1].start_sample for tokens in said]
    assert starts == [400, 400, 401]


def test_the_amounts_of_a_whole_pretraining_run_are_kept_to_a_dozen_samples():
    """9.8T tokens at 4096: how far the golden step strays grows with the logarithm of the samples (4.4 at 6000, 10.5 at
    2^33)."""
    weights = np.random.default_rng(4).lognormal(sigma=1.5, size=60)
    wanted = {f"s{i}": int(2_392_578_125 * part) for i, part in enumerate(weights / weights.sum())}
    amounts = {name: {"epochs": 2.0} for name in wanted} | shares(s0=1.0)
    for seed in range(5):
        rows = planned(2_392_578_125, amounts, **{name: samples // 2 for name, samples in wanted.items()})
        read = samples_by_source(rows, first=0, end=2_392_578_125, seed=seed)
        assert all(abs(read[name] - samples // 2 * 2) < 12 for name, samples in wanted.items() if name != "s0")


def test_mean_shares_are_weighed_by_how_long_phases_last():
    rows = planned(1000, shares(a=0.5, b=0.5), (400, shares(a=1.0)), (900, shares(c=1.0)))
    assert mean_shares(rows, num_samples=1000) == pytest.approx({"a": 0.7, "b": 0.2, "c": 0.1})
    assert mean_shares(rows, num_samples=800) == pytest.approx({"a": 0.75, "b": 0.25, "c": 0.0})


def test_a_table_is_the_same_from_json():
    rows = planned(1000, {"a": tokens(300), "b": {"epochs": 2.0}, **shares(c=1.0)}, (400, shares(b=1.0)), b=10)
    assert rows_from_json(json.loads(json.dumps(rows_to_json(rows)))) == rows


# What is refused: path, found, rule, fix


def refused(rows, num_samples, *arguments, read=0, seed=1, **num_windows):
    with pytest.raises(AmountError) as caught:
        if rows is None:
            planned(num_samples, *arguments, **num_windows)
        else:
            amended(rows, num_samples, *arguments, read=read, seed=seed, **num_windows)
    return caught.value


# amounts and phases of 1000 samples; path, and parts of what was found, the rule and the fix
AMOUNTS = [
    ([shares(a=0.6, b=0.6)], "sources", "shares a 0.6, b 0.6, in sum 1.2", "must sum to 1", "in proportion: a 0.5, b 0.5"),
    (
        [{"a": tokens(500), **shares(b=0.5, c=0.4)}],
        "sources", "in sum 0.9", "shares of what tokens and epochs leave must sum to 1", "b 0.555556, c 0.444444",
    ),
    (
        [{"a": tokens(500)}],
        "sources", "4000 tokens in a phase of 8000", "they must fill the phase", "a length of 4000 tokens for it",
    ),
    ([{"a": tokens(1100)}], "sources", "8800 tokens in a phase of 8000", "they must fill the phase", "a length of 8800 tokens"),
    (
        [{"a": tokens(1000), **shares(b=1.0)}],
        "sources", "8000 tokens in a phase of 8000", "they leave nothing to the shares", "smaller amounts, or a longer phase",
    ),
    ([{"a": {}}], "sources", "no source with an amount", "a phase reads at least one", "give one share, epochs or tokens"),
    (
        [{"a": {"share": 0.5, "tokens": 80.0}, **shares(b=0.5)}],
        "sources.a", "share 0.5 and tokens 80", "one of share, epochs, tokens", "keep one of them",
    ),
    ([shares(a=1.0), (400, {"a": {}})], "phases.0.sources.a", "no amount", "one of share, epochs, tokens", "keep one of them"),
    ([shares(a=1.0), (400, shares(a=0.9))], "phases.0.sources", "in sum 0.9", "must sum to 1", "a 1"),
    (
        [shares(a=1.0), (400, {"a": tokens(500)})],
        "phases.0.sources", "4000 tokens in a phase of 4800", "they must fill the phase", "a length of 4000 tokens",
    ),
    (
        [shares(a=1.0), (400, shares(a=1.0)), (400, shares(b=1.0))],
        "phases.1.start_tokens", "3200", "the phase before starts at 3200", "start it later than 3200",
    ),
    (
        [shares(a=1.0), (1000, shares(b=1.0))],
        "phases.0.start_tokens", "8000", "the stage ends at 8000 tokens", "leave it out, or raise stage.tokens",
    ),
    (
        [{"a": {"epochs": 2.5}, **shares(b=1.0)}],
        "sources.a.epochs", "2.5 of a source of unknown size", "known from the prepared data", "set sources.a.unique_tokens",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("amounts", "path", "found", "rule", "fix"), AMOUNTS, ids=[f"{row[1]} {row[3]}" for row in AMOUNTS])
def test_amounts_that_cannot_be_met(amounts, path, found, rule, fix):
    error = refused(None, 1000, *amounts)
    assert (error.path, found in error.found, rule in error.rule, fix in error.fix) == (path, True, True, True), str(error)
    assert all(part in str(error) for part in (error.path, error.found, error.rule, error.fix))
    assert isinstance(error, UnknownSize) == ("unknown size" in found)


def test_amounts_may_miss_the_phase_by_rounding():
    assert planned(1000, {"a": tokens(993), "b": {"epochs": 0.5}}, b=1)[0].slots["a"] > 0.99 * SLOTS


# A changed mixture


def test_a_changed_mixture_holds_from_here_on():
    rows = planned(1000, shares(a=0.5, b=0.5))
    new = amended(rows, 1000, shares(a=0.1, b=0.2, c=0.7), read=301)
    assert new[0] == rows[0]
    assert [row.start_sample for row in new] == [0, 301]
    assert np.array_equal(windows_of(new, first=0, count=301), windows_of(rows, first=0, count=301))
    after = counted(new, first=301, end=1000)
    assert all(abs(after[name] - 699 * part) < 4 for name, part in {"a": 0.1, "b": 0.2, "c": 0.7}.items())


def test_before_anything_is_read_a_change_is_a_new_plan():
    rows = planned(1000, shares(a=0.5, b=0.5), (400, shares(a=1.0)))
    new = amended(rows, 1000, shares(b=1.0), (300, shares(a=1.0)), read=0)
    assert new == planned(1000, shares(b=1.0), (300, shares(a=1.0)))


@settings(deadline=None, max_examples=80)
@given(st.data(), st.integers(20, 1800), st.integers(0, 2**64))
def test_tokens_and_epochs_count_what_was_read_already(data, num_samples, seed):
    """A phase changed midway ends with the totals that it now says, wherever it was changed."""
    read = data.draw(st.integers(1, num_samples - 1))
    before = planned(num_samples, shares(a=0.4, b=0.4, c=0.2))
    so_far = counted(before, end=read, seed=seed)
    left = [data.draw(st.integers(0, 1000)) + 1 for _ in range(3)]
    wanted = {
        name: so_far[name] + Fraction((num_samples - read) * part, sum(left)) for name, part in zip("abc", left, strict=True)
    }
    amounts = {"a": {"tokens": float(wanted["a"] * S)}, "b": {"epochs": float(wanted["b"] / 7)}, **shares(c=1.0)}
    rows = amended(before, num_samples, amounts, read=read, seed=seed, b=7)
    total = counted(rows, end=num_samples, seed=seed)
    assert all(abs(total[name] - wanted[name]) < 4 for name in "abc")
    assert np.array_equal(windows_of(rows, first=0, count=read, seed=seed), windows_of(before, first=0, count=read, seed=seed))


def test_tokens_of_a_later_phase_count_from_its_start():
    """What the first phase read of a source is not taken off what the second one says."""
    start = [shares(a=0.5, b=0.5), (400, {"a": tokens(100), **shares(b=1.0)})]
    rows = planned(1000, *start)
    new = amended(rows, 1000, start[0], (400, {"a": tokens(200), **shares(b=1.0)}), read=700)
    assert [row.start_sample for row in new] == [0, 400, 700]
    assert abs(counted(new, first=400, end=1000)["a"] - 200) < 4


def test_a_longer_horizon_is_no_phase_where_shares_say_all():
    rows = planned(1000, shares(a=0.3, b=0.7))
    assert amended(rows, 5000, shares(a=0.3, b=0.7), read=600) == rows
    assert amended(rows, 5000, shares(a=0.3, b=0.7), read=1000) == rows


@pytest.mark.parametrize("read", [100, 600, 1000])
def test_a_longer_horizon_spreads_what_is_left_of_tokens_over_it(read):
    amounts = {"a": tokens(300), "b": {"epochs": 2.0}, **shares(c=1.0)}
    rows = planned(1000, amounts, b=50)
    new = amended(rows, 1700, amounts, read=read, b=50)
    assert [row.start_sample for row in new] == [0, read]
    assert np.array_equal(windows_of(new, first=0, count=read), windows_of(rows, first=0, count=read))
    total = counted(new, end=1700)
    assert all(abs(total[name] - wanted) < 5 for name, wanted in {"a": 300, "b": 100, "c": 1300}.items())


def test_a_last_batch_past_the_horizon_is_no_phase():
    rows = planned(1000, {"a": tokens(600), "b": tokens(400)})
    assert amended(rows, 1000, {"a": tokens(600), "b": tokens(400)}, read=1004) == rows


def test_a_change_is_made_once():
    amounts = {"a": tokens(500), **shares(b=0.9, c=0.1)}
    rows = amended(planned(1000, shares(a=0.5, b=0.5)), 1000, amounts, (900, shares(c=1.0)), read=301)
    assert [row.start_sample for row in rows] == [0, 301, 900]
    for read in (301, 302, 555, 899, 900, 901, 999):
        assert amended(rows, 1000, amounts, (900, shares(c=1.0)), read=read) == rows


def test_a_change_taken_back_before_it_was_read_leaves_no_trace():
    rows = planned(1000, shares(a=0.5, b=0.5))
    changed = amended(rows, 1000, shares(a=0.9, b=0.1), read=301)
    assert amended(changed, 1000, shares(a=0.5, b=0.5), read=301) == rows
    again = amended(changed, 1000, shares(a=0.5, b=0.5), read=302)
    assert [row.start_sample for row in again] == [0, 301, 302]


def test_phases_to_come_may_be_added_moved_and_removed():
    rows = planned(1000, shares(a=1.0), (600, shares(b=1.0)))
    assert amended(rows, 1000, shares(a=1.0), read=500) == rows[:1]
    assert amended(rows, 1000, shares(a=1.0), (500, shares(b=1.0)), read=500) == planned(
        1000, shares(a=1.0), (500, shares(b=1.0))
    )
    assert amended(rows, 1000, shares(a=1.0), (600, shares(b=1.0)), (700, shares(a=1.0)), read=500)[:2] == rows


def test_a_source_ended_by_a_share_of_0_is_not_read_again():
    rows = amended(planned(1000, shares(a=0.5, b=0.5)), 1000, shares(a=1.0, b=0.0), read=301)
    assert counted(rows, first=301, end=1000) == {"a": 699}


PAST = [shares(a=0.5, b=0.5), (400, {"a": tokens(100), **shares(b=1.0)})]

# a mixture that the run above, 700 samples on, cannot take; path, found, rule, fix
PAST_CHANGES = [
    (
        [shares(a=0.5, b=0.5), (300, shares(a=1.0)), PAST[1]],
        "phases", "a phase that starts at 2400 tokens, in the past", "has read 5600 tokens", "start it at 5600 or later",
    ),
    ([shares(a=0.5, b=0.5)], "phases", "no phase at 3200 tokens", "a phase of the run began there", "leave it in"),
    (
        [shares(a=0.4, b=0.6), PAST[1]],
        "phases", "another mixture from 0 tokens on", "it ended before the 5600 tokens", "leave it as it was; add a phase",
    ),
    ([shares(a=0.5, b=0.5), (401, PAST[1][1])], "phases", "3208 tokens, in the past", "what was read stays", "5600 or later"),
    (
        [shares(a=0.5, b=0.5), (400, {"a": tokens(10), **shares(b=1.0)})],
        "phases.0.sources.a", "80 tokens in this phase", "of it were read already", "or leave the source out",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "path", "found", "rule", "fix"), PAST_CHANGES, ids=[row[2] for row in PAST_CHANGES])
def test_what_was_read_is_not_changed(change, path, found, rule, fix):
    error = refused(planned(1000, *PAST), 1000, *change, read=700)
    assert (error.path, found in error.found, rule in error.rule, fix in error.fix) == (path, True, True, True), str(error)


def test_an_amount_below_what_was_read_names_what_was_read():
    rows = planned(1000, shares(a=0.5, b=0.5))
    read = counted(rows, end=301)["a"]
    error = refused(rows, 1000, {"a": tokens(100), **shares(b=1.0)}, read=301)
    assert error.rule.startswith(f"{read * S} of it were read already")
    assert error.fix.startswith(f"tokens={read * S} or more")
    assert amended(rows, 1000, {"a": {"tokens": float(read * S)}, **shares(b=1.0)}, read=301)[1].slots["a"] == 0


@pytest.mark.parametrize("seed", range(20))
def test_25_changes_in_a_row_move_nothing_that_was_read(seed):
    """Amounts, phases to come and the horizon change at random, and a resume without a change makes none. Phases begin at even
    samples, resumes at odd ones."""
    rng, horizon, read = random.Random(seed), 400, 0
    first, phases = shares(a=0.6, b=0.4), {}
    rows = planned(horizon, first)
    seen = windows_of(rows, first=0, count=0, seed=seed)
    accepted = 0
    for _ in range(25):
        here = [start for start in phases if start < read]
        trial, later, end = dict(first), dict(phases), horizon
        kind = rng.choice(["amounts", "amounts", "add", "remove", "horizon"])
        if kind == "amounts" and here:
            later[max(here)] = any_amounts(rng, horizon=horizon)
        elif kind == "amounts":
            trial = any_amounts(rng, horizon=horizon)
        elif kind == "add":
            later[read + 2 * rng.randrange(30) + read % 2 + 2] = any_amounts(rng, horizon=horizon)
        elif kind == "remove" and any(start >= read for start in phases):
            later.pop(rng.choice([start for start in phases if start >= read]))
        else:
            end += rng.randrange(60)
        end = max([end, read + 40, *(start + 20 for start in later)])
        sizes = {"a": 97, "b": 194, "c": 291, "d": 388, "e": 485}
        try:
            new = amended(rows, end, trial, *sorted(later.items()), read=read, seed=seed, **sizes)
        except AmountError:
            continue
        accepted += 1
        first, phases, horizon, rows = trial, later, end, new
        assert np.array_equal(windows_of(rows, first=max(0, read - 80), count=min(80, read), seed=seed), seen[-80:])
        more = min(2 * rng.randrange(12) + (1 if read % 2 == 0 else 2), horizon - read)
        seen = np.concatenate([seen, windows_of(rows, first=read, count=more, seed=seed)])
        read += more
        if read < horizon:
            assert amended(rows, horizon, first, *sorted(phases.items()), read=read, seed=seed, **sizes) == rows
    assert accepted > 10 and read > 60
    assert np.array_equal(windows_of(rows, first=0, count=read, seed=seed), seen)
    assert read == sum(counted(rows, end=read, seed=seed).values())


def any_amounts(rng, *, horizon):
    """Shares of one to five sources, sometimes beside a source in tokens or epochs."""
    names = rng.sample("abcde", rng.randint(1, 5))
    if len(names) == 1 or rng.random() < 0.6:
        parts = {name: rng.randint(1, 9) for name in names}
        return {name: {"share": part / sum(parts.values())} for name, part in parts.items()}
    said = tokens(rng.randrange(1, horizon)) if rng.random() < 0.5 else {"epochs": rng.randrange(1, 8) / 4}
    return {names[0]: said, **{name: {"share": 1 / (len(names) - 1)} for name in names[1:]}}
