"""Goodput and losses of run directories whose every second is known."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.plan.stage import plan_stage
from launcher.rundir import goodput
from launcher.rundir.goodput import TRAIN_ROW, MeasuredGoodput, Meter, goodput_fields, measure_goodput
from launcher.rundir.losses import LIFE, is_number
from launcher.rundir.paths import RunDir
from launcher.rundir.phases import CAUSES
from launcher.rundir.records import read_records
from tests.training.tiny import run_config
from training.clocks import StepTimes
from training.metrics import Metrics

LONG_ROWS = 40_000  # of 400,000 steps


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def row(at: float, step: int, *, step_s: float | None = 2.0, wait_s: float = 0.0, **fields: Any) -> dict[str, Any]:
    times = {} if step_s is None else {"tokens_per_s": 1.0, "step_time_s": step_s, "data_wait_s": wait_s}
    row = {"time": at, "kind": "train", "stage": "a", "step": step, "samples": step, "tokens": step, "loss": 1.0}
    return {**row, **times, **fields}


def validation(at: float, step: int, **fields: Any) -> dict[str, Any]:
    return row(at, step, step_s=None, kind="validation", **fields)


def event(at: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": at, "kind": kind, "stage": "a", **fields}


def begun(*, pid: int = 1) -> list[dict[str, Any]]:
    """Training since 10 s."""
    return [event(0.0, "start", pid=pid), event(10.0, "stage_start", init_from=None)]


def measured(
    run: RunDir, rows: list[dict[str, Any]], events: list[dict[str, Any]], until: float | None = None, **how: Any
) -> MeasuredGoodput | None:
    """Whatever it is, it sums to the wall time."""
    run.metrics.write_text("".join(json.dumps(found) + "\n" for found in rows))
    found = measure_goodput(run, events=events, until=until, **how)
    if found:
        assert set(found.lost_s) == set(CAUSES) and min(found.lost_s.values()) >= 0 <= found.productive_s
        assert found.productive_s + sum(found.lost_s.values()) == pytest.approx(found.wall_s)
    return found


def divided(*args: Any, **how: Any) -> dict[str, float]:
    """Seconds that are not 0, by name."""
    found = measured(*args, **how)
    assert found
    return {"productive": found.productive_s} | {cause: pytest.approx(lost, abs=1e-6) for cause, lost in found.largest}


# Steps that count


def test_each_step_counts_as_long_as_its_row_says(run: RunDir) -> None:
    """10 steps of 2 s, 5 of 4 s, a validation and a checkpoint between them, in 60 s."""
    events = [event(100.0, "start"), event(110.0, "stage_start", init_from=None), event(160.0, "stage_done", step=15)]
    rows = [row(130.0, 10), validation(132.0, 10), row(155.0, 15, step_s=4.0)]
    found = measured(run, rows, events)
    assert found and (found.productive_s, found.wall_s) == (40.0, 60.0)
    assert found.goodput == pytest.approx(2 / 3) and found.largest == [("start_up", 10.0), ("other", 10.0)]


def test_a_conversion_is_no_sign_of_life(run: RunDir) -> None:
    """A day later, whether it comes to its end or not."""
    events = [*begun(), event(30.0, "stop", step=10), event(31.0, "job_end", exit="INTERRUPTED", after="end")]
    alone = measured(run, [row(30.0, 10)], events)
    later = [event(86400.0, "fault", rank=0, exit="RETRYABLE"), event(86500.0, "converted", step=10, seconds=9.0, stall_s=9.0)]
    assert alone and measured(run, [row(30.0, 10)], [*events, *later]) == alone


def test_the_first_row_of_a_launch_covers_its_steps_alone(run: RunDir) -> None:
    """Stopped at 15 and gone on there: 11 to 15 have no row, and were like those before them."""
    events = [event(0.0, "start"), event(1.0, "stage_start"), event(40.0, "stop", step=15)]
    events += [event(50.0, "start"), event(60.0, "resume", step=15)]
    rows = [row(21.0, 10), row(75.0, 20, step_s=3.0), row(105.0, 30, step_s=3.0)]
    found = divided(run, rows, events)
    assert found == {"productive": 10 * 2.0 + 5 * 2.0 + 15 * 3.0, "stopped": 10.0, "start_up": 1.0 + 10.0, "other": 9.0}


def test_steps_that_a_rewind_threw_away_are_lost(run: RunDir) -> None:
    """40 steps, a crash, on from 25: of the row up to 30 five steps were kept. So are the steps since the last row."""
    events = [event(0.0, "start", pid=1), event(1.0, "stage_start"), event(90.0, "fault"), event(95.0, "start", pid=1)]
    events.append(event(100.0, "resume", step=25))
    rows = [row(time, step) for time, step in ((21, 10), (41, 20), (61, 30), (81, 40))]
    lost = {"recomputed": 15 * 2.0 + 9.0, "restart": 10.0, "start_up": 1.0}
    assert divided(run, rows, events) == {"productive": 25 * 2.0, **lost}
    again = [row(115.0, 30, step_s=3.0), row(145.0, 40, step_s=3.0)]
    assert divided(run, [*rows, *again], events) == {"productive": 25 * 2.0 + 15 * 3.0, **lost}


def test_a_stage_that_starts_again_counts_once(run: RunDir) -> None:
    """Without a checkpoint the stage begins anew; the stage before it stays."""
    events = [event(0.0, "start"), event(1.0, "stage_start"), event(25.0, "stage_start", stage="b")]
    events.append(event(60.0, "stage_start", stage="b"))
    rows = [row(21.0, 10), row(45.0, 10, stage="b"), row(80.0, 10, stage="b", step_s=1.0)]
    assert divided(run, rows, events) == {"productive": 30.0, "start_up": 1.0, "recomputed": 35.0, "other": 4.0 + 10.0}


def test_a_rewind_without_an_event(run: RunDir) -> None:
    rows = [row(time, step) for time, step in ((20, 10), (40, 20), (60, 30), (90, 20))]
    assert divided(run, rows, [event(0.0, "start")]) == {"productive": 40.0, "recomputed": 40.0, "other": 10.0}


def test_time_ends_now_or_with_the_last_sign_of_life(run: RunDir) -> None:
    events = [event(0.0, "start"), event(30.0, "job_end", job="7"), event(5000.0, "amended")]
    found = measured(run, [row(20.0, 10)], events)
    assert found and found.wall_s == 30.0
    assert divided(run, [row(20.0, 10)], events, until=200.0) == {"productive": 20.0, "recomputed": 10.0, "stopped": 170.0}
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
    lines += [json.dumps(row(20.0, step)).encode() for step in (10**30, -5)]
    lines.append(json.dumps(row(30.0, 15)).encode()[:-25])  # cut off by a crash
    run.metrics.write_bytes(b"\n".join(lines))
    events = [event(0.0, "start"), {"kind": "resume"}, event(1.0, "resume", step="many"), {"time": None}]
    found = measure_goodput(run, events=events, until=None)
    assert found and (found.productive_s, found.wall_s) == (19.0, 20.0)  # the steps may not have begun before the training


# Losses, each by itself


def test_what_training_waits_for_between_and_in_its_steps(run: RunDir) -> None:
    """Of each of 30 steps of 2 s a quarter of a second is wait for data. A checkpoint of 9 s, for 3 of which training stood
    still; a validation of 4 s."""
    rows = [row(30.0, 10, wait_s=0.25), validation(34.0, 10, seconds=4.0), row(54.0, 20, wait_s=0.25)]
    rows.append(row(77.0, 30, wait_s=0.25))
    events = [*begun(), event(60.0, "checkpoint", step=20, seconds=9.0, stall_s=3.0), event(79.0, "stage_done", step=30)]
    lost = {"start_up": 10.0, "data_wait": 7.5, "validation": 4.0, "checkpoint": 3.0, "other": 2.0}
    assert divided(run, rows, events) == {"productive": 60.0 - 7.5, **lost}


def test_an_older_checkpoint_was_all_stall(run: RunDir) -> None:
    events = [*begun(), event(39.0, "checkpoint", step=10, seconds=9.0), event(39.0, "stop", step=10)]
    assert divided(run, [row(30.0, 10)], events) == {"productive": 20.0, "start_up": 10.0, "checkpoint": 9.0}


def test_waiting_in_the_queue_after_a_requeue(run: RunDir) -> None:
    """The ranks of a job saved at 30; the job began again at 130, and its nodes were checked before its ranks were started."""
    events = [
        event(0.0, "job_start", job="7", restarts=0),
        event(4.0, "start", job="7", restarts=0),
        event(10.0, "stage_start"),
    ]
    events += [event(30.0, "stop", step=10), event(33.0, "job_end", job="7", after="requeue", exit="CHECKPOINTED")]
    rows = [row(30.0, 10), row(170.0, 20)]
    again = [event(130.0, "job_start", job="7", restarts=1), event(140.0, "start", job="7", restarts=1)]
    again.append(event(150.0, "resume", step=10))
    lost = {"queue": 97.0, "start_up": 10.0 + 20.0, "other": 3.0}
    assert divided(run, rows, events + again) == {"productive": 40.0, **lost}
    older = divided(run, rows, [*events, *again[1:]])  # an older phidias tells of the ranks alone
    assert older == {"productive": 40.0, "queue": 107.0, "start_up": 20.0, "other": 3.0}
    assert divided(run, rows[:1], events, until=100.0)["queue"] == 67.0


def test_between_an_end_and_a_person_the_run_is_stopped(run: RunDir) -> None:
    """Ended at 30, submitted at 80, started at 130."""
    events = [*begun(), event(30.0, "stop", step=10), event(30.0, "job_end", job=None, after="end", exit="INTERRUPTED")]
    submitted = event(80.0, "submitted", job="8")
    again = [event(130.0, "job_start", job="8", restarts=0), event(150.0, "resume", step=10)]
    rows = [row(30.0, 10), row(170.0, 20)]
    lost = {"stopped": 100.0, "start_up": 30.0}
    assert divided(run, rows, [*events, *again]) == {"productive": 40.0, **lost}
    lost = {"stopped": 50.0, "queue": 50.0, "start_up": 30.0}
    assert divided(run, rows, [*events, submitted, *again]) == {"productive": 40.0, **lost}
    assert divided(run, rows[:1], [*events, submitted], until=100.0) == {
        "productive": 20.0, "stopped": 50.0, "queue": 20.0, "start_up": 10.0
    }  # fmt: skip
    export = event(80.0, "submitted", job="8", stage="export")
    assert divided(run, rows[:1], [*events, export], until=100.0)["stopped"] == 70.0


def test_a_stage_whose_job_waited_behind_that_of_another(run: RunDir) -> None:
    """Submitted together; the second job begins 50 s after the end of the first."""
    events = [event(-5.0, "submitted", job="7"), event(-5.0, "submitted", job="8", stage="b")]
    events += [event(0.0, "job_start", job="7", restarts=0), event(10.0, "stage_start"), event(30.0, "stage_done")]
    events += [event(32.0, "job_end", job="7", after="end", exit="DONE"), event(82.0, "job_start", job="8", restarts=0)]
    events.append(event(90.0, "stage_start", stage="b"))
    rows = [row(30.0, 10), row(100.0, 5, stage="b")]
    assert divided(run, rows, events) == {"productive": 30.0, "queue": 50.0, "start_up": 18.0, "other": 2.0}


def test_the_next_stage_of_a_launch_starts_up(run: RunDir) -> None:
    events = [*begun(), event(32.0, "stage_done", step=10), event(50.0, "stage_start", stage="b", init_from="a")]
    rows = [row(30.0, 10), row(60.0, 5, stage="b")]
    assert divided(run, rows, events) == {"productive": 30.0, "start_up": 28.0, "other": 2.0}
    assert divided(run, rows[:1], events[:-1], until=45.0) == {"productive": 20.0, "start_up": 23.0, "other": 2.0}
    events[3:] = [event(45.0, "fault", stage="b"), event(46.0, "start", pid=1), event(50.0, "stage_start", stage="b")]
    assert divided(run, rows, events) == {"productive": 30.0, "start_up": 23.0, "restart": 5.0, "other": 2.0}


@pytest.mark.parametrize("job", [{"job": "7", "restarts": 0}, {"job": None, "pid": 1}])
def test_a_restart_in_place(run: RunDir, job: dict[str, Any]) -> None:
    """10 steps and a checkpoint at 5; a fault at 36; steps again from 60 on."""
    events = [
        event(0.0, "start", **job),
        event(10.0, "stage_start"),
        event(36.0, "fault", rank=1),
        event(36.5, "fault", rank=2),
    ]
    events += [event(38.0, "job_end", **job, after="restart", exit="RETRYABLE"), event(40.0, "start", **job)]
    events.append(event(60.0, "resume", step=5))
    found = divided(run, [row(30.0, 10), row(80.0, 15)], events)
    assert found == {"productive": 30.0, "recomputed": 10.0 + 6.0, "restart": 24.0, "start_up": 10.0}
    wordless = [one for one in events if one["kind"] not in ("fault", "job_end")]
    found = divided(run, [row(30.0, 10), row(80.0, 15)], wordless)
    assert found == {"productive": 30.0, "recomputed": 10.0 + 10.0, "restart": 20.0, "start_up": 10.0}


def test_what_was_lost_since_the_last_row(run: RunDir) -> None:
    """Of 10 s between the last row and the fault 3 s were a checkpoint, which kept two more steps, and 4 s those. The
    checkpoint before the row has nothing to do with it."""
    events = [*begun(), event(12.0, "checkpoint", stall_s=2.0), event(44.0, "checkpoint", stall_s=3.0), event(45.0, "fault")]
    events += [event(46.0, "start", pid=1), event(50.0, "resume", step=12)]
    lost = {"recomputed": 3.0, "checkpoint": 5.0, "other": 3.0, "restart": 5.0, "start_up": 10.0}
    assert divided(run, [row(35.0, 10)], events) == {"productive": 24.0, **lost}


def test_a_fault_after_which_a_person_started_the_run(run: RunDir) -> None:
    events = [*begun(), event(30.0, "fault"), event(500.0, "start", pid=2), event(510.0, "resume", step=10)]
    assert divided(run, [row(30.0, 10), row(520.0, 15)], events) == {"productive": 30.0, "stopped": 470.0, "start_up": 20.0}


def test_another_process_may_have_the_number_of_the_last(run: RunDir) -> None:
    events = [*begun(), event(30.0, "stop", step=10), event(30.0, "job_end", job=None, after="end")]
    events += [event(500.0, "start", pid=1), event(510.0, "resume", step=10)]
    assert divided(run, [row(30.0, 10)], events) == {"productive": 20.0, "stopped": 470.0, "start_up": 20.0}


def test_a_job_that_left_no_word_of_its_end(run: RunDir) -> None:
    """Its node died behind 30 s. Slurm queued it again by itself, or a person did."""
    events = [event(0.0, "job_start", job="7", restarts=0), event(10.0, "stage_start")]
    again = [event(100.0, "job_start", job="7", restarts=1), event(110.0, "resume", step=10)]
    rows = [row(30.0, 10), row(130.0, 20)]
    assert divided(run, rows, events + again) == {"productive": 40.0, "queue": 70.0, "start_up": 20.0}
    again[0]["job"] = "8"
    assert divided(run, rows, events + again) == {"productive": 40.0, "stopped": 70.0, "start_up": 20.0}
    assert divided(run, rows[:1], events, until=90.0) == {"productive": 20.0, "start_up": 10.0, "other": 60.0}  # it may be well
    assert divided(run, rows[:1], events, until=90.0, waits=True) == {"productive": 20.0, "start_up": 10.0, "queue": 60.0}


def test_a_hang_lasted_until_it_was_seen(run: RunDir) -> None:
    """The last step ended at 36, the launcher saw at 136 that nothing moved for 100 s."""
    events = [*begun(), event(136.0, "hang", seconds=100.0), event(140.0, "start", pid=1), event(150.0, "resume", step=10)]
    rows = [row(30.0, 10), row(170.0, 20)]
    lost = {"hang": 100.0, "restart": 14.0, "recomputed": 6.0, "start_up": 10.0}
    assert divided(run, rows, events) == {"productive": 40.0, **lost}
    events[2]["seconds"] = 1e9  # not before the last sign of life
    assert divided(run, rows, events) == {"productive": 40.0, "hang": 106.0, "restart": 14.0, "start_up": 10.0}
    events[1:3] = [event(70.0, "hang", seconds=50.0)]  # before the first step
    assert divided(run, rows[1:], events)["hang"] == 50.0


def test_a_rewind_goes_back_and_on_in_the_same_launch(run: RunDir) -> None:
    """A spike at 15, the checkpoint at 5, 3 s to load it."""
    events = [*begun(), event(40.0, "rewind", step=15), event(43.0, "resume", step=5), event(63.0, "stage_done", step=15)]
    rows = [row(30.0, 10, wait_s=0.5), row(63.0, 15, wait_s=0.5)]
    lost = {"recomputed": 5 * 2.0 + 10.0, "data_wait": 15 * 0.5, "restart": 3.0, "start_up": 10.0}
    assert divided(run, rows, events) == {"productive": 22.5, **lost}


# Histories that are not whole


def test_late_rows_belong_to_the_training_they_were_of(run: RunDir) -> None:
    """Another rank has told of the fault before the first one's row is there."""
    events = [*begun(), event(29.9, "fault"), event(31.0, "start", pid=1), event(40.0, "resume", step=10)]
    found = measured(run, [row(30.0, 10), row(60.0, 20)], events)
    assert found and found.productive_s == pytest.approx(39.9) and found.lost_s["restart"] == pytest.approx(10.1)


