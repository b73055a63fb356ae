"""What a run came to: per stage, per source, and its held-out loss against the unigram entropy of the same text."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from data_prep.errors import DataError
from data_prep.manifest import Manifest, read_manifest
from data_prep.statistics import unigram_entropy
from data_prep.stream import SourceStream
from launcher.config.schema import RunConfig
from launcher.plan.prepared import folder_of
from launcher.report.format import format_count, format_duration, format_losses, format_number, format_percent
from launcher.report.history import History, StageHistory, first_value, last_value, read_history
from launcher.report.report_bands import Band, bands_of, fill_meter
from launcher.rundir.goodput import MeasuredGoodput, Meter
from launcher.rundir.lock import is_live
from launcher.rundir.order import stage_shares
from launcher.rundir.paths import RunDir


@dataclass(frozen=True)
class StageSummary:
    """One trained stage. Losses are those of the first and last logged step, nats per token; tokens/s is the median."""

    name: str
    tokens: float
    steps: int
    first_loss: float | None
    last_loss: float | None
    tokens_per_s: float | None


@dataclass(frozen=True)
class SourceSummary:
    """One source over the whole run. `shares` by stage; `unique_tokens` is the manifest's; losses and entropy in nats per
    token of the same held-out text. None is a figure nobody has: no manifest here, or no validation yet."""

    name: str
    shares: dict[str, float]
    tokens: float
    unique_tokens: int | None
    max_epochs: float | None
    held_out_loss: float | None
    entropy: float | None

    @property
    def epochs(self) -> float | None:
        return self.tokens / self.unique_tokens if self.unique_tokens else None

    @property
    def is_over_cap(self) -> bool:
        return self.max_epochs is not None and (self.epochs or 0.0) > self.max_epochs

    @property
    def ratio(self) -> float | None:
        """Held-out loss over unigram entropy: below 1 the model knows more than how often each token occurs."""
        return self.held_out_loss / self.entropy if self.held_out_loss is not None and self.entropy else None


@dataclass(frozen=True)
class Summary:
    """A run so far. The total held-out loss and entropy weigh the sources by their shares in `mixture_stage`; `bands`: what it
    did when."""

    name: str
    state: str
    tokens: float
    wall_s: float
    stages: tuple[StageSummary, ...]
    sources: tuple[SourceSummary, ...]
    mixture_stage: str
    held_out_loss: float | None
    entropy: float | None
    places: dict[str, Path]
    goodput: MeasuredGoodput | None
    bands: tuple[Band, ...]

    @property
    def below_entropy(self) -> float | None:
        """How far the held-out loss lies below the unigram entropy, as a fraction of it."""
        return 1.0 - self.held_out_loss / self.entropy if self.held_out_loss is not None and self.entropy else None

    @property
    def tokens_per_s(self) -> float | None:
        """Median tokens/s of the stage trained last."""
        return self.stages[-1].tokens_per_s if self.stages else None

    @property
    def verdict(self) -> str:
        """Both figures in a sentence."""
        below = self.below_entropy
        if below is None or self.entropy is None:
            return f"held-out loss {format_number(self.held_out_loss)}, unigram entropy of the held-out text not known"
        direction = "below" if below >= 0 else "above"
        loss, entropy = format_number(self.held_out_loss), format_number(self.entropy)
        return f"held-out loss {loss} is {format_percent(abs(below))} {direction} the unigram entropy {entropy}"

    @property
    def goodput_line(self) -> str:
        """Where the time went, in a sentence; empty before the first row."""
        found = self.goodput
        if found is None:
            return ""
        told = f"goodput {format_percent(found.goodput)} of {format_duration(found.wall_s)}"
        lost = format_losses(dict(found.largest), wall_s=found.wall_s)
        return f"{told}; lost: {lost}" if lost else told


def summarise(run: RunDir, config: RunConfig, *, history: History | None = None) -> Summary:
    """Reads metrics, manifests and the held-out text; a `history` already read is used as it is."""
    history = read_history(run) if history is None else history
    shares = stage_shares(run, config)
    sources = tuple(_summarise_source(name, config=config, history=history, shares=shares) for name in source_names(config))
    stage = mixture_stage(config, history=history)
    meter, until = Meter(run), time.time() if is_live(run) else None
    fill_meter(meter, rows=history.rows.for_goodput(), events=history.events)
    # As training does, over the sources that have held-out text; the entropy over the very same ones.
    weights = {source.name: source.shares[stage] for source in sources if source.held_out_loss and stage in source.shares}
    return Summary(
        name=config.run.name,
        state=history.status.get("state", "not started"),
        tokens=history.tokens,
        wall_s=history.wall_s,
        stages=tuple(_summarise_stage(stage) for stage in history.stages),
        sources=sources,
        mixture_stage=stage,
        held_out_loss=weighted_mean({source.name: source.held_out_loss for source in sources}, weights=weights),
        entropy=weighted_mean({source.name: source.entropy for source in sources}, weights=weights),
        places=find_places(run, config=config),
        goodput=meter.measure(until),
        bands=bands_of(meter.ledger, until=until),
    )


def source_names(config: RunConfig) -> tuple[str, ...]:
    """Every source of every stage, once, in the order of the config."""
    return tuple(dict.fromkeys(name for stage in config.stages for name in stage.mixture.sources))


def mixture_stage(config: RunConfig, *, history: History) -> str:
    """The stage whose mixture weighs the totals: the last one validated, before that the last of the config."""
    validated = [stage.name for stage in history.stages if len(stage.validation) and stage.name in config.stage_names]
    return validated[-1] if validated else config.stage_names[-1]


def weighted_mean(values: Mapping[str, float | None], *, weights: Mapping[str, float]) -> float | None:
    """Mean over the names in `weights`; None unless each has a value, so that two totals always cover the same sources."""
    known = [(weight, value) for name, weight in weights.items() if (value := values.get(name)) is not None]
    if not known or len(known) < len(weights):
        return None
    return sum(weight * value for weight, value in known) / sum(weights.values())


def find_places(run: RunDir, *, config: RunConfig) -> dict[str, Path]:
    """Where everything is: only what exists."""
    places = {"run directory": run.root}
    places |= {f"checkpoints {name}": run.checkpoints(name) for name in config.stage_names}
    places |= {f"export {name}": run.export(name) for name in config.stage_names}
    places |= {"report": run.report, "logs": run.logs}
    return {name: path for name, path in places.items() if path.exists()}


def _summarise_stage(stage: StageHistory) -> StageSummary:
    speed = stage.train["tokens_per_s"]
    known = speed[~np.isnan(speed)]
    return StageSummary(
        name=stage.name,
        tokens=stage.tokens,
        steps=stage.steps,
        first_loss=first_value(stage.train["loss"]),
        last_loss=last_value(stage.train["loss"]),
        tokens_per_s=float(np.median(known)) if len(known) else None,
    )


def _summarise_source(
    name: str, *, config: RunConfig, history: History, shares: Mapping[str, Mapping[str, float]]
) -> SourceSummary:
    settings = {stage.stage.name: stage.mixture.sources[name] for stage in config.stages if name in stage.mixture.sources}
    validated = _last_validated(name, stages=history.stages)
    manifest = _read_manifest(config, name)
    return SourceSummary(
        name=name,
        shares={stage: row.get(name, 0.0) for stage, row in shares.items() if stage in settings},
        tokens=sum(_last(stage.train.tokens_by_source, name) or 0.0 for stage in history.stages),
        unique_tokens=manifest.train.tokens if manifest else None,
        max_epochs=list(settings.values())[-1].max_epochs,
        held_out_loss=_last(validated.validation.loss_by_source, name) if validated else None,
        entropy=_held_out_entropy(name, config=config, stage=validated) if manifest else None,
    )


def _last(columns: Mapping[str, NDArray[np.float64]], name: str) -> float | None:
    return last_value(columns[name]) if name in columns else None


def _last_validated(name: str, *, stages: Iterable[StageHistory]) -> StageHistory | None:
    """The last stage with a held-out loss of the source."""
    validated = [stage for stage in stages if _last(stage.validation.loss_by_source, name) is not None]
    return validated[-1] if validated else None


def _read_manifest(config: RunConfig, name: str) -> Manifest | None:
    """None where the data lies elsewhere: a run directory is readable without it."""
    try:
        return read_manifest(folder_of(config, name))
    except (OSError, DataError):
        return None


def _held_out_entropy(name: str, *, config: RunConfig, stage: StageHistory | None) -> float | None:
    """Unigram entropy of the tokens the last validation predicted: windows of S + 1 lie S apart, so that after the first
    token every token is a label once. None before a validation, or where the shards are gone."""
    if stage is None:
        return None
    evaluated = int(_last(stage.validation.tokens_by_source, name) or 0)
    try:
        stream = SourceStream(folder_of(config, name), name=name, split="held_out")
        return unigram_entropy(stream.read(1, evaluated)) if evaluated else None
    except (OSError, DataError):
        # The manifest may have been copied here without its shards.
        return None


def print_summary(summary: Summary, *, console: Console | None = None) -> None:
    """The tables that end `phidias train`."""
    console = console or Console()
    console.print(_stage_table(summary))
    console.print(_source_table(summary))
    console.print(f"\n[bold]{summary.verdict}[/bold]", highlight=False)
    console.print(f"{format_count(summary.tokens)} tokens in {format_duration(summary.wall_s)}", highlight=False)
    if summary.goodput:
        console.print(summary.goodput_line, highlight=False, soft_wrap=True)
    width = max(map(len, summary.places))
    for name, path in summary.places.items():
        # soft_wrap: a path broken over two lines cannot be copied.
        console.print(f"  {name:<{width}}  {path}", highlight=False, soft_wrap=True, markup=False)


def _table(title: str, *, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _stage_table(summary: Summary) -> Table:
    table = _table(f"{summary.name}: stages", columns=("stage", "tokens", "steps", "first loss", "last loss", "tokens/s"))
    for stage in summary.stages:
        losses = (format_number(stage.first_loss), format_number(stage.last_loss))
        table.add_row(stage.name, format_count(stage.tokens), f"{stage.steps:,}", *losses, format_count(stage.tokens_per_s))
    return table


def _source_table(summary: Summary) -> Table:
    columns = ("source", "tokens read", "unique", "epochs", "held-out loss", "unigram entropy", "ratio")
    table = _table("\nsources", columns=columns)
    for source in summary.sources:
        table.add_row(
            source.name,
            format_count(source.tokens),
            format_count(source.unique_tokens),
            format_number(source.epochs, digits=2),
            format_number(source.held_out_loss),
            format_number(source.entropy),
            format_number(source.ratio),
        )
    return table
