"""Goodput of run directories whose every second is known."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.stage import plan_stage
from launcher.rundir.goodput import TRAIN_ROW, MeasuredGoodput, is_number, measure_goodput
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records
from tests.training.tiny import run_config
from training.metrics import Metrics, StepTimes

LONG_ROWS = 40_000  # of 400,000 steps


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def row(at: float, step: int, *, step_s: float | None = 2.0, kind: str = "train", stage: str = "a") -> dict[str, Any]:
    times = {} if step_s is None else {"tokens_per_s": 1.0, "step_time_s": step_s, "data_wait_s": 0.0}
    return {"time": at, "kind": kind, "stage": stage, "step": step, "samples": step, "tokens": step, "loss": 1.0, **times}


def event(at: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": at, "kind": kind, "stage": "a", **fields}


def measured(run: RunDir, rows: list[dict[str, Any]], events: list[dict[str, Any]], until: float | None = None) -> Any:
    run.metrics.write_text("".join(json.dumps(found) + "\n" for found in rows))
    return measure_goodput(run, events=events, until=until)


def test_each_step_counts_as_long_as_its_row_says(run: RunDir) -> None:
    """10 steps of 2 s, 5 of 4 s, a validation and a checkpoint between them, in 60 s."""
    events = [event(100.0, "start"), event(110.0, "stage_start", init_from=None), event(160.0, "stage_done", step=15)]
    rows = [row(130.0, 10), row(132.0, 10, step_s=None, kind="validation"), row(155.0, 15, step_s=4.0)]
    found = measured(run, rows, events)
    assert found == MeasuredGoodput(productive_s=40.0, wall_s=60.0)
    assert found.goodput == pytest.approx(2 / 3)


def test_the_first_row_of_a_launch_covers_its_steps_alone(run: RunDir) -> None:
    """Stopped at 15 and gone on there: 11 to 15 have no row, and were like those before them."""
    events = [event(0.0, "start"), event(1.0, "stage_start"), event(40.0, "stop", step=15)]
    events += [event(50.0, "start"), event(60.0, "resume", step=15)]
    rows = [row(21.0, 10), row(75.0, 20, step_s=3.0), row(105.0, 30, step_s=3.0)]
    assert measured(run, rows, events) == MeasuredGoodput(10 * 2.0 + 5 * 2.0 + 15 * 3.0, 105.0)


def test_steps_that_a_rewind_threw_away_are_lost(run: RunDir) -> None:
    """40 steps, a crash, on from 25: of the row up to 30 five steps were kept."""
    events = [event(0.0, "start"), event(1.0, "stage_start"), event(90.0, "fault"), event(95.0, "start")]
    events.append(event(100.0, "resume", step=25))
    rows = [row(time, step) for time, step in ((21, 10), (41, 20), (61, 30), (81, 40))]
    assert measured(run, rows, events) == MeasuredGoodput(25 * 2.0, 100.0)
    again = [row(115.0, 30, step_s=3.0), row(145.0, 40, step_s=3.0)]
    assert measured(run, [*rows, *again], events) == MeasuredGoodput(25 * 2.0 + 15 * 3.0, 145.0)


def test_a_stage_that_starts_again_counts_once(run: RunDir) -> None:
    """Without a checkpoint the stage begins anew; the stage before it stays."""
    events = [event(0.0, "start"), event(1.0, "stage_start"), event(25.0, "stage_start", stage="b")]
    events.append(event(60.0, "stage_start", stage="b"))
    rows = [row(21.0, 10), row(45.0, 10, stage="b"), row(80.0, 10, stage="b", step_s=1.0)]
    assert measured(run, rows, events) == MeasuredGoodput(20.0 + 10.0, 80.0)


def test_a_rewind_without_an_event(run: RunDir) -> None:
    rows = [row(time, step) for time, step in ((20, 10), (40, 20), (60, 30), (90, 20))]
    assert measured(run, rows, [event(0.0, "start")]) == MeasuredGoodput(40.0, 90.0)


def test_time_ends_now_or_with_the_last_sign_of_life(run: RunDir) -> None:
    events = [event(0.0, "start"), event(30.0, "job_end", job="7"), event(5000.0, "amended")]
    assert measured(run, [row(20.0, 10)], events).wall_s == 30.0
    assert measured(run, [row(20.0, 10)], events, until=200.0).wall_s == 200.0
    assert measured(run, [row(20.0, 10)], events, until=-1.0) is None  # another clock


def test_nothing_is_known_before_the_first_row(run: RunDir) -> None:
    assert measure_goodput(run, events=[event(0.0, "start")], until=9.0) is None
    assert measured(run, [], [event(0.0, "start"), event(1.0, "resume", step=5)]) is None
    assert measured(run, [row(20.0, 10)], []) is None


def test_what_is_no_row_is_passed_over(run: RunDir) -> None:
    lines = [
        b"7",
        b"{torn",
        b"\xff",
        b'{"time": "x", "step": 1}',
        b'{"time": 1.2.3, "kind": "train", "stage": "a", "step": 9, ',
    ]
    lines += [json.dumps(row(20.0, 10, step_s=float("nan"))).encode(), json.dumps(row(20.0, 10)).encode()]
    lines.append(json.dumps(row(30.0, 15)).encode()[:-25])  # cut off by a crash
    run.metrics.write_bytes(b"\n".join(lines))
    events = [event(0.0, "start"), {"kind": "resume"}, event(1.0, "resume", step="many"), {"time": None}]
    assert measure_goodput(run, events=events, until=None) == MeasuredGoodput(20.0, 20.0)


@pytest.mark.parametrize("value", [True, None, "1", float("nan"), float("inf"), 10**400, [1]])
def test_no_number(value: Any) -> None:
    assert not is_number(value) and is_number(-3) and is_number(0.5)


def test_rows_of_training_are_read_fast(tmp_path: Path) -> None:
    """Real rows, and a month of them: what reads them fast must know them."""
    config = run_config(tmp_path)
    run = RunDir(tmp_path / "runs" / "tiny")
    run.root.mkdir(parents=True)
    plan = plan_stage(config.stages[0], cluster=config.cluster)
    writer = Metrics(run, config, stage="pretrain", plan=plan, is_writer=True)
    times = StepTimes()
    for _ in range(10):
        times.add(tokens=256, seconds=0.01, waited_s=0.0)
    by_source = {f"source_{number}": 1.5 for number in range(12)}
    writer.train(10, samples=80, loss=1.0, loss_by_source=by_source, tokens_by_source=by_source, lr=1e-5, **times.means())
    line = run.metrics.read_bytes()
    assert TRAIN_ROW.match(line) and len(list(read_records(run.metrics))) == 1
    run.metrics.write_bytes(b"".join(line.replace(b'"step": 10,', b'"step": %d,' % (10 * n)) for n in range(1, LONG_ROWS + 1)))
    began = time.process_time()
    found = measure_goodput(run, events=[event(0.0, "start")], until=None)
    assert found and found.productive_s == pytest.approx(0.01 * 10 * LONG_ROWS)
    assert time.process_time() - began < 3.0  # 0.2 s where it is alone on its core
