"""What becomes of a job: the table, and its budget."""

import pytest

from launcher.jobs.policy import MAX_ASKED, POLICY, fruitless_starts, judge
from launcher.rundir.exits import ExitClass

START, CHECKPOINT = {"kind": "start"}, {"kind": "checkpoint"}
ASKED = [START, {"kind": "job_end", "exit": "CHECKPOINTED", "after": "requeue"}]  # by Slurm, before a checkpoint
BROKEN = [START, {"kind": "job_end", "exit": "RETRYABLE", "after": "restart"}]


def test_every_exit_class_has_a_row():
    assert set(POLICY) == set(ExitClass)


@pytest.mark.parametrize(
    ("ended", "after"),
    [
        (ExitClass.DONE, "end"),
        (ExitClass.CHECKPOINTED, "requeue"),
        (ExitClass.RETRYABLE, "restart"),
        (ExitClass.BAD_NODE, "restart"),
        (ExitClass.NEEDS_PERSON, "end"),
        (ExitClass.INTERRUPTED, "end"),
        (ExitClass.REFUSED, "end"),
    ],
)
def test_the_table(ended, after):
    assert judge(ended, events=[START], restarts=1).after == after


def test_starts_in_vain_are_counted_since_the_last_checkpoint():
    assert fruitless_starts([]) == 0
    assert fruitless_starts([START, START]) == 2
    assert fruitless_starts([START, CHECKPOINT, {"kind": "stop"}, START]) == 1
    assert fruitless_starts([START, {"kind": "stage_done"}, START, START]) == 2
    assert fruitless_starts([CHECKPOINT, START, {"kind": "no_start"}]) == 2  # for want of sound nodes
    assert fruitless_starts([START, START, {"kind": "submitted"}, START]) == 1  # a person has looked
    assert fruitless_starts([START, START, {"kind": "asked", "by": "train"}, START]) == 1
    assert fruitless_starts([START, {"kind": "converted"}, START]) == 2


@pytest.mark.parametrize("restarts", [1, 2, 5])
def test_a_person_has_to_look_after_starts_in_vain(restarts):
    events = [CHECKPOINT, *[START] * (restarts + 1)]
    verdict = judge(ExitClass.RETRYABLE, events=events, restarts=restarts)
    assert verdict.after == "end" and f"{restarts + 1} starts" in str(verdict.reason)
    assert judge(ExitClass.RETRYABLE, events=events[:-1], restarts=restarts).after == "restart"
    assert judge(ExitClass.RETRYABLE, events=[*events, CHECKPOINT, START], restarts=restarts).after == "restart"


@pytest.mark.parametrize("events", [[CHECKPOINT, START], [START, CHECKPOINT]])
def test_without_restarts_the_first_fault_ends_it(events):
    """One that went forward too."""
    verdict = judge(ExitClass.BAD_NODE, events=events, restarts=0)
    assert verdict.after == "end" and "cluster.restarts is 0" in str(verdict.reason)


def test_what_slurm_ended_is_no_fault():
    """Nor are faults what Slurm has asked for."""
    assert judge(ExitClass.RETRYABLE, events=[*ASKED * 5, *BROKEN, *ASKED * 5, START], restarts=2).after == "restart"
    assert judge(ExitClass.RETRYABLE, events=[*ASKED * 5, *BROKEN * 2, *ASKED * 5, START], restarts=2).after == "end"
    assert judge(ExitClass.CHECKPOINTED, events=[*BROKEN * 20, START], restarts=2).after == "requeue"
    assert fruitless_starts([*ASKED, *BROKEN, *BROKEN]) == 2  # where the end is recorded already
    assert fruitless_starts([START, *ASKED, START]) == 2  # the first left no word: killed


def test_what_was_asked_to_save_has_saved():
    """Progress, however short: `restarts` are those after faults."""
    asked = [CHECKPOINT, *ASKED * (MAX_ASKED - 2), START]
    assert judge(ExitClass.CHECKPOINTED, events=asked, restarts=0).after == "requeue"
    assert judge(ExitClass.CHECKPOINTED, events=[*ASKED, *asked[1:]], restarts=0).after == "end"
