"""Ranks of this machine: started again after a fault, as often as the config says; not after somebody asked them to end."""

import os
import signal
import sys
import threading
import time

import pytest

from launcher.config.compose import compose_run
from launcher.jobs import local as module
from launcher.jobs.local import train
from launcher.plan.prepared import Prepared
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import open_run
from launcher.rundir.records import append_record, read_records
from launcher.rundir.stop import BY_SIGNAL, ask_to_stop

STAGE = "demo_pretrain"
RANKS = """
import os, sys
from pathlib import Path
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records

run = RunDir(Path(sys.argv[1]))
number = sum(row["kind"] == "start" for row in read_records(run.events))
if number <= int(sys.argv[2]):
    append_record(run.events, "fault", stage="demo_pretrain", rank=0, node=None, exit="RETRYABLE", error="NetworkError: lost")
    sys.exit(1)
append_record(run.events, "stage_done", stage="demo_pretrain", exit="DONE", step=9)
"""


@pytest.fixture
def run(tmp_path):
    return open_run(config_of(tmp_path, restarts=0), prepared=Prepared())


def config_of(tmp_path, *, restarts):
    return compose_run(
        [f"run.runs_dir={tmp_path / 'runs'}", f"stage={STAGE}", f"cluster.restarts={restarts}", "monitor.console=plain"]
    )


@pytest.fixture
def ends(monkeypatch, run):
    """How the ranks end, one a start: an exit class, or what happens before it."""
    ends = []

    def train_stages(run, config, *, ranks, asked):
        append_record(run.events, "start")
        end = ends.pop(0)
        return end() if callable(end) else end

    monkeypatch.setattr(module, "train_stages", train_stages)
    monkeypatch.setattr("launcher.jobs.stages.RESTART_WAIT_S", 0.0)
    return ends


def jobs(run):
    return [(row["exit"], row["after"], row["job"]) for row in read_records(run.events) if row["kind"] == "job_end"]


def test_a_fault_ends_it_where_no_restart_is_allowed(run, ends, tmp_path, capsys):
    ends += [ExitClass.RETRYABLE, ExitClass.DONE]
    assert train(run, config_of(tmp_path, restarts=0)) is ExitClass.RETRYABLE
    assert jobs(run) == [("RETRYABLE", "end", None)] and "started again" not in capsys.readouterr().out


def test_nor_where_it_went_forward(run, ends, tmp_path):
    def saves():
        append_record(run.events, "checkpoint", stage=STAGE, step=10)
        return ExitClass.RETRYABLE

    ends += [saves, ExitClass.DONE]
    assert train(run, config_of(tmp_path, restarts=0)) is ExitClass.RETRYABLE and jobs(run) == [("RETRYABLE", "end", None)]


@pytest.mark.parametrize("fault", [ExitClass.RETRYABLE, ExitClass.BAD_NODE])
def test_a_fault_that_may_pass_is_tried_again(run, ends, tmp_path, fault):
    ends += [fault, fault, ExitClass.DONE]
    assert train(run, config_of(tmp_path, restarts=2)) is ExitClass.DONE
    assert jobs(run) == [(fault.name, "restart", None), (fault.name, "restart", None), ("DONE", "end", None)]


def test_starts_in_vain_are_counted_and_progress_makes_them_good(run, ends, tmp_path, capsys):
    def saves():
        append_record(run.events, "checkpoint", stage=STAGE, step=10)
        return ExitClass.RETRYABLE

    ends += [ExitClass.RETRYABLE, saves, *[ExitClass.RETRYABLE] * 9]
    assert train(run, config_of(tmp_path, restarts=1)) is ExitClass.RETRYABLE
    assert len(jobs(run)) == 4 and "not started again: 2 starts in a row" in capsys.readouterr().out


@pytest.mark.parametrize("ended", [ExitClass.NEEDS_PERSON, ExitClass.REFUSED, ExitClass.STATE, ExitClass.INTERRUPTED])
def test_what_needs_a_person_is_not_tried_again(run, ends, tmp_path, ended):
    ends += [ended, ExitClass.DONE]
    assert train(run, config_of(tmp_path, restarts=9)) is ended and len(jobs(run)) == 1


def test_a_person_who_asked_meanwhile_is_heard(run, ends, tmp_path):
    """The ranks broke before they could save: they are not started again for that."""

    def asked():
        ask_to_stop(run)
        return ExitClass.RETRYABLE

    ends += [asked, ExitClass.DONE]
    assert train(run, config_of(tmp_path, restarts=9)) is ExitClass.RETRYABLE and jobs(run) == [("RETRYABLE", "end", None)]


def test_whoever_starts_it_has_looked(run, ends, tmp_path):
    """Starts in vain of an earlier launch do not count against this one."""
    for fault in ([ExitClass.RETRYABLE] * 3, [ExitClass.RETRYABLE, ExitClass.DONE]):
        ends[:] = fault
        ended = train(run, config_of(tmp_path, restarts=2))
    assert ended is ExitClass.DONE and [after for _, after, _ in jobs(run)] == ["restart", "restart", "end", "restart", "end"]
    assert [row["by"] for row in read_records(run.events) if row["kind"] == "asked"] == ["train"] * 2


def test_ctrl_c_between_two_starts(run, ends, tmp_path, monkeypatch):
    """While it waits for what broke the first two to pass."""
    monkeypatch.setattr("launcher.jobs.stages.RESTART_WAIT_S", 60.0)
    began, before = time.monotonic(), signal.getsignal(signal.SIGINT)

    def second():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return ExitClass.RETRYABLE

    ends += [ExitClass.RETRYABLE, second, ExitClass.DONE]
    assert train(run, config_of(tmp_path, restarts=9)) is ExitClass.INTERRUPTED
    assert time.monotonic() - began < 50 and ends == [ExitClass.DONE] and signal.getsignal(signal.SIGINT) is before


def test_a_flag_of_an_earlier_launch_does_not_count(run, ends, tmp_path):
    run.stop_flag.write_text(BY_SIGNAL)
    ends += [ExitClass.RETRYABLE, ExitClass.DONE]
    assert train(run, config_of(tmp_path, restarts=1)) is ExitClass.DONE


def test_processes_that_break_twice(run, tmp_path, monkeypatch):
    """Real ones, in place of torchrun's; all else is as it is. What a crash left between two renames is taken back before."""
    left = run.checkpoints(STAGE) / "step_00000010.old"
    left.mkdir(parents=True)
    command = [sys.executable, "-c", RANKS, str(run.root), "2"]
    monkeypatch.setattr(module, "torchrun_command", lambda run, **_: command)
    monkeypatch.setattr("launcher.jobs.stages.RESTART_WAIT_S", 0.0)
    assert train(run, config_of(tmp_path, restarts=2)) is ExitClass.DONE
    assert [after for _, after, _ in jobs(run)] == ["restart", "restart", "end"]
    assert not left.exists() and left.with_suffix("").exists()
