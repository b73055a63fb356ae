"""The cluster of these tests: what it can do, and that nothing is left of it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_prep.test_build import REPOSITORY
from tests.slurm.conftest import require
from tests.slurm.daemons import can_unshare
from tests.slurm.lab import SlurmLab, parse_job

MODES = [False, *[True] * can_unshare()]
PREEMPTED = """#!/usr/bin/env bash
#SBATCH --signal=B:USR1@60
trap 'scontrol requeue "$SLURM_JOB_ID"; exit' USR1
echo started
sleep 60 & wait
"""


def test_nodes_are_machines_with_gpus(slurm):
    said = slurm.run(
        "srun", "--nodes=2", "--gres=gpu:2", "bash", "-c", 'echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $(hostname)"'
    )
    rows = sorted(line.split() for line in said.splitlines())
    assert [row[:2] for row in rows] == [[node, "0,1"] for node in slurm.nodes[:2]] and len(slurm.nodes) == 4
    assert not slurm.namespaces or [row[2] for row in rows] == ["n1", "n2"]


def test_a_wait_that_fails_says_what_the_job_wrote(slurm):
    job = slurm.submit(["sbatch", "--wrap=echo the reason; exit 3"])
    with pytest.raises(AssertionError, match=r"is not COMPLETED\n\d+ FAILED 3:0\nthe reason"):
        slurm.wait(job, "COMPLETED")


def test_high_takes_the_nodes_of_low(slurm):
    """The batch script is told at once, and puts itself back into the queue."""
    script, everything = slurm.folder / "low.sh", ["--nodes=4", "--exclusive", "--time=10"]
    script.write_text(PREEMPTED)
    low = slurm.submit(["sbatch", *everything, str(script)])
    slurm.wait(low, "RUNNING")
    high = slurm.submit(["sbatch", *everything, "--partition=high", "--wrap=true"])
    slurm.wait(high, "COMPLETED", timeout=20)
    (job,) = slurm.jobs(low)
    assert job.restarts == 1 and job.output.read_text().startswith("started\n")


def test_a_reset_ends_jobs_and_brings_nodes_back(slurm):
    job = slurm.submit(["sbatch", "--array=0-1", "--wrap=trap '' TERM; sleep 100"])
    slurm.wait(job, "RUNNING")
    slurm.kill_node(slurm.nodes[3])
    assert "down" in slurm.run("sinfo", "--noheader", "--format=%t")
    slurm.reset()
    assert {element.state for element in slurm.jobs(job)} <= {"CANCELLED", "FAILED"}
    assert set(slurm.run("sinfo", "--noheader", "--format=%t").split()) == {"idle"}


@pytest.mark.parametrize("namespaces", MODES)
def test_nothing_is_left_of_a_test_that_was_interrupted(slurm, namespaces):
    with pytest.raises(KeyboardInterrupt), SlurmLab(nodes=2, namespaces=namespaces) as lab:
        lab.wait(lab.submit(["sbatch", "--wrap=trap '' TERM; sleep 100"]), "RUNNING")
        lab.until(lambda: len(list(lab.processes())) >= 6, what="the processes of the job")
        raise KeyboardInterrupt
    assert not list(lab.processes()) and not lab.folder.exists()
    assert list(slurm.processes())  # the other cluster is untouched


@pytest.mark.parametrize("namespaces", MODES)
def test_no_daemon_outlives_tests_that_were_killed(slurm, namespaces):
    code = f"""
import os, signal
from tests.slurm.lab import SlurmLab
with SlurmLab(nodes=1, namespaces={namespaces}) as lab:
    print(lab.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    dead = SlurmLab()
    dead.folder = Path(died.stdout.strip())
    try:
        dead.until(lambda: not list(dead.processes()), what="the end of all daemons")
    finally:
        dead.close()


def test_where_slurm_is_missing_only_ci_fails(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    require([])
    with pytest.raises(pytest.skip.Exception, match="no slurmctld, munged on this machine: apt-get install"):
        require(["slurmctld", "munged"])
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no munged"):
        require(["munged"])


def test_values_with_spaces_are_read():
    job = parse_job("JobId=9 ArrayJobId=7 ArrayTaskId=1 JobState=FAILED ExitCode=2:0 Command=/a b/c.sh run.x=1 -f WorkDir=/a b")
    assert (job.id, job.exit_code, job.fields["Command"], job.fields["WorkDir"]) == ("7_1", 2, "/a b/c.sh run.x=1 -f", "/a b")
