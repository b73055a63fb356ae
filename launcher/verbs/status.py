"""Where runs stand: all of them, or those named, in more detail. Read from the run directories, from Slurm's queue and, where
a site keeps accounts of jobs, from those.

Keys: runs_dir=runs  out=json"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.config.errors import ConfigError, Problem
from launcher.jobs.accounting import FINISHING, EndedJob, LiveJob, belongs_to, ended_jobs, live_jobs
from launcher.jobs.queue import known_jobs
from launcher.report.status_page import print_block, print_table
from launcher.rundir.exits import ExitClass
from launcher.rundir.goodput import measure_goodput
from launcher.rundir.lock import is_live
from launcher.rundir.losses import is_number
from launcher.rundir.paths import RunDir
from launcher.rundir.records import parse_status, read_json, read_records
from launcher.rundir.speed import mfu_of
from launcher.verbs.logs import newest_logs
from launcher.verbs.request import read_run_words, take_options
from launcher.verbs.runs import RUNS_DIR, find_runs, list_runs

NUMBERS = ("step", "tokens", "loss", "tokens_per_s", "eta_s")
# Accounts are asked for a run's newest jobs alone: a long run has passed through hundreds.
ACCOUNTED = 20
BAD_NODES = 3
ENDED_WELL = (ExitClass.DONE.name, ExitClass.INTERRUPTED.name, ExitClass.CHECKPOINTED.name)

Row = dict[str, Any]


def run(words: Sequence[str]) -> int:
    words, shown_as = take_options(words, allowed={"out": ("json",)})
    names, options = read_run_words(words, keys=("runs_dir",))
    runs_dir = options.get("runs_dir", RUNS_DIR)
    if "runs_dir" in options and not Path(runs_dir).is_dir():
        raise ConfigError(Problem("runs_dir", repr(runs_dir), "there is no such folder", "the run.runs_dir of the runs"))
    runs = find_runs(names, runs_dir=runs_dir) if names else list_runs(runs_dir)
    rows = status_rows(runs)
    if shown_as:
        print(json.dumps(rows, indent=1))
    elif rows:
        show(rows, named=runs if names else [])
    else:
        print(f"no runs in {runs_dir}")
    return ExitClass.DONE


def show(rows: Sequence[Row], *, named: Sequence[RunDir]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)  # a fault may hold [brackets] and :words:
    print_table(rows, console=console)
    for row, found in zip(rows, named, strict=False):
        logs: list[Path] = []
        with suppress(ConfigError):
            logs = newest_logs(found, stage=None)
        print_block(row, root=found.root, logs=logs, console=console)


def status_rows(runs: Sequence[RunDir]) -> list[Row]:
    """A row a run; Slurm is asked once for all of them."""
    events = [list(read_records(run.events)) for run in runs]
    jobs = [known_jobs(of_run) for of_run in events]
    live = sorted(live_jobs(dict.fromkeys(job for of_run in jobs for job in of_run)), key=lambda job: job_order(job.job))
    queue = [[job for job in live if belongs_to(job.job, known=of_run)] for of_run in jobs]
    asked = [set(known[-ACCOUNTED:]) - {job.job for job in here} for known, here in zip(jobs, queue, strict=True)]
    accounts = ended_jobs(sorted(set().union(*asked)))
    return [
        status_row(run, events=of_run, live=here, accounts=[job for job in accounts if belongs_to(job.job, known=known)])
        for run, of_run, here, known in zip(runs, events, queue, asked, strict=True)
    ]


def status_row(run: RunDir, *, events: Sequence[Row], live: Sequence[LiveJob], accounts: Sequence[EndedJob]) -> Row:
    """One run. `jobs` are those in Slurm's queue, `ended_jobs` those that ended, as the run and the accounts tell it; a local
    run has none. Ratios are parts of 1, times are in seconds, None is a figure nobody has. `lost_s` is
    the time since the first start that did not go into steps that count, by cause, the largest first."""
    status = parse_status(run.status.read_text(errors="replace")) if run.status.exists() else {}
    stage = status["stage"] if isinstance(status.get("stage"), str) else None
    numbers = {key: status[key] if is_number(status.get(key)) else None for key in NUMBERS}
    plan = planned_stages(run)
    others = {name: jobs for name, jobs in submitted_jobs(events).items() if plan and name not in plan}
    training = [job for job in live if not belongs_to(job.job, known={job for jobs in others.values() for job in jobs})]
    works = is_live(run) or any(job.state == "RUNNING" for job in training)
    until = time.time() if works or training else None
    measured = measure_goodput(run, events=events, until=until, waits=not works)
    mfu = mfu_of(plan.get(stage or "", {}), tokens_per_s=numbers["tokens_per_s"])
    ends = {str(event.get("job")): event for event in events if event.get("kind") == "job_end" and event.get("job")}
    return {
        "name": run.name,
        "stage": stage,
        "state": state_of(status, live=works, queued=any(job.state not in FINISHING for job in training), events=events),
        **numbers,
        "mfu": None if mfu is None else round(mfu, 4),
        "goodput": round(measured.goodput, 4) if measured else None,
        "wall_s": round(measured.wall_s, 1) if measured else None,
        "lost_s": {cause: round(lost, 1) for cause, lost in measured.largest} if measured else {},
        "restarts": sum(event.get("kind") == "resume" for event in events),
        "last_fault": open_fault(events) or (None if works else vain_end(events)),
        "bad_nodes": bad_nodes(events),
        "jobs": [live_document(job) for job in live],
        "ended_jobs": list(ended_documents(ends, live=live, accounts=accounts)),
        "stages": [
            stage_document(row, events=events, tokens=numbers["tokens"] if name == stage else None)
            for name, row in plan.items()
        ],
        "other_jobs": others,
    }


def planned_stages(run: RunDir) -> dict[str, Row]:
    """The plan of each stage, by name; empty where there is none that can be read."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return {row["stage"]: row for row in read_json(run.plan)}
    return {}


