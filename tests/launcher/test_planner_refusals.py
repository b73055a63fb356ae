"""What the planner refuses before GPUs are taken, with the layout that would work; devices by name; the verb's exit codes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.config.check_layout import check_batch, check_pipeline, check_recompute, check_sequence
from launcher.config.check_precision import PRECISION_RULES
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError, LayoutError
from launcher.config.files import PACKAGED
from launcher.plan.document import plan_document
from launcher.plan.parameters import layers_by_chunk
from launcher.plan.planner import Planner

ONE = ["run=phi4", "stage=pretrain"]
PHI4 = compose_run(ONE)
STAGE = PHI4.stages[0]
DEVICES = sorted(path.stem for path in (PACKAGED / "hardware").glob("*.yaml"))


def refused(*words, **options):
    with pytest.raises(ConfigError) as caught:
        compose_run([*ONE, *words], planner=Planner(), **options)
    return caught.value


def with_layout(**changes):
    return replace(STAGE, layout=replace(STAGE.layout, **changes))


# Refusals, and what would work


def test_ffn_17920_over_8_ranks_is_refused_blockwise():
    """2,240 is no multiple of 128. Eight query-group heads make tp=8 fit everything else."""
    words = ["model.num_query_groups=8", "model.family=null", "precision=fp8_blockwise", "layout.tp=8"]
    error = refused(*words)
    text = str(error)
    assert "FP8 blockwise needs each rank's dimensions in multiples of 128: model.ffn_hidden_size / tp is 2240" in text
    assert "nearest layout that works, stage pretrain: layout.tp=4" in text
    (nearest,) = error.nearest
    mended = compose_run([*ONE, *words, *nearest.partition(": ")[2].split()])
    assert plan_document(mended)[0]["refusals"] == []
    # 2,240 is a multiple of 16: the other recipes take it.
    assert compose_run([*ONE, *words[:2], "precision=fp8_delayed", "layout.tp=8"]).stages[0].layout.tp == 8


@pytest.mark.parametrize(
    ("words", "path", "parts"),
    [
        (["layout.pp=7"], "layout.tp", ["tp * pp * cp (14) must divide the 1920 ranks"]),
        (["layout.tp=8"], "layout.tp", ["model.num_query_groups (10)"]),
        (["layout.pp=16", "layout.vpp=1"], "layout.pp", ["pp * vpp (16) must divide model.num_layers (40)"]),
        (["layout.cp=32", "stage.global_batch_size=180"], "layout.cp", ["a chunk of 64 tokens", "at most 16"]),
        (["model.padded_vocab_size=100353"], "layout.tp", ["model.padded_vocab_size (100353)"]),
        (["stage.rampup_batch_size={start: 100,increment: 10,tokens: 1e9}"], "stage.rampup_batch_size", ["of 100", "of 960"]),
        (["model.mlp_bias=true", "model.family=null", "layout.recompute=selective"], "layout.recompute_modules", ["never"]),
        (["precision=fp8_delayed", "cluster.gpu=a100_sxm"], "precision.fp8", ["a100_sxm computes no FP8", "precision=bf16"]),
        (["precision=fp8_blockwise", "cluster.gpu=b200"], "precision.fp8", ["the FP8 recipes delayed, tensorwise"]),
        (["cluster.gpu=h300"], "cluster.gpu", ["found 'h300'", ", ".join(DEVICES), "in the folder of --config-dir"]),
        (["precision=fp8_delayed", "layout.micro_batch_size=1", "stage.seq_length=4104"], "precision.fp8", ["is 4104"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)  # fmt: skip
def test_refusals(words, path, parts):
    error = refused(*words)
    problems = [problem for problem in error.problems if problem.path == path]
    assert problems, str(error)
    assert any(all(part in str(problem) for part in parts) for problem in problems), str(error)


@pytest.mark.parametrize(
    "words",
    [
        ["layout.tp=8"],
        ["layout.pp=16", "layout.vpp=1"],
        ["layout.cp=32", "stage.global_batch_size=180"],
        ["layout.micro_batch_size=7"],
        ["layout.vpp=3"],
        ["stage.global_batch_size=960", "layout.vpp=2", "layout.micro_batch_size=2"],
    ],
    ids=" ".join,
)
def test_the_nearest_layout_works(words):
    error = refused(*words)
    assert isinstance(error, LayoutError)
    (line,) = error.nearest
    stage, _, overrides = line.partition(": ")
    assert stage == "stage pretrain"
    (found,) = plan_document(compose_run([*ONE, *words, *overrides.split()]))
    assert found["refusals"] == []
    assert len(overrides.split()) <= 3


def test_nearest_layouts_are_told_a_stage():
    """A batch of 720 is no multiple of 480 replicas, nor two stages' groups of 240: both are told. Nothing is where nothing is
    refused."""
    with pytest.raises(ConfigError) as caught:
        compose_run(["run=phi4", "stage.global_batch_size=720"], planner=Planner())
    assert {line.split(":")[0] for line in caught.value.nearest} == {"stage pretrain", "stage midtrain"}
    assert Planner().nearest(PHI4) == []


def test_short_chunks_are_for_cpu_ranks_to_try():
    config = compose_run(["run=demo", "stage=demo_pretrain", "layout.cp=2", "stage.seq_length=64"])
    assert list(check_sequence(config.stages[0], config=config)) == []


def test_recomputed_attention_goes_with_biases():
    model = replace(PHI4.model, mlp_bias=True)
    stage = with_layout(recompute="selective", recompute_modules=("core_attn",))
    assert list(check_recompute(stage, config=replace(PHI4, model=model))) == []
    (problem,) = check_recompute(with_layout(recompute="selective", recompute_modules=()), config=PHI4)
    assert "selective" in str(problem)


def test_a_ramp_that_fits_is_accepted():
    config = compose_run([*ONE, "stage.rampup_batch_size={start: 960, increment: 960, tokens: 1e9}"])
    assert list(check_batch(config.stages[0], config=config)) == []


# Pipelines: Megatron's own validation is the oracle


PIPELINES = [
    (layers, pp, vpp, first, last, embedding, loss)
    for layers in (1, 6, 7, 10, 12, 14)
    for pp in (1, 2, 3, 4)
    for vpp in (1, 2)
    for first, last in ((None, None), (1, None), (None, 2), (2, 2), (4, 4), (3, 1), (20, None))
    for embedding, loss in ((False, False), (True, False), (False, True), (True, True))
]


def megatron_layers(layers, pp, vpp, first, last, embedding, loss):
    """Layers of each chunk of each stage as Megatron builds them; None where it refuses."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    try:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=64,
            num_attention_heads=4,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
            account_for_embedding_in_pipeline_split=embedding,
            account_for_loss_in_pipeline_split=loss,
            pipeline_dtype="bf16" if pp > 1 else None,
        )
        chunks = range(vpp)
        return [
            [get_num_layers_to_build(config, vp_stage=c if vpp > 1 else None, pp_rank=rank) for c in chunks]
            for rank in range(pp)
        ]
    except (AssertionError, ValueError):
        return None


