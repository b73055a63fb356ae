"""The run directory: what is frozen, what may be amended, what makes it another run, and who holds it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.config.validate import dump_run, validate_run
from launcher.plan.prepared import Prepared
from launcher.rundir import freeze
from launcher.rundir.amend import compare
from launcher.rundir.checkpoints import FORMAT_VERSION, Meta
from launcher.rundir.code import code_version
from launcher.rundir.exits import RunStateError
from launcher.rundir.freeze import open_run, read_config
from launcher.rundir.lock import is_live, lock_run
from launcher.rundir.paths import RunDir
from launcher.rundir.permissions import refuse_world_writable
from launcher.rundir.records import append_record, read_json, read_records, write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(tmp_path):
    """Composes run=demo with more overrides, in a runs_dir of the test."""
    return lambda *words: compose_run([f"run.runs_dir={tmp_path / 'runs'}", *words])


def opened(config, **options):
    """The run's directory, of a run whose data is not prepared here."""
    return open_run(config, prepared=Prepared(), **options)


def kinds(run):
    return [row["kind"] for row in read_records(run.events)]


def test_a_new_run_freezes_config_plan_and_code(demo):
    config = demo()
    run = opened(config)
    assert read_config(run) == config
    assert [stage["stage"] for stage in read_json(run.plan)] == ["demo_pretrain", "demo_midtrain"]
    assert read_json(run.code) == code_version()
    assert read_json(run.code)["packages"].keys() >= {"megatron-core", "torch"}
    assert kinds(run) == ["created"]
    assert yaml.safe_load(run.config.read_text())["schema_version"] == 7


def test_the_same_config_again_changes_nothing(demo):
    run = opened(demo())
    before = run.config.read_bytes(), run.config.stat().st_mtime_ns
    opened(demo())
    assert (run.config.read_bytes(), run.config.stat().st_mtime_ns) == before
    assert kinds(run) == ["created"]


def test_stages_are_added_in_the_order_of_the_run(demo):
    run = opened(demo("stage=demo_midtrain"))
    opened(demo("stage=demo_pretrain"))
    assert read_config(run) == demo()
    assert kinds(run) == ["created", "stage_added"]


def test_a_selected_stage_leaves_the_others_as_they_are(demo):
    run = opened(demo("stage.tokens=1e6"))
    opened(demo("stage=demo_midtrain"))
    assert [stage.stage.tokens for stage in read_config(run).stages] == [1e6, 5e5]


AMENDABLE = [
    "layout.micro_batch_size=4",
    "optim.lr=1e-3",
    "stage.tokens=3e6",
    "stage.global_batch_size=64",
    "precision=bf16",
    "cluster.timeout_s=100",
    "monitor.log_interval=5",
    "run.data_dir=elsewhere",
    "data.num_workers=1",
    "mixture.sources.code.max_epochs=2",
]


@pytest.mark.parametrize("word", AMENDABLE)
def test_what_may_change_is_amended_and_recorded(demo, word):
    run = opened(demo("stage=demo_pretrain"))
    changed = demo("stage=demo_pretrain", word)
    opened(changed)
    assert read_config(run) == changed
    assert kinds(run) == ["created", "amended"]
    changes = list(read_records(run.events))[-1]["changes"]
    assert any(path.endswith(word.partition("=")[0].rpartition(".")[2]) or "precision" in path for path in changes), changes
    assert all(old != new for old, new in changes.values())
    assert read_json(run.plan)[0]["tokens"] == changed.stages[0].stage.tokens


