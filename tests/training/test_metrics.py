"""What the sinks hold, read back."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.plan.stage import plan_stage
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, read_records
from tests.training.tiny import run_config
from training.metrics import Metrics, StepTimes, WandbSink, flatten


def metrics(root: Path, *, is_writer: bool = True) -> Metrics:
    config = run_config(root, monitor={"tensorboard": True})
    run = RunDir(root / "runs" / "tiny")
    run.root.mkdir(parents=True, exist_ok=True)
    plan = plan_stage(config.stages[0], cluster=config.cluster)
    return Metrics(run, config, stage="pretrain", plan=plan, is_writer=is_writer)


def test_a_row_reaches_every_sink(tmp_path: Path) -> None:
    writer = metrics(tmp_path)
    writer.train(3, samples=24, loss=5.5, loss_by_source={"a": 5.0, "b": 6.0}, tokens_per_s=100.0)
    writer.status("running")
    writer.close()
    (row,) = read_records(writer.run.metrics)
    assert {key: row[key] for key in ("kind", "stage", "step", "samples", "tokens", "loss")} == {
        "kind": "train", "stage": "pretrain", "step": 3, "samples": 24, "tokens": 24 * 32, "loss": 5.5,
    }  # fmt: skip
    events = EventAccumulator(str(writer.run.tensorboard / "pretrain")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss_by_source/b")] == [(24, 6.0)]
    status = read_json(writer.run.status)
    assert status["state"] == "running" and status["stage_tokens"] == 48 * 32
    assert status["eta_s"] == round((48 * 32 - 24 * 32) / 100.0, 1)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other = metrics(tmp_path, is_writer=False)
    other.train(1, samples=8, loss=1.0)
    other.validation(1, samples=8, loss=1.0)
    other.event("stage_start")
    other.status("running")
    assert list((tmp_path / "runs" / "tiny").iterdir()) == []


def test_flatten_names_what_is_nested_and_leaves_out_what_is_no_number() -> None:
    fields = {"loss": 1, "by": {"a": 2.0, "deep": {"b": 3}}, "note": "text"}
    assert flatten(fields, prefix="train") == {"train/loss": 1, "train/by/a": 2.0, "train/by/deep/b": 3}


def test_a_row_says_the_means_of_the_steps_since_the_last() -> None:
    """Tokens over seconds, not a mean of speeds: a ramp's last small batch beside a large one."""
    times = StepTimes()
    times.add(tokens=100, seconds=1.0, waited_s=0.5)
    times.add(tokens=800, seconds=3.0, waited_s=0.0)
    assert times.means() == {"tokens_per_s": 225.0, "step_time_s": 2.0, "data_wait_s": 0.25}


KEY = "0123456789abcdef" * 2 + "01234567"


def wandb_sink(root: Path, **wandb: Any) -> WandbSink:
    config = run_config(root, monitor={"wandb": dict(key_file=None, project="phidias", entity=None, group="tiny") | wandb})
    run = RunDir(root / "runs" / "tiny")
    run.root.mkdir(parents=True)
    return WandbSink(run, config, stage="pretrain")


def test_the_key_of_a_file_is_in_the_environment_when_wandb_starts_and_not_in_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text(KEY)
    told: list[Any] = []
    monkeypatch.setattr("wandb.init", lambda **words: told.append((words, os.environ["WANDB_API_KEY"])) or MagicMock())
    wandb_sink(tmp_path, mode="online", key_file=str(file))
    ((words, key),) = told
    assert key == KEY and words["mode"] == "online"
    assert words["config"]["monitor"]["wandb"]["key_file"] == str(file) and KEY not in repr(words)


def test_wandb_writes_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    sink = wandb_sink(tmp_path, mode="offline")
    sink.write({"train/loss": 1.0}, samples=8)
    sink.close()
    wandb.teardown()  # its process writes a little after the run has finished
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" and b"ffn_hidden_size" in path.read_bytes() for path in written)  # the config, as it is
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
