"""A checkpoint of another run that a stage starts from: which one a path names, what is refused, what of its ledger goes on.
Without torch: tests/training/test_ranks.py starts from one."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.errors import ConfigError
from launcher.jobs.stages import refuse_headless
from launcher.plan.prepared import open_source
from launcher.rundir.ancestor import check_ancestor, find_ancestor, place_of, take_over
from launcher.rundir.checkpoints import DP_RESHARDABLE, FORMAT_VERSION, CheckpointError, Meta, file_digest
from launcher.rundir.freeze import write_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, write_json
from launcher.rundir.reshard import reshard_key
from tests.training.shards import write_sources
from tests.training.tiny import run_config, stage_config


def write_checkpoint(run, stage, step, *, key=None, ledger=None):
    path = run.checkpoints(stage) / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "shard").write_bytes(b"x" * 9)
    form = {"sharding": DP_RESHARDABLE, "reshard": key} if key else {}
    layout = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1}
    meta = Meta(FORMAT_VERSION, stage, step, step * 8, step * 256, True, layout, ledger or {}, {}, {}, {"shard": 9}, **form)
    write_json(path / "meta.json", vars(meta) | {"digests": {"shard": file_digest(path / "shard")}})
    append_record(path.parent / "index.jsonl", "checkpoint", path=path.name, meta=file_digest(path / "meta.json"))
    return path


def stage_named(name, **changes):
    return stage_config(**{**changes, "stage": {"name": name, **changes.get("stage", {})}})


@pytest.fixture
def parent(tmp_path):
    """A run of three stages, of which the last has no checkpoint; and its config."""
    config = run_config(tmp_path, stages=[stage_named(name) for name in ("pretrain", "anneal", "late")], run={"name": "parent"})
    config = replace(config, tokenizer=replace(config.tokenizer, file=str(tmp_path / "gone.json")))
    run = RunDir(tmp_path / "runs" / "parent")
    run.root.mkdir(parents=True)
    write_config(run, config)
    write_checkpoint(run, "pretrain", 3)
    write_checkpoint(run, "pretrain", 6)
    write_checkpoint(run, "anneal", 2)
    return run


def child(tmp_path, path, *, model=(), data=(), run=(), **sections):
    stage = stage_named("branch", **{**sections, "stage": {"init_from": str(path), **sections.get("stage", {})}})
    return run_config(tmp_path, stages=[stage], run={"name": "child", **dict(run)}, model=dict(model), data=dict(data))


def refusals(config):
    return [(problem.path, str(problem)) for problem in check_ancestor(config.stages[0], config=config)]


def state_of(folder):
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())).hexdigest()


def test_a_path_names_a_run_a_stage_or_a_step(parent):
    steps = parent.checkpoints("pretrain")
    for path, found in {
        parent.root: ("anneal", 2), steps: ("pretrain", 6), steps / "step_00000003": ("pretrain", 3),
    }.items():  # fmt: skip
        meta = find_ancestor(path).saved.meta
        assert (meta.stage, meta.step) == found
    origin = find_ancestor(steps).origin()
    assert origin == {
        "run": str(parent.root), "stage": "pretrain", "step": 6, "tokens": 1536,
        "digest": file_digest(steps / "step_00000006" / "meta.json"),
    }  # fmt: skip


def test_other_folders_are_of_no_run(parent):
    export = parent.export("pretrain")
    export.mkdir(parents=True)
    for path in (export, parent.root.parent, parent.logs, parent.root / "nowhere"):
        assert place_of(path) is None
    (parent.root / "config.json").write_text("{}")  # a Hugging Face folder that has a config.yaml as well
    assert place_of(parent.root) is None


def test_what_is_torn_or_damaged_is_passed_over_for_the_one_before(parent):
    steps = parent.checkpoints("pretrain")
    assert find_ancestor(steps, passing={"pretrain/step_00000006": "rotted"}).saved.meta.step == 3
    assert find_ancestor(steps, passing={"midtrain/step_00000006": "rotted"}).saved.meta.step == 6  # of another stage
    with pytest.raises(CheckpointError, match="rotted"):  # by a shorter number too
        find_ancestor(steps / "step_6", passing={"pretrain/step_00000006": "rotted"})
    (steps / "step_00000006" / "shard").write_bytes(b"")
    assert find_ancestor(steps).saved.meta.step == 3
    with pytest.raises(CheckpointError, match=r"step_00000006 has no valid checkpoint .*the checkpoint is torn"):
        find_ancestor(steps / "step_00000006")


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("checkpoints/pretrain/step_00000004", "no checkpoint of step 4; there are 3, 6"),
        ("checkpoints/pretrain/last", "last is the name of no checkpoint"),
        ("checkpoints/late", "none was written"),
    ],
)
def test_no_valid_checkpoint_is_refused(inside, said, parent, tmp_path):
    [(path, text)] = refusals(child(tmp_path, parent.root / inside))
    assert path == "stage.init_from" and said in text and "a stage starts from a valid checkpoint" in text


def test_a_sound_one_passes_and_nothing_is_written(parent, tmp_path):
    before = state_of(parent.root)
    config = child(tmp_path, parent.root, stage={"seq_length": 64, "rotary_base": 50000}, optim={"keep_moments": True})
    run = RunDir(Path(config.run.runs_dir) / "child")
    refuse_headless(run, config)
    assert refusals(child(tmp_path, parent.root, model={"family": "llama", "name": "other", "hidden_dropout": 0.1})) == []
    assert state_of(parent.root) == before and not run.root.exists()


KEEP = {"optim": {"keep_moments": True}}
# what is asked for, the refusal's path, parts of it
OTHER = [
    (dict(model={"num_layers": 2}), "model.num_layers", ["found 2", "has 4", "Fix: model.num_layers=4"]),
    (dict(model={"padded_vocab_size": 384}), "model.padded_vocab_size", ["found 384", "has 256"]),
    (dict(model={"tied_embeddings": True}), "model.tied_embeddings", ["found true", "Fix: model.tied_embeddings=false"]),
    (dict(stage={"seq_length": 16}), "stage.seq_length", ["found 16", "not be shorter than in", "(32)", "use 32 or more"]),
    (KEEP | {"layout": {"distributed_optimizer": False}}, "layout.distributed_optimizer", ["found false", "has true"]),
    (KEEP | {"precision": {"moments_dtype": "bf16"}}, "precision.moments_dtype", ["found 'bf16'", "has 'fp32'"]),
]


@pytest.mark.parametrize(("asked", "path", "parts"), OTHER)
def test_another_model_or_optimizer_is_refused(asked, path, parts, parent, tmp_path):
    found = refusals(child(tmp_path, parent.root, **asked))
    assert [row[0] for row in found] == [path], found
    assert all(part in found[0][1] for part in parts), found[0][1]


def test_another_tokenizer_is_refused(parent, tmp_path):
    config = child(tmp_path, parent.root)
    other = replace(config, tokenizer=replace(config.tokenizer, eod="</s>"))
    [(path, text)] = refusals(other)
    assert path == "tokenizer" and "another one than that of" in text


def test_everything_is_reported_before_the_run_is_touched(parent, tmp_path):
    config = child(tmp_path, parent.root, model={"num_layers": 2}, stage={"seq_length": 16})
    run = RunDir(Path(config.run.runs_dir) / "child")
    with pytest.raises(ConfigError) as caught:
        refuse_headless(run, config)
    assert sorted(problem.path for problem in caught.value.problems) == ["model.num_layers", "stage.seq_length"]
    assert not run.root.exists()


def test_a_run_names_its_own_stages(parent, tmp_path):
    [(path, text)] = refusals(child(tmp_path, parent.root, run={"name": "parent"}))
    assert path == "stage.init_from" and "of this very run" in text and text.endswith("Fix: stage.init_from=anneal")


def test_moments_in_the_fast_form_are_of_one_layout(parent, tmp_path):
    config = child(tmp_path, parent.checkpoints("pretrain"), **KEEP)
    key = reshard_key(config.stages[0], cluster=config.cluster)
    write_checkpoint(parent, "pretrain", 7, key=key)
    assert refusals(config) == []
    write_checkpoint(parent, "pretrain", 8, key=key | {"pp": 2})
    [(path, text)] = refusals(config)
    assert path == "optim.keep_moments" and "pp 2 -> 1" in text
    assert "`phidias checkpoint parent action=convert stage=pretrain` first, or optim.keep_moments=false" in text
    assert refusals(child(tmp_path, parent.checkpoints("pretrain"))) == []  # weights have one form


def test_the_ledger_goes_on_where_the_shards_are_the_same(parent, tmp_path):
    write_sources(tmp_path / "data", names=("a", "b", "c"))
    config = child(tmp_path, parent.checkpoints("pretrain"))
    rows = {name: dict(position=7, seq_length=32, digest=open_source(config, name).digest) for name in "ab"}
    rows |= {"c": rows["a"] | {"digest": "of others"}, "elsewhere": rows["a"]}
    write_checkpoint(parent, "pretrain", 9, ledger=rows)
    found = find_ancestor(parent.checkpoints("pretrain"))
    assert take_over(found, config=config) == ({"a": rows["a"], "b": rows["b"]}, {"c": "its shards are others"})
    kept, anew = take_over(found, config=replace(config, run=replace(config.run, seed=8)))
    assert kept == {} and anew.keys() == {"a", "b", "c"}
    assert set(anew.values()) == {"it is read in another order: run.seed was 7, is 8"}


def test_a_config_that_cannot_be_read_is_a_refusal(parent, tmp_path):
    text = parent.config.read_text()
    parent.config.write_text(text.replace("schema_version: 7", "schema_version: 999"))
    [(path, said)] = refusals(child(tmp_path, parent.root))
    assert path == "stage.init_from" and "schema_version 999" in said