def ours(layers, pp, vpp, first, last, embedding, loss):
    layout = replace(
        STAGE.layout,
        pp=pp,
        vpp=vpp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        account_for_embedding_in_pipeline_split=embedding,
        account_for_loss_in_pipeline_split=loss,
    )
    config = replace(PHI4, model=replace(PHI4.model, num_layers=layers))
    problems = list(check_pipeline(replace(STAGE, layout=layout), config=config))
    return None if problems else layers_by_chunk(layers, layout=layout)


@pytest.mark.filterwarnings("ignore")
def test_pipelines_are_split_as_megatron_splits_them():
    """What we accept Megatron builds, with the same layers in each chunk; what it would build and we refuse is listed."""
    differing, stricter = [], []
    for row in PIPELINES:
        theirs, mine = megatron_layers(*row), ours(*row)
        if mine is not None and mine != theirs:
            differing.append((row, mine, theirs))
        if mine is None and theirs is not None:
            stricter.append((row, theirs))
    assert differing == []
    unexpected = [(row, chunks) for row, chunks in stricter if not is_senseless(row, chunks)]
    assert unexpected == []


def is_senseless(row, chunks):
    """Layouts that Megatron's validation lets through: not all layers built or some twice, layers placed in a pipeline of one
    stage, virtual stages of one, or stages without a layer."""
    layers, pp, vpp, first, last, embedding, loss = row
    placed = first is not None or last is not None or embedding or loss
    return sum(map(sum, chunks)) != layers or (pp == 1 and (placed or vpp > 1)) or any(sum(stage) <= 0 for stage in chunks)


