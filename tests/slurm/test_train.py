"""slurm/pretrain.sh on a real cluster, with real megatron-core ranks over gloo: two nodes train, are interrupted and go on."""

import shlex

import pytest

from tests.slurm.training import (
    STARTED_S,
    job_ids,
    losses,
    phidias,
    status,
    submit,
    until,
    until_step,
    workspace_of_slurm,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Text, tokenizer and shards, made once."""
    made = workspace_of_slurm(tmp_path_factory.mktemp("train"))
    made.config("data")
    return made


def test_two_nodes_train_as_if_nothing_had_happened(slow, slurm, workspace):
    whole = workspace.named("whole")
    (job,) = slurm.wait(submit(slurm, whole), "COMPLETED", timeout=STARTED_S)
    assert job.exit_code == 0
    (start,) = whole.events("start")
    assert len(start["nodes"]) == 2 and whole.events("stage_done")

    stopped = workspace.named("stopped")
    number = submit(slurm, stopped)
    until_step(stopped, 2)
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


def test_a_stage_that_fails_takes_those_after_it_along(slow, slurm, workspace):
    both = workspace.named("both")
    command = [*both.words(), "cluster=lab", "cluster.partition=low", "stage.tokens=122880"]  # long enough to be stopped
    runs = f"runs_dir={both.root / 'runs'}"
    lines = phidias(slurm, both, "submit", *command, "dry=true").splitlines()
    assert len(lines) == 2 and "--dependency=afterok:" in lines[1] and not both.run_dir.exists()
    assert shlex.split(lines[0])[3] == "sbatch"
    first, second = job_ids(phidias(slurm, both, "submit", *command))
    assert "queued already" in phidias(slurm, both, "submit", *command)
    slurm.run("scancel", first)
    slurm.wait(first, "CANCELLED")
    slurm.wait(second, "CANCELLED")
    assert status(slurm, both)["jobs"] == []
    # Again: what is not done is queued anew; a person stops it, and nothing of it is left.
    number, _ = job_ids(phidias(slurm, both, "resume", both.run, runs))
    until_step(both, 2)
    assert (number, "RUNNING") in [(job["job"], job["state"]) for job in status(slurm, both)["jobs"]]
    assert f"job_{number}.log" in phidias(slurm, both, "logs", both.run, runs, "lines=5")
    assert "save after this step" in phidias(slurm, both, "stop", both.run, runs)
    (job,) = slurm.wait(number, "FAILED", timeout=STARTED_S)
    assert job.exit_code == 130 and [row["exit"] for row in both.events("job_end")][-1] == "INTERRUPTED"
    assert not slurm.run("squeue", "--noheader").strip()


def test_what_slurm_would_refuse_is_never_queued(slurm, workspace):
    """sbatch --test-only, before anything is written."""
    refused = workspace.named("nowhere")
    said = phidias(slurm, refused, "submit", *refused.words(), "cluster=lab", "cluster.partition=nowhere", code=2)
    assert not job_ids(said) and not refused.run_dir.exists()