SCALED = "{rope_type: linear, factor: 2.0, original_max_position_embeddings: 128, beta_fast: null, beta_slow: null}"
# overrides, the path refused, frozen and new value as shown
FIXED = [
    (["model.num_layers=2"], "model.num_layers", "4", "2"),
    (["run.seed=7"], "run.seed", "42", "7"),
    (["tokenizer.eod=x"], "tokenizer.eod", "'<|endoftext|>'", "'x'"),
    (["data.chunk_tokens=8192"], "data.chunk_tokens", "4096", "8192"),
    (["data.group_tokens=2097152"], "data.group_tokens", "65536", "2097152"),
    (["data.held_out_fraction=0.1"], "data.held_out_fraction", "0.05", "0.1"),
    (["stage.seq_length=256"], "stages.demo_pretrain.stage.seq_length", "128", "256"),
    (["stage.rotary_base=5"], "stages.demo_pretrain.stage.rotary_base", "10000", "5"),
    (
        ["model.family=llama", f"stage.rope_scaling={SCALED}"],
        "stages.demo_pretrain.stage.rope_scaling",
        "null",
        "{'rope_type': 'linear'",
    ),
    (["stage.init_from=/hf/phi-4"], "stages.demo_pretrain.stage.init_from", "null", "'/hf/phi-4'"),
    (["mixture.sources.code.format=text"], "stages.demo_pretrain.mixture.sources.code.format", "'jsonl'", "'text'"),
    (["+mixture.windows=best_fit"], "stages.demo_pretrain.mixture.windows", "'stream'", "'best_fit'"),
    (["stage.eod_mask_loss=true"], "stages.demo_pretrain.stage.eod_mask_loss", "false", "true"),
    (["data.length_buckets=[512]"], "data.length_buckets", "[8192, 16384]", "[512]"),
]


@pytest.mark.parametrize(("words", "path", "old", "new"), FIXED, ids=[" ".join(fixed[0]) for fixed in FIXED])
def test_what_makes_another_run_is_refused_with_both_values(demo, words, path, old, new):
    run = opened(demo("stage=demo_pretrain"))
    before = run.config.read_bytes()
    with pytest.raises(RunStateError) as caught:
        opened(demo("stage=demo_pretrain", *words))
    text = str(caught.value)
    assert f"  {path}: the run has {old}" in text and new in text
    assert "another run.name" in text
    assert run.config.read_bytes() == before and kinds(run) == ["created"]


def test_all_refused_differences_are_named(demo):
    opened(demo())
    with pytest.raises(RunStateError) as caught:
        opened(demo("model.num_layers=2", "run.seed=7", "data.chunk_tokens=8192"))
    assert all(path in str(caught.value) for path in ("model.num_layers", "run.seed", "data.chunk_tokens"))


def test_a_stage_the_run_has_may_not_leave_its_list(demo):
    opened(demo())
    with pytest.raises(RunStateError, match=r"run\.stages"):
        opened(demo("run.stages=[demo_pretrain]"))


def test_stages_that_do_not_fit_together_are_refused_before_writing(demo):
    """Each call is right alone; together code would be two sources under one name."""
    run = opened(demo("stage=demo_pretrain"))
    before = run.config.read_bytes()
    with pytest.raises(ConfigError, match="one name is one source"):
        opened(demo("stage=demo_midtrain", "mixture.sources.code.inputs=[elsewhere/*]"))
    assert run.config.read_bytes() == before


def test_a_folder_of_something_else_is_refused(demo, tmp_path):
    foreign = tmp_path / "runs" / "demo"
    foreign.mkdir(parents=True)
    opened(demo("run.name=empty"))
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(RunStateError, match=r"holds thesis\.tex and no config\.yaml"):
        opened(demo())
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_leftovers_of_a_crash_become_the_run(demo, tmp_path):
    run = RunDir(tmp_path / "runs" / "demo")
    run.root.mkdir(parents=True)
    run.lock.touch()
    (run.root / ".config.yaml.123.tmp").touch()
    assert read_config(opened(demo())) == demo()


