"""What becomes of a job by how it ended: a row for each exit class. Restarts that bring a run forward cost nothing; those in
vain are counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.rundir.exits import ExitClass

After = Literal["end", "requeue"]

POLICY: dict[ExitClass, After] = {
    ExitClass.DONE: "end",
    ExitClass.REFUSED: "end",
    ExitClass.STATE: "end",
    ExitClass.CHECKPOINTED: "requeue",
    ExitClass.RETRYABLE: "requeue",
    ExitClass.BAD_NODE: "requeue",
    ExitClass.NEEDS_PERSON: "end",
    ExitClass.INTERRUPTED: "end",
}
# Starts in a row without one more checkpoint before a person has to look.
MAX_FRUITLESS = 3


@dataclass(frozen=True)
class Verdict:
    """What to do, and why where it is not what the table says."""

    after: After
    reason: str | None = None


def judge(ended: ExitClass, *, events: Sequence[dict[str, Any]]) -> Verdict:
    """The table's row, unless the last starts have all been in vain."""
    after = POLICY[ended]
    fruitless = fruitless_starts(events)
    if after != "end" and ended is not ExitClass.CHECKPOINTED and fruitless >= MAX_FRUITLESS:
        return Verdict("end", f"{fruitless} starts in a row have ended without one more checkpoint")
    return Verdict(after)


def fruitless_starts(events: Sequence[dict[str, Any]]) -> int:
    """Starts since the last checkpoint or end of a stage."""
    count = 0
    for event in reversed(events):
        if event["kind"] in ("checkpoint", "stage_done"):
            break
        count += event["kind"] == "start"
    return count
