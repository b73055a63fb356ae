"""`phidias plan` and `phidias exposure` for people."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from launcher.config.schema import ModelConfig, RunConfig
from launcher.plan.exposure import Exposure
from launcher.plan.parameters import count_parameters
from launcher.plan.prediction_page import print_prediction
from launcher.plan.search import Found

UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
UNKNOWN = "–"


def print_plan(
    config: RunConfig,
    *,
    stages: Sequence[dict[str, Any]],
    found: Mapping[str, Found] | None = None,
    console: Console | None = None,
) -> None:
    """The page: `stages` is the plan document, `found` what layout=auto weighed."""
    console = console or Console(highlight=False)
    table = Table(
        title=f"[bold]{config.run.name}[/]: {model_line(config.model)}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("")
    for stage in stages:
        table.add_column(stage["stage"], justify="right", header_style="bold cyan")
    columns = [list(stage_lines(stage)) for stage in stages]
    for rows in zip(*columns, strict=True):
        table.add_row(f"[dim]{rows[0][0]}[/]", *(value for _, value in rows))
    console.print(Panel.fit(table, border_style="dim"))
    for stage in stages:
        print_prediction(stage, found=(found or {}).get(stage["stage"]), console=console)
        for refusal in stage["refusals"]:
            console.print(f"[bold red]refused[/] (stage {stage['stage']}): {refusal}")


def model_line(model: ModelConfig) -> str:
    count = count_parameters(model)
    parts = f"embedding {count.embedding:,}, layers {count.layers:,}, head {count.head:,}"
    return f"{model.name}, {count.total:,} parameters\n[dim]{parts}[/]"


def stage_lines(stage: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Label and value of each line of a stage's column."""
    layout, flops = stage["layout"], stage["flops_per_token"]
    yield "tokens", short(stage["tokens"])
    yield "steps", f"{stage['num_steps']:,}"
    yield "tokens/step", short(stage["tokens_per_step"])
    yield "sequence length", f"{stage['seq_length']:,}"
    sizes = [row["size"] for row in stage["batches"]]
    yield "global batch", f"{sizes[-1]:,}" + (f" from {sizes[0]:,} in {len(sizes) - 1} steps up" if len(sizes) > 1 else "")
    yield "RoPE base", f"{stage['rotary_base']:,}"
    yield "precision", stage["precision"]
    yield "cluster", f"{stage['cluster']}, {stage['world_size']:,} ranks"
    yield "layout", " ".join(f"{name}{layout[name]}" for name in ("tp", "pp", "vpp", "cp", "dp"))
    yield "microbatches", f"{stage['num_microbatches']} of {stage['micro_batch_size']}"
    yield "recomputed", ", ".join(layout["recompute_modules"]) if layout["recompute"] == "selective" else layout["recompute"]
    yield "pipeline bubble", f"{stage['bubble_fraction']:.1%}"
    yield from predicted_lines(stage)
    yield "parameters/rank", " ".join(short(count) for count in stage["params_by_pipeline_stage"])
    yield "FLOPs/token", ", ".join(f"{short(flops[name], flop=True)} {name}" for name in ("full", "causal", "sixn"))
    yield "warm-up", f"{stage['warmup_steps']:,} steps"
    for label, samples in (("checkpoints", stage["checkpoint_samples"]), ("validation", stage["validation_samples"])):
        yield label, f"every {max(1, round(samples / stage['global_batch_size'])):,} steps"
    yield "sources", ", ".join(f"{name} {share:.4g}" for name, share in stage["sources"].items())
    yield "mixture phases", " ".join(["from 0", *(short(phase["start_tokens"]) for phase in stage["phases"][1:])])


def predicted_lines(stage: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Speed, memory, time and cost; a dash each on CPU ranks, of which no speed is known."""
    memory, goodput = stage["memory_gib"], stage["goodput"]
    known = stage["step_time_s"] is not None
    capacity = f" of {memory['capacity']:.1f}" if memory["capacity"] else ""
    yield (
        "memory/GPU" if known else "memory/rank",
        f"{memory['peak']:.1f}{capacity} GiB" if known else f"{memory['peak']:.2f} GiB",
    )
    if not known:
        yield "speed", "not predicted on CPU ranks"
        return
    tflops = stage["model_tflops_per_gpu"]
    yield "step", f"{stage['step_time_s']:.3f} s"
    yield "[bold]tokens/s/GPU[/]", f"[bold]{stage['tokens_per_s_per_gpu']:,.0f}[/]"
    yield "TFLOP/s/GPU", ", ".join(f"{tflops[name]:.0f} {name}" for name in ("full", "causal", "sixn"))
    yield "MFU (causal)", f"{stage['mfu']:.1%} of {stage['mfu_peak_tflops']:,.0f}"
    cost = "" if stage["cost_usd"] is None else f", ${stage['cost_usd']:,.0f}"
    days = (
        "never ends" if stage["days"] is None else f"[bold]{stage['days']:.1f}[/], {short(stage['gpu_hours'])} GPU-hours{cost}"
    )
    yield "[bold]days[/]", days
    if goodput:
        yield "goodput", f"{goodput['goodput']:.1%}, a failure every {goodput['failure_interval_s'] / 3600:.0f} h"
        interval, optimum = goodput["interval_s"] / 60, goodput["optimum_interval_s"] / 60
        yield "checkpoint", f"{goodput['checkpoint_s']:.1f} s every {interval:.0f} min; best {optimum:.0f} min"


def print_exposure(config: RunConfig, *, rows: Sequence[Exposure], console: Console | None = None) -> None:
    """The table of `phidias exposure`; of a run that has begun, with what it has read by now."""
    console = console or Console(highlight=False)
    tokens = sum(stage.stage.tokens for stage in config.stages)
    begun = any(row.tokens_read is not None for row in rows)
    title = f"[bold]{config.run.name}[/]: {short(tokens)} tokens over {', '.join(config.stage_names)}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = (
        "source",
        "share",
        "tokens",
        "unique",
        "epochs",
        "cap",
        "repeats from",
        "at step",
        *(("read", "epochs so far") if begun else ()),
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "source" else "right", header_style="bold cyan")
    for row in rows:
        table.add_row(*exposure_cells(row), *((short(row.tokens_read), epochs(row.epochs_read)) if begun else ()))
    console.print(Panel.fit(table, border_style="dim"))


def exposure_cells(row: Exposure) -> Iterable[str]:
    yield row.source
    yield f"{row.share:.2%}"
    yield short(row.tokens)
    yield short(row.unique_tokens)
    yield epochs(row.epochs)
    yield UNKNOWN if row.max_epochs is None else f"{row.max_epochs:g}"
    yield short(row.first_repeat_token)
    yield UNKNOWN if row.first_repeat_step is None else f"{row.first_repeat_stage} {row.first_repeat_step:,}"


def epochs(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}"


def short(value: float | None, *, flop: bool = False) -> str:
    """23592960 -> 23.6M; FLOPs say G where tokens say B."""
    if value is None:
        return UNKNOWN
    for unit, size in UNITS:
        if abs(value) >= size:
            return f"{value / size:.4g}{'G' if flop and unit == 'B' else unit}"
    return f"{value:g}"