def test_rows_begin_the_training_whose_events_are_lost(run: RunDir) -> None:
    events = [event(0.0, "start", pid=1), event(50.0, "fault"), event(60.0, "start", pid=1)]
    found = divided(run, [row(30.0, 10), row(90.0, 20)], events)
    assert found == {"productive": 40.0, "start_up": 10.0, "recomputed": 20.0, "restart": 20.0}


def test_steps_longer_than_their_time_are_cut(run: RunDir) -> None:
    found = divided(run, [row(30.0, 10, step_s=1e300), row(40.0, 20, step_s=0.5)], begun())
    assert found == {"productive": 25.0, "start_up": 10.0, "other": 5.0}
    found = divided(run, [row(30.0, 10, wait_s=3.0)], begun(), until=60.0)
    assert found == {"productive": 0.0, "start_up": 10.0, "data_wait": 20.0, "other": 30.0}


def test_parts_that_say_too_much_are_cut_alike(run: RunDir) -> None:
    """In 30 s: 10 steps of 2 s, a checkpoint that says it took 20 s, a validation of 20 s."""
    events = [*begun(), event(40.0, "checkpoint", stall_s=20.0), event(40.0, "stop")]
    found = divided(run, [row(30.0, 10), validation(39.0, 10, seconds=20.0)], events)
    assert found == {"productive": 10.0, "checkpoint": 10.0, "validation": 10.0, "start_up": 10.0}


