"""Whether a run is at work, waits, or has ended and how, read from its directory alone: Slurm is not asked, so that any machine
that sees the files can tell."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.rundir.exits import ExitClass
from launcher.rundir.lock import is_live
from launcher.rundir.paths import RunDir

Row = Mapping[str, Any]

AT_WORK = ("start", "job_start")
# After so many seconds without a sign of life a run that says it is at work, and that nobody holds, is taken for dead.
SILENT_S = 120.0
BY_STATE = {"done": ExitClass.DONE, "stopped": ExitClass.INTERRUPTED}


@dataclass(frozen=True)
class Standing:
    """`state` for people; `ended`: how the run ended, None of one that is at work or waits."""

    state: str
    ended: ExitClass | None = None


def stands(events: Sequence[Row], *, status: Row, stages: Sequence[str]) -> Standing:
    """By the last word of its launches. A run that an older phidias ended on one machine has none: its status tells."""
    known = [event for event in events if isinstance(event.get("kind"), str)]
    places = [index for index, event in enumerate(known) if event["kind"] in (*AT_WORK, "job_end")]
    waits = waiting_jobs(known, stages=stages)
    if not places:
        return Standing("queued" if waits else str(status.get("state", "not started")))
    last = known[places[-1]]
    if last["kind"] in AT_WORK:
        return Standing(str(status.get("state", "starting")))
    if last.get("after") in ("requeue", "restart"):
        return Standing("queued" if last["after"] == "requeue" else "starting")
    later = [event for event in known[places[-1] :] if event["kind"] == "submitted"]
    if waits and (later or last.get("exit") == ExitClass.DONE.name):
        return Standing("queued")
    ended = exit_class(last.get("exit"))
    return Standing({0: "done", 130: "stopped"}.get(ended, "failed"), ended)


def exit_class(name: object) -> ExitClass:
    """Of a name in an event; a fault that may be retried where it is none."""
    return ExitClass[name] if isinstance(name, str) and name in ExitClass.__members__ else ExitClass.RETRYABLE


def waiting_jobs(events: Sequence[Row], *, stages: Sequence[str]) -> list[str]:
    """Submitted for stages of the run, and not started yet. Data, export and evaluation are not the run."""
    begun = {str(event.get("job")) for event in events if event["kind"] in ("job_start", "job_end")}
    submitted = [event for event in events if event["kind"] == "submitted" and event.get("job")]
    own = [event for event in submitted if set(str(event.get("stage")).split(",")) & set(stages)]
    return [str(event["job"]) for event in own if str(event["job"]) not in begun]


def ended_in_silence(run: RunDir, events: Sequence[Row], *, status: Row) -> Standing | None:
    """How a run that says it is at work has ended without a word: its launcher was killed. None where somebody holds it, it
    gave a sign of life lately, or Slurm may start it again."""
    if time.time() - last_sign(run) < SILENT_S or holds(run):
        return None
    state = str(status.get("state"))
    if state in BY_STATE:
        return Standing(state, BY_STATE[state])
    launch = next((event for event in reversed(events) if event.get("kind") in AT_WORK), None)
    return Standing("died", ExitClass.RETRYABLE) if launch and launch.get("job") is None else None


def last_sign(run: RunDir) -> float:
    """Unix seconds; 0 where there is none."""
    times = [0.0]
    for path in (run.status, run.metrics, run.events, run.heartbeat, run.config):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def holds(run: RunDir) -> bool:
    """Whether somebody holds the run, or it cannot be told."""
    try:
        return is_live(run)
    except OSError:
        return True
