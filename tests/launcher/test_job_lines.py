"""Lines for sbatch and srun, and what an allocation is: values in, values out."""

import os
from dataclasses import replace

import pytest

from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.jobs.allocation import Allocation, fitted_to, port, srun_command
from launcher.jobs.graph import TRAIN_SCRIPT, job_comment, stage_line
from launcher.jobs.queue import known_jobs, queued
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record
from launcher.verbs.status import jobs_of

PHI4 = compose_run(["run=phi4", "cluster.partition=gpu", "cluster.account=us"])
GIVEN = Allocation(job="4711", num_nodes=240, tasks_per_node=8, nodes=("n1", "n2"), restarts=0)


def test_a_stage_as_a_job(tmp_path):
    config = replace(PHI4, run=replace(PHI4.run, runs_dir=str(tmp_path / "my runs")))
    line = stage_line(config, stage="midtrain", after="17")
    assert line[:2] == ["sbatch", "--parsable"] and line[-1].endswith("slurm/pretrain.sh")
    for option in (
        "--job-name=phi4.midtrain", "--nodes=240", "--ntasks-per-node=8", "--gpus-per-node=8", "--exclusive",
        "--partition=gpu", "--account=us", "--time=1-00:00:00", "--dependency=afterok:17", "--kill-on-invalid-dep=yes",
        f"--comment={tmp_path / 'my runs' / 'phi4'}:midtrain",
    ):  # fmt: skip
        assert option in line, option
    assert not any("dependency" in word for word in stage_line(config, stage="pretrain", after=None))
    header = TRAIN_SCRIPT.read_text().splitlines()
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(header)


def test_cpu_ranks_ask_for_no_gpus():
    config = replace(PHI4, cluster=replace(PHI4.cluster, gpu=None))
    assert not any("gpus" in word for word in stage_line(config, stage="pretrain", after=None))


def test_srun_starts_a_task_a_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    line = srun_command(RunDir(tmp_path), cluster=PHI4.cluster, stage="pretrain")
    for word in ("--nodes=240", "--ntasks-per-node=8", "--kill-on-bad-exit=1", "--cpus-per-task=12", "--stage=pretrain"):
        assert word in line, word


def test_what_slurm_gave_counts():
    smaller = fitted_to(PHI4, replace(GIVEN, num_nodes=120), overrides=("run=phi4",))
    assert smaller.cluster.world_size == 960


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"num_nodes": 120}, ("cluster.num_nodes=240",), "sbatch --nodes=240"),
        ({"tasks_per_node": 1}, (), "sbatch --ntasks-per-node=8"),
    ],
)
def test_what_does_not_fit_the_job_is_refused(changes, overrides, said):
    with pytest.raises(ConfigError, match=said):
        fitted_to(PHI4, replace(GIVEN, **changes), overrides=overrides)


def test_a_local_cluster_has_no_jobs():
    with pytest.raises(ConfigError, match=r"cluster\.kind"):
        fitted_to(compose_run(["run=demo"]), replace(GIVEN, tasks_per_node=2), overrides=())


def test_ports_of_jobs_side_by_side_differ():
    assert port(PHI4.cluster, job="1") != port(PHI4.cluster, job="2")
    assert port(replace(PHI4.cluster, master_port=29500), job="1") == 29500


def test_a_job_carries_its_run_and_stages(tmp_path):
    assert job_comment(RunDir(tmp_path), stages=("pretrain", "midtrain")) == f"{tmp_path}:pretrain,midtrain"


SQUEUE = """#!/bin/sh
echo "$@" >&2
{0}
"""


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A squeue that says what it is told, and a run with two jobs."""
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    for job in ("7", "8", "7"):
        append_record(run.events, "start", job=job)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def says(script):
        (tmp_path / "squeue").write_text(SQUEUE.format(script))
        (tmp_path / "squeue").chmod(0o755)
        return run

    return says


def test_jobs_in_the_queue(squeue):
    run = squeue('echo "8 PENDING"')
    assert known_jobs(run) == ["7", "8"]
    assert queued(run) == {"8": "PENDING"}
    assert queued(squeue('echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')) == {}


def test_a_queue_that_does_not_answer_is_not_empty(squeue, monkeypatch, tmp_path):
    """Else a second submit would queue a live run again."""
    run = squeue('echo "Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(ConfigError, match="Unable to contact slurm controller"):
        queued(run)
    assert jobs_of(run) == []
    (tmp_path / "squeue").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queued(run) == {}