def test_what_is_written_too_late_counts_as_of_now(run: RunDir) -> None:
    run.events.write_text("".join(json.dumps(found) + "\n" for found in begun()))
    run.metrics.write_text(json.dumps(row(30.0, 10)) + "\n")
    meter = Meter(run)
    meter.read()
    with run.events.open("a") as file:
        file.write(json.dumps(event(25.0, "fault")) + "\n")
    meter.read()
    found = meter.measure(40.0)
    assert found and found.largest == [("start_up", 10.0), ("restart", 10.0)] and found.productive_s == 20.0


NUMBERS = st.one_of(st.floats(-5, 300), st.floats(allow_nan=False), st.sampled_from([None, "x", True, 10**400]))
TIMES = st.floats(0, 300)
EVENTS = st.fixed_dictionaries(
    {"kind": st.sampled_from([*sorted(LIFE), "submitted", "amended"]), "stage": st.sampled_from("ab")},
    optional={
        "step": st.one_of(st.integers(-1, 60), NUMBERS),
        "seconds": NUMBERS,
        "stall_s": NUMBERS,
        "job": st.sampled_from(["1", "2", None]),
        "restarts": st.integers(0, 2),
        "pid": st.integers(1, 2),
        "after": st.sampled_from(["restart", "requeue", "end", "x"]),
    },
)
ROWS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["train", "train", "validation"]), "stage": st.sampled_from("ab")},
    optional={"step": st.integers(-1, 60), "step_time_s": NUMBERS, "data_wait_s": NUMBERS, "seconds": NUMBERS},
)
HISTORY = st.lists(st.tuples(TIMES, st.one_of(EVENTS, ROWS)), max_size=40)


