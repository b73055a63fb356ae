"""The predicted part of `phidias plan` for people: time, memory, matrix products, and what layout=auto weighed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table

from launcher.config.schema import Layout
from launcher.plan.search import Found, describe, why_slower

# Components under so much of a step, or so many GiB, share a line.
SMALL_PART, SMALL_GIB = 0.001, 0.005


def print_prediction(stage: Mapping[str, Any], *, found: Found | None, console: Console) -> None:
    """Tables of one stage: where a step's time and a GPU's memory go."""
    tables: list[RenderableType] = [memory_table(stage["memory_gib"])]
    if stage["step_time_s"] is not None:
        tables = [time_table(stage), *tables, gemm_table(stage["gemms"])]
    console.print(Panel(Columns(tables, padding=(0, 3)), title=f"[bold]{stage['stage']}[/]", border_style="dim", expand=False))
    if found is not None:
        best = found.best[0]
        title = f"[bold]{stage['stage']}: layout=auto[/]"
        console.print(Panel(found_table(found), title=title, border_style="dim", expand=False))
        console.print(f"  chosen: {describe(best.layout)} precision={best.precision.name}", soft_wrap=True)
    for row in stage["rehearsals"] or []:
        found_out = f"{row['microbatch_s'] * 1e3:.1f} ms a microbatch, {row['peak_gib']:.1f} GiB"
        console.print(f"  rehearsed {row['date']}, pipeline stage {row['pipeline_stage']}: {found_out}")


def time_table(stage: Mapping[str, Any]) -> Table:
    step_s = stage["step_time_s"]
    table = plain_table("time of a step", "ms", "")
    rows = sorted(stage["time_s"].items(), key=lambda item: -item[1])
    for name, seconds in rows:
        if seconds >= SMALL_PART * step_s:
            table.add_row(name, f"{seconds * 1e3:,.1f}", f"{seconds / step_s:.1%}")
    rest = [(name, seconds) for name, seconds in rows if seconds < SMALL_PART * step_s]
    if rest:
        total = sum(seconds for _, seconds in rest)
        table.add_row("[dim]" + folded([name for name, _ in rest]) + "[/]", f"{total * 1e3:,.1f}", f"{total / step_s:.1%}")
    table.add_row("[bold]step[/]", f"[bold]{step_s * 1e3:,.1f}[/]", "")
    if stage["checkpoint_s_per_step"] is not None:
        table.add_row("[dim]checkpoints besides, a step[/]", f"{stage['checkpoint_s_per_step'] * 1e3:,.1f}", "")
    return table


def folded(names: Sequence[str]) -> str:
    return "\n".join(", ".join(names[start : start + 3]) for start in range(0, len(names), 3))


def memory_table(memory: Mapping[str, Any]) -> Table:
    """GiB of each pipeline stage by component; of long pipelines the first, the fullest and the last."""
    stages = memory["by_stage"]
    fullest = max(range(len(stages)), key=lambda index: stages[index]["total"])
    shown = range(len(stages)) if len(stages) <= 4 else sorted({0, 1, fullest, len(stages) - 1})
    table = plain_table("GiB of a GPU", *(f"stage {stages[index]['stage']}" for index in shown))
    for name in dict.fromkeys(name for index in shown for name in stages[index]["by_component"]):
        sizes = [stages[index]["by_component"].get(name, 0.0) for index in shown]
        if max(sizes) >= SMALL_GIB:
            table.add_row(name, *(f"{size:.2f}" for size in sizes))
    table.add_row("[bold]total[/]", *(f"[bold]{stages[index]['total']:.1f}[/]" for index in shown))
    if memory["capacity"] is not None:
        table.add_row("of the device", *(f"{stages[index]['total'] / memory['capacity']:.0%}" for index in shown))
    return table


def gemm_table(gemms: Iterable[Mapping[str, Any]]) -> Table:
    table = plain_table("matrix product", "m", "n", "k", "", "TFLOP/s", "ms")
    for row in gemms:
        sizes = (f"{row[name]:,}" for name in ("m", "n", "k"))
        table.add_row(row["name"], *sizes, row["precision"], f"{row['tflops']:,.0f}", f"{row['seconds'] * 1e3:.3f}")
    return table


def found_table(found: Found) -> Table:
    """The best layouts, and why each is slower than the first."""
    best = found.best[0]
    title = f"best of {found.num_candidates:,}; {found.num_too_large:,} of those looked at did not fit"
    table = plain_table(title, "step s", "GiB", "loses", align="left")
    for candidate in found.best:
        words = f"{in_short(candidate.layout)} {candidate.precision.name}"
        words += " gathered" if candidate.precision.fp8_param_gather else ""
        slower = "" if candidate is best else f"+{candidate.seconds / best.seconds - 1:.1%}: {why_slower(candidate, best=best)}"
        table.add_row(words, f"{candidate.seconds:.3f}", f"{candidate.memory_gib:.1f}", slower)
    return table


def in_short(layout: Layout) -> str:
    """tp2 pp4 vpp5 mbs1, and what else is unusual."""
    sizes = " ".join(f"{name}{getattr(layout, name)}" for name in ("tp", "pp", "vpp", "cp") if getattr(layout, name) > 1)
    words = [sizes, f"mbs{layout.micro_batch_size}"]
    words += [layout.cp_comm_type] if layout.cp > 1 and layout.cp_comm_type != "p2p" else []
    words += [f"{layout.recompute} recompute"] if layout.recompute != "none" else []
    words += ["ends as layers"] if layout.account_for_embedding_in_pipeline_split else []
    return " ".join(word for word in words if word)


def plain_table(first: str, *others: str, align: Any = "right") -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, header_style="bold", overflow="fold")
    for name in others:
        table.add_column(name, justify=align, header_style="cyan", overflow="fold")
    return table
