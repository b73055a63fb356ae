"""What the sinks hold, read back."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.plan.stage import plan_stage
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, read_records
from tests.training.tiny import run_config
from training.metrics import Metrics


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
