"""What a job decides, at its start and at each end of its ranks. Slurm, the nodes and the ranks are told what to say here; on a
real cluster with real ranks the same is in tests/slurm/test_faults.py."""

import signal
from dataclasses import replace

import pytest

from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError, Problem
from launcher.jobs import work as module
from launcher.jobs.allocation import Allocation
from launcher.jobs.node_rules import NodeFault
from launcher.jobs.nodes import Health
from launcher.jobs.steps import place_of
from launcher.jobs.work import Job, work
from launcher.rundir.exits import ExitClass
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records
from launcher.rundir.stop import ANY_LAYOUT, BY_SIGNAL

NODES = tuple(f"n{number}" for number in range(1, 9))
RUNNING = "JobId=7 JobState=RUNNING RunTime=00:01:00 TimeLimit=01:00:00 Partition=gpu NumNodes=8 ExcNodeList=(null)\n"


class World:
    """What lies outside the job: `ends` are how its ranks end, one a start, `faults` what checks find, one list a check."""

    def __init__(self, monkeypatch, root, *, spare=0, restarts=0):
        self.run, self.commands, self.ends, self.faults, self.trained, self.asked = RunDir(root), [], [], [], [], []
        root.mkdir()
        self.silent, self.partition = (), [f"n{number}" for number in range(1, 20)]
        self.said, self.states, self.problem, self.may_pass, self.now = RUNNING, {}, None, False, 0.0
        config = compose_run(["run=phi4", f"cluster.num_nodes={8 - spare}", f"cluster.spare_nodes={spare}", "stage=pretrain",
                              "stage.global_batch_size=3360"])  # fmt: skip
        given = Allocation(job="7", number=7, element=None, tasks_per_node=8, nodes=NODES, restarts=restarts)
        place = place_of(self.run, config, code=root / "code" / "x", environment={})
        self.job = Job(self.run, config, given, place, self.asked)
        for name in ("check_nodes", "train_stages", "slurm_says"):
            monkeypatch.setattr(module, name, getattr(self, name))
        monkeypatch.setattr("launcher.jobs.slurm.slurm_says", self.slurm_says)
        monkeypatch.setattr("launcher.jobs.slurm.time", self)
        monkeypatch.setattr("launcher.jobs.stages.RESTART_WAIT_S", 0.0)
        monkeypatch.setattr(module, "signals_ignored", lambda: None)  # in this process they are the tests'

    def monotonic(self):
        self.now += 1.0
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def check_nodes(self, run, cluster, *, nodes, step, environment, inspect):
        found = self.faults.pop(0) if self.faults else ()
        healthy = tuple(node for node in nodes if node not in {fault.node for fault in found})
        answered = {node: {} for node in nodes if node not in self.silent}
        return Health(healthy, tuple(found), self.problem, {"nodes": answered}, may_pass=self.may_pass)

    def train_stages(self, run, config, *, ranks, asked, **about):
        append_record(run.events, "start", **about)
        self.trained.append(about["nodes"])
        end = self.ends.pop(0)
        return end() if callable(end) else end

    def slurm_says(self, *command):
        self.commands.append(command)
        if command[0] == "sinfo" and "--format=%N" in command:
            return "\n".join(self.partition)
        if command[0] == "sinfo":
            return "".join(f"{node} {self.states.get(node, 'mixed')}\n" for node in NODES)
        return self.said if "show" in command else ""

    @property
    def updates(self):
        return [command[1:] for command in self.commands if command[1] in ("requeue", "update")]

    def events(self, kind):
        return [row for row in read_records(self.run.events) if row["kind"] == kind]


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(monkeypatch, tmp_path / "run")


def test_a_stage_that_ends_well_ends_the_job(world):
    world.ends = [ExitClass.DONE]
    assert work(world.job) is ExitClass.DONE and world.trained == [list(NODES)] and not world.updates


