"""What plan.json predicted of each stage, against what was measured. A loss is not predicted, and on CPU ranks no speed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from launcher.plan.memory import GIB
from launcher.report.format import MISSING, format_count, format_duration, format_number, format_percent
from launcher.report.history import History, StageHistory
from launcher.report.report_bands import Band, work_s
from launcher.report.report_rows import Column
from launcher.rundir.losses import is_number
from launcher.rundir.paths import RunDir
from launcher.rundir.speed import read_plan

DAY_S = 86400.0
NO_PLAN = "No plan.json lies in the run directory: there is nothing to compare with."
NO_GPU = "The cluster has no GPUs, so the plan predicts no speed, duration or memory of a rank; tokens and steps it does."
SPEED_NOTE = "Measured speeds are medians of the logged steps, memory is the largest seen."


@dataclass(frozen=True)
class Measured:
    """Of a stage so far: medians of the rows that were read, the largest memory, and the seconds at work on it. None is what
    the rows do not say."""

    tokens: float
    steps: int
    tokens_per_s: float | None
    step_time_s: float | None
    tflops_per_gpu: float | None
    mfu: float | None
    memory_gib: float | None
    duration_s: float


@dataclass(frozen=True)
class Comparison:
    """A line of the table. `expected`: what of `planned` would be there by now, where that is less."""

    name: str
    planned: float | None
    measured: float | None
    show: Callable[[float | None], str]
    expected: float | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over planned."""
        against = self.planned if self.expected is None else self.expected
        return self.measured / against if self.measured is not None and against else None


class Plans:
    """plan.json of a run, by stage; empty where there is none."""

    def __init__(self, run: RunDir):
        self.stages = read_plan(run.plan)

    def predicted(self, stage: str) -> dict[str, float | None]:
        """Figures by the names of `Measured`; None where nobody predicts one. What memory the plan works out for CPU ranks is
        that of tensors, and theirs is a whole process's."""
        plan = self.stages.get(stage, {})
        tflops, memory = plan.get("model_tflops_per_gpu") or {}, plan.get("memory_gib") or {}
        days: Any = plan.get("days")
        found: dict[str, Any] = {
            "tokens": plan.get("tokens"),
            "steps": plan.get("num_steps"),
            "tokens_per_s": plan.get("tokens_per_s"),
            "step_time_s": plan.get("step_time_s"),
            "tflops_per_gpu": tflops.get("causal"),
            "mfu": plan.get("mfu"),
            "memory_gib": memory.get("peak") if memory.get("capacity") else None,
            "duration_s": days * DAY_S if is_number(days) else None,
        }
        return {name: float(value) if is_number(value) else None for name, value in found.items()}

    @property
    def tokens(self) -> float | None:
        """Of all stages; None without a plan."""
        planned = [self.predicted(name)["tokens"] for name in self.stages]
        return sum(tokens or 0.0 for tokens in planned) if planned else None


def measure(stage: StageHistory, *, bands: Iterable[Band]) -> Measured:
    memory = stage.train["memory_max_bytes"]
    known = memory[np.isfinite(memory)]
    return Measured(
        tokens=stage.tokens,
        steps=stage.steps,
        tokens_per_s=median(stage.train["tokens_per_s"]),
        step_time_s=median(stage.train["step_time_s"]),
        tflops_per_gpu=median(stage.train["tflops_per_gpu"]),
        mfu=median(stage.train["mfu"]),
        memory_gib=float(known.max()) / GIB if len(known) else None,
        duration_s=work_s(bands, stage=stage.name),
    )


def median(column: Column) -> float | None:
    known = column[np.isfinite(column)]
    return float(np.median(known)) if len(known) else None


def compare_stage(measured: Measured, *, predicted: Mapping[str, float | None]) -> list[Comparison]:
    """Only what is predicted. Tokens and steps are those of the whole stage; its duration is scaled to the tokens trained."""
    done = min(1.0, measured.tokens / predicted["tokens"]) if predicted["tokens"] else 1.0
    duration = predicted["duration_s"]
    rows = [
        Comparison("tokens", predicted["tokens"], measured.tokens, format_count),
        Comparison("steps", predicted["steps"], measured.steps, format_count),
        Comparison("tokens/s", predicted["tokens_per_s"], measured.tokens_per_s, format_count),
        Comparison("step time", predicted["step_time_s"], measured.step_time_s, format_seconds),
        Comparison("TFLOP/s per GPU", predicted["tflops_per_gpu"], measured.tflops_per_gpu, format_tenths),
        Comparison("MFU", predicted["mfu"], measured.mfu, format_percent),
        Comparison("memory of a GPU", predicted["memory_gib"], measured.memory_gib, format_gib),
        Comparison("duration", duration, measured.duration_s, format_duration, expected=duration and duration * done),
    ]
    return [row for row in rows if row.planned is not None]


def format_seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value * 1e3:,.0f} ms" if value < 1 else f"{value:,.2f} s"


def format_tenths(value: float | None) -> str:
    return format_number(value, digits=1)


def format_gib(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.1f} GiB"


def plan_section(history: History, *, plans: Plans, bands: Sequence[Band]) -> str:
    """Sentences and a table a stage, as HTML."""
    if not plans.stages:
        return f'<p class="empty">{NO_PLAN}</p>'
    if not history.stages:
        return '<p class="empty">No step is logged yet.</p>'
    parts = [f'<p class="lead">{describe(plans)}</p>']
    for stage in history.stages:
        if rows := compare_stage(measure(stage, bands=bands), predicted=plans.predicted(stage.name)):
            title = f"<h3>{escape(stage.name)}</h3>" if len(history.stages) > 1 else ""
            parts.append(title + _table(rows))
        else:
            parts.append(f"<h3>{escape(stage.name)}</h3><p class='empty'>plan.json has no such stage.</p>")
    return "".join(parts)


def describe(plans: Plans) -> str:
    """What is compared, and what cannot be."""
    speeds = [plans.predicted(name)["step_time_s"] for name in plans.stages]
    return SPEED_NOTE if any(speed is not None for speed in speeds) else NO_GPU


def _table(rows: Iterable[Comparison]) -> str:
    cells = "".join(_row(row) for row in rows)
    heads = '<th></th><th class="number">planned</th><th class="number">measured</th><th class="number">of plan</th><th></th>'
    return f'<div class="scroll plan"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>'


def _row(row: Comparison) -> str:
    planned = row.show(row.planned)
    if row.expected is not None and row.planned is not None and row.expected < 0.995 * row.planned:
        planned += f"<small>{row.show(row.expected)} for the tokens so far</small>"
    return (
        f'<tr><td>{row.name}</td><td class="number">{planned}</td><td class="number">{row.show(row.measured)}</td>'
        f'<td class="number">{format_percent(row.ratio, digits=0 if (row.ratio or 0) >= 1 else 1)}</td>{_bar(row.ratio)}</tr>'
    )


def _bar(ratio: float | None) -> str:
    """The planned is a mark at two thirds; what is measured reaches up to it, or beyond."""
    if ratio is None:
        return "<td></td>"
    width = f"{min(100.0, 100 * ratio / 1.5):.1f}%"
    return f'<td><span class="bar against"><span style="width:{width};--colour:var(--series-0)"></span></span></td>'
