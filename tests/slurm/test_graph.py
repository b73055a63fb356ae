"""`phidias submit` on a real cluster: from text to an evaluated checkpoint without a person, and ablation sweeps."""

import json
import os
import re

import pytest
import yaml

from tests.slurm.training import STARTED_S, job_ids, phidias, status, submit, until, workspace_of_slurm

ON_LOW = ("cluster=lab", "cluster.partition=low")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Text only: its data is made by the first job."""
    return workspace_of_slurm(tmp_path_factory.mktemp("graph"))


def test_from_text_to_an_evaluated_checkpoint(slurm, workspace):
    command = [*workspace.words(), *ON_LOW, "run.after=[export,eval]", "data.num_machines=2"]
    said = phidias(slurm, workspace, "submit", *command)
    jobs = job_ids(said)
    assert re.findall(r"^(\S+): job \d+", said, flags=re.MULTILINE) == [
        f"{workspace.run}.{what}" for what in ("data", "small", "long", "long.export", "long.eval")
    ]
    # What the repository becomes meanwhile changes nothing: the jobs run the copy in the run directory.
    (copy,) = (workspace.run_dir / "code").iterdir()
    assert (copy / "slurm" / "pretrain.sh").exists() and os.access(copy / "slurm" / "pretrain.sh", os.X_OK)
    for job in jobs:
        for element in slurm.wait(job, "COMPLETED", timeout=STARTED_S):
            assert f"{copy}/" in element.fields["Command"]
    found = json.loads((workspace.run_dir / "eval" / "long.json").read_text())
    assert found["held_out"]["agrees"] and workspace.events("code_changed") == []
    assert [row["stage"] for row in workspace.events("stage_done")] == ["small", "long"]
    assert "everything is done" in phidias(slurm, workspace, "submit", *command)
    assert status(slurm, workspace)["state"] == "done"


def test_a_sweep_is_all_or_nothing_and_an_array(slurm, workspace):
    """Two mixtures, one at a time, each a run of its own; one that is refused keeps all from being queued."""
    workspace.config("data")
    sweep = [*workspace.named("ablation").words(), *ON_LOW, "stage=small", "stage.tokens=8192"]
    folder = workspace.root / "yaml" / "mixture"
    even = (folder / "small.yaml").read_text().replace("0.7", "0.5").replace("0.3", "0.5")
    (folder / "even.yaml").write_text(even.replace("name: small", "name: even"))
    shares = "mixture=small,even"
    before = len(slurm.jobs())
    assert not job_ids(phidias(slurm, workspace, "submit", "-m", *sweep, "optim.clip_grad=1,-1", code=2))
    assert len(slurm.jobs()) == before and not list((workspace.root / "runs").glob("ablation*"))
    said = phidias(slurm, workspace, "submit", "-m", *sweep, shares, "concurrency=1")
    (array,) = set(re.findall(r"element \d of array (\d+), 1 at a time", said))
    runs = sorted((workspace.root / "runs").glob("ablation-*"))
    assert len(runs) == 2
    assert "queued already" in phidias(slurm, workspace, "submit", "-m", *sweep, shares, "concurrency=1")
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    assert sorted(config["stages"][0]["mixture"]["sources"]["prose"]["share"] for config in configs) == [0.5, 0.7]
    assert {config["run"]["name"] for config in configs} == {run.name for run in runs}
    first, second = f"{array}_0", f"{array}_1"
    slurm.wait(first, "RUNNING")
    until(lambda: waits_for_the_limit(slurm, second), what="the second element to wait")
    names = phidias(slurm, workspace, "status", "ablation-*", f"runs_dir={workspace.root / 'runs'}", "out=json")
    assert {row["name"] for row in json.loads(names)} == {run.name for run in runs}
    if not os.environ.get("PHIDIAS_SLOW"):  # to their ends: make test-slow
        assert f"cancelled {second}" in phidias(slurm, workspace, "stop", "ablation-*", f"runs_dir={workspace.root / 'runs'}")
        return
    slurm.wait(array, "COMPLETED", timeout=2 * STARTED_S)
    started = [workspace.named(run.name).events("start")[0] for run in runs]
    ended = [workspace.named(run.name).events("job_end")[0] for run in runs]
    assert {row["job"] for row in started} == {first, second}
    assert max(row["time"] for row in started) > min(row["time"] for row in ended)  # never both


def waits_for_the_limit(slurm, job):
    said = slurm.run("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%T %r")
    return said.split() == ["PENDING", "JobArrayTaskLimit"]


def test_the_code_that_a_run_was_frozen_with(slurm, workspace):
    """By hand: the first start copies it, a requeue runs the copy although the repository is another by then."""
    frozen = workspace.named("frozen")
    number = submit(slurm, frozen, "stage.tokens=8192")
    until(lambda: frozen.events("start"), what="the start")
    (copy,) = (frozen.run_dir / "code").iterdir()
    (copy / "launcher" / "verbs" / "job.py").write_text("raise SystemExit(77)\n")  # seen by whatever runs the copy
    slurm.run("scontrol", "requeue", number)
    (job,) = slurm.wait(number, "FAILED", timeout=STARTED_S)
    assert job.exit_code == 77 and job.restarts == 1
