"""`phidias watch`, fed with the files a run writes: what it shows, what does not break it, and when and how it ends."""

import fcntl
import io
import json
import os
import signal
import threading
import time

import pytest
from rich.console import Console

from launcher.cli import main
from launcher.plan.document import plan_document
from launcher.report.progress import Progress, RecordTail
from launcher.report.standing import SILENT_S, stands
from launcher.report.surroundings import Surroundings, event_line
from launcher.report.watch import WatchView
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import open_run
from launcher.rundir.records import append_record, write_json
from tests.training.tiny import SHARES, run_config, stage_config

STAGES = [stage_config(), stage_config(stage={"name": "midtrain", "tokens": 256 * 3.0})]
NAMES = ["pretrain", "midtrain"]


@pytest.fixture
def config(tmp_path):
    return run_config(tmp_path, stages=STAGES)


@pytest.fixture
def run(tmp_path, config, monkeypatch):
    """Frozen, not begun; the plan counts 400 tokens of each source, and GPUs of 1e-3 TFLOP/s."""
    monkeypatch.chdir(tmp_path)
    run = open_run(config, prepared=None)
    plan = plan_document(config, sizes={})
    for stage in plan:
        stage["mfu_peak_tflops"] = 1e-3
        stage["exposure"] = [{"source": name, "unique_tokens": 400} for name in SHARES]
    write_json(run.plan, plan)
    return run


def status(run, *, state="running", step=0, stage="pretrain", **fields):
    base = {"name": "tiny", "stage": stage, "state": state, "step": step, "num_steps": 6, "tokens": step * 256, "loss": 5.0}
    write_json(run.status, {**base, "tokens_per_s": 1234.0, "eta_s": 75.0, "time": 1.0 + step, **fields})


def train(run, *, step, at=None, stage="pretrain", **fields):
    row = {"stage": stage, "step": step, "samples": step * 8, "tokens": step * 256, "loss": 5.0, "loss_by_source": {"a": 4.5}}
    row |= {"tokens_by_source": {"a": 128 * step, "b": 77}, "step_time_s": 1.5, "data_wait_s": 0.5}
    row |= {"slowest_rank": 12, "slowest_ratio": 1.043}
    record(run.metrics, "train", at, **{**row, **fields})


def record(path, kind, at, /, **fields):
    """At a time of its own."""
    with path.open("a") as file:
        file.write(json.dumps({"time": time.time() if at is None else at, "kind": kind, **fields}) + "\n")


def screen(run, config, *, width):
    """The lines of the panel."""
    with WatchView(run, config, "rich", console=Console(file=io.StringIO(), width=width, force_terminal=True)) as view:
        output = io.StringIO()
        Console(file=output, width=width, color_system=None).print(view.render())
    return output.getvalue().splitlines()


# What it shows