def test_no_run_a_newer_one_and_an_edited_one(demo, tmp_path):
    with pytest.raises(RunStateError, match="no run at"):
        read_config(RunDir(tmp_path / "nothing"))
    run = opened(demo())
    text = run.config.read_text()
    run.config.write_text(text.replace("schema_version: 7", "schema_version: 99"))
    with pytest.raises(RunStateError, match="schema_version 99; this code reads up to 7"):
        read_config(run)
    with pytest.raises(RunStateError, match="schema_version 99"):
        opened(demo())
    run.config.write_text(text.replace("num_layers: 4", "num_layers: four"))
    with pytest.raises(RunStateError, match=r"changed by hand(.|\n)*model\.num_layers"):
        read_config(run)
    run.config.write_text("{")
    with pytest.raises(RunStateError, match="not a frozen config"):
        read_config(run)


def test_older_configs_are_upgraded(demo, monkeypatch):
    run = opened(demo())
    tree = yaml.safe_load(run.config.read_text())
    tree["schema_version"], tree["model"]["depth"] = 0, tree["model"].pop("num_layers")
    for key in ("reader", "cache_dir", "trace"):  # of schema 2
        del tree["data"][key]
    for stage in tree["stages"]:
        del stage["stage"]["reset_attention_mask"], stage["layout"]["cp_comm_type"]
    run.config.write_text(yaml.safe_dump(tree))

    def rename(old):
        model = {("num_layers" if key == "depth" else key): value for key, value in old["model"].items()}
        return {**old, "model": model}

    monkeypatch.setitem(freeze.UPGRADES, 0, rename)
    assert read_config(run) == demo()


@pytest.mark.parametrize("words", [["run=demo"], ["run=phi4"]])
def test_a_config_of_schema_3_says_what_it_said(words):
    """Devices, networks and uneven pipelines came with schema 4."""
    config = compose_run(words)
    tree = dump_run(config)
    tree["schema_version"] = 3
    del tree["hardware"], tree["cluster"]["operations"]
    if tree["cluster"]["network"]:
        tree["cluster"]["network"] = {"intra_node_gb_per_s": 450, "inter_node_gb_per_s": 50}
    added = (
        "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split", "recompute_modules", "tp_comm_overlap",
    )  # fmt: skip
    for stage in tree["stages"]:
        for name in added:
            del stage["layout"][name]
    found = validate_run(freeze.upgrade(tree))
    assert found.hardware == config.hardware
    layout = found.stages[0].layout
    assert layout.recompute_modules == ("core_attn",) and not layout.tp_comm_overlap  # what selective was, and what ran
    assert (layout.tp, layout.pp) == (config.stages[0].layout.tp, config.stages[0].layout.pp)
    assert found.model == config.model


def test_a_config_of_schema_4_says_what_it_said():
    """What launching asks of a cluster came with schema 5, what is watched with schema 6: until then NaN ended a run."""
    config = compose_run(["run=demo"])
    tree = dump_run(config)
    tree["schema_version"], tree["cluster"]["container"] = 4, "image.sqsh"  # which nothing read
    del tree["run"]["after"], tree["monitor"]["wandb"]["key_file"], tree["monitor"]["hang"], tree["monitor"]["health"]
    for stage in tree["stages"]:
        del stage["stage"]["deterministic"]
        for name in ("keep_every_tokens", "keep_best", "asynchronous"):
            del stage["stage"]["checkpoint"][name]
    for name in ("cpu_partition", "sbatch_options", "spare_nodes", "checks", "restarts"):
        del tree["cluster"][name]
    upgraded = validate_run(freeze.upgrade(tree))
    assert upgraded.monitor.health.non_finite.action == "stop" and upgraded.monitor.health.loss_spike.action == "note"
    assert replace(upgraded, monitor=replace(upgraded.monitor, health=config.monitor.health)) == config


def test_what_a_model_exports_as_may_change_and_its_shape_may_not():
    """A later stage scales its rotary angles, which Phi3 cannot say and Llama, of the same layers, can."""
    frozen = compose_run(["run=phi4"])
    changed = compare(frozen, config=replace(frozen, model=replace(frozen.model, family="llama")))
    assert (changed.refused, changed.amended) == ([], [("model.family", "phi3", "llama")])
    assert compare(frozen, config=replace(frozen, model=replace(frozen.model, num_layers=38))).refused