def test_a_fault_that_may_pass_is_tried_again_here(world):
    world.ends = [ExitClass.RETRYABLE, ExitClass.DONE]
    assert work(world.job) is ExitClass.DONE and len(world.trained) == 2 and not world.updates
    assert [row["after"] for row in world.events("job_end")] == ["restart", "end"]


def test_starts_in_vain_end_for_a_person(world):
    world.ends = [ExitClass.RETRYABLE] * 9
    assert work(world.job) is ExitClass.RETRYABLE and len(world.trained) == 3
    assert "3 starts in a row" in world.events("job_end")[-1]["reason"]


def test_the_config_says_how_many_starts_may_be_in_vain(world):
    cluster = replace(world.job.config.cluster, restarts=4)
    world.ends = [ExitClass.RETRYABLE] * 9
    job = replace(world.job, config=replace(world.job.config, cluster=cluster))
    assert work(job) is ExitClass.RETRYABLE and len(world.trained) == 5


def test_a_bad_node_is_excluded_on_the_same_job(world):
    world.faults = [[NodeFault("n3", "7 GPUs")]]
    assert work(world.job) is ExitClass.BAD_NODE and not world.trained
    assert world.updates == [("requeue", "7"), ("update", "JobId=7", "ExcNodeList=n3")]
    assert [(row["node"], row["reason"], row["job"]) for row in world.events("bad_node")] == [("n3", "7 GPUs", "7")]


def test_what_the_user_excluded_stays_excluded(world):
    world.faults, world.said = [[NodeFault("n3", "7 GPUs")]], RUNNING.replace("(null)", "n[20-21]")
    work(world.job)
    assert world.updates[-1] == ("update", "JobId=7", "ExcNodeList=n[20-21],n3")


def test_spare_nodes_stand_in(tmp_path, monkeypatch):
    world = World(monkeypatch, tmp_path / "run", spare=1)
    world.faults, world.ends = [[NodeFault("n3", "7 GPUs")]], [ExitClass.DONE]
    assert work(world.job) is ExitClass.DONE and not world.updates
    assert world.trained == [[node for node in NODES if node != "n3"]]


def test_a_node_that_a_rank_calls_bad_is_left_out(tmp_path, monkeypatch):
    world = World(monkeypatch, tmp_path / "run", spare=1)

    def ended():
        append_record(world.run.events, "fault", exit="BAD_NODE", node="n2", rank=9, error="an ECC error")
        return ExitClass.BAD_NODE

    world.ends = [ended, ExitClass.DONE]
    assert work(world.job) is ExitClass.DONE and "n2" in world.trained[0] and "n2" not in world.trained[1]


def test_a_node_that_all_ranks_name_is_left_out_once(tmp_path, monkeypatch):
    """A straggler, or weights that differ: every rank knows whose they are, and ends for it."""
    world = World(monkeypatch, tmp_path / "run", spare=1)

    def ended():
        for rank in range(56):
            append_record(world.run.events, "fault", exit="BAD_NODE", node="n5", rank=rank, error="its weights differ")
        append_record(world.run.events, "fault", exit="RETRYABLE", node="n1", rank=3, error="connection closed by peer")
        return ExitClass.BAD_NODE

    world.ends = [ended, ExitClass.DONE]
    assert work(world.job) is ExitClass.DONE and "n5" not in world.trained[1] and "n1" in world.trained[1]
    assert [(row["node"], row["reason"]) for row in world.events("bad_node")] == [("n5", "its weights differ")]


def test_a_name_that_is_no_node_of_the_job_is_not_excluded(world):
    """Slurm would refuse the whole exclusion for it."""

    def ended():
        append_record(world.run.events, "fault", exit="BAD_NODE", node="n5.cluster.local", rank=9, error="an ECC error")
        return ExitClass.BAD_NODE

    world.ends = [ended, ExitClass.DONE]
    assert work(world.job) is ExitClass.DONE and len(world.trained) == 2 and not world.events("bad_node")


