"""What becomes of a job, or of a run on this machine, by how its ranks ended: a row for each exit class. Restarts that bring a
run forward cost nothing; those in vain are counted."""

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
PROGRESS = ("checkpoint", "stage_done", "created", "submitted")


@dataclass(frozen=True)
class Verdict:
    """What to do, and why where it is not what the table says."""

    after: After
    reason: str | None = None


def judge(ended: ExitClass, *, events: Sequence[dict[str, Any]], restarts: int) -> Verdict:
    """The table's row, unless the last starts have all been in vain. `restarts`: how many may follow the first of them."""
    after = POLICY[ended]
    fruitless = fruitless_starts(events)
    most = MAX_ASKED if ended is ExitClass.CHECKPOINTED else restarts + 1
    if after == "end" or fruitless < most:
        return Verdict(after)
    many = f"{fruitless} starts in a row have ended without one more checkpoint"
    return Verdict("end", many if fruitless > 1 else f"ended as {ended.name}, and cluster.restarts is {restarts}")


def fruitless_starts(events: Sequence[dict[str, Any]]) -> int:
    """Starts since the last checkpoint or end of a stage, or since a person put the run into the queue."""
    count = 0
    for event in reversed(events):
        if event["kind"] in PROGRESS:
            break
        count += event["kind"] in STARTS
    return count
