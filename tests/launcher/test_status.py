"""`phidias status` over run directories and a Slurm that says what it is told."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cli import main
from launcher.jobs.accounting import EndedJob, LiveJob, belongs_to, ended_jobs, live_jobs
from launcher.plan.document import plan_document
from launcher.plan.parameters import flops_per_token
from launcher.report.status_page import print_table
from launcher.rundir.lock import lock_run
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, write_json
from launcher.verbs.status import status_rows
from tests.training.tiny import run_config, stage_config

CONFIG = run_config(Path("unused"), stages=[stage_config(), stage_config(stage={"name": "midtrain", "tokens": 256 * 3.0})])
PROGRAM = """#!/bin/sh
echo "$0 $*" >> {calls}
{script}
"""
RUNNING = {
    "stage": "pretrain",
    "state": "running",
    "step": 3,
    "tokens": 768,
    "loss": 2.5,
    "tokens_per_s": 1000.0,
    "eta_s": 75.0,
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """`slurm(squeue="echo ...", sacct="exit 1")` puts such programs on the PATH; `slurm.calls()`: how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def says(**programs):
        for name, script in programs.items():
            (folder / name).write_text(PROGRAM.format(calls=tmp_path / "calls", script=script))
            (folder / name).chmod(0o755)

    says.calls = lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    says(squeue="exit 1", sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    return says


@pytest.fixture
def phidias(tmp_path, monkeypatch, capsys):
    """What `phidias status ...` prints, below a folder with runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        code = main(["status", *words])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return call


def make_run(root, name, *, jobs=(), **status):
    """A run with a plan of two stages, jobs submitted for them, and a status."""
    run = RunDir(root / "runs" / name)
    run.root.mkdir(parents=True)
    run.config.touch()
    write_json(run.plan, plan_document(CONFIG, sizes={}))
    for job, stage in zip(jobs, ("pretrain", "midtrain"), strict=False):
        append_record(run.events, "submitted", stage=stage, job=job)
    if status:
        write_json(run.status, status)
    return run


def only(out):
    (row,) = json.loads(out)
    return row


# What Slurm says


def test_jobs_in_the_queue(slurm):
    slurm(squeue='printf "7|RUNNING|None\\n8|PENDING|Dependency\\n9_1|PENDING|job requeued in held state\\n"')
    assert live_jobs(["7", "8", "9"]) == [
        LiveJob("7", "RUNNING", None),
        LiveJob("8", "PENDING", "Dependency"),
        LiveJob("9_1", "PENDING", "job requeued in held state"),
    ]
    assert belongs_to("9_1", known=["9"]) and belongs_to("9_1", known=["9_1"]) and not belongs_to("9_1", known=["9_2", "91"])


def test_accounts_of_jobs_that_ended(slurm):
    lines = ["7|TIMEOUT|0:0|60|n[1-4]", "7|NODE_FAIL|0:0|90|n[1-4]", "8|CANCELLED by 1000|0:15|0|None assigned"]
    slurm(sacct="\n".join(["cat <<END", *lines, "9|RUNNING|0:0|5|n1", "a line", "END"]))
    found = ended_jobs(["7", "8", "9"])
    assert found == [EndedJob("7", "NODE_FAIL", "0:0", 90, "n[1-4]"), EndedJob("8", "CANCELLED", "0:15", 0, "None assigned")]


@pytest.mark.parametrize("script", ["exit 1", "echo '7|FAILED'", "echo '7|FAILED|1:0|soon|n1'", "printf '\\377'"])
def test_a_slurm_that_does_not_answer(slurm, script):
    slurm(squeue=script, sacct=script)
    assert live_jobs(["7"]) == [] and ended_jobs(["7"]) == []


def test_a_slurm_that_hangs_is_not_waited_for(slurm, monkeypatch):
    monkeypatch.setattr("launcher.jobs.accounting.ACCOUNTS_TIMEOUT_S", 0.2)
    slurm(sacct="exec sleep 60")
    began = time.monotonic()
    assert ended_jobs(["7"]) == []
    assert time.monotonic() - began < 30


def test_no_slurm_and_no_jobs(slurm, monkeypatch, tmp_path):
    assert live_jobs([]) == [] and ended_jobs(["", "7; rm", "seven"]) == [] and not slurm.calls()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert live_jobs(["7"]) == [] and ended_jobs(["7"]) == []


# Rows


def test_slurm_is_asked_once_for_all_runs(slurm, phidias, tmp_path):
    for name, jobs in (("one", ("1", "2")), ("two", ("3",)), ("none", ())):
        make_run(tmp_path, name, jobs=jobs)
    slurm(squeue='echo "2|PENDING|Priority"; echo "3|RUNNING|None"', sacct='echo "1|OUT_OF_MEMORY|0:125|61|n1"')
    one, two, none = json.loads(phidias("out=json"))
    assert one["jobs"] == [{"job": "2", "state": "PENDING", "reason": "Priority"}] and one["state"] == "queued"
    assert [(job["job"], job["state"], job["elapsed_s"]) for job in one["ended_jobs"]] == [("1", "OUT_OF_MEMORY", 61)]
    assert two["jobs"] == [{"job": "3", "state": "RUNNING"}] and two["ended_jobs"] == []
    assert none["jobs"] == [] and none["state"] == "not started"
    squeue, sacct = slurm.calls()
    assert squeue.endswith("--jobs=1,2,3") and sacct.endswith("--jobs=1")


def test_a_local_run_asks_slurm_nothing(slurm, phidias, tmp_path):
    make_run(tmp_path, "local", **RUNNING)
    row = only(phidias("out=json"))
    assert row["state"] == "died" and row["mfu"] is None and slurm.calls() == []


def test_accounts_are_asked_for_the_newest_jobs(slurm, phidias, tmp_path):
    run = make_run(tmp_path, "long")
    for job in range(100, 200):
        append_record(run.events, "start", job=str(job))
    phidias()
    assert slurm.calls()[-1].endswith(f"--jobs={','.join(map(str, range(180, 200)))}")


def test_ends_are_told_without_accounts_too(slurm, phidias, tmp_path):
    run = make_run(tmp_path, "ended", jobs=("7", "8"), **RUNNING)
    append_record(run.events, "job_end", job="7", exit="CHECKPOINTED", after="requeue", reason=None)
    append_record(run.events, "job_end", job="7", exit="RETRYABLE", after="end", reason="3 starts in a row")
    (job,) = only(phidias("out=json"))["ended_jobs"]
    assert job == {"job": "7", "exit": "RETRYABLE", "after": "end", "reason": "3 starts in a row",
                   "state": None, "exit_code": None, "elapsed_s": None, "nodes": None}  # fmt: skip
    slurm(sacct='echo "7|TIMEOUT|0:0|86400|n[1-4]"')
    (job,) = only(phidias("out=json"))["ended_jobs"]
    assert (job["exit"], job["state"], job["nodes"]) == ("RETRYABLE", "TIMEOUT", "n[1-4]")
    slurm(squeue='echo "7|PENDING|BeginTime"')
    assert only(phidias("out=json"))["ended_jobs"] == []


def test_a_job_at_work_is_live_where_no_lock_says_so(slurm, phidias, tmp_path):
    run = make_run(tmp_path, "far", jobs=("7",), **RUNNING)
    slurm(squeue='echo "7|RUNNING|None"')
    assert only(phidias("out=json"))["state"] == "running"
    slurm(squeue="exit 1")
    assert only(phidias("out=json"))["state"] == "died"
    with lock_run(run):
        assert only(phidias("out=json"))["state"] == "running"


def test_jobs_beside_the_stages_are_no_training(slurm, phidias, tmp_path):
    """Data is prepared before it, an export waits behind it: the run is queued, then done."""
    run = make_run(tmp_path, "whole", jobs=("2",))
    for stage, job in (("data", "1"), ("export", "3")):
        append_record(run.events, "submitted", stage=stage, job=job)
    slurm(squeue='echo "1_0|RUNNING|None"; echo "2|PENDING|Dependency"; echo "3|PENDING|Dependency"')
    row = only(phidias("out=json"))
    assert row["state"] == "queued" and row["other_jobs"] == {"data": ["1"], "export": ["3"]}
    write_json(run.status, {**RUNNING, "state": "done"})
    slurm(squeue='echo "3|PENDING|Resources"')
    assert only(phidias("out=json"))["state"] == "done"
    slurm(squeue='echo "2|RUNNING|None"')
    write_json(run.status, RUNNING)
    assert only(phidias("out=json"))["state"] == "running"


def test_why_nothing_was_started_is_told(phidias, tmp_path):
    run = make_run(tmp_path, "idle", **RUNNING)
    append_record(run.events, "no_start", job="7", reason="3 sound nodes, 4 wanted")
    assert "idle: 3 sound nodes, 4 wanted\n" in phidias()


def test_goodput_goes_on_while_a_run_waits(slurm, phidias, tmp_path):
    run = make_run(tmp_path, "waits", jobs=("7",), **RUNNING)
    began = time.time() - 1000
    run.events.write_text(run.events.read_text() + json.dumps({"time": began, "kind": "start", "job": "7"}) + "\n")
    row = {"time": began + 100, "kind": "train", "stage": "pretrain", "step": 10, "step_time_s": 5.0}
    run.metrics.write_text(json.dumps(row) + "\n")
    found = only(phidias("out=json"))
    assert (found["goodput"], found["wall_s"], found["lost_s"]) == (0.5, 100.0, {"start_up": 50.0})
    slurm(squeue='echo "7|PENDING|Resources"')
    found = only(phidias("out=json"))
    assert found["goodput"] == pytest.approx(0.05, rel=0.02) and list(found["lost_s"]) == ["queue", "start_up"]
    assert found["lost_s"]["queue"] == pytest.approx(900, rel=0.02) and found["wall_s"] == pytest.approx(1000, rel=0.02)
    slurm(squeue='echo "7|RUNNING|None"')  # what it does since its last row is not known yet
    assert list(only(phidias("out=json"))["lost_s"]) == ["other", "start_up"]


def test_mfu_is_the_plans(tmp_path):
    """A prediction that comes true has the MFU that was predicted."""
    from launcher.config.compose import compose_run

    config = compose_run(["run=phi4"])
    (plan, *_) = plan_document(config)
    run = RunDir(tmp_path / "phi4")
    run.root.mkdir()
    write_json(run.plan, [plan])
    write_json(run.status, {"stage": plan["stage"], "state": "running", "tokens_per_s": plan["tokens_per_s"]})
    (row,) = status_rows([run])
    assert row["mfu"] == pytest.approx(plan["mfu"], abs=1e-4) and 0.2 < row["mfu"] < 0.8
    flops = flops_per_token(config.model, seq_length=plan["seq_length"])["causal"]
    assert row["mfu"] == pytest.approx(flops * plan["tokens_per_s"] / 1920 / (plan["mfu_peak_tflops"] * 1e12), abs=1e-4)


def test_stages_have_what_their_checkpoints_hold(phidias, tmp_path):
    run = make_run(tmp_path, "two", jobs=("1", "2"), **{**RUNNING, "stage": "midtrain", "tokens": 512})
    for tokens in (768, 1536):
        append_record(run.events, "checkpoint", stage="pretrain", tokens=tokens)
    append_record(run.events, "checkpoint", stage="midtrain", tokens=256)
    pretrain, midtrain = only(phidias("out=json"))["stages"]
    assert pretrain == {"stage": "pretrain", "tokens": 1536, "planned_tokens": 1536, "job_ids": ["1"]}
    assert midtrain == {"stage": "midtrain", "tokens": 512, "planned_tokens": 768, "job_ids": ["2"]}


WRONG = [
    {"stage": 7, "state": None, "step": "many", "tokens": [1], "loss": "nan", "tokens_per_s": True, "eta_s": {}},
    {
        "stage": "pretrain",
        "state": "running",
        "step": float("nan"),
        "tokens": 10**400,
        "loss": float("inf"),
        "tokens_per_s": None,
    },
    {"stage": ["pretrain"], "state": {"a": 1}},
]


@pytest.mark.parametrize("status", WRONG)
def test_a_status_edited_by_hand_hides_nothing(slurm, phidias, tmp_path, status):
    run = make_run(tmp_path, "odd", **status)
    make_run(tmp_path, "whole", **RUNNING)
    run.events.write_text('5\n"text"\n{"kind": "fault"}\n{"time": 1}\n{"job": [1], "kind": "job_end"}\n')
    run.plan.write_text("{torn")
    for columns in (80, 200):
        out = phidias(columns=columns)
        assert "\nodd " in out and "\nwhole " in out and "2.500" in out
    assert "odd" in phidias("odd")
    odd, whole = json.loads(phidias("out=json"))
    assert (odd["step"], odd["tokens"], odd["loss"], odd["tokens_per_s"], odd["stages"]) == (None, None, None, None, [])
    assert whole["step"] == 3


# The page

PAGE = dict(
    name="phi4-14b", stage="pretrain", state="running", step=123456, tokens=4.12e12, loss=2.1134, tokens_per_s=9.51e6,
    mfu=0.4123, eta_s=1e6, goodput=0.971, restarts=2, last_fault=None, bad_nodes=[], ended_jobs=[],
    jobs=[{"job": "4711", "state": "RUNNING"}, {"job": "4712", "state": "PENDING", "reason": "Dependency"}],
    stages=[{"stage": "pretrain", "tokens": 4.12e12, "planned_tokens": 9.8e12, "job_ids": ["4711"]}], other_jobs={},
)  # fmt: skip


def page(*rows, columns):
    output = io.StringIO()
    print_table(rows, console=Console(file=output, width=columns, highlight=False, markup=False, emoji=False))
    return output.getvalue().splitlines()


def test_a_wide_screen_shows_every_column():
    header, row, waiting = page(PAGE, columns=140)
    for word in ("123k", "4.12T", "2.113", "9.51M", "41.2%", "11 d 13 h", "97.1%", "4711 R, 4712 PD"):
        assert word in row, word
    assert header.split()[-2:] == ["restarts", "jobs"] and waiting == "phi4-14b: waiting 4712 (Dependency)"


def test_a_narrow_one_breaks_the_table():
    first, row, empty, second, rest, _ = page(PAGE, columns=80)
    assert max(map(len, (first, row, second, rest))) <= 80 and empty == ""
    assert first.split()[-1] == "left" and "11 d 13 h" in row
    assert second.split() == ["run", "goodput", "restarts", "jobs"]
    assert rest.split() == ["phi4-14b", "97.1%", "2", "4711", "R,", "4712", "PD"]


def test_a_name_is_never_cut():
    name = "a_run_with_a_name_as_long_as_names_of_sweeps"
    lines = page({**PAGE, "name": name}, columns=80)
    assert max(map(len, lines[:-1])) <= 80 and sum(name in line for line in lines) == 4  # in three tables, and for what waits
    lines = page({**PAGE, "name": 3 * name}, columns=80)
    assert (3 * name)[:68] in lines[1] and "…" not in "".join(lines)


def test_what_needs_attention_stands_below():
    nodes = [{"node": f"n{number}", "reason": "two [ECC] errors"} for number in (3, 2)]
    lines = page({**PAGE, "bad_nodes": nodes, "last_fault": "a cable :x:\nat line 2"}, columns=140)
    assert "phi4-14b: a cable :x:" in lines
    assert "phi4-14b: bad nodes n3 (two [ECC] errors), n2 (two [ECC] errors)" in lines


def test_how_the_last_job_ended_where_none_is_queued():
    ended = {"job": "4709", "state": None, "exit": "RETRYABLE"}
    assert page({**PAGE, "jobs": [], "ended_jobs": [ended]}, columns=140)[1].endswith("4709 RETRYABLE")
    assert page({**PAGE, "jobs": [], "ended_jobs": [{**ended, "state": "TIMEOUT"}]}, columns=140)[1].endswith("4709 TIMEOUT")
    many = [{"job": str(job), "state": "PENDING"} for job in range(5)]
    assert page({**PAGE, "jobs": many}, columns=140)[1].endswith("0 PD, 1 PD +3")


def test_nodes_found_bad_are_told_newest_first(phidias, tmp_path):
    run = make_run(tmp_path, "nodes", **RUNNING)
    for node in ("n1", "n2", "n1", "n3", "n4"):
        append_record(run.events, "bad_node", node=node, reason="slow")
    assert [row["node"] for row in only(phidias("out=json"))["bad_nodes"]] == ["n4", "n3", "n1"]


def test_a_run_that_is_named_has_a_block(slurm, phidias, tmp_path):
    run = make_run(tmp_path, "named", jobs=("7", "8"), **RUNNING)
    append_record(run.events, "job_end", job="6", exit="RETRYABLE", after="end", reason="3 starts in a row in vain")
    append_record(run.events, "submitted", stage="data", job="5")
    append_record(run.events, "submitted", stage="pretrain,midtrain", job="9_1")
    began = time.time() - 7200
    told = [{"time": began, "kind": "start", "pid": 1}, {"time": began + 720, "kind": "stage_start", "stage": "pretrain"}]
    with run.events.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in told)
    row = {"time": began + 7200, "kind": "train", "stage": "pretrain", "step": 100, "step_time_s": 54.0, "data_wait_s": 1.8}
    run.metrics.write_text(json.dumps(row) + "\n")
    run.logs.mkdir()
    for name in ("job_7.log", "pretrain.log"):
        (run.logs / name).touch()
    slurm(
        squeue='echo "7|RUNNING|None"; echo "8|PENDING|Dependency"; echo "9_1|PENDING|Priority"; echo "5_1|RUNNING|None"',
        sacct='echo "6|NODE_FAIL|1:0|90000|n[1-4]"; echo "5_0|COMPLETED|0:0|3600|n5"',
    )
    out = phidias("named")
    for line in (
        "  stages     pretrain  768 of 1,536 tokens, 50.0%; job 7 RUNNING, 9_1 PENDING",
        "             midtrain  0 of 768 tokens, 0.0%; job 8 PENDING, 9_1 PENDING",
        "  data       job 5 COMPLETED RUNNING",
        "  lost       27.5% of 2 h 00 min: other 15.0%, start-up 10.0%, data wait 2.5%",
        "  ended      5_0  COMPLETED 0:0 after 1 h 00 min on n5",
        "             6  RETRYABLE, not started again: 3 starts in a row in vain; NODE_FAIL 1:0 after 1 d 1 h on n[1-4]",
        "  directory  runs/named",
        "  log        runs/named/logs/job_7.log",
        "             runs/named/logs/pretrain.log",
    ):
        assert f"\n{line}\n" in out, (line, out)
    assert "directory" not in phidias()
