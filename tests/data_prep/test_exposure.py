"""Exposure against a simulation that reads every window of every stage and counts tokens one by one."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.exposure import Cut, StageUse, breaches, readings
from data_prep.mixing import Extent, PhaseRow, names_of, plan_phases, schedule_of, slack
from data_prep.order import SourceOrder, carry_over, quantise
from data_prep.spec import Amount, Mixture, Phase, Source

LENGTH, CHUNK, GROUP = 4, 16, 48  # group: 12 windows
SEED = 3


def cut(name, windows, *, seq_length=LENGTH, window_tokens=None, kind="stream"):
    """A source of so many windows of LENGTH tokens."""
    order = SourceOrder(
        name=name, num_tokens=windows * LENGTH + 1, seq_length=seq_length, chunk_tokens=CHUNK, group_tokens=GROUP, seed=SEED,
        windows=kind,
    )  # fmt: skip
    return Cut(order, seq_length if window_tokens is None else window_tokens)


def source(**fields):
    return Source(**({"inputs": ("x",), "format": "text"} if "parent" not in fields else {"min_document_tokens": 9}), **fields)


def use(name, num_samples, shares, *later, sizes, sources=None, init_from=None, replay=None, seq_length=LENGTH):
    """A stage of `shares`, and (first sample, shares) of later phases; `sizes`: windows of LENGTH tokens of each source."""
    rows = [
        PhaseRow(start, dict(zip(row, quantise(list(row.values())), strict=True)), {}) for start, row in [(0, shares), *later]
    ]
    known = {source: cut(source, windows, seq_length=seq_length) for source, windows in sizes.items()}
    described = {name: source() for name in names_of(rows)} | (sources or {})
    return StageUse(name, seq_length, num_samples, rows, described, known, init_from, replay)


def simulated(stages):
    """For each stage and source: samples, tokens before and read here, most reads of a token through the source, and the first
    sample that reads a token of it again. Only the walk and carry_over: no arithmetic of counts."""
    found, ends, begins = {}, {}, {}
    for stage in stages:
        state = {name: dict(row, read=row["read"].copy()) for name, row in ends.get(stage.init_from, {}).items()}
        parent = next((other for other in stages if other.name == stage.init_from), None)
        if parent and stage.replay_sample is not None:
            walk = names_and_order(parent, end=stage.replay_sample)
            for name in names_of(parent.rows):
                state[name]["position"] = begins[parent.name][name] + walk.count(name)
                state[name]["order"] = parent.cuts[name].order
        names = names_of(stage.rows)
        begins[stage.name] = {}
        for name in names:
            order = stage.cuts[name].order
            row = state.setdefault(name, {"order": order, "position": 0, "tokens": 0, "read": Counter()})
            row["position"], row["skipped"] = carry_over(row["order"], row["position"], order)
            row["order"], begins[stage.name][name] = order, row["position"]
        rows = {name: {"samples": 0, "before": state[name]["tokens"], "repeat": None} for name in names}
        walk = names_and_order(stage, end=stage.num_samples)
        offsets = {name: offsets_from(state[name]["order"], state[name]["position"], walk.count(name)) for name in names}
        for sample, name in enumerate(walk):
            row = state[name]
            offset = next(offsets[name])
            tokens = range(offset, offset + stage.seq_length)
            if rows[name]["repeat"] is None and any(row["read"][token] for token in tokens):
                rows[name]["repeat"] = sample
            row["read"].update(tokens)
            row["position"] += 1
            row["tokens"] += stage.seq_length
            rows[name]["samples"] += 1
        for name in names:
            most = max(state[name]["read"].values(), default=0)
            found[stage.name, name] = {**rows[name], "tokens": state[name]["tokens"], "most": most,
                                       "skipped": state[name]["skipped"]}  # fmt: skip
        ends[stage.name] = state
    return found


def names_and_order(stage, *, end):
    """The source of each of the first samples of a stage."""
    names = names_of(stage.rows)
    return [names[s] for s in schedule_of(stage.rows, names=names, seed=SEED).assign(0, min(end, stage.num_samples))[0]]


def offsets_from(order, position, count):
    return iter(order.locate(position + np.arange(count))[1].tolist())


def by_stage(stages):
    return {(reading.stage, reading.source): reading for reading in readings(stages, seed=SEED)}


@st.composite
def runs(draw, *, lengths=(LENGTH,)):
    """Two or three stages of up to three sources and phases; each later one starts from an earlier one, some replay it."""
    names = ["a", "b", "c"]
    sizes = {name: draw(st.integers(9, 70)) for name in names}
    weights = st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any)
    stages, at = [], sorted(draw(st.lists(st.sampled_from(lengths), min_size=2, max_size=3)))
    for index, seq_length in enumerate(at):
        num_samples = draw(st.integers(1, 120))
        starts = [0, *sorted(draw(st.sets(st.integers(1, 130), max_size=2)))]
        rows = [dict(zip(names, [w / sum(row) for w in row], strict=True)) for row in [draw(weights) for _ in starts]]
        parent = draw(st.sampled_from(stages)) if stages else None
        replay = draw(st.none() | st.integers(0, 130)) if parent else None
        stages.append(
            use(f"stage{index}", num_samples, rows[0], *zip(starts[1:], rows[1:], strict=True), sizes=sizes,
                init_from=parent.name if parent else None, replay=replay, seq_length=seq_length)
        )  # fmt: skip
    return stages


@settings(deadline=None, max_examples=120)
@given(runs())
def test_readings_are_what_a_simulation_reads(stages):
    wanted, found = simulated(stages), by_stage(stages)
    assert wanted.keys() == found.keys()
    for key, reading in found.items():
        seen = wanted[key]
        assert (reading.samples, reading.tokens_before, reading.tokens_after) == (
            seen["samples"],
            seen["before"],
            seen["tokens"],
        )
        assert reading.tokens == seen["samples"] * LENGTH
        assert reading.first_repeat == seen["repeat"], key
        assert reading.skipped_tokens == seen["skipped"] == 0


@settings(deadline=None, max_examples=80)
@given(runs(lengths=(4, 8, 16)))
def test_readings_through_longer_sequences_are_what_a_simulation_reads(stages):
    """Where tokens were skipped, what comes around again may be those first: the plan says the earliest that it can be."""
    wanted, found = simulated(stages), by_stage(stages)
    for key, reading in found.items():
        seen = wanted[key]
        assert (reading.samples, reading.tokens_before, reading.tokens_after) == (
            seen["samples"],
            seen["before"],
            seen["tokens"],
        )
        assert reading.skipped_tokens == seen["skipped"]
        assert seen["repeat"] is None or (reading.first_repeat is not None and reading.first_repeat <= seen["repeat"]), key


@settings(deadline=None, max_examples=80)
@given(runs())
def test_epochs_are_reads_over_windows_and_the_most_read_token_is_within_one(stages):
    """Without a replay nothing is read k + 1 times before everything was read k times."""
    stages = [replace(stage, replay_sample=None) for stage in stages]
    wanted, found = simulated(stages), by_stage(stages)
    for (stage, name), reading in found.items():
        windows = next(use.cuts[name].order.num_windows for use in stages if use.name == stage)
        epochs = wanted[stage, name]["tokens"] / LENGTH / windows
        assert reading.epochs == pytest.approx(epochs)
        assert reading.epochs_before == pytest.approx(wanted[stage, name]["before"] / LENGTH / windows)
        assert wanted[stage, name]["most"] == -(-round(epochs * windows) // windows)


# By hand


def test_two_stages_that_start_from_one_do_not_count_each_other():
    sizes = {"a": 100}
    stages = [
        use("base", 60, {"a": 1.0}, sizes=sizes),
        use("left", 30, {"a": 1.0}, sizes=sizes, init_from="base"),
        use("right", 70, {"a": 1.0}, sizes=sizes, init_from="base"),
    ]
    found = by_stage(stages)
    assert [found[name, "a"].tokens_after / LENGTH for name in ("base", "left", "right")] == [60, 90, 130]
    assert [found[name, "a"].first_repeat for name in ("base", "left", "right")] == [None, None, 40]
    assert found["right", "a"].epochs_before == 0.6


def test_a_stage_from_nothing_begins_at_nothing():
    sizes = {"a": 100}
    stages = [use("base", 90, {"a": 1.0}, sizes=sizes), use("other", 50, {"a": 1.0}, sizes=sizes)]
    found = by_stage(stages)
    assert (found["other", "a"].tokens_before, found["other", "a"].epochs, found["other", "a"].first_repeat) == (0, 0.5, None)


def test_a_replay_repeats_from_its_first_window_and_counts_on():
    sizes = {"a": 100, "b": 50}
    stages = [
        use("base", 80, {"a": 1.0}, sizes=sizes),
        use("recall", 100, {"a": 0.5, "b": 0.5}, sizes=sizes, init_from="base", replay=20),
    ]
    found = by_stage(stages)
    assert found["recall", "a"].first_repeat == names_and_order(stages[1], end=100).index("a")
    assert found["recall", "a"].tokens_before == 80 * LENGTH
    assert found["recall", "b"].first_repeat is None
    assert found["recall", "a"].epochs == (80 + found["recall", "a"].samples) / 100


def test_a_replay_from_the_end_is_none():
    sizes = {"a": 100}
    base = use("base", 80, {"a": 1.0}, sizes=sizes)
    goes_on = [base, use("next", 30, {"a": 1.0}, sizes=sizes, init_from="base")]
    replays = [base, use("next", 30, {"a": 1.0}, sizes=sizes, init_from="base", replay=80)]
    assert readings(goes_on, seed=SEED) == readings(replays, seed=SEED)
    assert by_stage(goes_on)["next", "a"].first_repeat == 20


def test_a_phase_that_begins_later_repeats_later():
    """b is read from sample 100 on, once through by sample 150."""
    stage = use("base", 200, {"a": 1.0}, (100, {"b": 1.0}), sizes={"a": 1000, "b": 50})
    reading = by_stage([stage])["base", "b"]
    assert (reading.samples, reading.first_repeat, reading.epochs) == (100, 150, 2.0)


def test_a_bucket_is_read_with_its_parent():
    """Long documents lie in both: what is read through either counts for both, and the bucket repeats from its first window."""
    sources = {"web": source(max_epochs=2.0), "web_long": source(parent="web")}
    sizes = {"web": 200, "web_long": 20}
    stages = [
        use("base", 300, {"web": 0.9, "web_long": 0.1}, sizes=sizes, sources=sources),
        use("next", 40, {"web_long": 1.0}, sizes=sizes, sources=sources, init_from="base"),
    ]
    found = by_stage(stages)
    web, long = found["base", "web"], found["base", "web_long"]
    assert web.epochs == long.epochs == pytest.approx(web.samples / 200 + long.samples / 20)
    assert long.first_repeat == names_and_order(stages[0], end=300).index("web_long")
    assert web.first_repeat == [i for i, name in enumerate(names_and_order(stages[0], end=300)) if name == "web"][200]
    assert found["next", "web_long"].epochs == pytest.approx(long.epochs + 2.0)
    assert found["next", "web_long"].tokens_before == long.tokens  # tokens are those read through the source itself
    assert found["next", "web_long"].first_repeat == 0


def test_a_parent_read_after_its_bucket_repeats_from_its_first_window():
    sources = {"web": source(), "web_long": source(parent="web")}
    sizes = {"web": 200, "web_long": 20}
    stages = [
        use("base", 10, {"web_long": 1.0}, sizes=sizes, sources=sources),
        use("next", 40, {"web": 1.0}, sizes=sizes, sources=sources, init_from="base"),
    ]
    found = by_stage(stages)
    assert (found["base", "web_long"].first_repeat, found["next", "web"].first_repeat) == (None, 0)
    assert found["next", "web"].epochs == pytest.approx(0.7)


def test_a_source_of_unknown_size_has_tokens_and_no_epochs():
    stage = use("base", 100, {"a": 0.5, "b": 0.5}, sizes={"a": 10})
    found = by_stage([stage])
    assert found["base", "b"].epochs is None and found["base", "b"].first_repeat is None
    assert found["base", "b"].tokens == found["base", "b"].samples * LENGTH
    assert found["base", "a"].epochs == pytest.approx(5.0)


def test_packed_windows_hold_fewer_tokens():
    stage = use("base", 100, {"a": 1.0}, sizes={"a": 40})
    packed = replace(stage, cuts={"a": cut("a", 40, window_tokens=3.5, kind="best_fit")})
    assert (by_stage([packed])["base", "a"].tokens, by_stage([packed])["base", "a"].epochs) == (350.0, 2.5)


# Caps


@settings(deadline=None, max_examples=60)
@given(runs(), st.floats(0.05, 4.0))
def test_a_breach_is_a_reading_above_its_cap(stages, cap):
    """By the simulation's counts; a source read by no sample of a stage is none of its business."""
    stages = [replace(stage, sources={**stage.sources, "a": source(max_epochs=cap)}) for stage in stages]
    wanted = simulated(stages)
    over = set()
    for stage in stages:
        seen = wanted.get((stage.name, "a"))
        windows = stage.cuts["a"].order.num_windows
        if seen and seen["samples"] and seen["tokens"] / LENGTH > cap * windows + slack(stage.num_samples) + 1e-6:
            over.add(stage.name)
    found = list(breaches(stages, found=readings(stages, seed=SEED)))
    assert {reading.stage for reading, _ in found} == over
    assert all((reading.source, said) == ("a", cap) for reading, said in found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("epochs", [0.5, 1.0, 3.0])
def test_amounts_at_their_cap_keep_it(seed, epochs):
    """A source may be read exactly as often as its cap says: the sample more or less that the order gives is no breach."""
    sources = {"a": Source(inputs=("x",), format="text", epochs=epochs, max_epochs=epochs), "b": source(share=1.0)}
    for num_samples in (1301, 20_011):
        rows = plan_phases(Mixture(name="m", sources=sources), extent=Extent(LENGTH, num_samples, {"a": 300}))
        stage = StageUse("base", LENGTH, num_samples, rows, sources, {"a": cut("a", 300)}, None, None)
        assert list(breaches([stage], found=readings([stage], seed=seed))) == []
        tight = {**sources, "a": replace(sources["a"], max_epochs=epochs - 20 / 300)}
        (breach,) = breaches([replace(stage, sources=tight)], found=readings([stage], seed=seed))
        assert breach == (readings([stage], seed=seed)[0], epochs - 20 / 300)


def test_caps_of_each_stage_are_its_own():
    sizes, first, second = {"a": 100}, {"a": source(max_epochs=1.0)}, {"a": source(max_epochs=3.0)}
    stages = [
        use("base", 95, {"a": 1.0}, sizes=sizes, sources=first),
        use("next", 150, {"a": 1.0}, sizes=sizes, sources=second, init_from="base"),
    ]
    assert list(breaches(stages, found=readings(stages, seed=SEED))) == []
    stages[1] = replace(stages[1], sources=first)
    assert [(reading.stage, cap) for reading, cap in breaches(stages, found=readings(stages, seed=SEED))] == [("next", 1.0)]


def test_phases_of_a_mixture_are_counted_as_they_are_planned():
    """plan_phases and readings together: what amounts say is what exposure finds."""
    mixture = Mixture(
        name="m",
        sources={"a": source(share=1.0), "b": source()},
        phases=(Phase(start_tokens=400.0 * LENGTH, sources={"a": Amount(share=1.0), "b": Amount(epochs=1.5)}),),
    )
    rows = plan_phases(mixture, extent=Extent(LENGTH, 1000, {"a": 2000, "b": 200}))
    cuts = {"a": cut("a", 2000), "b": cut("b", 200)}
    stage = StageUse("base", LENGTH, 1000, rows, mixture.sources, cuts, None, None)
    found = by_stage([stage])
    assert found["base", "b"].epochs == pytest.approx(1.5, abs=4 / 200)
    per_source = defaultdict(list)
    for sample, name in enumerate(names_and_order(stage, end=1000)):
        per_source[name].append(sample)
    assert found["base", "b"].first_repeat == per_source["b"][200] > 400
    assert found["base", "a"].samples == len(per_source["a"])
