"""Chosen checkpoints exported by themselves, the model card, and tasks of lm-evaluation-harness on what was exported."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.report.report_eval import eval_section
from launcher.rundir.checkpoints import CheckpointError, checkpoint_at, file_digest
from launcher.rundir.exits import RunStateError
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, read_records
from tests.slow import slow
from tests.training.test_evaluate import STAGE, train_and_export
from training.interop import evaluate
from training.interop.export import export
from training.interop.tasks import Asked, Tasks, kept
from training.interop.tokenizer import is_misread

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "tasks"
EARLY = f"{STAGE}@3"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """With a vocabulary that holds the tokenizer's, and a checkpoint at step 3 of 4."""
    return train_and_export(tmp_path_factory.mktemp("tasks"), sections={}, save_at=3, vocab_size=300, padded_vocab_size=384)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lm-eval's own tasks take long to read, and Hugging Face's cache is the user's."""
    lm_tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed: pip install 'phidias[eval]'")
    import datasets

    real = lm_tasks.TaskManager
    monkeypatch.setattr(
        lm_tasks, "TaskManager", lambda include_path, **_: real(include_path=include_path, include_defaults=False)
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    yield


# Chosen checkpoints


def test_a_chosen_checkpoint_has_a_folder_of_its_own(exported: RunDir) -> None:
    folder = export(exported, read_config(exported), stage=STAGE, step=3)
    assert folder == exported.export(EARLY) and read_json(folder / "phidias.json")["step"] == 3
    last = read_json(exported.export(STAGE) / "phidias.json")
    assert last["step"] == 4
    one, other = ((path / "model.safetensors").read_bytes() for path in (folder, exported.export(STAGE)))
    assert len(one) == len(other) and one != other
    shutil.rmtree(folder)


def test_a_step_that_is_not_there_is_told_with_those_that_are(exported: RunDir) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2; there are 3, 4, and .*keep_every_tokens.*Fix: step=4"):
        export(exported, read_config(exported), stage=STAGE, step=2)
    assert not list(exported.root.glob("export/*@2*"))


def test_the_model_card_is_filled_from_the_run(exported: RunDir) -> None:
    card = (exported.export(STAGE) / "README.md").read_text()
    meta = read_json(exported.checkpoints(STAGE) / "step_00000004" / "meta.json")
    own = [row for row in read_records(exported.metrics) if row["kind"] == "validation"][-1]
    assert card.startswith("---\nlibrary_name: transformers\n") and "license_name: FILL-IN" in card
    for words in (
        f"| {STAGE} | scratch | {meta['tokens']:,} | 4 | 32 | 8 | 10,000 |", "Phi3ForCausalLM: the end of stage pretrain",
        f"| {STAGE} | 4 | mixture | {own['loss']:.4f} |", "1 x CPU rank | TP1 PP1 CP1",
        *(f"| {STAGE} | {name} |  | {tokens:,} |" for name, tokens in meta["tokens_by_source"].items()),
    ):  # fmt: skip
        assert words in card, words
    assert "{" not in card and "None" not in card.replace("None was measured", "")


def test_the_tokenizer_and_generation_config_that_users_load(exported: RunDir) -> None:
    folder = exported.export(STAGE)
    tokens = {row["content"]: row["id"] for row in read_json(folder / "tokenizer.json")["added_tokens"]}
    ends = [tokens["<|endoftext|>"], tokens["<|im_end|>"]]
    assert read_json(folder / "generation_config.json")["eos_token_id"] == ends
    assert read_json(folder / "tokenizer_config.json")["tokenizer_class"] == "GPT2Tokenizer" and not is_misread(folder)


# Tasks


def digest_of(run: RunDir, step: int) -> str:
    return file_digest(checkpoint_at(run, STAGE, step=step).path / "meta.json")


def asked(**changes: Any) -> Asked:
    return Asked(**{**dict(names=("words",), directory=EXAMPLE), **changes})


def test_tasks_are_measured_and_kept(exported: RunDir) -> None:
    config, wanted = read_config(exported), evaluate.Wanted(tasks=Tasks(asked(num_fewshot=1, limit=6)))
    found = evaluate.evaluate(exported, config, stage=STAGE, wanted=wanted)
    assert found.tasks and found.held_out.agrees
    row = read_json(exported.eval(STAGE))["tasks"]["rows"]["words"]
    assert row == found.tasks["rows"]["words"] and row["documents"] == 6 and row["num_fewshot"] == 1
    assert set(row["metrics"]) == {"acc", "acc_norm"} and row["metrics"]["acc"]["higher_is_better"] is True
    assert (row["metrics"]["acc"]["value"] * 6) % 1 == pytest.approx(0.0)
    event = [event for event in read_records(exported.events) if event["kind"] == "eval"][-1]
    assert event["tasks"]["words acc"] == row["metrics"]["acc"]["value"]
    evaluate.evaluate(exported, config, stage=STAGE)  # of the same files, without tasks
    assert read_json(exported.eval(STAGE))["tasks"]["rows"]["words"] == row
    assert "words acc" in eval_section(exported, stages=(STAGE,))


def test_a_learning_curve_of_tasks(exported: RunDir) -> None:
    config, wanted = read_config(exported), evaluate.Wanted(tasks=Tasks(asked()))
    evaluate.evaluate(exported, config, stage=STAGE, wanted=wanted)
    found = list(evaluate.evaluate_steps(exported, config, stage=STAGE, wanted=wanted))
    assert [one.exported.name for one in found] == [EARLY] and not exported.export(EARLY).exists()
    assert read_json(exported.eval(EARLY))["step"] == 3 and found[0].held_out.agrees is None
    assert list(evaluate.evaluate_steps(exported, config, stage=STAGE, wanted=wanted)) == []
    # Of fewer documents it is another question; and what was measured of the checkpoint stays.
    fewer = evaluate.Wanted(tasks=Tasks(asked(limit=2)))
    assert not evaluate.has_figures(exported, name=EARLY, checkpoint=digest_of(exported, 3), wanted=fewer)
    again = evaluate.earlier(exported, replace(found[0].exported, written=0.0))
    assert again["tasks"]["asked"] == ["words"] and not evaluate.earlier(
        exported, replace(found[0].exported, checkpoint="other", written=0.0)
    )
    page = eval_section(exported, stages=(STAGE,))
    assert "step 3 (" in page and "step 4 (" in page


def test_a_task_that_is_not_known_has_a_nearest_name() -> None:
    with pytest.raises(RunStateError, match=r"no task 'wrods' in .*tasks or lm-eval 0\.4.*did you mean words\?"):
        Tasks(asked(names=("wrods",)))
    with pytest.raises(RunStateError, match="task_dir /nowhere is no folder here"):
        Tasks(asked(directory=Path("/nowhere")))


@slow
def test_a_task_that_needs_the_network_is_refused(tmp_path: Path) -> None:
    text = (EXAMPLE / "words.yaml").read_text()
    (tmp_path / "far.yaml").write_text(
        text.replace("task: words", "task: far").replace("dataset_path: json", "dataset_path: no/such")
    )
    (tmp_path / "gone.yaml").write_text(text.replace("task: words", "task: gone"))
    for name in ("far", "gone"):
        with pytest.raises(RunStateError, match=rf"task {name} cannot be had .*no network is used.*Fix: fetch it once"):
            Tasks(asked(names=(name,), directory=tmp_path))


def test_what_was_measured_before_is_kept() -> None:
    before: dict[str, Any] = {"tasks": {"lm_eval": "1", "asked": ["a"], "rows": {"a": 1, "b": 2}}}
    now: dict[str, Any] = {"lm_eval": "2", "asked": ["b"], "rows": {"b": 3}}
    before["tasks"]["how"], now["how"] = {"a": [0, None]}, {"b": [None, 10]}
    how = {"a": [0, None], "b": [None, 10]}
    assert kept(before, now) == {"lm_eval": "2", "asked": ["a", "b"], "how": how, "rows": {"a": 1, "b": 3}}
    assert kept({}, None) == {"asked": [], "how": {}, "rows": {}} and json.dumps(kept(before, None))