def test_nodes_that_slurm_has_lost_are_not_asked(tmp_path, monkeypatch):
    world = World(monkeypatch, tmp_path / "run", spare=1)
    world.states, world.ends = {"n1": "down*"}, [ExitClass.DONE]
    assert work(world.job) is ExitClass.DONE and world.trained == [list(NODES[1:])]
    assert world.events("lost_node")[0]["reason"] == "Slurm says down*" and not world.events("bad_node")


def test_nodes_that_slurm_takes_away_are_nobodys_fault(world):
    """However many: the job goes back into the queue, and Slurm itself gives it others. They may come back repaired."""
    world.states = dict.fromkeys(NODES[:3], "draining")
    assert work(world.job) is ExitClass.BAD_NODE and world.updates == [("requeue", "7")]


def test_silent_nodes_do_not_speak_for_all(world):
    world.silent = NODES[:3]
    world.faults = [[NodeFault(node, "did not answer") for node in world.silent]]
    assert work(world.job) is ExitClass.BAD_NODE and world.updates[-1][-1] == "ExcNodeList=n1,n2,n3"


def test_where_all_nodes_are_known_to_be_bad(tmp_path, monkeypatch):
    """Slurm gave them again: its update had been cut short."""
    world = World(monkeypatch, tmp_path / "run", restarts=1)
    for node in NODES:
        append_record(world.run.events, "bad_node", node=node, reason="7 GPUs", job="7")
    assert work(world.job) is ExitClass.BAD_NODE and not world.trained and world.updates


def test_a_job_is_not_left_waiting_for_nodes_that_do_not_exist(world):
    """Slurm would take the exclusion, and keep the job for ever."""
    world.faults, world.partition = [[NodeFault("n3", "7 GPUs")]], list(NODES)
    assert work(world.job) is ExitClass.BAD_NODE and not world.updates
    assert "without n3 partition gpu has 7 nodes, and the job wants 8" in world.events("job_end")[-1]["reason"]


def test_a_measurement_that_fails_is_tried_again(world):
    world.problem, world.may_pass = "the nodes were not measured: did not end in 210 s", True
    assert work(world.job) is ExitClass.RETRYABLE and len(world.events("no_start")) == 3


def test_starts_that_slurm_ends_without_progress_are_counted(world):
    """A time limit that is too short for a step would go on for ever."""
    for _ in range(9):
        append_record(world.run.events, "start")
        append_record(world.run.events, "job_end", exit="CHECKPOINTED", after="requeue")
    world.ends = [ExitClass.INTERRUPTED]
    assert work(world.job) is ExitClass.CHECKPOINTED and not world.updates
    assert "10 starts in a row" in world.events("job_end")[-1]["reason"]


def test_preemptions_leave_the_budget_of_faults_as_it_is(world):
    for _ in range(5):
        append_record(world.run.events, "start")
        append_record(world.run.events, "job_end", exit="CHECKPOINTED", after="requeue")
    world.ends = [ExitClass.RETRYABLE, ExitClass.RETRYABLE, ExitClass.DONE]
    assert work(world.job) is ExitClass.DONE and len(world.trained) == 3


def test_many_bad_nodes_at_once_are_nobodys(world):
    """Excluding half a cluster for a wrong threshold would leave a job that never starts."""
    world.faults = [[NodeFault(node, "driver 535") for node in NODES[:4]]]
    assert work(world.job) is ExitClass.NEEDS_PERSON and not world.events("bad_node") and not world.updates
    assert "4 of 8 nodes fail their checks, n1: driver 535" in world.events("no_start")[0]["reason"]


def test_what_no_node_is_to_blame_for_waits_for_a_person(world):
    world.problem = "the disk is nearly full"
    assert work(world.job) is ExitClass.NEEDS_PERSON and world.events("no_start")[0]["reason"] == world.problem


def test_where_nobody_answers_it_is_tried_again(world, monkeypatch):
    monkeypatch.setattr(module, "check_nodes", lambda *_, **__: Health((), (), "no node answered", {}, may_pass=True))
    assert work(world.job) is ExitClass.RETRYABLE and len(world.events("no_start")) == 3


