"""From one layout to another in the middle of a stage, with real ranks: the interval's checkpoint is refused, converted, and
gone on from; a stop may ask for one that needs no conversion."""

import json
from pathlib import Path

import pytest

from tests.endtoend.workspace import Workspace
from tests.slow import slow

pytestmark = slow  # test_order.py converts too, without comparing losses
PP2, DP2 = "layout.pp=2", "layout.pp=1"  # on two ranks


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("prepared"))
    workspace.config("data")
    return workspace


@pytest.fixture(scope="module")
def straight(prepared: Workspace) -> dict[int, float]:
    """The losses of a run that nothing disturbs."""
    run = prepared.named("straight")
    run.config("train", "stage=small", PP2)
    return losses(run)


def losses(run: Workspace) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.rows("metrics.jsonl") if row["kind"] == "train"}


def stopped(run: Workspace, *words: str) -> None:
    """Trains a few steps in PP2, then has it save: by Ctrl-C or, with words, by `phidias stop`."""
    process = run.start_training("stage=small", PP2)
    run.wait_for_step(3, stage="small", process=process)
    if words:
        run.phidias("stop", run.run, "runs_dir=runs", *words)
        process.communicate(timeout=120)
        assert process.returncode == 130
    else:
        assert run.interrupt(process) == 130


def newest(run: Workspace) -> Path:
    rows = run.rows("checkpoints/small/index.jsonl")
    return run.run_dir / "checkpoints" / "small" / rows[-1]["path"]


def test_a_layout_changes_by_way_of_a_conversion(prepared: Workspace, straight: dict[int, float]) -> None:
    run = prepared.named("moved")
    stopped(run)
    assert "tp1 pp2" in run.phidias("checkpoint", "moved", "runs_dir=runs")
    starts = len(run.events("start"))
    refusal = run.config("train", "stage=small", DP2, code=3)
    assert "was saved in another layout: pp 2 -> 1" in refusal and "phidias checkpoint moved action=convert" in refusal
    assert len(run.events("start")) == starts
    before, folder = losses(run), newest(run)
    assert "can go on from" in run.phidias("checkpoint", "moved", "action=convert", "runs_dir=runs")
    assert newest(run) == folder and json.loads((folder / "meta.json").read_text())["sharding"] == "fully_reshardable"
    run.phidias("checkpoint", "moved", "action=verify", "runs_dir=runs")
    run.config("train", "stage=small", DP2)
    assert [row["step"] for row in run.events("resume")] == [max(before)]
    assert losses(run) == pytest.approx(straight, abs=1e-5)


def test_a_stop_for_any_layout_needs_none(prepared: Workspace, straight: dict[int, float]) -> None:
    run = prepared.named("told")
    stopped(run, "layout=any")
    assert json.loads((newest(run) / "meta.json").read_text())["sharding"] == "fully_reshardable"
    assert "already" in run.phidias("checkpoint", "told", "action=convert", "runs_dir=runs")
    run.config("train", "stage=small", DP2)
    assert losses(run) == pytest.approx(straight, abs=1e-5)