def test_a_config_of_schema_6_says_what_it_said():
    """Kernels, moments, RoPE scaling and tasks came with schema 7; until then Megatron's plain code computed the loss."""
    config = compose_run(["run=phi4"])
    tree = dump_run(config)
    tree["schema_version"] = 6
    del tree["run"]["after_stages"], tree["run"]["evaluation"]
    for stage in tree["stages"]:
        del stage["stage"]["rope_scaling"], stage["precision"]["moments_dtype"], stage["optim"]["keep_moments"]
        for name in ("cuda_graph_impl", "cpu_offloading_num_layers", "cross_entropy_fusion_impl"):
            del stage["layout"][name]
    found = validate_run(freeze.upgrade(tree))
    assert {stage.layout.cross_entropy_fusion_impl for stage in found.stages} == {"none"}
    plain = [replace(stage, layout=replace(stage.layout, cross_entropy_fusion_impl="te")) for stage in found.stages]
    assert replace(found, stages=tuple(plain)) == config


def test_new_code_on_an_old_run_is_recorded(demo, monkeypatch):
    run = opened(demo())
    monkeypatch.setattr(freeze, "code_version", lambda: {**code_version(), "commit": "f" * 40})
    opened(demo())
    assert kinds(run) == ["created", "code_changed"]
    assert read_json(run.code)["commit"] == "f" * 40


def test_floats_survive_yaml(demo):
    config = demo(
        "stage.tokens=9.8e12", "data.held_out_fraction=1e-7", "mixture.sources.code.max_epochs=1e9", "stage=demo_pretrain"
    )
    config = replace(config, stages=config.stages[:1])
    assert read_config(opened(config)) == config