# Devices


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_plans(name):
    (found,) = plan_document(compose_run([*ONE, f"cluster.gpu={name}"]))
    assert found["hardware"] == name
    assert 0.1 < found["mfu"] < 0.75 and found["memory_gib"]["capacity"] > 40
    assert compose_run([*ONE, f"cluster.gpu={name}"]).hardware.source


def test_devices_are_ordered_by_speed():
    rates = {name: plan_document(compose_run([*ONE, f"cluster.gpu={name}"]))[0]["tokens_per_s_per_gpu"] for name in DEVICES}
    assert rates["gb200"] > rates["b200"] > rates["h200_sxm"] > rates["h100_sxm"] > rates["h100_pcie"] > rates["a100_sxm"]
    assert rates["a100_sxm"] > rates["l40s"]


def write(folder, files):
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def test_a_sites_own_device(tmp_path):
    text = "defaults: [h100_sxm, _self_]\nname: ours\nsource: measured here\nmemory_gib: 93.6\n"
    folder = write(tmp_path, {"hardware/ours": text})
    config = compose_run([*ONE, "cluster.gpu=ours"], config_dir=folder)
    assert (config.hardware.name, config.hardware.memory_gib, config.hardware.num_sms) == ("ours", 93.6, 132)
    assert config.hardware.efficiency == PHI4.hardware.efficiency
    assert plan_document(config)[0]["memory_gib"]["capacity"] == 93.6
    with pytest.raises(ConfigError, match="h200_sxm, l40s, ours"):
        compose_run([*ONE, "cluster.gpu=theirs"], config_dir=folder)


def test_a_sites_file_comes_before_the_packaged_one(tmp_path):
    packaged = (PACKAGED / "efficiency" / "hopper.yaml").read_text()
    efficiency = re.sub(r"^step_s: .*$", "step_s: 1.5", packaged, flags=re.MULTILINE)
    config = compose_run(ONE, config_dir=write(tmp_path, {"efficiency/hopper": efficiency}))
    assert config.hardware.efficiency.step_s == 1.5
    (slow,), (fast,) = plan_document(config), plan_document(PHI4)
    assert slow["step_time_s"] - fast["step_time_s"] == pytest.approx(1.47, rel=0.02)


def test_no_precision_rule_is_against_bf16():
    for name in DEVICES:
        config = compose_run([*ONE, f"cluster.gpu={name}"])
        assert [problem for rule in PRECISION_RULES for problem in rule(config.stages[0], config=config)] == []


# The verb


OWN = "defaults: [h100_sxm, _self_]\nname: {}\nmemory_gib: 93.6\n"
# What the file says, parts of the message.
BROKEN = {
    "a key too many": (OWN.format("ours") + "memory: 3\n", ["hardware.memory"]),
    "a number below 0": (OWN.format("ours").replace("93.6", "-1"), ["hardware.memory_gib", "greater than 0"]),
    "a list": ("- 1\n", ["a mapping of names to values"]),
    "no efficiency": (OWN.format("ours") + "efficiency: none_such\n", ["'none_such'", "ampere", "hopper"]),
    "no parent": ("defaults: [none_such, _self_]\nname: ours\n", ["'none_such'", "h100_sxm"]),
    "its own parent": ("defaults: [ours, _self_]\nname: ours\n", ["ours"]),
    "no YAML": ("name: [ours\n", ["ours.yaml"]),
}


