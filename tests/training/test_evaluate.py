"""phidias eval: an exported folder scores on the run's own held-out windows what the run scored, whatever its layout, masks and
precision; and every folder that is not the model that was trained, or cannot be compared with it, is found out."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import load_file, save_file

from data_prep.errors import DataError
from data_prep.manifest import read_manifest, split_of, write_manifest
from data_prep.storage import as_folder
from launcher.cli import main as phidias
from launcher.config.schema import RunConfig
from launcher.config.validate import dump_run
from launcher.plan.stage import plan_stage
from launcher.rundir.exits import RunStateError
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, read_records, write_json
from launcher.verbs import eval as eval_verb
from tests.endtoend.workspace import write_tokenizer
from tests.training.shards import write_sources
from tests.training.tiny import run_config, stage_config
from tests.training.world import cpu_seams, one_rank
from training.heartbeat import Heartbeat
from training.interop import evaluate
from training.interop.export import export
from training.interop.exported import CPU, load_model, read_export
from training.interop.held_out import TOLERANCE, HeldOut, caveats, document_bias, verdict
from training.startup import Phases
from training.step import Flags, mixture_loss
from training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

MASKS = dict(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
STAGE = "pretrain"
Sections = dict[str, dict[str, Any]]
# Micro batches of 5 do not divide the windows: the run's validation pads, and here nothing does.
CASES: dict[str, Sections] = {
    "phi3": dict(layout=dict(micro_batch_size=5), stage=dict(global_batch_size=5)),
    "masked": dict(stage=MASKS),
    "bf16": dict(precision=dict(params_dtype="bf16")),
}


def train_and_export(root: Path, *, sections: Sections, save_at: int | None = None, **model: Any) -> RunDir:
    """A few steps of the tiny model, its validation, checkpoint (another one at a step) and export. Source c has no held-out
    text."""
    write_tokenizer(root)
    write_sources(root / "data")
    no_held_out_text(root / "data" / "c")
    stage = {**sections, "stage": {"tokens": 1024.0, **sections.get("stage", {})}}
    tokenizer = dict(file=str(root / "data" / "tokenizer.json"))
    config = run_config(root, stages=[stage_config(**stage)], tokenizer=tokenizer, model=model)
    run = RunDir(root / "runs" / "tiny")
    run.root.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(dump_run(config)))
    train(run, config, save_at=save_at)
    export(run, config, stage=STAGE)
    return run


def no_held_out_text(folder: Path) -> None:
    write_manifest(folder, manifest=replace(read_manifest(as_folder(folder)), held_out=split_of([])))


def train(run: RunDir, config: RunConfig, *, save_at: int | None = None) -> None:
    stage = config.stages[0]
    plan = plan_stage(stage, cluster=config.cluster)
    writers = mock.patch.object(filesystem_async, "_results_queue", None)  # which a Trainer starts a process for
    with cpu_seams(), one_rank(stage.layout) as rank, writers:
        heartbeat = Heartbeat(run, stage=stage.stage.name, rank=0, hang=config.monitor.hang)
        trainer = Trainer(run, config, stage=stage, plan=plan, rank=rank, heartbeat=heartbeat, phases=Phases())
        trainer.restore()
        while not trainer.is_finished:
            trainer.train_step(Flags())
            if trainer.progress.step == save_at:
                trainer.save(any_layout=True)
        trainer.validate()
        trainer.save(any_layout=True, is_last=True)
        heartbeat.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train_and_export(tmp_path_factory.mktemp("phi3"), sections=CASES["phi3"])


@pytest.fixture
def copy(exported: RunDir, tmp_path: Path) -> Iterator[RunDir]:
    """The run, to be spoilt. However that ends, no figures of it are left behind half written."""
    target = tmp_path / "tiny"
    shutil.copytree(exported.root, target, ignore=shutil.ignore_patterns("eval"))
    yield RunDir(target)
    assert not list(target.rglob("*.tmp"))


def measure(run: RunDir, config: RunConfig | None = None) -> HeldOut:
    return evaluate.evaluate(run, config or read_config(run), stage=STAGE).held_out


def reading(config: RunConfig, data_dir: Path) -> RunConfig:
    return replace(config, run=replace(config.run, data_dir=str(data_dir)))


def change_weights(run: RunDir, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = run.export(STAGE) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# The figures


@pytest.mark.parametrize("case", CASES)
def test_an_export_scores_what_the_run_scored(case: str, exported: RunDir, tmp_path: Path) -> None:
    run = exported if case == "phi3" else train_and_export(tmp_path, sections=CASES[case])
    held_out = measure(run)
    own = [row for row in read_records(run.metrics) if row["kind"] == "validation"][-1]
    assert held_out.agrees and held_out.tolerance == TOLERANCE["bf16" if case == "bf16" else "fp32"]
    assert held_out.run_step == own["step"] and set(held_out.by_source) == {"a", "b"}
    rows = {**held_out.by_source, "mixture": held_out.mixture}
    assert {name: row.run_loss for name, row in rows.items()} == {**own["loss_by_source"], "mixture": own["loss"]}
    assert max(abs(row.difference or 0.0) for row in rows.values()) < (2e-3 if case == "bf16" else 2e-6)
    assert {name: row.tokens for name, row in held_out.by_source.items()} | {"c": 0} == own["tokens_by_source"]
    expected = {"phi3": 256, "bf16": 256, "masked": 251}[case]  # held-out documents have 50 tokens: 5 ends are not predicted
    assert held_out.by_source["a"].tokens == expected


def test_what_is_written(exported: RunDir) -> None:
    held_out = measure(exported)
    source = read_json(exported.export(STAGE) / "phidias.json")
    kept = read_json(exported.eval(STAGE))
    assert source == {name: kept[name] for name in ("run", "stage", "step", "tokens", "checkpoint")}
    assert kept["export"]["bytes"] > 500_000 and kept["export"]["path"] == str(exported.export(STAGE))
    section = kept["held_out"]
    assert section["agrees"] is True and section["dtype"] == "fp32" and "no window" in section["left_out"]["c"]
    row = section["by_source"]["a"]
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"])) and row["difference"] == row["loss"] - row["run_loss"]
    event = [row for row in read_records(exported.events) if row["kind"] == "eval"][-1]
    assert event["loss"] == held_out.mixture.loss and event["agrees"] and event["step"] == source["step"]


def test_the_mixture_weighs_the_sources_by_their_shares() -> None:
    assert mixture_loss({"a": 2.0, "b": 4.0}, shares={"a": 0.6, "b": 0.2, "c": 0.2}) == pytest.approx(2.5)
    assert math.isnan(mixture_loss({"a": 2.0}, shares={"b": 1.0}))


def test_documents_see_themselves_alone() -> None:
    document = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32).numpy()
    bias = document_bias(document, dtype=torch.float32, device=CPU)
    assert (bias[0, 0] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


# What is found out


def test_one_wrong_weight_is_found(copy: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are kept, so that no earlier ones stand for this export."""

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][3] += 0.5

    change_weights(copy, spoil)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(copy.root), "--stage", STAGE])
    assert evaluate.main() == 3
    out, err = capsys.readouterr()
    assert "mixture" in out and "agrees" not in out
    assert "is not the model that was trained" in err and "0.0001 nats apart" in err and "Fix: `phidias export` again" in err
    section = read_json(copy.eval(STAGE))["held_out"]
    assert section["agrees"] is False and abs(section["mixture"]["difference"]) > 1e-4