@pytest.mark.parametrize("width", [80, 120, 50])
def test_the_panel_has_all_figures_and_stays_inside_the_screen(run, config, width):
    now = time.time()
    record(run.events, "start", now - 100, job="4711", nodes=["n1", "n2", "n3"])
    for step in (1, 2):
        train(run, step=step, at=now - 80 + 20 * step, step_time_s=15.0, stage="midtrain")
    record(run.events, "checkpoint", now - 1, stage="midtrain", step=2, seconds=3.2, bytes=123456789)
    record(run.events, "fault", now, stage="midtrain", rank=9, node="n3", exit="RETRYABLE", error="NetworkError: lost\ntrace")
    status(run, stage="midtrain", step=2, num_steps=3)
    lines = screen(run, config, width=width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    for figure in (
        "tiny  running",
        "5.000",
        "1,234",
        "1 min 15 s",
        "15.00 s",
        "0.500 s",
        "12, 1.04x",
        "MFU",
        "goodput",
        "midtrain",
    ):
        assert figure in text, figure
    rows = {line.strip("│ ").split(" ")[0]: line.split() for line in lines}
    # Of the first stage, whose rows are not here, what the plan says: half of 1,536 tokens. Then 256 of this one.
    assert rows["a"][1:7] == ["a", "50.0%", "256", f"{(768 + 256) / 400:.2f}", "4.500", "–"]
    if width > 50:
        assert "fault        midtrain, rank 9, node n3, RETRYABLE, NetworkError" in text
        assert "checkpoint   midtrain, step 2, 123MB, 3 s" in text
        assert "1 CPU rank (n1 … n3), job 4711" in lines[-1]


def test_speed_against_the_hardware_is_the_plans(run, config):
    around = Surroundings(run, config.cluster)
    around.read(now=0.0)
    plan = around.plan["pretrain"]
    progress = Progress(status={"stage": "pretrain", "tokens_per_s": 1000.0})
    assert around.mfu(progress) == pytest.approx(plan["flops_per_token"]["causal"] * 1000.0 / 1e12 / 1e-3)
    assert around.mfu(Progress(status={"stage": "other", "tokens_per_s": 1000.0})) is None


def plain(run, config):
    output = io.StringIO()
    return WatchView(run, config, "plain", console=Console(file=output, width=80), clock=lambda: 0.0), output


def test_plain_lines_tell_progress_and_what_happens(run, config):
    record(run.events, "start", time.time() - 100)
    status(run, step=1)
    view, output = plain(run, config)
    with view:
        assert output.getvalue().startswith("pretrain: step 1/6, loss 5.000, 256 tokens, 1,234 tokens/s, MFU ")
        output.truncate(0)
        append_record(run.events, "straggler", stage="pretrain", step=2, rank=3, node="n1", action="note")
        status(run, step=2)
        view.refresh()
        append_record(run.events, "job_end", job=None, exit="DONE", after="end", reason=None)
        status(run, state="done", step=6)
    lines = output.getvalue().strip("\0").splitlines()
    assert [line[10:] for line in lines[:2]] == [
        "straggler    pretrain, step 2, rank 3, node n1, note",
        "job end      DONE, end",
    ]
    assert lines[2].startswith("pretrain: step 6/6") and lines[2].endswith("done") and len(lines) == 3
    assert view.ended is ExitClass.DONE


def test_an_event_of_another_day_has_its_date():
    event = {"time": time.mktime((2026, 3, 4, 5, 6, 7, 0, 0, -1)), "kind": "stage_start", "stage": "pretrain"}
    assert event_line(event, now=event["time"] + 60) == "05:06:07  stage start  pretrain"
    assert event_line(event, now=event["time"] + 1e6) == "03-04 05:06  stage start  pretrain"
    assert event_line({"kind": "x"}, now=1e9).endswith("  x")


def test_the_time_of_a_run_that_has_ended_ends_with_it(run, config):
    """Goodput of a run of last week is what it was then."""
    began = time.time() - 7 * 86400
    record(run.events, "start", began)
    for step in range(1, 5):
        train(run, step=step, at=began + 10 * step, step_time_s=10.0, data_wait_s=1.0)
    status(run, step=4)
    with plain(run, config)[0] as view:
        assert view._around.measured.wall_s > 6 * 86400
        record(run.events, "job_end", began + 40, job=None, exit="RETRYABLE", after="end")
        view.refresh()
        assert view._around.measured.wall_s == pytest.approx(40, abs=0.01)
        assert view._around.measured.goodput == pytest.approx(0.9, abs=0.01)


# What does not break it


def test_a_log_that_was_cut_off_and_a_status_that_is_torn(run, config):
    status(run, step=5)
    for step in range(1, 6):
        train(run, step=step)
    record(run.events, "start", None)
    view, output = plain(run, config)
    with view:
        run.status.write_text('{"state": "runn')
        run.metrics.write_text("")
        run.events.write_text("torn\n[1]\n{}\n" + json.dumps({"time": "soon", "kind": 5}) + "\n")
        view.refresh()
        train(run, step=3, loss=2.25)
        append_record(run.metrics, "validation", stage=None, loss="none")
        append_record(run.metrics, "validation", stage="pretrain", step=3, loss=1.5, loss_by_source="none")
        record(run.events, "start", None)
        view.refresh()
        assert view._progress.loss == 2.25 and view._progress.status["step"] == 5
        assert "pretrain: step 3, held-out loss 1.500 ()" in output.getvalue()
    assert view.ended is None


def test_a_tail_goes_on_where_a_file_was_replaced_by_a_shorter_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    tail = RecordTail(path)
    assert [row["n"] for row in tail.new_rows()] == [1, 2]
    path.write_text('{"n": 3}\n')
    assert [row["n"] for row in tail.new_rows()] == [3] and tail.new_rows() == []


# When and how it ends

START, END = {"kind": "start"}, {"kind": "job_end", "exit": "DONE", "after": "end"}
FIRST, SECOND = ({"kind": "submitted", "stage": name, "job": job} for name, job in zip(NAMES, ("1", "2"), strict=True))


@pytest.mark.parametrize(
    ("events", "said", "state", "ended"),
    [
        ([], None, "not started", None),
        ([FIRST], None, "queued", None),
        ([START], None, "starting", None),
        ([START], "running", "running", None),
        ([START, END], "done", "done", ExitClass.DONE),
        ([START, END | {"exit": "INTERRUPTED"}], "stopped", "stopped", ExitClass.INTERRUPTED),
        ([START, END | {"exit": "NEEDS_PERSON"}], "running", "failed", ExitClass.NEEDS_PERSON),
        ([START, END | {"exit": "gone"}], "running", "failed", ExitClass.RETRYABLE),
        ([START, END | {"exit": "RETRYABLE", "after": "restart"}], "running", "starting", None),
        ([START, END | {"exit": "CHECKPOINTED", "after": "requeue"}], "stopped", "queued", None),
        ([START, END, START], "done", "done", None),
        # Two jobs, one a stage: the second waits for the first, and is not started where that fails.
        ([FIRST, SECOND, {"kind": "job_start", "job": "1"}, END | {"job": "1"}], "done", "queued", None),
        ([FIRST, SECOND, {"kind": "job_start", "job": "1"}, END | {"exit": "STATE"}], "running", "failed", ExitClass.STATE),
        ([START, END | {"exit": "STATE"}, SECOND], "running", "queued", None),
        ([START, {"kind": "submitted", "stage": "export", "job": "3"}, END], "done", "done", ExitClass.DONE),
    ],
)
def test_where_a_run_stands(events, said, state, ended):
    found = stands(events, status={"state": said} if said else {}, stages=NAMES)
    assert (found.state, found.ended) == (state, ended)


@pytest.mark.parametrize(("exit_name", "code"), [("DONE", 0), ("RETRYABLE", 11), ("NEEDS_PERSON", 13), ("INTERRUPTED", 130)])
def test_it_ends_as_the_run_does(run, exit_name, code, capsys):
    append_record(run.events, "start")
    append_record(run.events, "job_end", job=None, exit=exit_name, after="end", reason=None)
    status(run, step=3)
    assert main(["watch", "tiny"]) == code
    assert "step 3/6" in capsys.readouterr().out


def test_a_run_that_has_not_begun_is_waited_for(run, capsys):
    def begins_and_ends():
        append_record(run.events, "start")
        status(run, step=1)
        time.sleep(0.2)
        append_record(run.events, "job_end", job=None, exit="DONE", after="end", reason=None)

    timer = threading.Timer(0.2, begins_and_ends)
    timer.start()
    assert main(["watch", "tiny", "every=0.05"]) == 0
    timer.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "not started" and any("start" in line for line in lines[1:]) and lines[-1].endswith("done")


def test_a_run_that_is_not_there_yet(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launcher.verbs.watch.WAIT_S", 0.05)
    append_record(run.events, "job_end", job=None, exit="DONE", after="end", reason=None)
    later = run.root.rename(tmp_path / "later")
    assert main(["watch", "tiny"]) == 3 and "no run 'tiny'" in capsys.readouterr().err
    timer = threading.Timer(0.2, later.rename, [run.root])
    timer.start()
    assert main(["watch", "tiny", "wait=true"]) == 0
    timer.join()
    assert "waiting for runs/tiny" in capsys.readouterr().out


def test_ctrl_c_ends_it_and_not_the_run(run, capsys):
    append_record(run.events, "start")
    status(run, step=1)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert main(["watch", "tiny"]) == 0
    assert not run.stop_flag.exists() and "Traceback" not in capsys.readouterr().err


def test_it_ends_where_nobody_reads_it_any_more(run, config):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(SystemExit), WatchView(run, config, "plain", console=Console(file=Closed())):
        pass


def test_a_launcher_that_was_killed_leaves_a_run_that_died(run, config):
    """Without a word: it is silent, and nobody holds it. One of Slurm's may be started again."""
    append_record(run.events, "start", job=None)
    status(run, step=1)
    old = time.time() - 2 * SILENT_S
    view, _ = plain(run, config)
    with view:
        assert view.ended is None
        for path in (run.status, run.events, run.config):
            os.utime(path, (old, old))
        with run.lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            view.refresh()
            assert view.ended is None
        view.refresh()
        assert view.ended is ExitClass.RETRYABLE and view._progress.state == "died"
        append_record(run.events, "start", job="4711")
        os.utime(run.events, (old, old + 1))
        view.refresh()
        assert view.ended is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "this verb needs the name of a run"),
        (["tiny", "other"], "one run is watched at a time"),
        (["tiny", "every=0"], "found '0'; it is a number of seconds above 0"),
        (["tiny", "every=soon"], "every=5"),
        (["tiny", "show=html"], "it is one of rich, plain"),
        (["tiny", "evry=5"], "did you mean every=?"),
    ],
)
def test_what_is_refused(run, capsys, words, told):
    assert main(["watch", *words]) == 2
    assert told in capsys.readouterr().err