@pytest.fixture
def phidias(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        capsys.readouterr()
        code = main(words)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_device_is_refused(name, phidias, tmp_path):
    text, parts = BROKEN[name]
    folder = write(tmp_path, {"hardware/ours": text})
    code, _, err = phidias("plan", "--config-dir", folder, *ONE, "cluster.gpu=ours")
    assert code == 2 and "Traceback" not in err
    assert all(part in err for part in parts), err


@pytest.mark.parametrize("flag", ["--config-dir", "hydra.searchpath"])
def test_a_sites_own_device_on_the_command_line(flag, phidias, tmp_path):
    folder = write(tmp_path, {"hardware/ours": OWN.format("ours")})
    words = [flag, folder] if flag.startswith("--") else [f"{flag}=[file://{folder}]"]
    code, out, err = phidias("plan", *words, *ONE, "cluster.gpu=ours", "out=json")
    assert code == 0, err
    (stage,) = json.loads(out)
    assert (stage["hardware"], stage["memory_gib"]["capacity"]) == ("ours", 93.6)


def test_a_site_changes_a_packaged_device(phidias, tmp_path):
    """A file of the same name inherits from the packaged one, which it stands before."""
    folder = write(tmp_path, {"hardware/h100_sxm": OWN.format("h100_sxm")})
    code, out, err = phidias("plan", "--config-dir", folder, *ONE, "out=json")
    assert code == 0, err
    assert json.loads(out)[0]["memory_gib"]["capacity"] == 93.6


KEYS = {
    "tokens_per_s_per_gpu", "step_time_s", "model_tflops_per_gpu", "mfu", "memory_gib", "days", "gpu_hours", "layout",
    "num_params", "tokens", "num_steps", "num_microbatches",
    "bubble_fraction", "time_s", "gemms", "goodput", "cost_usd", "refusals",
}  # fmt: skip


def test_json_has_what_programs_read(phidias):
    code, out, err = phidias("plan", "run=phi4", "out=json")
    assert (code, err) == (0, "")
    for stage in json.loads(out):
        assert stage.keys() >= KEYS
        assert set(stage["model_tflops_per_gpu"]) == {"full", "causal", "sixn"}
        assert stage["memory_gib"].keys() >= {"peak", "capacity", "by_component", "by_stage"}
        assert stage["model_tflops_per_gpu"]["full"] > stage["model_tflops_per_gpu"]["causal"]


def test_what_does_not_fit_is_shown_and_refused(phidias):
    code, out, err = phidias("plan", *ONE, "layout=dp", "out=json")
    assert code == 2
    (stage,) = json.loads(out)
    assert stage["memory_gib"]["peak"] > 79.1 and len(stage["refusals"]) == 1
    assert f"layout (stage pretrain): found pipeline stage 0 needs {stage['memory_gib']['peak']:.1f} GiB a GPU" in err
    words = err.partition("Fix: ")[2].split()
    assert words and all(word.startswith("layout.") for word in words)
    assert phidias("plan", *ONE, "layout=dp", "out=json", *words)[0] == 0
    code, out, err = phidias("plan", *ONE, "layout=dp")
    assert code == 2 and "refused" in out and "Fix: layout." in err


def test_a_layout_that_breaks_a_rule_is_refused_with_a_nearer_one(phidias):
    code, out, err = phidias("plan", *ONE, "layout.tp=8")
    assert (code, out) == (2, "")
    assert "nearest layout that works, stage pretrain: layout.tp=2" in err


def test_the_page_of_a_search_tells_what_was_weighed(phidias):
    code, out, _ = phidias("plan", *ONE, "layout=auto")
    assert code == 0
    assert "layout=auto" in out and "best of 1," in out and "ms" in out
    assert "CUDA context" in out and "GEMM" in out and "MFU" in out


def test_a_picture_is_written(phidias, tmp_path):
    code, _, err = phidias("plan", "run=phi4", "picture=plan.html")
    assert code == 0 and "drawn: plan.html" in err
    page = Path("plan.html").read_text()
    assert "<svg" in page and "pretrain" in page and "midtrain" in page


def test_a_picture_of_another_kind_is_refused(phidias):
    code, _, err = phidias("plan", *ONE, "picture=plan.foo")
    assert code == 2 and "plan.foo" in err and "html" in err
    assert "Traceback" not in err
