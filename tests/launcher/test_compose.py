"""Composition: every YAML file, the choice of stages, and what a wrong key, type or file is told."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import model_configs
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.plan.document import plan_document
from launcher.plan.exposure import plan_exposure
from launcher.plan.planner import Planner
from launcher.verbs import plan
from launcher.verbs.app import named_in_sweep, run_config_verb

CONFIG_DIR = Path(model_configs.__file__).parent
# The series of sizes is in test_series.py.
RUNS = sorted(path.stem for path in (CONFIG_DIR / "run").glob("*.yaml") if not path.stem.startswith("series"))
STAGES = {"phi4": ("pretrain", "midtrain"), "demo": ("demo_pretrain", "demo_midtrain"), "ablation": ("ablation",)}
# Hardware and efficiency are no groups of Hydra: a cluster names a device by name (test_planner_refusals reads each).
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONFIG_DIR.glob("*/*.yaml"))
    if path.parent.name not in ("run", "stage", "hardware", "efficiency")
]


def refused(overrides, **options):
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides, **options)
    return caught.value


def problems(overrides, **options):
    return [(problem.path, str(problem)) for problem in refused(overrides, **options).problems]


def write(directory, files):
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(directory)


@pytest.mark.parametrize("run", RUNS)
def test_every_run_composes_with_all_its_stages_and_plans(run):
    config = compose_run([f"run={run}"])
    assert config.stage_names == config.run.stages == STAGES[run]
    assert [stage["stage"] for stage in plan_document(config)] == list(config.run.stages)
    assert plan_exposure(config)


@pytest.mark.parametrize(("run", "stage"), [(run, stage) for run in RUNS for stage in STAGES[run]])
def test_one_stage_is_the_same_alone_as_with_the_others(run, stage):
    alone = compose_run([f"run={run}", f"stage={stage}"])
    assert alone.stages == (compose_run([f"run={run}"]).stage(stage),)
    assert alone.run.stages == STAGES[run]


def test_stage_files_are_named_as_their_stages():
    for path in (CONFIG_DIR / "stage").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["stage"]["name"] == path.stem


# Stages that no run file lists, with what a run of phi-4 needs to have them.
BRANCHES = {
    "midtrain_32k": ["run.stages=[pretrain,midtrain_32k]"],
    "midtrain_128k": ["run.stages=[pretrain,midtrain_128k]", "model.family=llama"],
    "anneal": ["run.stages=[pretrain,anneal]"],
    "curriculum": ["run.stages=[curriculum]", "stage=curriculum"],
}


@pytest.mark.parametrize("name", BRANCHES)
def test_every_other_stage_composes_and_plans(name):
    config = compose_run(["run=phi4", *BRANCHES[name]])
    assert config.stage_names[-1] == name and config.model.name == "phi4_14b"
    tokens = [row["tokens_per_step"] for row in plan_document(config)]
    assert tokens == [5760 * 4096] * len(config.stages)  # the batch in tokens is held
    assert all(row.epochs is None or row.max_epochs is None or row.epochs <= row.max_epochs for row in plan_exposure(config))


def test_every_stage_file_is_of_a_run():
    listed = {stage for stages in STAGES.values() for stage in stages} | BRANCHES.keys()
    assert {path.stem for path in (CONFIG_DIR / "stage").glob("*.yaml")} - {"series"} == listed


def test_several_midtrainings_branch_from_one_pretraining():
    names = ("pretrain", "midtrain", "midtrain_32k", "anneal")
    config = compose_run(["run=phi4", f"run.stages=[{','.join(names)}]"])
    assert [stage.stage.parent for stage in config.stages] == [None, "pretrain", "pretrain", "pretrain"]
    assert plan_exposure(config)


@pytest.mark.parametrize("name", ["midtrain_32k", "midtrain_128k"])
def test_the_planner_finds_a_layout_for_long_sequences(name):
    stage = compose_run(["run=phi4", *BRANCHES[name], f"stage={name}", "layout=auto"], planner=Planner()).stages[0]
    assert stage.layout.cp * 8192 >= stage.stage.seq_length


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_fits_some_run(group, option):
    large = option.startswith(("phi", "llama", "slurm", "fp8", "auto"))
    errors = []
    for run in ("phi4", "demo") if large else ("demo", "phi4"):
        for stage in STAGES[run]:
            try:
                config = compose_run([f"run={run}", f"stage={stage}", f"{group}={option}"], planner=Planner())
            except ConfigError as error:
                errors.append(f"run={run} stage={stage}: {error}")
                continue
            assert plan_document(config)[0]["num_steps"] > 0
            return
    pytest.fail("\n".join(errors))


MIXTURES = ("phi4_pretrain", "no_synthetic", "more_web")


@pytest.mark.parametrize("name", MIXTURES)
def test_ablations_read_the_same_sources_in_other_shares(name):
    config, first = (compose_run(["run=ablation", f"mixture={mixture}"]) for mixture in (name, "phi4_pretrain"))
    sources, others = config.stages[0].mixture.sources, first.stages[0].mixture.sources
    assert config.stages[0].mixture.name == name
    assert sum(source.share for source in sources.values()) == pytest.approx(1)
    assert all(replace(source, share=0.0) == replace(others[key], share=0.0) for key, source in sources.items())
    (stage,) = plan_document(config)
    assert stage["sources"] == pytest.approx({key: source.share for key, source in sources.items()}, abs=1e-3)
    assert all(row["epochs"] < 1 for row in stage["exposure"])  # repeated text would be another experiment


def test_a_sweep_is_a_run_for_each_mixture_and_one_group(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Hydra leaves the sweep's definition in runs_dir
    requests = []
    monkeypatch.setattr(plan, "act", lambda request: requests.append(request) or 0)
    assert run_config_verb("plan", words=["-m", "run=ablation", f"mixture={','.join(MIXTURES)}", "stage.tokens=1e9"]) == 0
    configs = [request.config for request in requests]
    assert [config.stages[0].mixture.name for config in configs] == list(MIXTURES)
    assert {config.monitor.wandb.group for config in configs} == {"ablation"}
    names = {config.run.name for config in configs}
    assert len(names) == 3 and all(re.fullmatch("ablation-[0-9a-f]{6}", name) for name in names)


def test_runs_of_a_sweep_are_a_group_also_where_the_config_names_none():
    for said, group in (("null", "demo"), ("mine", "mine")):
        config = compose_run(["run=demo", f"monitor.wandb.group={said}"])
        assert named_in_sweep(config, overrides=["run.seed=1"]).monitor.wandb.group == group


def test_an_override_without_a_stage_reaches_every_stage():
    config = compose_run(["stage.checkpoint.keep_last=7", "precision=bf16"])
    assert [(stage.stage.checkpoint.keep_last, stage.precision.name) for stage in config.stages] == [(7, "bf16")] * 2


def test_an_override_of_a_key_that_only_the_chosen_stage_has():
    config = compose_run(["stage=demo_midtrain", "mixture.sources.long.share=0.2", "mixture.sources.code.share=0.45"])
    assert config.stages[0].mixture.sources["long"].share == 0.2


def test_interpolations_are_resolved():
    config = compose_run(["run.data_dir=elsewhere", "run.name=other"])
    assert config.tokenizer.file == "elsewhere/tokenizer.json"
    assert config.stages[0].mixture.sources["code"].inputs == ("elsewhere/raw/code/*.jsonl.gz",)
    assert config.monitor.wandb.group == "other"


def test_stage_of_another_run_is_refused_with_the_right_names():
    ((path, text),) = problems(["run=demo", "stage=pretrain"])
    assert path == "stage"
    assert "run 'demo' has the stages demo_pretrain, demo_midtrain" in text
    assert "stage=demo_pretrain or stage=demo_midtrain" in text


@pytest.mark.parametrize(
    "word", ["layout.tp=1", "optim.lr=1e-4", "optim=demo_midtrain", "mixture=demo_midtrain", "mixture.name=x", "++layout.pp=1"]
)
def test_what_belongs_to_one_stage_needs_its_name(word):
    ((path, text),) = problems([word])
    assert path == word.lstrip("+").partition("=")[0]
    assert "2 are selected" in text and "add stage=demo_pretrain or stage=demo_midtrain" in text


# overrides, path, parts of the message
BAD = [
    (["layout.tpp=2"], "layout.tpp", ["did you mean layout.tp"]),
    (["modle=demo"], "modle", ["did you mean model?"]),
    (["lr=1"], "lr", ["did you mean optim.lr?"]),
    (["model.num_layer=3"], "model.num_layer", ["did you mean model.num_layers?"]),
    (["mixture.sources.cod.share=0.1", "stage=demo_pretrain"], "mixture.sources.cod.share", ["mixture.sources.code.share"]),
    (["mixture.sources.code.unique_tokens=1", "stage=demo_pretrain"], "mixture.sources.code.unique_tokens", ["Fix: +mixture"]),
    (["zzzzzz=1"], "zzzzzz", ["--cfg job shows every key"]),
    (["model=phi4_14"], "model", ["'phi4_14'", "did you mean phi4_14b"]),
    (["run=dmo"], "run", ["'dmo'", "run has ablation, demo, phi4", "did you mean demo"]),
    (["stage=demo_pretrai"], "stage", ["stage=demo_pretrain"]),
    (["run.stages=[demo_pretrain,demo_nothing]"], "stage", ["'demo_nothing'", "stage has ablation, anneal"]),
    (["layout.tp"], "layout.tp", ["key=value"]),
    (["run.name=${run.nme}"], "run.name", ["${run.nme}", "did you mean run.name?"]),
    (["run.name=???"], "run.name", ["nothing", "must be set"]),
    (["~model.num_layers"], "model.num_layers", ["nothing", "must be set"]),
    (["+model.num_layrs=2"], "model.num_layrs", ["unknown keys are refused", "did you mean model.num_layers?"]),
    (["+cluster.speed=2"], "cluster.speed", ["cluster has name, kind"]),
    (["model.num_layers=two"], "model.num_layers", ["'two'", "whole number"]),
    (["model.num_layers=true"], "model.num_layers", ["found true", "it must be a number"]),
    (["model.num_layers=2.5"], "model.num_layers", ["2.5", "whole number"]),
    (["model.num_layers=0"], "model.num_layers", ["greater than 0"]),
    (["model.num_layers=null"], "model.num_layers", ["found null"]),
    (["model.tied_embeddings=perhaps"], "model.tied_embeddings", ["'perhaps'", "true or false"]),
    (["model.activation=relu"], "model.activation", ["'swiglu', 'gelu' or 'squared_relu'"]),
    (["model.name=2024"], "model.name", ["2024", "quote it"]),
    (["run.name=a/b"], "run.name", ["pattern"]),
    (["run.stages=demo_pretrain"], "run.stages", ["a list"]),
    (["stage.tokens=inf"], "stage.tokens", ["finite"]),
    (["data=3"], "data", ["a section"]),
    (["data.held_out_fraction=0.5"], "data.held_out_fraction", ["less than 0.5"]),
]


@pytest.mark.parametrize(("overrides", "path", "parts"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_override(overrides, path, parts):
    found = problems(overrides)
    assert [bad_path for bad_path, _ in found] == [path]
    assert all(part in found[0][1] for part in parts), found[0][1]


def test_all_unknown_keys_are_reported_together():
    assert [path for path, _ in problems(["layout.tpp=2", "run.seeed=3", "modle=demo"])] == ["layout.tpp", "run.seeed", "modle"]


def test_all_type_problems_are_reported_together_and_stages_are_named():
    words = ["+model.numlayers=2", "model.kv_channels=abc", "run.seed=-1", "precision.fp8=yes"]
    error = refused(words)
    assert {problem.path for problem in error.problems} == {"model.numlayers", "model.kv_channels", "run.seed", "precision.fp8"}
    assert str(error).startswith("config refused, 4 problems:")


def test_a_type_problem_of_one_stage_says_which(tmp_path):
    text = (CONFIG_DIR / "stage" / "demo_midtrain.yaml").read_text()
    text = text.replace("name: demo_midtrain", "name: demo_late").replace("seq_length: 512", "seq_length: long")
    found = problems(["run.stages=[demo_pretrain,demo_late]"], config_dir=write(tmp_path, {"stage/demo_late.yaml": text}))
    assert [path for path, _ in found] == ["stage.seq_length (stage demo_late)"]


def test_whole_numbers_may_be_written_as_floats():
    assert compose_run(["data.group_tokens=8.192e6"]).data.group_tokens == 8_192_000


def test_a_new_model_is_one_yaml_file(tmp_path):
    files = {"model/tiny.yaml": "defaults: [demo, _self_]\nname: tiny\nnum_layers: 2\n"}
    model = compose_run(["model=tiny"], config_dir=write(tmp_path, files)).model
    assert (model.name, model.num_layers, model.hidden_size) == ("tiny", 2, 128)


def test_a_misspelt_and_a_missing_key_in_a_yaml_file(tmp_path):
    text = (CONFIG_DIR / "optim" / "demo_pretrain.yaml").read_text().replace("clip_grad", "clip_gard")
    found = problems(["stage=demo_pretrain", "optim=mine"], config_dir=write(tmp_path, {"optim/mine.yaml": text}))
    assert [path for path, _ in found] == ["optim.clip_grad", "optim.clip_gard"]
    assert "nothing" in found[0][1] and "did you mean optim.clip_grad?" in found[1][1]


def test_broken_yaml_names_the_file_and_line(tmp_path):
    ((path, text),) = problems(
        ["model=broken"], config_dir=write(tmp_path, {"model/broken.yaml": "name: x\n  num_layers: 3\n"})
    )
    assert path == "config" and "broken.yaml" in text and "line 2" in text


def test_a_stage_file_may_not_change_what_stages_share(tmp_path):
    text = (CONFIG_DIR / "stage" / "demo_midtrain.yaml").read_text().replace("name: demo_midtrain", "name: rogue")
    files = {"stage/rogue.yaml": f"{text}\nmodel: {{num_layers: 2}}\n"}
    found = problems(["run.stages=[demo_pretrain,rogue]"], config_dir=write(tmp_path, files))
    assert [path for path, _ in found] == ["model"]
    assert "a stage file may set stage, layout, precision, optim and mixture only" in found[0][1]


def test_a_stage_file_named_otherwise_than_its_stage(tmp_path):
    files = {"stage/misnamed.yaml": (CONFIG_DIR / "stage" / "demo_pretrain.yaml").read_text()}
    found = problems(["run.stages=[misnamed]"], config_dir=write(tmp_path, files))
    assert found[0][0] == "stage.name" and "misnamed" in found[0][1]


def test_a_bare_override_hides_no_wrong_type():
    found = [path for path, _ in problems(["model.num_layers=-1", "model.hidden_size=foo", "run.seed=x", "optim.lr=0.1"])]
    assert found == ["optim.lr", "run.seed", "model.num_layers", "model.hidden_size"]


def test_a_bare_override_of_a_source_of_one_stage_is_told_to_name_it(tmp_path):
    """The other stage has no such source: composed with the word it would fail as an unknown key."""
    stage = "# @package _global_\ndefaults: [demo_midtrain, {override /mixture: other}]\nstage: {name: late}\n"
    mixture = "name: other\nsources: {long: {inputs: [a], format: text, share: 1.0, max_epochs: 1.0}}\n"
    files = {"stage/late.yaml": stage, "mixture/other.yaml": mixture}
    words = ["run.stages=[demo_pretrain,late]", "mixture.sources.code.share=0.2"]
    ((path, text),) = problems(words, config_dir=write(tmp_path, files))
    assert path == "mixture.sources.code.share" and "add stage=demo_pretrain or stage=late" in text