def state_of(status: Row, *, live: bool, queued: bool, events: Sequence[Row]) -> str:
    """status.json is as old as its writer: a run that says it is running and that nobody holds waits in the queue, has failed
    with a word, or died without one."""
    if queued and not live:
        return "queued"
    if not live and (ended_in_fault(events) or vain_end(events)):
        return "failed"
    state = status["state"] if isinstance(status.get("state"), str) else "starting" if live else "not started"
    return "died" if state in ("starting", "running") and not live else state


def open_fault(events: Sequence[Row]) -> str | None:
    """The last fault, or why ranks were not started, unless a stage went on or ended well after it."""
    kinds = ("fault", "no_start", "resume", "stage_start", "stage_done")
    last = next((event for event in reversed(events) if event.get("kind") in kinds), None)
    return str(last.get("error", last.get("reason"))) if last and last["kind"] in ("fault", "no_start") else None


def ended_in_fault(events: Sequence[Row]) -> bool:
    """Whether the last launch left a word of what broke it."""
    kinds = ("start", "submitted", "stop", "stage_done", "fault", "no_start", "hang")
    last = next((event["kind"] for event in reversed(events) if event.get("kind") in kinds), None)
    return last in ("fault", "no_start", "hang")


def vain_end(events: Sequence[Row]) -> str | None:
    """Why the last job of the run was not started again, where the policy gave it up."""
    last = next((event for event in reversed(events) if event.get("kind") in ("job_end", "start", "submitted")), None)
    gave_up = last and last["kind"] == "job_end" and last.get("after") == "end" and last.get("exit") not in ENDED_WELL
    return str(last.get("reason") or last.get("exit")) if last and gave_up else None


def bad_nodes(events: Sequence[Row]) -> list[dict[str, str]]:
    """The last found ones, newest first, each once with its newest reason."""
    found: dict[str, str] = {}
    for event in reversed(events):
        if event.get("kind") == "bad_node":
            found.setdefault(str(event.get("node")), str(event.get("reason")))
    return [{"node": node, "reason": reason} for node, reason in found.items()][:BAD_NODES]


def live_document(job: LiveJob) -> Row:
    return {"job": job.job, "state": job.state} | ({"reason": job.reason} if job.reason else {})


def ended_documents(ends: Mapping[str, Row], *, live: Sequence[LiveJob], accounts: Sequence[EndedJob]) -> Iterator[Row]:
    """Oldest first: what the run wrote of each job's end, and what the accounts say, which know of a job that was killed."""
    known = {job.job: {key: value for key, value in asdict(job).items() if key != "job"} for job in accounts}
    nothing = dict.fromkeys(("state", "exit_code", "elapsed_s", "nodes"))
    for job in sorted({*ends, *known} - {one.job for one in live}, key=job_order):
        end = ends.get(job, {})
        yield {"job": job, **{key: end.get(key) for key in ("exit", "after", "reason")}, **known.get(job, nothing)}


def job_order(job: str) -> tuple[int, ...]:
    return tuple(int(part) for part in job.split("_") if part.isdigit())


def submitted_jobs(events: Sequence[Row]) -> dict[str, list[str]]:
    """Ids by what they were submitted for: stages, of which an element of a sweep trains several, and data, export, eval."""
    found: dict[str, list[str]] = {}
    for event in events:
        if event.get("kind") == "submitted":
            for name in str(event.get("stage")).split(","):
                found.setdefault(name, []).append(str(event.get("job")))
    return found


def stage_document(plan: Row, *, events: Sequence[Row], tokens: float | None) -> Row:
    """How far a stage has come: `tokens` where status.json says it, of another stage what its newest checkpoint holds."""
    own = [event for event in events if event.get("stage") == plan["stage"]]
    saved = [event["tokens"] for event in own if event.get("kind") == "checkpoint" and is_number(event.get("tokens"))]
    return {
        "stage": plan["stage"],
        "tokens": tokens if tokens is not None else saved[-1] if saved else 0,
        "planned_tokens": plan["num_samples"] * plan["seq_length"],
        "job_ids": submitted_jobs(events).get(plan["stage"], []),
    }
