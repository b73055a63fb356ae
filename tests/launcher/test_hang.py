"""Ranks that hang, as the launcher sees it. Its own clock is the test's."""

import json

import pytest

from launcher.config.monitoring import Hang
from launcher.jobs import hang as module
from launcher.jobs.hang import GRACE_S, HangWatch
from launcher.rundir.paths import RunDir

LIMITS = Hang(factor=20.0, least_s=120.0, start_s=600.0, pause_s=900.0)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


def beat(run, clock, *, phase="step", step=7, limit_s=120.0, after=1.0):
    clock[0] += after
    run.heartbeat.write_text(json.dumps({"phase": phase, "step": step, "limit_s": limit_s}) + "   \n")


def stack(run, rank, *, node="n1", text="Timeout!\n"):
    folder = run.stacks / "small"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank_{rank:05d}_{node}.txt").write_text(text)


def test_ranks_that_step_are_left_alone(run, clock):
    watch = HangWatch(run, stage="small", hang=LIMITS)
    for _ in range(5):
        beat(run, clock, after=100.0)
        assert watch.hung() is None
    clock[0] += 120.0 + GRACE_S
    assert watch.hung() is None  # just not
    clock[0] += 1.0
    assert watch.hung().seconds == pytest.approx(120.0 + GRACE_S + 1.0)


def test_what_a_launch_before_left_is_not_looked_at(run, clock):
    beat(run, clock, limit_s=1.0)
    stack(run, 0)
    watch = HangWatch(run, stage="small", hang=LIMITS)
    assert not run.heartbeat.exists() and not (run.stacks / "small").exists()
    clock[0] += 500.0
    assert watch.hung() is None  # of 600 s to start


def test_ranks_that_never_start(run, clock):
    watch = HangWatch(run, stage="small", hang=LIMITS)
    clock[0] += 600.0 + GRACE_S + 1.0
    found = watch.hung()
    assert found.phase == "start" and found.silent == {} and found.node is None and "(start)" in str(found)


def test_a_long_checkpoint_is_no_hang(run, clock):
    watch = HangWatch(run, stage="small", hang=LIMITS)
    beat(run, clock, phase="checkpoint", limit_s=900.0)
    watch.hung()
    clock[0] += 800.0
    assert watch.hung() is None


def test_the_rank_that_all_wait_for(run, clock):
    watch = HangWatch(run, stage="small", hang=LIMITS)
    beat(run, clock)
    watch.hung()
    for rank in range(4):
        stack(run, rank, node=f"n_{rank // 2}", text="" if rank == 3 else "Timeout!\n")  # an underscore of the site's own
    clock[0] += 200.0
    found = watch.hung()
    assert found.silent == {"n_1": [3]} and found.node == "n_1"
    assert str(found) == "hung: nothing moved for 200 s (step after step 7); no stack came from rank 3 on n_1"


def test_where_nobody_left_a_stack_nobody_is_blamed(run, clock):
    watch = HangWatch(run, stage="small", hang=LIMITS)
    beat(run, clock)
    watch.hung()
    for rank in range(4):
        stack(run, rank, text="")
    clock[0] += 200.0
    assert watch.hung().silent == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"phase": "step"}', "null"])
def test_a_torn_heartbeat_is_as_none(run, clock, text):
    watch = HangWatch(run, stage="small", hang=LIMITS)
    run.heartbeat.write_text(text)
    clock[0] += 500.0
    assert watch.hung() is None
    clock[0] += 700.0
    assert watch.hung().phase == "start"
