"""What breaks while a job trains, on a real cluster with real ranks: the run goes on by itself, bitwise as if nothing had
happened, or ends and says why."""

import pytest

from launcher.rundir.paths import RunDir
from tests.chaos.nodes import node_storm
from tests.slurm.training import (
    STARTED_S,
    losses,
    phidias,
    status,
    submit,
    until,
    until_step,
    workspace_of_slurm,
)

SEED = 7
# 120 steps, a checkpoint every 16, there before the next step: what is gone on from is not a matter of chance.
TOKENS = ("stage.tokens=61440", "stage.checkpoint.asynchronous=false")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    made = workspace_of_slurm(tmp_path_factory.mktemp("faults"))
    made.config("data")
    return made


@pytest.fixture(scope="module")
def undisturbed(workspace):
    """The losses of the same two ranks on this machine, by torchrun."""
    whole = workspace.named("whole")
    whole.config("train", "stage=small", "cluster=local", *TOKENS)
    return losses(whole)


def test_a_run_gets_over_two_nodes_that_go_down(slurm_installed, tmp_path):
    """One after the other, wherever the job's own script runs; the other faults of the chaos harness need no Slurm."""
    outcomes, wrong = node_storm(tmp_path, count=2, seed=SEED)
    assert len(outcomes) == 2 and all(outcome.survived for outcome in outcomes), outcomes
    assert wrong == []


def send(slurm, run, signal):
    """To one rank; not to srun, nor to what ranks have forked."""
    slurm.run("pkill", f"--signal={signal}", "--oldest", "--full", f"^[^ ]*python[^ ]* -m training {run.run_dir} ")


def test_a_rank_that_is_killed_is_started_again_in_the_same_job(slow, slurm, workspace, undisturbed):
    killed = workspace.named("killed")
    number = submit(slurm, killed, *TOKENS)
    until_step(killed, 20)
    send(slurm, killed, "KILL")
    (job,) = slurm.wait(number, "COMPLETED", timeout=STARTED_S)
    assert job.restarts == 0 and [row["after"] for row in killed.events("job_end")] == ["restart", "end"]
    assert killed.events("resume") and losses(killed) == undisturbed
    assert status(slurm, killed)["last_fault"] is None


def test_a_rank_that_stands_still_is_found_and_started_again(slow, slurm, workspace, undisturbed):
    """SIGSTOP: nothing fails, all others wait. They leave their stacks, it leaves none."""
    still = workspace.named("still")
    number = submit(slurm, still, *TOKENS, "monitor.hang.least_s=3", "monitor.hang.factor=1.1")
    until_step(still, 20)
    send(slurm, still, "STOP")
    (job,) = slurm.wait(number, "COMPLETED", timeout=STARTED_S)
    (hang,) = still.events("hang")
    assert [len(ranks) for ranks in hang["silent"].values()] == [1] and hang["phase"] == "step"
    assert losses(still) == undisturbed
    # The node is left behind: with no other to go to, the job was queued again without it.
    assert job.restarts == 1 and hang["node"] in job.fields["ExcNodeList"]


def test_a_fatal_fault_ends_the_job(slow, slurm, workspace):
    diverged = workspace.named("diverged")
    (job,) = slurm.wait(submit(slurm, diverged, "optim.lr=1e30", "optim.min_lr=1e30"), "FAILED", timeout=STARTED_S)
    assert job.exit_code == 13 and len(diverged.events("start")) == 1
    assert "NonFiniteError" in status(slurm, diverged)["last_fault"]


def test_preemption_saves_and_comes_back(slow, slurm, workspace, undisturbed):
    """Slurm tells the ranks by SIGTERM and the batch script by its own signal; the nodes are another's meanwhile."""
    low = workspace.named("low")
    number = submit(slurm, low, *TOKENS, nodes=2, options=["--exclusive", "--nodelist=" + ",".join(slurm.nodes[:2])])
    until_step(low, 20)
    wanted = ["--partition=high", "--exclusive", "--nodes=2", "--nodelist=" + ",".join(slurm.nodes[:2])]
    high = slurm.submit(["sbatch", *wanted, "--wrap=sleep 2"])
    slurm.wait(high, "COMPLETED", timeout=60)
    (job,) = slurm.wait(number, "COMPLETED", timeout=STARTED_S)
    assert job.restarts == 1 and low.events("stop")  # it saved
    assert losses(low) == undisturbed


