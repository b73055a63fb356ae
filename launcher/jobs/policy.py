"""What becomes of a job, or of a run on this machine, by how its ranks ended: a row for each exit class. Restarts that bring a
run forward cost nothing; those in vain are counted, after faults and where Slurm asked to save each by themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.rundir.exits import ExitClass

# `restart`: here, on nodes that pass their checks again; where too few do, the job is queued again without the others.
After = Literal["end", "restart", "requeue"]

POLICY: dict[ExitClass, After] = {
    ExitClass.DONE: "end",
    ExitClass.REFUSED: "end",
    ExitClass.STATE: "end",
    ExitClass.CHECKPOINTED: "requeue",
    ExitClass.RETRYABLE: "restart",
    ExitClass.BAD_NODE: "restart",
    ExitClass.NEEDS_PERSON: "end",
    ExitClass.INTERRUPTED: "end",
}
# Starts in a row without one more checkpoint, each of which Slurm asked to save: a time limit that is too short for one step,
# say. After faults it is `cluster.restarts` that says how many.
MAX_ASKED = 10
# Rows of events.jsonl that are a start: of ranks, or one that came to nothing for want of sound nodes.
STARTS = ("start", "no_start")
# `asked`: a person has called `phidias train`. A checkpoint that was converted is none more.
PROGRESS = ("checkpoint", "stage_done", "created", "submitted", "asked")


@dataclass(frozen=True)
class Verdict:
    """What to do, and why where it is not what the table says."""

    after: After
    reason: str | None = None


def judge(ended: ExitClass, *, events: Sequence[dict[str, Any]], restarts: int) -> Verdict:
    """The table's row, unless as many starts have been in vain as may be. `restarts`: how many may follow the first one that a
    fault ended; with 0 none follows one that went forward either."""
    after = POLICY[ended]
    if after == "restart" and not restarts:
        return Verdict("end", f"ended as {ended.name}, and cluster.restarts is 0")
    fruitless = fruitless_starts(events, ended=ended)
    if after == "end" or fruitless < (MAX_ASKED if after == "requeue" else restarts + 1):
        return Verdict(after)
    return Verdict("end", f"{fruitless} starts in a row have ended without one more checkpoint")


def fruitless_starts(events: Sequence[dict[str, Any]], *, ended: ExitClass = ExitClass.RETRYABLE) -> int:
    """Starts since the last checkpoint or end of a stage, or since a person started the run, that ended as the last one has:
    `ended`, by a fault or because Slurm asked. One of which nothing was said is a fault."""
    wanted = POLICY[ended]
    count, after = 0, wanted
    for event in reversed(events):
        if event["kind"] in PROGRESS:
            break
        if event["kind"] == "job_end":
            after = after_end(event)
        elif event["kind"] in STARTS:
            count += after == wanted
            after = POLICY[ExitClass.RETRYABLE]
    return count


def after_end(event: dict[str, Any]) -> After:
    """By the table, of an end that was recorded."""
    name = str(event.get("exit"))
    return POLICY[ExitClass[name] if name in ExitClass.__members__ else ExitClass.RETRYABLE]