HOLDER = """
import sys, time
from pathlib import Path
from launcher.rundir.lock import lock_run
from launcher.rundir.paths import RunDir
with lock_run(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_live_run_has_one_launcher(demo):
    run = opened(demo())
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.root)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "held\n"
        assert is_live(run)
        with pytest.raises(RunStateError, match=rf"run demo is live \(pid {holder.pid} on .* since .*\)"), lock_run(run):
            pass
        with pytest.raises(RunStateError, match="is live"):
            opened(demo("stage.tokens=3e6"))
        assert kinds(run) == ["created"]
    finally:
        holder.kill()
        holder.wait()
    with lock_run(run):
        assert is_live(run)
    assert not is_live(run)


ORPHAN = """
import subprocess, sys
from pathlib import Path
from launcher.rundir.lock import lock_run
from launcher.rundir.paths import RunDir
with lock_run(RunDir(Path(sys.argv[1]))) as lock:
    print(subprocess.Popen(["sleep", "60"], pass_fds=[lock], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)
"""


def test_ranks_that_outlive_their_launcher_are_named(demo):
    run = opened(demo())
    ended = subprocess.run([sys.executable, "-c", ORPHAN, str(run.root)], capture_output=True, text=True, cwd=ROOT, check=True)
    try:
        with pytest.raises(RunStateError, match=r"its launcher died, its ranks still train; .*touch .*/stop`"), lock_run(run):
            pass
    finally:
        os.kill(int(ended.stdout), signal.SIGKILL)


def test_a_child_that_inherits_the_lock_keeps_it(demo):
    run = opened(demo())
    with lock_run(run) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    try:
        assert is_live(run)
    finally:
        child.kill()
        child.wait()
    time.sleep(0.05)
    assert not is_live(run)


def test_amendments_are_told(demo):
    opened(demo("stage=demo_pretrain"))
    told = []
    opened(demo("stage=demo_pretrain", "stage.tokens=3e6"), on_change=told.append)
    assert told == ["amended: stages.demo_pretrain.stage.tokens 2500000.0 -> 3000000.0"]


def test_a_stage_does_not_shrink_below_what_it_read(demo):
    run = opened(demo("stage=demo_pretrain"))
    write_checkpoint(run, "demo_pretrain", tokens=2_000_000)
    opened(demo("stage=demo_pretrain", "stage.tokens=2e6"))
    with pytest.raises(RunStateError, match="has read 2000000 tokens, asked for 1e\\+06"):
        opened(demo("stage=demo_pretrain", "stage.tokens=1e6"))


def test_the_end_another_stage_started_from_stays(demo):
    run = opened(demo())
    write_checkpoint(run, "demo_midtrain", tokens=4096)
    with pytest.raises(RunStateError, match="stage demo_midtrain has started from its end"):
        opened(demo("stage=demo_pretrain", "stage.tokens=3e6"))


@pytest.mark.parametrize("runs_dir", ["/proc/nowhere", "/etc/passwd"])
def test_a_folder_that_cannot_be_made_is_a_config_error(demo, runs_dir):
    with pytest.raises(ConfigError, match=rf"run\.runs_dir: found {runs_dir} \("):
        opened(demo(f"run.runs_dir={runs_dir}"))


def test_a_folder_that_cannot_be_written_is_a_config_error(demo, tmp_path):
    run = RunDir(tmp_path / "runs" / "demo")
    run.root.mkdir(parents=True)
    run.lock.symlink_to("/proc/nowhere/lock")  # mode bits do not bind root
    with pytest.raises(ConfigError, match=r"run\.runs_dir: found .*runs \(No such file or directory\)"):
        opened(demo())


@pytest.fixture
def umask():
    """Sets the umask, and sets it back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_a_new_run_follows_the_umask(demo, umask, mask, mode):
    umask(mask)
    run = opened(demo())
    assert run.root.stat().st_mode & 0o777 == mode and run.config.stat().st_mode & 0o777 == mode & 0o666


def test_a_run_made_under_a_umask_of_0_is_refused_at_once(demo, umask, tmp_path):
    (tmp_path / "runs").mkdir()
    umask(0)
    with pytest.raises(RunStateError, match=r"runs/demo may be written by everybody \(mode 0777\).*chmod o-w -R.*umask 022"):
        opened(demo())
    run = RunDir(tmp_path / "runs" / "demo")
    assert not run.config.exists()
    run.root.chmod(0o755)  # and not what lies in it
    with pytest.raises(RunStateError, match=r"runs/demo/lock may be written by everybody"):
        opened(demo())


@pytest.mark.parametrize("path", ["runs", "runs/demo", "runs/demo/config.yaml"])
def test_what_everybody_may_write_is_not_opened_again(demo, tmp_path, path):
    run = opened(demo())
    before = run.config.read_bytes()
    (tmp_path / path).chmod(0o757)
    with pytest.raises(RunStateError, match=rf"{path} may be written by everybody \(mode 0757\).*Fix: `chmod o-w"):
        opened(demo("stage.tokens=3e6"))
    with pytest.raises(RunStateError, match="may be written by everybody"):
        refuse_world_writable(run)
    assert run.config.read_bytes() == before and read_config(run) == demo()  # which status and report still read


def test_the_sticky_bit_serves_the_folder_of_runs_but_not_a_run(demo, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o1777)
    run = opened(demo())
    opened(demo())
    run.root.chmod(0o1777)
    with pytest.raises(RunStateError, match=r"runs/demo may be written by everybody \(mode 1777\)"):
        opened(demo())


def write_checkpoint(run, stage, *, tokens):
    path = run.checkpoints(stage) / "step_00000001"
    path.mkdir(parents=True)
    meta = Meta(FORMAT_VERSION, stage, 1, tokens // 128, tokens, False, {}, {}, {}, {}, {})
    write_json(path / "meta.json", vars(meta))
    append_record(run.checkpoints(stage) / "index.jsonl", "checkpoint", path=path.name, finished=False)
