"""Scores of tasks in eval/: of a stage's export and of checkpoints of it that were measured by themselves."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from launcher.report.format import MISSING, format_count
from launcher.report.tables import table
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json

Section = Mapping[str, Any]
DIGITS = 4


def read_evaluation(run: RunDir, *, name: str) -> Section | None:
    """eval/<name>.json; None where there is none that can be read."""
    try:
        found = read_json(run.eval(name))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("held_out"), dict) else None


def evaluations(run: RunDir, *, stage: str) -> list[Section]:
    """All of a stage, by step: one a step, the stage's own export first."""
    names = [stage, *(path.stem for path in run.eval(stage).parent.glob(f"{stage}@*.json"))]
    by_step: dict[int, Section] = {}
    for found in (read_evaluation(run, name=name) for name in names):
        if found is not None:
            by_step.setdefault(int(found["step"]), found)
    return [by_step[step] for step in sorted(by_step)]


def scores(found: Section) -> Iterator[tuple[str, float, float | None, str]]:
    """What was scored, the score, its standard error, and how it was asked."""
    for name, row in ((found.get("tasks") or {}).get("rows") or {}).items():
        for metric, figures in row["metrics"].items():
            yield f"{name} {metric}", figures["value"], figures["stderr"], how(row)


def how(row: Section) -> str:
    """Scores are comparable where this is equal."""
    shots = [] if row.get("num_fewshot") is None else [f"{row['num_fewshot']}-shot"]
    documents = [f"{row['documents']:,} documents"] if row.get("documents") else []
    return ", ".join([*shots, *documents, *([f"version {row['version']}"] if row.get("version") is not None else [])])


def tasks_table(found: Sequence[Section]) -> str:
    """A row a score, a column a step of the stage; empty where no task was measured."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for one in found:
        for name, value, stderr, told in scores(one):
            error = "" if stderr is None else f" <small>± {stderr:.{DIGITS}f}</small>"
            cells.setdefault((name, told), {})[one["step"]] = f"{value:.{DIGITS}f}{error}"
    if not cells:
        return ""
    steps = [one for one in found if any(one["step"] in row for row in cells.values())]
    heads = ("task", *(f"#step {one['step']:,} ({format_count(one['tokens'])} tokens)" for one in steps), "")
    rows = [
        (escape(name), *(row.get(one["step"], MISSING) for one in steps), escape(told)) for (name, told), row in cells.items()
    ]
    lead = "Tasks of lm-evaluation-harness; ± is its standard error."
    return f'<p class="lead">{lead}</p>{table(heads, rows=rows, empty="")}'