def test_slurm_asks_and_the_job_queues_itself_again(world):
    def ended():
        world.asked.append(signal.SIGUSR1)
        world.run.stop_flag.write_text(BY_SIGNAL)
        return ExitClass.INTERRUPTED

    world.ends = [ended]
    assert work(world.job) is ExitClass.CHECKPOINTED and world.updates == [("requeue", "7")]


def test_ranks_that_slurm_asked_by_themselves(world):
    """Preemption without a signal for the batch script: only the ranks get SIGTERM."""
    world.ends = [ExitClass.INTERRUPTED]
    assert work(world.job) is ExitClass.CHECKPOINTED and world.updates == [("requeue", "7")]


@pytest.mark.parametrize("flag", ["", ANY_LAYOUT])
def test_a_person_stops_the_run(world, flag):
    def ended():
        world.run.stop_flag.write_text(flag)
        return ExitClass.INTERRUPTED

    world.ends = [ended]
    assert work(world.job) is ExitClass.INTERRUPTED and not world.updates


@pytest.mark.parametrize(
    ("said", "requeued"),
    [
        ("JobId=7 JobState=COMPLETING RunTime=00:01:00 TimeLimit=01:00:00", False),  # cancelled: a person meant it
        ("JobId=7 JobState=COMPLETING RunTime=01:00:30 TimeLimit=01:00:00", True),  # out of time: nobody did
        (RUNNING, True),
    ],
)
def test_a_cancelled_job_does_not_come_back(world, said, requeued):
    world.said, world.ends = said, [ExitClass.INTERRUPTED]
    assert work(world.job) is ExitClass.CHECKPOINTED and bool(world.updates) == requeued


def test_a_signal_before_the_ranks_start(world):
    world.asked.append(signal.SIGTERM)
    assert work(world.job) is ExitClass.CHECKPOINTED and not world.trained and world.updates == [("requeue", "7")]


@pytest.mark.parametrize("restarts", [0, 1])
@pytest.mark.parametrize(("flag", "trains"), [("", False), (ANY_LAYOUT, False), (BY_SIGNAL, True), (None, True)])
def test_a_flag_that_was_raised_while_the_job_waited(tmp_path, monkeypatch, restarts, flag, trains):
    """A person's counts: whoever queues a run lowers the flag first. One of an earlier start's launcher does not."""
    world = World(monkeypatch, tmp_path / "run", restarts=restarts)
    if flag is not None:
        world.run.stop_flag.write_text(flag)
    world.ends = [ExitClass.DONE]
    assert work(world.job) is (ExitClass.DONE if trains else ExitClass.INTERRUPTED)
    assert bool(world.trained) == trains and not world.run.stop_flag.exists()


def test_a_controller_that_is_away_is_asked_again(world, monkeypatch):
    tries, says = [], world.slurm_says

    def away(*command):
        tries.append(command)
        if command[0] == "scontrol" and len(tries) < 4:
            raise ConfigError(Problem("cluster", "Unable to contact slurm controller", "Slurm must answer", "wait"))
        return says(*command)

    monkeypatch.setattr("launcher.jobs.slurm.slurm_says", away)
    world.ends = [ExitClass.INTERRUPTED]
    assert work(world.job) is ExitClass.CHECKPOINTED and world.updates == [("requeue", "7")]


def test_a_refusal_is_not_asked_again(world, monkeypatch):
    """Of a job that was submitted with --no-requeue, say: its nodes wait for nothing."""
    says = world.slurm_says

    def refuses(*command):
        if command[1] == "requeue":
            raise ConfigError(Problem("cluster", "Requested operation is presently disabled", "Slurm must answer", "see"))
        return says(*command)

    monkeypatch.setattr("launcher.jobs.slurm.slurm_says", refuses)
    world.ends = [ExitClass.INTERRUPTED]
    assert work(world.job) is ExitClass.CHECKPOINTED and world.now < 60
    assert "presently disabled" in world.events("job_end")[-1]["reason"]
