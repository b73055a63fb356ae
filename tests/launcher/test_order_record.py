"""order.json: what a run records of the order of its data, how that changes, and that no change moves what was read."""

import json
import os
import shutil
from hashlib import blake2b

import numpy as np
import pytest

from data_prep.manifest import verify_source
from data_prep.mixing import Extent, names_of, plan_phases, schedule_of
from data_prep.order import SLOTS, SourceOrder, StageOrder, carry_over, quantise
from data_prep.spec import Amount, Mixture, Phase, Source
from data_prep.stream import SourceStream
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.config.reading import assumed_sizes, plan_tables, source_order
from launcher.plan.prepared import Prepared, read_source
from launcher.rundir.checkpoints import FORMAT_VERSION, Meta
from launcher.rundir.exits import RunStateError
from launcher.rundir.freeze import open_run, read_config
from launcher.rundir.order import recorded_held_out, recorded_shards, recorded_tables, stage_shares
from launcher.rundir.records import append_record, read_json, read_records, write_json
from tests.training.shards import write_sources
from tests.training.tiny import run_config, stage_config

S = 32  # tokens of a window of the tiny run
SAMPLES = 320  # of its stage
SHARES = {"a": {"share": 0.5}, "b": {"share": 0.3}, "c": {"share": 0.2}}
CHANGED = {"a": {"share": 0.2}, "b": {"share": 0.3}, "c": {"share": 0.5}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_sources(root, ("a", "b", "c", "d"), num_tokens=6000)
    return root


@pytest.fixture
def tiny(tmp_path, shards):
    """Composes a run of one stage on shards of its own: amounts of the sources, later phases by sample, more settings."""
    shutil.copytree(shards, tmp_path / "data")

    def compose(amounts=None, *phases, samples=SAMPLES, name="pretrain", init_from=None, **changes):
        amounts = amounts or SHARES
        sources = {source: dict(inputs=["unused"], format="text", **amount) for source, amount in amounts.items()}
        later = [dict(start_tokens=float(start * S), sources=rows) for start, rows in phases]
        settings = dict(name=name, tokens=float(samples * S), init_from=init_from)
        stage = stage_config(stage=settings)
        stage["mixture"] = dict(name="tiny", sources=sources, phases=later)
        return run_config(tmp_path, stages=[stage], **changes)

    return compose


def opened(config, **options):
    prepared = Prepared()
    for name in dict.fromkeys(name for stage in config.stages for name in stage.mixture.sources):
        assert read_source(config, name, into=prepared) == []
    return open_run(config, prepared=prepared, **options)


def checkpoint(run, samples, *, stage="pretrain"):
    path = run.checkpoints(stage) / f"step_{samples:08d}"
    path.mkdir(parents=True)
    meta = Meta(FORMAT_VERSION, stage, samples // 8, samples, samples * S, False, {}, {}, {}, {}, {})
    write_json(path / "meta.json", vars(meta))
    append_record(run.checkpoints(stage) / "index.jsonl", "checkpoint", path=path.name, finished=False)


def kinds(run):
    return [row["kind"] for row in read_records(run.events)]


def starts(run, stage="pretrain"):
    return [row.start_sample for row in recorded_tables(run)[stage]]


def slots(amounts):
    return dict(zip(amounts, quantise([amount["share"] for amount in amounts.values()]), strict=True))


# Written once, amended from here on


def test_the_order_is_written_when_a_run_is_first_opened(tiny):
    config = tiny(SHARES, (200, {"a": {"share": 1.0}}))
    run = opened(config)
    tree = read_json(run.order)
    assert tree["format_version"] == 1
    assert tree["stages"] == {
        "pretrain": [
            {
                "start_sample": 0,
                "slots": slots(SHARES),
                "declared": {"start": 0, "end": None, "amounts": SHARES},
            },
            {
                "start_sample": 200,
                "slots": {"a": SLOTS},
                "declared": {"start": 200, "end": None, "amounts": {"a": {"share": 1.0}}},
            },
        ]
    }
    assert kinds(run) == ["created"]


def test_the_shards_are_written_down_as_they_were(tiny):
    config = tiny()
    run = opened(config)
    files = {path.name: path.stat() for path in (run.root.parent.parent / "data" / "a").glob("shard_*")}
    assert sorted(files) == ["shard_00000.bin", "shard_00000.idx"]
    recorded = {name: (state.size, state.version) for name, state in recorded_shards(run)["a"].items()}
    assert recorded["shard_00000.bin"] == (files["shard_00000.bin"].st_size, str(files["shard_00000.bin"].st_mtime_ns))
    assert recorded_shards(run).keys() == {"a", "b", "c"}
    held_out = SourceStream(run.root.parent.parent / "data" / "a", name="a", split="held_out")
    assert recorded_held_out(run)["a"] == held_out.digest and len(set(recorded_held_out(run).values())) == 3


def test_opened_again_it_stays_as_it_is(tiny):
    run = opened(tiny())
    before = read_json(run.order)
    checkpoint(run, 80)
    told = []
    opened(tiny(), on_change=told.append)
    assert read_json(run.order) == before
    assert (kinds(run), told) == (["created"], [])


def test_a_changed_mixture_is_a_phase_from_the_newest_checkpoint_on(tiny):
    run = opened(tiny())
    for samples in (40, 80):
        checkpoint(run, samples)
    told = []
    opened(tiny(CHANGED), on_change=told.append)
    assert starts(run) == [0, 80]
    assert [row.slots for row in recorded_tables(run)["pretrain"]] == [slots(SHARES), slots(CHANGED)]
    assert "phase: stage pretrain from 2,560 tokens on: a 0.2, b 0.3, c 0.5" in told
    (event,) = [row for row in read_records(run.events) if row["kind"] == "phase"]
    assert {key: event[key] for key in ("stage", "start_sample", "start_tokens")} == {
        "stage": "pretrain", "start_sample": 80, "start_tokens": 2560,
    }  # fmt: skip
    assert event["shares"] == pytest.approx({"a": 0.2, "b": 0.3, "c": 0.5})
    assert read_config(run) == tiny(CHANGED)


def test_a_phase_is_told_once(tiny):
    run = opened(tiny())
    checkpoint(run, 80)
    opened(tiny(CHANGED))
    before = read_json(run.order)
    for samples in (88, 160):
        checkpoint(run, samples)
        opened(tiny(CHANGED))
    assert read_json(run.order) == before
    assert kinds(run).count("phase") == 1


def test_before_the_first_checkpoint_a_changed_mixture_is_the_plan(tiny):
    run = opened(tiny())
    opened(tiny(CHANGED))
    assert [(row.start_sample, row.slots) for row in recorded_tables(run)["pretrain"]] == [(0, slots(CHANGED))]


def test_what_was_read_is_read_alike_after_changes(tiny):
    """The order of the ranks, from order.json, before and after a changed mixture, a phase to come and a longer horizon."""
    config = tiny()
    run = opened(config)
    read = [in_order(config, recorded_tables(run)["pretrain"], end=80)]
    for samples, changed in [
        (80, tiny(CHANGED)),
        (120, tiny(CHANGED, (200, {"a": {"share": 1.0}}))),
        (208, tiny({**CHANGED, "d": {}}, (200, {"a": {"share": 0.5}, "d": {"share": 0.5}}), samples=400)),
    ]:
        checkpoint(run, samples)
        opened(changed)
        now = in_order(changed, recorded_tables(run)["pretrain"], end=samples + 40)
        assert now[: len(read[-1])] == read[-1]
        read.append(now)
    assert starts(run) == [0, 80, 200, 208]
    assert {name for name, _, _ in read[-1][200:208]} == {"a"}
    assert {name for name, _, _ in read[-1][208:]} == {"a", "d"}


def in_order(config, rows, *, end):
    """(source, epoch, offset) of the first samples of a stage of the tiny run."""
    stage, names = config.stages[0], names_of(rows)
    sizes = Prepared()
    for name in names:
        read_source(config, name, into=sizes)
    orders = [source_order(name, stage=stage, config=config, size=sizes.sizes[name]) for name in names]
    schedule = schedule_of(rows, names=names, seed=config.run.seed)
    return located(StageOrder(orders=orders, schedule=schedule, starts=[0] * len(names)), names, first=0, count=end)


def located(stage, names, *, first, count):
    windows = stage.windows(first, count)
    return [
        (names[source], epoch, offset)
        for source, epoch, offset in zip(windows.source.tolist(), windows.epoch.tolist(), windows.offset.tolist(), strict=True)
    ]


def test_tokens_that_count_over_a_phase_are_met_after_a_change(tiny):
    run = opened(tiny({"a": {"tokens": 100.0 * S}, "b": {"share": 1.0}}))
    checkpoint(run, 80)
    opened(tiny({"a": {"tokens": 200.0 * S}, "b": {"share": 1.0}}))
    walk = [name for name, _, _ in in_order(tiny(), recorded_tables(run)["pretrain"], end=SAMPLES)]
    assert abs(walk.count("a") - 200) < 4
    assert abs(walk[:80].count("a") - 25) < 4


def test_a_longer_horizon_alone_is_no_phase(tiny):
    run = opened(tiny())
    checkpoint(run, 80)
    opened(tiny(samples=2 * SAMPLES))
    assert (starts(run), kinds(run)) == ([0], ["created", "amended"])


def test_a_stage_added_later_leaves_the_order_of_the_others(tiny):
    both = dict(run={"stages": ["pretrain", "midtrain"]})
    run = opened(tiny(**both))
    checkpoint(run, 80)
    before = read_json(run.order)["stages"]["pretrain"]
    opened(tiny(CHANGED, name="midtrain", init_from="pretrain", **both))
    tree = read_json(run.order)["stages"]
    assert tree["pretrain"] == before
    assert [row["slots"] for row in tree["midtrain"]] == [slots(CHANGED)]


def test_mean_shares_are_those_that_were_recorded(tiny):
    run = opened(tiny())
    checkpoint(run, 80)
    opened(tiny(CHANGED))
    assert stage_shares(run, tiny(CHANGED)) == {"pretrain": pytest.approx({"a": 0.275, "b": 0.3, "c": 0.425})}


# What is refused


def refused(config):
    with pytest.raises(RunStateError) as caught:
        opened(config)
    return str(caught.value)


def unchanged(run):
    return read_json(run.order), read_config(run), kinds(run)


def test_a_source_that_was_read_stays_described(tiny):
    run = opened(tiny())
    checkpoint(run, 80)
    before = unchanged(run)
    error = refused(tiny({"a": {"share": 0.6}, "b": {"share": 0.4}}))
    assert "stage pretrain reads c, which the mixture no longer describes" in error
    assert "Fix: mixture.sources.c.share=0 ends reading it" in error
    assert unchanged(run) == before
    opened(tiny({"a": {"share": 0.6}, "b": {"share": 0.4}, "c": {"share": 0.0}}))
    assert recorded_tables(run)["pretrain"][-1].slots["c"] == 0


def test_before_anything_was_read_a_source_may_leave(tiny):
    run = opened(tiny())
    opened(tiny({"a": {"share": 0.6}, "b": {"share": 0.4}}))
    assert recorded_tables(run)["pretrain"][0].slots.keys() == {"a", "b"}


def test_a_phase_in_the_past_is_refused(tiny):
    run = opened(tiny())
    checkpoint(run, 80)
    before = unchanged(run)
    error = refused(tiny(SHARES, (40, CHANGED)))
    assert "stage pretrain: mixture.phases: found a phase that starts at 1280 tokens, in the past" in error
    assert "the stage has read 2560 tokens" in error and "Fix: start it at 2560 or later" in error
    assert unchanged(run) == before


def test_a_phase_that_began_is_not_removed(tiny):
    run = opened(tiny(SHARES, (40, CHANGED)))
    checkpoint(run, 80)
    assert "mixture.phases: found no phase at 1280 tokens" in refused(tiny())


def test_a_phase_that_ended_is_not_changed(tiny):
    run = opened(tiny(SHARES, (40, CHANGED)))
    checkpoint(run, 80)
    assert "mixture.phases: found another mixture from 0 tokens on" in refused(tiny(CHANGED, (40, CHANGED)))


def test_an_amount_below_what_was_read_is_refused(tiny):
    run = opened(tiny())
    checkpoint(run, 80)
    error = refused(tiny({"a": {"tokens": 10.0 * S}, "b": {"share": 0.5}, "c": {"share": 0.5}}))
    assert "mixture.sources.a: found 320 tokens in this phase" in error and "were read already" in error


def test_a_cap_broken_by_a_change_is_refused_before_it_is_written(tiny):
    """From here on: 41 of the 80 samples were of a, and 240 more come; an epoch has 187."""
    capped = {"a": {"share": 0.5, "max_epochs": 1.2}, "b": {"share": 0.3}, "c": {"share": 0.2}}
    run = opened(tiny(capped))
    checkpoint(run, 80)
    before = unchanged(run)
    all_of_a = {"a": {"share": 1.0, "max_epochs": 1.2}, "b": {"share": 0.0}, "c": {"share": 0.0}}
    with pytest.raises(ConfigError, match=r"mixture\.sources\.a\.max_epochs: found 1\.2; .* are 1\.503 epochs"):
        opened(tiny(all_of_a))
    assert unchanged(run) == before


@pytest.mark.parametrize("version", [2, 99, None])
def test_an_order_of_newer_code_is_refused(tiny, version):
    run = opened(tiny())
    write_json(run.order, {**read_json(run.order), "format_version": version})
    text = run.order.read_text()
    error = refused(tiny())
    assert f"order.json has format_version {version}; this code reads 1" in error
    assert "use the phidias that wrote it" in error
    assert run.order.read_text() == text


def test_a_shard_changed_since_the_launch_is_refused_until_it_was_verified(tiny):
    config = tiny()
    run = opened(config)
    launched = recorded_shards(run)["b"]["shard_00000.bin"]
    directory = run.root.parent.parent / "data" / "b"
    path = directory / "shard_00000.bin"
    os.utime(path, ns=(10**18, 1_700_000_000_123_456_789))
    before = unchanged(run)
    error = refused(config)
    assert all(part in error for part in ("source b", str(path), str(launched), "`phidias data action=verify`"))
    assert "12,000 bytes changed at 2023-11-14 22:13:20.123457 UTC" in error
    assert unchanged(run) == before
    assert verify_source(directory) == []
    opened(config)
    assert recorded_shards(run)["b"]["shard_00000.bin"].version == "1700000000123456789"


def test_a_shard_of_other_text_is_not_accepted(tiny):
    config = tiny()
    run = opened(config)
    directory = run.root.parent.parent / "data" / "b"
    tokens = np.fromfile(directory / "shard_00000.bin", dtype=np.uint16)
    tokens[7] += 1
    tokens.tofile(directory / "shard_00000.bin")
    assert any("bin_xxh3" in line for line in verify_source(directory))
    assert "source b" in refused(config)
    assert recorded_shards(run)["b"]["shard_00000.bin"].version != str((directory / "shard_00000.bin").stat().st_mtime_ns)


def test_what_was_verified_once_does_not_vouch_for_a_later_change(tiny):
    config = tiny()
    run = opened(config)
    directory = run.root.parent.parent / "data" / "b"
    assert verify_source(directory) == []
    os.utime(directory / "shard_00000.bin", ns=(10**18, 10**18))
    assert "source b" in refused(config)


# Older runs


def test_a_run_from_before_order_json_goes_on_with_one_phase(tiny):
    config = tiny()
    run = opened(config)
    recorded = read_json(run.order)
    checkpoint(run, 80)
    run.order.unlink()
    opened(config)
    assert read_json(run.order) == recorded
    assert (starts(run), kinds(run)) == ([0], ["created"])


# The order of every run that exists


def digest(stage, names, *, places, count=512):
    """Over (source, epoch, offset) of the samples from each place on."""
    rows = [located(stage, names, first=place, count=count) for place in places]
    return blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


def phi4_stage(config, name, *, before=None):
    """A stage of phi4 at its assumed sizes, going on where the one before ended."""
    sizes = assumed_sizes(config)
    rows = plan_tables(config, sizes=sizes)[name]
    names = names_of(rows, first=config.stage(name).mixture.sources)
    orders = [source_order(source, stage=config.stage(name), config=config, size=sizes[source]) for source in names]
    begin = [0] * len(names)
    if before is not None:
        stage, read, end = before
        ended = dict(zip(read, zip(stage.orders, stage.positions(end).tolist(), strict=True), strict=True))
        begin = [
            carry_over(*ended[source], order)[0] if source in ended else 0 for source, order in zip(names, orders, strict=True)
        ]
    schedule = schedule_of(rows, names=names, seed=config.run.seed)
    return StageOrder(orders=orders, schedule=schedule, starts=begin), names


@pytest.fixture(scope="module")
def phi4():
    return compose_run(["run=phi4"])


def test_golden_pretraining(phi4):
    """If this moves, every run that exists reads other data: never record it anew, add an upgrade of order.json."""
    stage, names = phi4_stage(phi4, "pretrain")
    end = phi4.stage("pretrain").stage.num_samples
    places = (0, end // 2, end - 512, 2**32 - 256, 2**33 - 256)
    assert digest(stage, names, places=places) == "486ef50b6740499d03f3ad0cf9e2ae6b"


def test_golden_midtraining(phi4):
    """If this moves, every run that exists reads other data: never record it anew, add an upgrade of order.json."""
    pretrain, read = phi4_stage(phi4, "pretrain")
    before = (pretrain, read, phi4.stage("pretrain").stage.num_samples)
    stage, names = phi4_stage(phi4, "midtrain", before=before)
    end = phi4.stage("midtrain").stage.num_samples
    places = (0, end // 2, end - 512, 2**32 - 256)
    assert digest(stage, names, places=places) == "be4fc7b7b861ed25ed4f50e513fddc8b"


def test_golden_phases():
    """If this moves, every run that exists reads other data: never record it anew, add an upgrade of order.json."""
    seq_length, end = 4096, 6_000_000_000
    names = [f"source_{i:02d}" for i in range(50)]
    windows = {name: 10_000_019 * (i * i + 1) for i, name in enumerate(names)}
    sources = {name: Source(inputs=("x",), format="jsonl", share=(i + 1) / 820) for i, name in enumerate(names[:40])}
    sources |= {name: Source(inputs=("x",), format="jsonl") for name in names[40:]}
    second = {name: Amount(share=(i + 1) / 1035) for i, name in enumerate(names[:45])}
    third = {name: Amount(share=1 / 45) for name in names[5:]} | {names[0]: Amount(tokens=1e12)}
    starts = (2**31 + 12_345, 2**32 + 777)
    mixture = Mixture(
        name="synthetic",
        sources=sources,
        phases=tuple(
            Phase(start_tokens=float(start * seq_length), sources=row)
            for start, row in zip(starts, (second, third), strict=True)
        ),
    )
    rows = plan_phases(mixture, extent=Extent(seq_length, end, windows))
    orders = [
        SourceOrder(
            name=name,
            num_tokens=windows[name] * seq_length + 1 + i,
            seq_length=seq_length,
            chunk_tokens=131_072,
            group_tokens=2**31,
            seed=99,
        )
        for i, name in enumerate(names)
    ]
    stage = StageOrder(orders=orders, schedule=schedule_of(rows, names=names, seed=99), starts=list(range(50)))
    places = (0, starts[0] - 256, 2**32 - 256, starts[1] - 256, end // 2, end - 512)
    assert digest(stage, names, places=places) == "709b247eda3a2a9311566148fce35007"
