"""What Slurm knows of jobs, those of many runs in one call: squeue of jobs that wait or run, sacct of those that have ended,
where a site keeps accounts (slurmdbd).

Nothing here raises: where Slurm is not installed, fails or hangs, nothing is known, and run directories tell the rest.
"""

import re
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

QUEUE_TIMEOUT_S, ACCOUNTS_TIMEOUT_S = 30.0, 5.0
FINISHING = ("RUNNING", "COMPLETING")
NOT_ENDED = ("PENDING", "SUSPENDED", *FINISHING)


@dataclass(frozen=True)
class LiveJob:
    """A job in the queue; `reason`: why it waits, None where it does not."""

    job: str
    state: str
    reason: str | None


@dataclass(frozen=True)
class EndedJob:
    """Slurm's account of a job, of its last start. `exit_code` is `code:signal`; `nodes` a Slurm node list, `n[1-4]`."""

    job: str
    state: str
    exit_code: str
    elapsed_s: int
    nodes: str


def live_jobs(jobs: Iterable[str]) -> list[LiveJob]:
    """Those of the jobs that are in the queue; each element of an array is one."""
    rows = _ask("squeue", "--noheader", "--array", "--format=%i|%T|%r", jobs=jobs, timeout_s=QUEUE_TIMEOUT_S)
    return [_live_job(*row) for row in rows if len(row) == 3]


def _live_job(job: str, state: str, reason: str) -> LiveJob:
    waits = state not in FINISHING and reason not in ("", "None", "(null)")
    return LiveJob(job=job, state=state, reason=reason if waits else None)


def ended_jobs(jobs: Iterable[str]) -> list[EndedJob]:
    """Those of the jobs that have ended and that accounts are kept of. A requeued job has one a start: the last counts."""
    columns = "--format=JobID,State,ExitCode,ElapsedRaw,NodeList"
    options = ("--noheader", "--parsable2", "--allocations", "--allusers", columns)
    rows = _ask("sacct", *options, jobs=jobs, timeout_s=ACCOUNTS_TIMEOUT_S)
    found = {row[0]: _ended_job(*row) for row in rows if len(row) == 5 and row[3].isdigit()}
    return [job for job in found.values() if job.state not in NOT_ENDED]


def _ended_job(job: str, state: str, exit_code: str, elapsed_s: str, nodes: str) -> EndedJob:
    cause = state.partition(" ")[0]  # CANCELLED by 1000
    return EndedJob(job=job, state=cause, exit_code=exit_code, elapsed_s=int(elapsed_s), nodes=nodes)


def belongs_to(job: str, *, known: Collection[str]) -> bool:
    """Whether a job is one of those known, or an element of one: `17_2` of `17`."""
    return job in known or job.partition("_")[0] in known


def _ask(*command: str, jobs: Iterable[str], timeout_s: float) -> Sequence[list[str]]:
    """Rows of a command that takes job ids, by column. One that is no id, from a file edited by hand, would spoil the call."""
    ids = ",".join(job for job in jobs if re.fullmatch(r"\d+(_\d+)?", job))
    if not ids:
        return []
    try:
        done = subprocess.run([*command, f"--jobs={ids}"], capture_output=True, check=True, timeout=timeout_s)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip().split("|") for line in done.stdout.decode(errors="replace").splitlines()]
