"""`phidias plan` and `phidias exposure` for people."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from launcher.config.schema import ModelConfig, RunConfig
from launcher.plan.document import plan_document
from launcher.plan.exposure import Exposure
from launcher.plan.parameters import count_parameters

UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
UNKNOWN = "–"


def print_plan(config: RunConfig, *, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    stages = plan_document(config)
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
    yield "global batch", f"{stage['global_batch_size']:,}"
    yield "RoPE base", f"{stage['rotary_base']:,}"
    yield "precision", stage["precision"]
    yield "cluster", f"{stage['cluster']}, {stage['world_size']:,} ranks"
    yield "layout", " ".join(f"{name}{layout[name]}" for name in ("tp", "pp", "vpp", "cp", "dp"))
    yield "microbatches", f"{stage['num_microbatches']} of {stage['micro_batch_size']}"
    yield "pipeline bubble", f"{stage['bubble_fraction']:.1%}"
    yield "parameters/rank", " ".join(short(count) for count in stage["params_by_pipeline_stage"])
    yield "FLOPs/token", ", ".join(f"{short(flops[name], flop=True)} {name}" for name in ("full", "causal", "sixn"))
    yield "warm-up", f"{stage['warmup_steps']:,} steps"
    yield "checkpoints", f"every {stage['checkpoint_interval']:,} steps"
    yield "validation", f"every {stage['validation_interval']:,} steps"
    yield "sources", ", ".join(f"{name} {share:.4g}" for name, share in stage["sources"].items())


def print_exposure(config: RunConfig, *, rows: Iterable[Exposure], console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    tokens = sum(stage.stage.tokens for stage in config.stages)
    title = f"[bold]{config.run.name}[/]: {short(tokens)} tokens over {', '.join(config.stage_names)}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("source", "share", "tokens", "unique", "epochs", "cap", "repeats from"):
        table.add_column(name, justify="left" if name == "source" else "right", header_style="bold cyan")
    for row in rows:
        epochs = UNKNOWN if row.epochs is None else f"{row.epochs:.2f}"
        cap = UNKNOWN if row.max_epochs is None else f"{row.max_epochs:g}"
        table.add_row(
            row.source,
            f"{row.share:.2%}",
            short(row.tokens),
            short(row.unique_tokens),
            epochs,
            cap,
            short(row.first_repeat_token),
        )
    console.print(Panel.fit(table, border_style="dim"))


def short(value: float | None, *, flop: bool = False) -> str:
    """23592960 -> 23.6M; FLOPs say G where tokens say B."""
    if value is None:
        return UNKNOWN
    for unit, size in UNITS:
        if abs(value) >= size:
            return f"{value / size:.4g}{'G' if flop and unit == 'B' else unit}"
    return f"{value:g}"