@given(history=HISTORY, until=st.none() | st.floats(-10, 400), waits=st.booleans(), in_order=st.booleans())
@settings(max_examples=400, deadline=None)
def test_every_history_is_divided_exactly(
    tmp_path_factory: pytest.TempPathFactory, history: Any, until: float | None, waits: bool, in_order: bool
) -> None:
    if in_order:
        history = sorted(history, key=lambda found: found[0])
    found = [{"time": at, **fields} for at, fields in history]
    rows = [one for one in found if one["kind"] in ("train", "validation")]
    events = [one for one in found if one["kind"] not in ("train", "validation")]
    start = {"time": 0.0, "kind": "start", "pid": 1}
    measured(RunDir(tmp_path_factory.getbasetemp()), rows, [start, *events], until=until, waits=waits)


@given(history=HISTORY, cut=st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_what_is_read_bit_by_bit_is_what_is_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, history: Any, cut: int
) -> None:
    """As training asks, at each checkpoint; a line may be half written then."""
    run = RunDir(tmp_path_factory.mktemp("run"))
    found = [{"time": at, **fields} for at, fields in sorted(history, key=lambda found: found[0])]
    found = [{"time": 0.0, "kind": "start", "pid": 1}, *({**one, "time": i + 1.0} for i, one in enumerate(found))]
    meter, whole = Meter(run), Meter(run)
    for i, one in enumerate(found):
        path = run.metrics if one["kind"] in ("train", "validation") else run.events
        line = json.dumps(one) + "\n"
        with path.open("a") as file:
            file.write(line[:9])
            if i == cut:
                file.flush()
                meter.read()
            file.write(line[9:])
    meter.read()
    whole.read()
    assert meter.measure(99.0) == whole.measure(99.0)


def test_fields_for_who_logs_them(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput.time, "time", lambda: 50.0)
    assert goodput_fields(run) == {}
    run.events.write_text("".join(json.dumps(found) + "\n" for found in begun()))
    run.metrics.write_text(json.dumps(row(30.0, 10)) + "\n")
    found = goodput_fields(run)
    assert found["goodput/productive"] == 0.4 and found["goodput/wall_s"] == 50.0 and found["goodput/start_up_s"] == 10.0
    assert set(found) == {"goodput/productive", "goodput/productive_s", "goodput/wall_s", *(f"goodput/{c}_s" for c in CAUSES)}
    with run.metrics.open("a") as file:
        file.write(json.dumps(row(50.0, 20)) + "\n")
    assert goodput_fields(run)["goodput/productive_s"] == 40.0


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
    found = measure_goodput(run, events=[event(0.0, "start"), event(1.0, "stage_start", stage="pretrain")], until=None)
    assert found and found.productive_s == pytest.approx(0.01 * 10 * LONG_ROWS)
    assert time.process_time() - began < 3.0  # 0.25 s where it is alone on its core
