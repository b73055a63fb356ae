"""`phidias status` for people: a table of runs, several of them on a narrow screen; what needs attention below it; and a block
for each run that was named. Made from the rows that out=json prints."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.report.format import MISSING, format_count, format_duration, format_losses, format_number, format_percent

LEFT_ALIGNED = ("run", "state", "stage", "jobs")
GAP = 2
JOBS = 2  # in the table; the rest is counted
ENDED = 5  # in a block
# Slurm's short words of the states jobs are in most.
SHORT = {"RUNNING": "R", "PENDING": "PD", "COMPLETING": "CG", "CONFIGURING": "CF", "SUSPENDED": "S", "REQUEUED": "RQ"}

Row = Mapping[str, Any]


def print_table(rows: Sequence[Row], *, console: Console) -> None:
    """The table, and under it what a person should know of each run."""
    cells = [dict(run_cells(row)) for row in rows]
    for number, columns in enumerate(split_columns(cells, width=console.width)):
        console.print(*([""] if number else []), status_table(cells, columns=columns), sep="\n")
    for row in rows:
        for line in attention(row):
            console.print(f"{row['name']}: {line}", soft_wrap=True)


def run_cells(row: Row) -> Iterator[tuple[str, str]]:
    """Heading and text of each column."""
    yield "run", row["name"]
    yield "state", row["state"]
    yield "stage", row["stage"] or MISSING
    yield "step", format_count(row["step"])
    yield "tokens", format_count(row["tokens"])
    yield "loss", format_number(row["loss"])
    yield "tokens/s", format_count(row["tokens_per_s"])
    yield "MFU", format_percent(row["mfu"])
    yield "left", format_duration(row["eta_s"] if row["state"] == "running" else None)
    yield "goodput", format_percent(row["goodput"])
    yield "restarts", str(row["restarts"])
    yield "jobs", short_jobs(row)


def short_jobs(row: Row) -> str:
    """Those in the queue as squeue shortens their states; where there is none, how the last one ended."""
    live, ended = row["jobs"], row["ended_jobs"]
    if live:
        more = f" +{len(live) - JOBS}" if len(live) > JOBS else ""
        return ", ".join(f"{job['job']} {SHORT.get(job['state'], job['state'])}" for job in live[:JOBS]) + more
    return f"{ended[-1]['job']} {ended[-1]['state'] or ended[-1]['exit']}" if ended else MISSING


def split_columns(cells: Sequence[Mapping[str, str]], *, width: int) -> list[list[str]]:
    """The columns of each table: as many as the screen is wide for, behind the name of the run."""
    name, *others = cells[0]
    widths = {column: max(cell_len(text) for text in (column, *(row[column] for row in cells))) for column in cells[0]}
    tables = [[name]]
    for column in others:
        if len(tables[-1]) > 1 and sum(widths[one] + GAP for one in [*tables[-1], column]) - GAP > width:
            tables.append([name])
        tables[-1].append(column)
    return tables


def status_table(cells: Sequence[Mapping[str, str]], *, columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold cyan")
    for name in columns:
        # A name is there to be typed again: it is broken rather than cut.
        table.add_column(name, justify="left" if name in LEFT_ALIGNED else "right", no_wrap=name != "run", overflow="fold")
    for row in cells:
        table.add_row(*(Text(row[name]) for name in columns))
    return table


def attention(row: Row) -> Iterator[str]:
    """What a person should know: the open fault, nodes found bad, and what jobs wait for."""
    if row["last_fault"]:
        yield first_line(row["last_fault"])
    if row["bad_nodes"]:
        yield "bad nodes " + ", ".join(f"{node['node']} ({first_line(node['reason'])})" for node in row["bad_nodes"])
    waiting = [f"{job['job']} ({job['reason']})" for job in row["jobs"] if "reason" in job]
    if waiting:
        yield "waiting " + ", ".join(waiting)


def first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")


def print_block(row: Row, *, root: Path, logs: Sequence[Path], console: Console) -> None:
    """More of one run: its stages with their jobs, what cost it time, how jobs have ended, and where everything lies."""
    ends = [("ended", describe_end(job)) for job in row["ended_jobs"][-ENDED:]]
    lines = [*stage_lines(row), *lost_lines(row), *ends, ("directory", str(root))]
    lines += [("log", str(path)) for path in logs]
    console.print(f"\n{row['name']}", style="bold")
    labels = [label for label, _ in lines]
    width = max(map(cell_len, labels))
    for i, (label, text) in enumerate(lines):
        shown = "" if i and labels[i - 1] == label else label
        console.print(f"  {shown:<{width}}  {text}", soft_wrap=True)


def stage_lines(row: Row) -> Iterator[tuple[str, str]]:
    """The stages, then what was submitted beside them: data, export, evaluation."""
    states = {job["job"]: job["state"] for job in [*row["ended_jobs"], *row["jobs"]] if job["state"]}
    width = max((cell_len(stage["stage"]) for stage in row["stages"]), default=0)
    for stage in row["stages"]:
        done, planned = stage["tokens"], stage["planned_tokens"]
        part = format_percent(done / planned) if planned else MISSING
        text = f"{stage['stage']:<{width}}  {format_count(done)} of {format_count(planned)} tokens, {part}"
        yield "stages", "; ".join(filter(None, (text, name_jobs(stage["job_ids"], states=states))))
    for name, jobs in row["other_jobs"].items():
        yield name, name_jobs(jobs, states=states)


def lost_lines(row: Row) -> Iterator[tuple[str, str]]:
    """`lost  3.2% of 12 d 4 h: restart 1.4%, checkpoint 0.9%`: what was no step that counts since the first start."""
    wall_s, lost_s = row["wall_s"], row["lost_s"]
    if wall_s and lost_s:
        part = format_percent(1 - row["goodput"])
        yield "lost", f"{part} of {format_duration(wall_s)}: {format_losses(lost_s, wall_s=wall_s)}"


def name_jobs(jobs: Sequence[str], *, states: Mapping[str, str]) -> str:
    """The newest ones with their states; of an array those of its elements, each once."""
    words = []
    for job in jobs[-JOBS:]:
        own = [state for known, state in states.items() if job in (known, known.partition("_")[0])]
        words.append(" ".join([job, *dict.fromkeys(own)]))
    return f"job {', '.join(words)}" if words else ""


def describe_end(job: Row) -> str:
    """`4711  RETRYABLE, queued again; NODE_FAIL 0:0 after 1 d 0 h on n[1-4]`: what the run wrote, then Slurm's account."""
    then = {"requeue": "queued again", "restart": "started again", "end": "not started again"}.get(job["after"], job["after"])
    then = None if job["exit"] == "DONE" else then
    wrote = ", ".join(filter(None, (job["exit"], then))) + (f": {job['reason']}" if job["reason"] else "")
    account = (
        f"{job['state']} {job['exit_code']} after {format_duration(job['elapsed_s'])} on {job['nodes']}" if job["state"] else ""
    )
    return f"{job['job']}  " + "; ".join(filter(None, (wrote, account)))
