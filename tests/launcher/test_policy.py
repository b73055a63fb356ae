"""What becomes of a job: the table, and its budget."""

import pytest

from launcher.jobs.policy import MAX_FRUITLESS, POLICY, fruitless_starts, judge
from launcher.rundir.exits import ExitClass

START, CHECKPOINT = {"kind": "start"}, {"kind": "checkpoint"}


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
    assert judge(ended, events=[START]).after == after


def test_starts_in_vain_are_counted_since_the_last_checkpoint():
    assert fruitless_starts([]) == 0
    assert fruitless_starts([START, START]) == 2
    assert fruitless_starts([START, CHECKPOINT, {"kind": "stop"}, START]) == 1
    assert fruitless_starts([START, {"kind": "stage_done"}, START, START]) == 2
    assert fruitless_starts([CHECKPOINT, START, {"kind": "no_start"}]) == 2  # for want of sound nodes
    assert fruitless_starts([START, START, {"kind": "submitted"}, START]) == 1  # a person has looked


def test_a_person_has_to_look_after_starts_in_vain():
    events = [CHECKPOINT, *[START] * MAX_FRUITLESS]
    verdict = judge(ExitClass.RETRYABLE, events=events)
    assert verdict.after == "end" and f"{MAX_FRUITLESS} starts" in str(verdict.reason)
    assert judge(ExitClass.RETRYABLE, events=events[:-1]).after == "restart"
    # What was asked to save has saved: progress, however short.
    assert judge(ExitClass.CHECKPOINTED, events=events).after == "requeue"