def test_a_node_that_dies_is_left_behind(slow, slurm, workspace, undisturbed):
    moved = workspace.named("moved")
    number = submit(slurm, moved, *TOKENS)
    until_step(moved, 20)
    first = moved.events("start")[0]["nodes"]
    slurm.kill_node(first[1])
    (job,) = slurm.wait(number, "COMPLETED", timeout=STARTED_S)
    assert job.restarts == 1 and first[1] not in moved.events("start")[-1]["nodes"]
    assert losses(moved) == undisturbed


def test_a_spare_node_stands_in(slow, slurm, workspace, undisturbed):
    """The job outlives the node: no queue, no other allocation."""
    spared = workspace.named("spared")
    number = submit(slurm, spared, *TOKENS, "cluster.spare_nodes=1", nodes=3, options=["--no-kill"])
    until_step(spared, 20)
    (start,) = spared.events("start")
    assert len(start["nodes"]) == 2
    slurm.kill_node(start["nodes"][1])
    (job,) = slurm.wait(number, "COMPLETED", timeout=STARTED_S)
    assert job.restarts == 0 and losses(spared) == undisturbed
    last = spared.events("start")[-1]["nodes"]
    assert last[0] == start["nodes"][0] and start["nodes"][1] not in last
    assert [row["node"] for row in spared.events("lost_node")] == [start["nodes"][1]]


def test_a_node_that_fails_its_checks_is_excluded(slow, slurm, workspace):
    """On the same job id: what waits for it goes on waiting."""
    sick, mark = workspace.named("sick"), workspace.root / "sick"
    mark.write_text(slurm.nodes[0])
    setup = f"cluster.setup=['test $SLURMD_NODENAME != $(cat {mark})']"
    number = submit(slurm, sick, setup, options=["--nodelist=" + slurm.nodes[0], "--dependency=singleton"])
    until(lambda: sick.events("bad_node"), what="the node's fault")
    slurm.run("scontrol", "update", f"JobId={number}", "ReqNodeList=")
    (job,) = slurm.wait(number, "COMPLETED", timeout=STARTED_S)
    assert job.restarts == 1 and slurm.nodes[0] in job.fields["ExcNodeList"]
    (row,) = sick.events("bad_node")
    assert row["node"] == slurm.nodes[0] and [row["exit"] for row in sick.events("job_end")] == ["BAD_NODE", "DONE"]


def test_a_job_that_someone_cancels_stays_cancelled(slow, slurm, workspace):
    """Its ranks save on SIGTERM; it must not put itself back into the queue."""
    cancelled = workspace.named("cancelled")
    number = submit(slurm, cancelled, *TOKENS)
    until_step(cancelled, 2)
    slurm.run("scancel", number)
    (job,) = slurm.wait(number, "CANCELLED", timeout=60)
    assert job.restarts == 0 and not slurm.run("squeue", "--noheader").strip()


def test_stopping_a_run_that_waits_to_start_again(slow, slurm, workspace):
    """The stop flag of a person outlives a requeue; one that Slurm's signal raised does not."""
    waiting = workspace.named("waiting")
    number = submit(slurm, waiting, *TOKENS)
    until_step(waiting, 2)
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    until(lambda: [row["after"] for row in waiting.events("job_end")] == ["requeue"], what="the requeue")
    RunDir(waiting.run_dir).stop_flag.write_text("")
    (job,) = slurm.wait(number, "FAILED", timeout=STARTED_S)
    assert job.exit_code == 130 and len(waiting.events("start")) == 1
    assert "nothing of it is running" in phidias(slurm, waiting, "stop", "waiting", f"runs_dir={waiting.root / 'runs'}")
