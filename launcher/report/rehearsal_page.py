"""`phidias rehearse` for people: one rank's measurement beside the plan."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from launcher.plan.page import UNKNOWN

LABELS = {
    "forward": "forward, a microbatch",
    "backward": "backward, a microbatch",
    "microbatch": "[bold]microbatch[/]",
    "optimizer": "optimizer",
    "step": "[bold]step of this rank[/]",
    "held besides": "FP8 copies, workspaces",
    "context": "CUDA context",
    "slack": "allocator slack",
    "peak": "[bold]peak[/]",
}
# Of what one rank cannot show.
ELSEWHERE = {
    "tp_s": "TP", "cp_s": "CP", "contention_s": "contention", "pp_s": "PP", "bubble_s": "bubble", "dp_s": "DP",
    "slowest_gpu_s": "slowest GPU", "other_s": "other",
}  # fmt: skip


def print_rehearsal(document: Mapping[str, Any], *, console: Console | None = None) -> None:
    """`document`: the measurement file."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("measured", "predicted", "difference"):
        table.add_column(name, justify="right", header_style="cyan")
    for row in document["compared"]:
        table.add_row(*cells(row))
    console.print(Panel(table, title=f"[bold]{document['stage']}[/]: {who(document)}", border_style="dim", expand=False))
    for line in lines(document):
        console.print(f"  {line}", soft_wrap=True)


def who(document: Mapping[str, Any]) -> str:
    measured = document["measured"]
    return f"rank {measured['rank']} of {measured['world_size']:,} (pipeline stage {document['pipeline_stage']})"


def cells(row: Mapping[str, Any]) -> Iterable[str]:
    yield LABELS.get(row["name"], row["name"])
    for value in (row["measured"], row["predicted"]):
        digits = 3 if row["unit"] == "GiB" and (value or 0) < 10 else 2
        yield UNKNOWN if value is None else f"{value:,.{digits}f} {row['unit']}"
    yield UNKNOWN if row["difference"] is None else f"{row['difference']:+.1%}"


def lines(document: Mapping[str, Any]) -> Iterable[str]:
    measured, times, speed = document["measured"], document["times"], document["speed"]
    count = len(measured["steps"])
    yield f"{measured['device']}, {count} steps of {measured['num_microbatches']} microbatches ({measured['data']} data)"
    yield f"spread of steps {times['spread']:.1%}; {times['stand_in_s'] * 1e3:.1f} ms a step stood in for others, taken off"
    tflops = ", ".join(f"{speed['tflops'][name]:.3g} {name}" for name in ("full", "causal", "sixn"))
    yield f"{speed['tokens_per_s']:,.1f} tokens/s/GPU of its own work; TFLOP/s: {tflops}{mfu(speed)}"
    yield from elsewhere(document["not_rehearsed"])
    yield from (f"turned off: {line}" for line in document["turned_off"])
    yield from (f"[bold red]not sound[/]: {line}" for line in measured["problems"])


def mfu(speed: Mapping[str, Any]) -> str:
    return "" if speed["mfu"] is None else f"; MFU (causal) {speed['mfu']:.1%} of {speed['mfu_peak_tflops']:,.0f}"


def elsewhere(planned: Mapping[str, float]) -> Iterable[str]:
    """What only the whole job can show, as planned."""
    if not planned:
        yield "no time is predicted of CPU ranks"
        return
    parts = ", ".join(f"{label} {planned[name] * 1e3:,.0f}" for name, label in ELSEWHERE.items() if planned[name] >= 5e-4)
    yield f"planned besides, ms of a step of {planned['step_s'] * 1e3:,.0f}: {parts or 'nothing'}"
    yield f"planned besides, GiB: communication buffers {planned['communication_gib']:.2f}"
