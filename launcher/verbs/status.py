"""Where runs stand, from the files in their directories: all runs, or those named.

Keys: runs_dir=runs  out=json"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.config.errors import ConfigError, Problem
from launcher.jobs.queue import queued
from launcher.plan.page import UNKNOWN, short
from launcher.rundir.exits import ExitClass
from launcher.rundir.lock import is_live
from launcher.rundir.paths import RunDir
from launcher.rundir.records import parse_status, read_records
from launcher.verbs.request import read_run_words, take_options
from launcher.verbs.runs import RUNS_DIR, find_run, list_runs

FROM_STATUS = ("stage", "state", "step", "tokens", "loss", "tokens_per_s", "eta_s")


def run(words: Sequence[str]) -> int:
    words, shown_as = take_options(words, allowed={"out": ("json",)})
    names, options = read_run_words(words, keys=("runs_dir",))
    runs_dir = options.get("runs_dir", RUNS_DIR)
    if "runs_dir" in options and not Path(runs_dir).is_dir():
        raise ConfigError(Problem("runs_dir", repr(runs_dir), "there is no such folder", "the run.runs_dir of the runs"))
    runs = [find_run(name, runs_dir=runs_dir) for name in names] if names else list_runs(runs_dir)
    rows = [status_row(found) for found in runs]
    if shown_as:
        print(json.dumps(rows, indent=1))
    else:
        console = Console(highlight=False, markup=False)  # a fault may hold [brackets]
        console.print(status_table(rows) if rows else f"no runs in {runs_dir}")
        for row in rows:
            if row["last_fault"]:
                console.print(f"{row['name']}: {row['last_fault'].splitlines()[0]}", soft_wrap=True)
    return ExitClass.DONE


def status_row(run: RunDir) -> dict[str, Any]:
    """One run. `jobs` are those that Slurm has of it; a local run has none. `goodput` is not kept yet."""
    status = parse_status(run.status.read_text(errors="replace")) if run.status.exists() else {}
    events = list(read_records(run.events))
    row: dict[str, Any] = {"name": run.name, **{key: status.get(key) for key in FROM_STATUS}}
    row["state"] = state_of(status, live=is_live(run))
    restarts = sum(event["kind"] == "resume" for event in events)
    return row | {"goodput": None, "restarts": restarts, "last_fault": open_fault(events), "jobs": jobs_of(run)}


def jobs_of(run: RunDir) -> list[dict[str, str]]:
    """What Slurm has of the run; nothing where it does not answer: the run directory tells the rest."""
    with suppress(ConfigError):
        return [{"job": job, "state": state} for job, state in queued(run).items()]
    return []


def open_fault(events: Sequence[dict[str, Any]]) -> str | None:
    """The last fault, unless a stage went on or ended well after it."""
    last = next(
        (event for event in reversed(events) if event["kind"] in ("fault", "resume", "stage_start", "stage_done")), None
    )
    return str(last["error"]) if last and last["kind"] == "fault" else None


def state_of(status: dict[str, Any], *, live: bool) -> str:
    """status.json is as old as its writer: a run that says it is running and that nobody holds has died."""
    state = str(status.get("state", "starting" if live else "not started"))
    return "died" if state in ("starting", "running") and not live else state


def status_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold cyan")
    for column in ("run", "state", "stage"):
        table.add_column(column, no_wrap=True)
    for column in ("step", "tokens", "loss", "tokens/s", "left", "restarts"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        loss = UNKNOWN if row["loss"] is None else f"{row['loss']:.3f}"
        left = UNKNOWN if row["eta_s"] is None or row["state"] != "running" else f"{row['eta_s']:,.0f} s"
        numbers = [short(row["step"]), short(row["tokens"]), loss, short(row["tokens_per_s"]), left, str(row["restarts"])]
        table.add_row(Text(row["name"]), row["state"], row["stage"] or UNKNOWN, *numbers)
    return table
