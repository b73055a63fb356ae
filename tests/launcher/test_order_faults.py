"""Faults that a review found, each a test: the moments at which phases change, shares of 0, caps of parents, crashes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from data_prep.exposure import Cut, StageUse, breaches, readings
from data_prep.mixing import AmountError, Extent, PhaseRow, plan_phases
from data_prep.order import SourceOrder
from data_prep.spec import Mixture, Source
from launcher.config.check import check_run
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.rundir.order import recorded_tables
from tests.data_prep.test_exposure import source
from tests.data_prep.test_mixing import amended, planned, shares, tokens
from tests.launcher.test_order_record import CHANGED, SHARES, checkpoint, opened, shards, slots, tiny  # noqa: F401


def test_an_older_run_whose_mixture_changes_goes_on_from_here(tiny):  # noqa: F811
    run = opened(tiny())
    checkpoint(run, 80)
    run.order.unlink()
    opened(tiny(CHANGED))
    rows = recorded_tables(run)["pretrain"]
    assert [(row.start_sample, row.slots) for row in rows] == [(0, slots(SHARES)), (80, slots(CHANGED))]


def test_a_crash_after_order_json_and_before_the_config_is_not_the_end(tiny):  # noqa: F811
    run = opened(tiny())
    for path in (run.config, run.plan, run.code, run.events):
        path.unlink()
    opened(tiny())


def test_a_phase_that_ended_with_the_checkpoint_is_not_changed_either():
    """Accepted now and refused at the next resume, it would strand the run."""
    before, changed = (shares(a=0.5, b=0.5), (50, shares(a=1.0))), (shares(a=0.4, b=0.6), (50, shares(a=1.0)))
    with pytest.raises(AmountError, match="another mixture from 0 tokens on"):
        amended(planned(100, *before), 100, *changed, read=50)


def test_a_phase_after_amounts_that_filled_the_stage_can_be_resumed():
    """Two sources in tokens fill 100 samples; the last batch ran to 104, from where another phase holds."""
    amounts, later = {"a": tokens(50), "b": tokens(50)}, (104, shares(a=1.0))
    rows = amended(planned(100, amounts), 200, amounts, later, read=104)
    amended(rows, 200, amounts, later, read=112)


@pytest.mark.parametrize("amounts", [shares(a=0.0, b=0.0), {**shares(a=0.0), "b": tokens(60)}])
def test_shares_of_0_fill_no_phase(amounts):
    with pytest.raises(AmountError):
        planned(100, amounts)


def test_a_source_may_be_ended_beside_amounts_that_fill_the_phase():
    """share=0 is the fix that a removed source is answered with."""
    assert planned(100, {**shares(a=0.0), "b": tokens(100)})[0].slots["a"] == 0


def test_a_horizon_a_few_samples_longer_is_no_crash():
    rows = planned(97, {"a": tokens(97)})
    amended(rows, 100, {"a": tokens(97)}, read=97)


def test_a_source_at_its_cap_of_epochs_keeps_it_over_a_whole_pretraining_run():
    weights = np.random.default_rng(4)
    num, seed = 2_392_578_125, 18
    for _ in range(seed + 1):
        w = weights.lognormal(sigma=1.5, size=60)
    w /= w.sum()
    sizes = {f"s{i}": max(2, int(num * part / 2)) for i, part in enumerate(w)}
    sources = {n: Source(inputs=("x",), format="text", epochs=2.0, max_epochs=2.0) for n in sizes if n != "s0"}
    sources["s0"] = Source(inputs=("x",), format="text", share=1.0)
    rows = plan_phases(Mixture(name="m", sources=sources), extent=Extent(4096, num, sizes))
    order = partial(SourceOrder, seq_length=4096, chunk_tokens=131072, group_tokens=2**31, seed=seed)
    cuts = {name: Cut(order(name=name, num_tokens=windows * 4096 + 1), 4096) for name, windows in sizes.items()}
    stage = StageUse("p", 4096, num, rows, sources, cuts, None, None)
    assert [(r.source, r.samples - 2 * sizes[r.source]) for r, _ in breaches([stage], found=readings([stage], seed=seed))] == []


def test_the_cap_of_a_parent_counts_what_its_bucket_reads():
    """web is read 1.5 times; then web_long alone twice: web's longest documents are read 3.5 times, its cap is 2."""
    sizes = {"web": 1000, "web_long": 100}
    order = partial(SourceOrder, seq_length=8, chunk_tokens=32, group_tokens=64, seed=1)
    cuts = {name: Cut(order(name=name, num_tokens=windows * 8 + 1), 8) for name, windows in sizes.items()}
    sources = {"web": source(max_epochs=2.0), "web_long": source(parent="web")}
    rows = [[PhaseRow(0, {"web": 2**32}, {})], [PhaseRow(0, {"web": 0, "web_long": 2**32}, {})]]
    first = StageUse("one", 8, 1500, rows[0], sources, cuts, None, None)
    stages = [first, StageUse("two", 8, 200, rows[1], sources, cuts, "one", None)]
    assert [(r.stage, r.source) for r, _ in breaches(stages, found=readings(stages, seed=1))] == [("two", "web")]


def test_a_length_that_is_no_multiple_repeats_no_earlier():
    """S 3 -> 4 at a group's border: epochs() of the same token differ in the last digits, and 'a replay' is seen."""
    order = partial(SourceOrder, name="a", num_tokens=245, chunk_tokens=12, group_tokens=24, seed=1)
    cuts = {length: {"a": Cut(order(seq_length=length), length)} for length in (3, 4)}
    rows = [PhaseRow(0, {"a": 2**32}, {})]
    first = StageUse("one", 3, 16, rows, {"a": source()}, cuts[3], None, None)
    stages = [first, StageUse("two", 4, 6, rows, {"a": source()}, cuts[4], "one", None)]
    assert readings(stages, seed=1)[1].first_repeat is None


def test_a_source_that_only_a_phase_to_come_would_read_may_leave(tiny):  # noqa: F811
    halves = {"a": {"share": 0.5}, "b": {"share": 0.5}}
    run = opened(tiny({**halves, "c": {}}, (200, {"a": {"share": 0.5}, "c": {"share": 0.5}})))
    checkpoint(run, 80)
    opened(tiny(halves))


def test_a_problem_is_found_once():
    config = compose_run(["run=demo"])
    stage = config.stages[0]
    code = replace(stage.mixture.sources["code"], tokens=5e4)
    stage = replace(stage, mixture=replace(stage.mixture, sources={**stage.mixture.sources, "code": code}))
    with pytest.raises(ConfigError) as caught:
        check_run(replace(config, stages=(stage, config.stages[1])))
    assert [problem.path for problem in caught.value.problems] == ["mixture.sources.code (stage demo_pretrain)"]
