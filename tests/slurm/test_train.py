"""slurm/pretrain.sh on a real cluster, with real megatron-core ranks over gloo: two nodes train, are interrupted and go on."""

import json
import os
import time
from pathlib import Path

import pytest

from tests.endtoend.workspace import Workspace

SCRIPT = str(Path(__file__).resolve().parents[2] / "slurm" / "pretrain.sh")
# Two nodes of one rank each, over gloo.
CLUSTER = """defaults:
  - local
  - _self_

name: lab
kind: slurm
num_nodes: 2
gpus_per_node: 1
"""
TASKS = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2"]
STARTED_S = 120.0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Text, tokenizer and shards, made once."""
    made = Workspace(tmp_path_factory.mktemp("train"))
    (made.root / "yaml" / "cluster").mkdir()
    (made.root / "yaml" / "cluster" / "lab.yaml").write_text(CLUSTER)
    made.config("data")
    return made


def words(workspace, *more, stage="small"):
    return [*workspace.words(), f"stage={stage}", "cluster=lab", *more]


def submit(slurm, workspace, *more, stage="small", options=()):
    return slurm.submit(["sbatch", *TASKS, *options, SCRIPT, *words(workspace, *more, stage=stage)], cwd=workspace.root)


def until(true, *, what):
    deadline = time.monotonic() + STARTED_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def losses(workspace):
    """By samples: a step that was taken again counts as it was taken last."""
    return {row["samples"]: row["loss"] for row in workspace.rows("metrics.jsonl") if row["kind"] == "train"}


def test_two_nodes_train_as_if_nothing_had_happened(slurm, workspace):
    whole = workspace.named("whole")
    (job,) = slurm.wait(submit(slurm, whole), "COMPLETED", timeout=STARTED_S)
    assert job.exit_code == 0
    (start,) = whole.events("start")
    assert len(start["nodes"]) == 2 and whole.events("stage_done")

    stopped = workspace.named("stopped")
    number = submit(slurm, stopped)
    until(lambda: len(losses(stopped)) >= 2, what="the second step")
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    until(lambda: len(stopped.events("start")) == 2, what="the requeued start")
    (job,) = slurm.wait(number, "COMPLETED", timeout=STARTED_S)
    assert job.restarts == 1
    assert [row["after"] for row in stopped.events("job_end")] == ["requeue", "end"]
    assert losses(stopped) == losses(whole)


def test_a_refused_config_ends_the_job(slurm, workspace):
    refused = workspace.named("refused")
    (job,) = slurm.wait(submit(slurm, refused, "layout.tp=3"), "FAILED")
    assert job.exit_code == 2 and "config refused" in job.output.read_text()
    (job,) = slurm.wait(submit(slurm, refused, "cluster.num_nodes=4"), "FAILED")
    assert job.exit_code == 2 and "sbatch --nodes=4" in job.output.read_text()
    assert not refused.run_dir.exists()


def test_a_stage_that_fails_takes_those_after_it_along(slurm, workspace):
    both = workspace.named("both")
    command = [*both.words(), "cluster=lab", "cluster.partition=low"]
    dry = phidias(slurm, both, "submit", *command, "dry=true")
    lines = [line for line in dry.splitlines() if line.startswith("sbatch")]
    assert len(lines) == 2 and "--dependency=afterok:" in lines[1] and not both.run_dir.exists()
    out = phidias(slurm, both, "submit", *command)
    first, second = (line.split("job ")[1].split(",")[0].split(";")[0] for line in out.splitlines())
    assert "queued already" in phidias(slurm, both, "submit", *command)
    slurm.run("scancel", first)
    slurm.wait(first, "CANCELLED")
    slurm.wait(second, "CANCELLED")
    assert phidias(slurm, both, "status", both.run, f"runs_dir={both.root / 'runs'}", "out=json").count('"jobs": []') == 1
    # Again: what is not done is queued anew; a person stops it, and nothing of it is left.
    again = phidias(slurm, both, "resume", both.run, f"runs_dir={both.root / 'runs'}")
    number = again.split("job ")[1].split(";")[0]
    until(lambda: len(losses(both)) >= 2, what="the second step")
    state = json.loads(phidias(slurm, both, "status", both.run, f"runs_dir={both.root / 'runs'}", "out=json"))[0]
    assert {"job": number, "state": "RUNNING"} in state["jobs"]
    assert f"job_{number}.log" in phidias(slurm, both, "logs", both.run, f"runs_dir={both.root / 'runs'}", "lines=5")
    assert "save after this step" in phidias(slurm, both, "stop", both.run, f"runs_dir={both.root / 'runs'}")
    (job,) = slurm.wait(number, "FAILED", timeout=STARTED_S)
    assert job.exit_code == 130 and [row["exit"] for row in both.events("job_end")][-1] == "INTERRUPTED"
    assert not slurm.run("squeue", "--noheader").strip()


def phidias(slurm, workspace, *words):
    """As a user on a login node of the cluster."""
    return slurm.run("env", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}", "phidias", *words, cwd=workspace.root)
