"""Signs of life of a rank, with real threads and files."""

import json
import time

import pytest

from launcher.config.monitoring import Hang
from launcher.rundir.paths import RunDir
from training import heartbeat as module
from training.heartbeat import WIDTH, Heartbeat


def limits(**changes):
    return Hang(**{"factor": 20.0, "least_s": 120.0, "start_s": 600.0, "pause_s": 900.0, **changes})


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(module, "BEAT_S", 0.0)
    made = []

    def begin(*, rank=0, **changes):
        made.append(Heartbeat(RunDir(tmp_path), stage="small", rank=rank, hang=limits(**changes)))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def said(tmp_path):
    text = (tmp_path / "heartbeat.json").read_text()
    assert len(text) == WIDTH + 1
    return json.loads(text)


def stack_of(tmp_path, rank=0):
    return (tmp_path / "stacks" / "small" / f"rank_{rank:05d}_n7.txt").read_text()


def test_what_the_first_rank_tells(start, tmp_path):
    heart = start()
    assert said(tmp_path) == {"phase": "start", "step": 0, "limit_s": 600.0}
    heart.step(1, seconds=30.0)
    assert said(tmp_path) == {"phase": "step", "step": 1, "limit_s": 600.0}  # 20 times 30
    for step in range(2, 10):
        heart.step(step, seconds=2.0)
    assert said(tmp_path) == {"phase": "step", "step": 9, "limit_s": 120.0}
    with heart.pause("checkpoint", step=9):
        assert said(tmp_path) == {"phase": "checkpoint", "step": 9, "limit_s": 900.0}
    assert said(tmp_path)["phase"] == "step"
    heart.end(step=9)  # sinks may take longer than a step
    assert said(tmp_path) == {"phase": "end", "step": 9, "limit_s": 900.0}


def test_the_other_ranks_tell_nothing(start, tmp_path):
    start(rank=3).step(1, seconds=1.0)
    assert not (tmp_path / "heartbeat.json").exists() and stack_of(tmp_path, 3) == ""


def test_a_rank_that_stands_still_leaves_its_stack(start, tmp_path):
    """Also where Python's own lock is held, as a hung collective may."""
    start(start_s=0.2)
    deadline = time.monotonic() + 10
    while not stack_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "test_a_rank_that_stands_still_leaves_its_stack" in stack_of(tmp_path)


def test_one_that_moves_after_all_leaves_none(start, tmp_path):
    heart = start(start_s=0.1)
    deadline = time.monotonic() + 10
    while not stack_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    heart.step(1, seconds=1.0)
    assert stack_of(tmp_path) == ""


def test_short_steps_are_not_all_told(start, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 60.0)
    heart = start()
    for step in range(1, 6):
        heart.step(step, seconds=0.01)
    assert said(tmp_path)["step"] == 1  # the first, after which other limits hold
