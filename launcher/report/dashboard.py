"""A W&B dashboard as data: sections of panels, each naming the metrics that training logs (training/metrics.py writes them as
`<stage>/<name>`). What an engineer on call looks at first stands first. launcher/report/workspace.py makes a W&B workspace of
it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launcher.rundir.phases import CAUSES

FIRST, SOURCES, OPTIMIZER, SPEED, RANKS, SYSTEM = (
    "Look here first", "Sources", "Optimizer", "Speed and memory", "Ranks", "System"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One panel of every stage. `metrics` are logged below the stage's name; `each`: one metric below which W&B finds a line
    for each source, also those that a later phase adds."""

    section: str
    title: str
    unit: str
    metrics: tuple[str, ...] = ()
    each: str | None = None
    log: bool = False
    kind: Literal["line", "stacked-area"] = "line"


# The one table of what is shown: tests compare it with what a run writes. Goodput is logged at checkpoints, the slowest rank
# where there are several that compute the same, MFU and what is over predicted with GPUs, FP8 where it is on.
TABLE = (
    Row(section=FIRST, title="Loss", unit="nats per token", metrics=("train/loss",)),
    Row(section=FIRST, title="Held-out loss", unit="nats per token", metrics=("validation/loss",)),
    Row(section=FIRST, title="Gradient norm", unit="before clipping", metrics=("train/grad_norm",), log=True),
    Row(section=FIRST, title="Speed", unit="tokens/s", metrics=("train/tokens_per_s",)),
    Row(section=FIRST, title="MFU", unit="part of the dense peak, causal FLOPs", metrics=("train/mfu",)),
    Row(section=FIRST, title="Step time and wait for data", unit="s", metrics=("train/step_time_s", "train/data_wait_s")),
    Row(section=FIRST, title="Slowest rank", unit="times the median", metrics=("train/slowest_ratio",)),
    Row(section=FIRST, title="Goodput", unit="part of the time", metrics=("goodput/productive",)),
    Row(section=FIRST, title="Time lost, by cause", unit="s", metrics=tuple(f"goodput/{cause}_s" for cause in CAUSES),
        kind="stacked-area"),
    Row(section=FIRST, title="Events so far", unit="of each kind", each="event"),
    Row(section=SOURCES, title="Loss by source", unit="nats per token", each="train/loss_by_source"),
    Row(section=SOURCES, title="Held-out loss by source", unit="nats per token", each="validation/loss_by_source"),
    Row(section=SOURCES, title="Tokens by source", unit="tokens", each="train/tokens_by_source", kind="stacked-area"),
    Row(section=SOURCES, title="Epochs by source", unit="times read", each="train/epochs_by_source"),
    Row(section=OPTIMIZER, title="Learning rate", unit="", metrics=("train/lr",)),
    Row(section=OPTIMIZER, title="Norm of the weights", unit="", metrics=("train/weight_norm",)),
    Row(section=OPTIMIZER, title="Size of an update", unit="part of their norm", metrics=("train/update_ratio",), log=True),
    Row(section=OPTIMIZER, title="Zeros in the gradient", unit="part of it", metrics=("train/zero_grads",)),
    Row(section=OPTIMIZER, title="FP8: tensors cut off", unit="tensors", metrics=("train/fp8_overflows",)),
    Row(section=OPTIMIZER, title="FP8: largest value", unit="", metrics=("train/fp8_amax_max",), log=True),
    Row(section=OPTIMIZER, title="FP8: smallest scale", unit="", metrics=("train/fp8_scale_min",), log=True),
    Row(section=SPEED, title="Where a step goes", unit="s", kind="stacked-area", metrics=tuple(
        f"train/{part}_s" for part in ("forward", "backward", "optimizer", "exposed", "data_wait", "checkpoint"))),
    Row(section=SPEED, title="Speed of a GPU", unit="tokens/s", metrics=("train/tokens_per_s_per_gpu",)),
    Row(section=SPEED, title="Arithmetic of a GPU", unit="TFLOP/s, causal FLOPs", metrics=("train/tflops_per_gpu",)),
    Row(section=SPEED, title="Memory of the fullest rank", unit="bytes", metrics=("train/memory_max_bytes",)),
    Row(section=SPEED, title="Measured over predicted", unit="times the plan",
        metrics=("train/speed_vs_plan", "train/memory_vs_plan")),
    Row(section=RANKS, title="Forward time, mean and slowest rank", unit="s",
        metrics=("train/forward_s", "train/forward_max_s")),
    Row(section=RANKS, title="Step time, mean and slowest rank", unit="s",
        metrics=("train/rank_step_s", "train/rank_step_max_s")),
    Row(section=RANKS, title="Longest wait for data", unit="s", metrics=("train/data_wait_max_s",)),
    Row(section=RANKS, title="Which rank is slowest", unit="rank", metrics=("train/slowest_rank",)),
)  # fmt: skip
# wandb's own, of the first rank's node: name, unit, title. `{gpu}` for each GPU of a node.
SYSTEM_TABLE = (
    ("GPU busy", "%", "system/gpu.{gpu}.gpu"),
    ("GPU memory", "%", "system/gpu.{gpu}.memoryAllocated"),
    ("Memory of the node", "%", "system/memory_percent"),
    ("Memory of the process", "MB", "system/proc.memory.rssMB"),
)
EVENTS = """**Events** of a run (faults, restarts, checkpoints, bad nodes) are in its directory:

    phidias watch {run}
    phidias status {run}
    phidias logs {run}
"""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over `x`; `pattern`: a regular expression of metric names, where there are no `metrics`; or `text`."""

    title: str
    unit: str = ""
    x: str = ""
    metrics: tuple[str, ...] = ()
    pattern: str | None = None
    log: bool = False
    kind: Literal["line", "stacked-area"] = "line"
    text: str | None = None


@dataclass(frozen=True)
class Section:
    name: str
    panels: tuple[Panel, ...]
    is_open: bool


@dataclass(frozen=True)
class Dashboard:
    """`run`: the one whose panels these are; None: all of the project."""

    name: str
    project: str
    entity: str | None
    run: str | None
    sections: tuple[Section, ...]

    def document(self) -> dict[str, Any]:
        """As out=json prints it."""
        return asdict(self)


def plan_dashboard(
    *, project: str, entity: str | None, run: str | None, stages: Sequence[str], gpus_per_node: int
) -> Dashboard:
    """`stages`: those whose panels stand first are first. Sections of all stages before those of the machine."""
    sections = [
        section(name, rows=[row for row in TABLE if row.section == name], stage=stage, several=len(stages) > 1, run=run)
        for name in dict.fromkeys(row.section for row in TABLE)
        for stage in stages
    ]
    sections.append(Section(SYSTEM, tuple(system_panels(gpus_per_node)), is_open=False))
    return Dashboard(f"Phidias: {run or project}", project=project, entity=entity, run=run, sections=tuple(sections))


def section(name: str, *, rows: Sequence[Row], stage: str, several: bool, run: str | None) -> Section:
    panels = [panel_of(row, stage=stage) for row in rows]
    if name == FIRST:
        panels.append(Panel(title="Events", text=EVENTS.format(run=run or "<run>")))
    return Section(f"{name}: {stage}" if several else name, tuple(panels), is_open=name in (FIRST, SOURCES))


def panel_of(row: Row, *, stage: str) -> Panel:
    """Over the stage's samples, which go on where they were after every restart and rewind."""
    pattern = f"^{re.escape(f'{stage}/{row.each}/')}.+$" if row.each else None
    metrics = tuple(f"{stage}/{name}" for name in row.metrics)
    x = f"{stage}/samples"
    return Panel(title=row.title, unit=row.unit, x=x, metrics=metrics, pattern=pattern, log=row.log, kind=row.kind)


def system_panels(gpus_per_node: int) -> Iterator[Panel]:
    """GPU panels where there are GPUs. wandb measures them by time."""
    for title, unit, name in SYSTEM_TABLE:
        is_gpu = "{gpu}" in name
        metrics = tuple(name.format(gpu=gpu) for gpu in range(gpus_per_node)) if is_gpu else (name,)
        if metrics:
            yield Panel(title=title, unit=unit, x="Relative Time (Process)", metrics=metrics)
