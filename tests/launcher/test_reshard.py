"""Which layouts read a checkpoint that was written fast, and what is refused before GPUs are taken."""

import pytest

from launcher.config.compose import compose_run
from launcher.plan.prepared import Prepared
from launcher.rundir.checkpoints import DP_RESHARDABLE, FORMAT_VERSION, FULLY_RESHARDABLE, Meta
from launcher.rundir.exits import RunStateError
from launcher.rundir.freeze import open_run, read_config, refuse_unopenable
from launcher.rundir.records import append_record, read_json, write_json
from launcher.rundir.reshard import reshard_key, unlike

STAGE = "demo_pretrain"


@pytest.fixture
def demo(tmp_path):
    return lambda *words: compose_run([f"run.runs_dir={tmp_path / 'runs'}", f"stage={STAGE}", *words])


@pytest.fixture
def saved(demo):
    """A run with a checkpoint of its own layout, in either form."""

    def make(sharding=DP_RESHARDABLE, *words):
        config = demo(*words)
        run = open_run(config, prepared=Prepared())
        path = run.checkpoints(STAGE) / "step_00000010"
        path.mkdir(parents=True)
        key = reshard_key(config.stage(STAGE), cluster=config.cluster)
        meta = Meta(FORMAT_VERSION, STAGE, 10, 80, 5120, False, {}, {}, {}, {}, {}, sharding=sharding, reshard=key)
        write_json(path / "meta.json", vars(meta))
        append_record(run.checkpoints(STAGE) / "index.jsonl", "checkpoint", path=path.name)
        return run

    return make


def key(config):
    return reshard_key(config.stage(STAGE), cluster=config.cluster)


def same(config, other):
    meta = Meta(FORMAT_VERSION, STAGE, 1, 1, 1, False, {}, {}, {}, {}, {}, sharding=DP_RESHARDABLE, reshard=key(config))
    return not unlike(meta, key(other))


@pytest.mark.parametrize(
    ("words", "reads"),
    [
        (["cluster.gpus_per_node=4"], True),
        (["layout.micro_batch_size=1"], True),
        (["layout.cp=2"], True),
        (["layout.tp=2"], False),
        (["layout.pp=2"], False),
        (["layout.pp=2", "layout.vpp=2"], False),
        (["precision=bf16"], False),
        (["precision=bf16", "precision.grad_reduce_in_fp32=false"], False),
        (["layout.overlap_grad_reduce=true"], False),
    ],
)
def test_what_the_optimizers_buckets_lie_by(demo, words, reads):
    assert same(demo(), demo(*words)) == reads


def test_gradients_in_another_precision_lie_in_another_buffer(demo):
    assert not same(demo("precision=bf16"), demo("precision=bf16", "precision.grad_reduce_in_fp32=false"))


def test_buckets_grow_with_many_data_parallel_ranks(demo):
    """Megatron's rule, where gradients are reduced while they are computed: only then are there several. The ranks take
    over the checkpoint's."""
    words = ["layout.overlap_grad_reduce=true", "stage.global_batch_size=6720", "layout.micro_batch_size=1"]
    few, many = (demo(*words, f"cluster.gpus_per_node={count}") for count in (40, 80))
    assert key(few)["bucket_size"] == 40_000_000 and key(many)["bucket_size"] == 80_000_000
    assert same(few, many) and same(many, few)


def test_one_bucket_and_several_are_named_by_the_setting(demo):
    meta = Meta(FORMAT_VERSION, STAGE, 1, 1, 1, False, {}, {}, {}, {}, {}, sharding=DP_RESHARDABLE, reshard=key(demo()))
    assert unlike(meta, key(demo("layout.overlap_grad_reduce=true"))) == {"overlap_grad_reduce": [False, True]}


def test_it_is_what_a_file_holds(demo, saved):
    """Read back from meta.json it is equal to itself."""
    run = saved(DP_RESHARDABLE, "layout.pp=2")
    config = read_config(run)
    assert read_json(run.checkpoints(STAGE) / "step_00000010" / "meta.json")["reshard"] == key(config)


@pytest.mark.parametrize("check", ["train", "submit"])
def test_another_layout_is_refused_with_the_way_out(demo, saved, check):
    run = saved()
    before = run.config.read_bytes()
    with pytest.raises(RunStateError) as refusal:
        asked = demo("layout.pp=2")
        refuse_unopenable(run, asked) if check == "submit" else open_run(asked, prepared=Prepared())
    said = str(refusal.value)
    assert "step_00000010 of stage demo_pretrain was saved in another layout: pp 1 -> 2" in said
    assert f"`phidias checkpoint {run.name} action=convert stage=demo_pretrain`" in said
    assert f"`phidias stop {run.name} layout=any`" in said
    assert run.config.read_bytes() == before


def test_another_data_parallel_size_is_not(demo, saved):
    run = saved()
    open_run(demo("cluster.gpus_per_node=1"), prepared=Prepared())
    assert read_config(run).cluster.gpus_per_node == 1


def test_one_for_any_layout_is_read_by_any(demo, saved):
    run = saved(FULLY_RESHARDABLE)
    open_run(demo("layout.pp=2"), prepared=Prepared())
    assert read_config(run).stage(STAGE).layout.pp == 2