def test_nan_does_not_agree(copy: RunDir) -> None:
    change_weights(copy, lambda weights: weights["model.norm.weight"].fill_(math.nan))
    assert measure(copy).agrees is False
    assert read_json(copy.eval(STAGE))["held_out"]["by_source"]["a"]["loss"] is None


def truncate(run: RunDir) -> None:
    path = run.export(STAGE) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:10_000])


def drop_weight(run: RunDir) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.1.mlp.down_proj.weight"]

    change_weights(run, drop)


SPOILT: dict[str, tuple[Callable[[RunDir], None], str]] = {
    "none": (lambda run: shutil.rmtree(run.export(STAGE)), r"has no export.*Fix: phidias export tiny stage=pretrain"),
    "foreign": (lambda run: (run.export(STAGE) / "phidias.json").unlink(), "phidias.json is missing or unreadable"),
    "torn": (truncate, "does not load through transformers.*Fix: phidias export"),
    "weight": (drop_weight, "missing_keys model.layers.1.mlp.down_proj.weight; transformers would draw"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_no_whole_export(case: str, copy: RunDir) -> None:
    spoil, message = SPOILT[case]
    spoil(copy)
    with pytest.raises(RunStateError, match=message):
        measure(copy)
    assert not copy.eval(STAGE).exists()


def test_other_windows_cannot_be_compared(copy: RunDir) -> None:
    """As when stage.validation was amended after the stage had ended."""
    config = read_config(copy)
    stage = config.stages[0]
    settings = replace(stage.stage, validation=replace(stage.stage.validation, max_tokens=64))
    with pytest.raises(RunStateError, match="held-out tokens are a 64, b 64; the run validated on a 256, b 256"):
        measure(copy, replace(config, stages=(replace(stage, stage=settings),)))
    assert not copy.eval(STAGE).exists()


def test_data_that_is_not_there(copy: RunDir, tmp_path: Path) -> None:
    config, data = read_config(copy), tmp_path / "data"
    with pytest.raises(DataError, match=r"manifest\.json"):
        measure(copy, reading(config, data))
    shutil.copytree(config.run.data_dir, data)
    prepare_anew(data / "b" / "manifest.json")
    with pytest.raises(DataError, match=r"source b: .* was prepared anew"):
        measure(copy, reading(config, data))
    assert not copy.eval(STAGE).exists()


def prepare_anew(manifest: Path) -> None:
    rows = json.loads(manifest.read_text())
    rows["train"]["shards"][0]["bin_xxh3"] = "0" * 32
    manifest.write_text(json.dumps(rows))


def test_no_held_out_text_at_all(copy: RunDir, tmp_path: Path) -> None:
    config, data = read_config(copy), tmp_path / "data"
    shutil.copytree(config.run.data_dir, data)
    for name in "ab":
        no_held_out_text(data / name)
    with pytest.raises(DataError, match=r"no source has held-out text .* 33 tokens of one source.*held_out_fraction"):
        measure(copy, reading(config, data))


def test_an_export_of_another_step_is_said_and_not_compared(copy: RunDir) -> None:
    path = copy.export(STAGE) / "phidias.json"
    write_json(path, read_json(path) | {"step": 1, "tokens": 160})
    found = evaluate.evaluate(copy, read_config(copy), stage=STAGE)
    exported, held_out = found.exported, found.held_out
    assert held_out.agrees is None and held_out.mixture.run_loss is None and not verdict(exported, held_out)
    said = "\n".join(caveats(copy, exported, held_out))
    assert "left out: c" in said and "NOT compared: the run did not validate at step 1" in said
    assert "the export is of step 1, the newest checkpoint of step 7: `phidias export tiny stage=pretrain`" in said


# The verb


@pytest.mark.parametrize(("words", "code", "message"), [
    (["tiny", "stage=midtrain"], 2, "stage: found 'midtrain'; run tiny has pretrain. Fix: stage=pretrain"),
    (["tiny", "other"], 2, "this verb takes one run"),
    (["tinny"], 3, "did you mean tiny?"),
    (["tiny", "prompt=x"], 2, "stage=, step=, steps=, long_context=, tasks="),
])  # fmt: skip
def test_words_that_are_refused(
    words: list[str], code: int, message: str, copy: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phidias(["eval", *words, f"runs_dir={copy.root.parent}"]) == code
    assert message in capsys.readouterr().err


def test_what_eval_needs(copy: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "tiny", f"runs_dir={copy.root.parent}"]
    monkeypatch.setattr(eval_verb, "installed", lambda package: None)
    assert phidias(words) == 2 and "pip install 'phidias[train,eval]'" in capsys.readouterr().err
    copy.config.write_text(copy.config.read_text().replace("family: phi3", "family: null"))
    assert phidias(words) == 2 and "model.family: found null" in capsys.readouterr().err


# Long text


def test_loss_by_position_is_that_of_the_documents_alone(exported: RunDir) -> None:
    """Held-out documents have 50 tokens, windows 32 and the next: each is one."""
    found = evaluate.evaluate(exported, read_config(exported), stage=STAGE, wanted=evaluate.Wanted(long=True)).long_context
    assert found is not None and found.positions is not None
    model = load_model(read_export(exported, stage=STAGE), dtype="fp32", device=CPU, run=exported)
    losses = []
    for name in ("a", "b"):
        tokens = np.fromfile(exported.root.parents[1] / "data" / name / "held_out_00000.bin", dtype=np.uint16)
        for begin in range(0, len(tokens), 50):
            document = torch.tensor(tokens[begin : begin + 33].astype(np.int64))[None]
            with torch.no_grad():
                logits = model(input_ids=document[:, :-1]).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0], document[0, 1:], reduction="none"))
    assert found.positions.documents == {"a": 12, "b": 12} and found.positions.reference == 16
    first, second = found.positions.buckets
    assert (first.begin, first.end, second.begin, second.end) == (0, 16, 16, 32)
    table = torch.stack(losses)
    assert first.loss == pytest.approx(float(table[:, :16].mean()), rel=1e-5)
    assert second.rise == pytest.approx(float(table[:, 16:].mean() - table[:, :16].mean()), abs=1e-5)
    section = read_json(exported.eval(STAGE))["long_context"]
    assert [bucket["rises"] for bucket in section["positions"]["buckets"]] == [False, second.rises]
    assert section["positions"]["rises"] is found.positions.rises and section["needles"] == []


def test_long_context_is_measured_where_sequences_grew_or_it_is_asked_for(exported: RunDir) -> None:
    assert evaluate.evaluate(exported, read_config(exported), stage=STAGE).long_context is None
    stages = [stage_config(), stage_config(stage=dict(name="midtrain", seq_length=64, init_from="pretrain"))]
    config = run_config(exported.root, stages=stages)
    assert [evaluate.trained_length(config, stage=stage) for stage in config.stages] == [None, 32]
