"""Exposure: how often each source is read over the stages of a run, and how far a live one has come."""

from collections.abc import Mapping
from dataclasses import dataclass

from data_prep.exposure import Reading, readings
from launcher.config.reading import Sizes, Tables, all_sources, assumed_sizes, plan_tables, stage_uses
from launcher.config.schema import RunConfig
from launcher.plan.stage import plan_stage


@dataclass(frozen=True)
class Exposure:
    """One source over all selected stages.

    `share` is its part of all their tokens; `tokens` are read through this source, each read counted once. `unique_tokens` is
    the manifest's count where the source is prepared, else what the mixture assumes; null where neither is known. `epochs`
    are those of its most read tokens: documents that lie in a length bucket are read through that, too.
    `first_repeat_token`, `_stage` and `_step`: the run's token count, and the step, at which it begins to read tokens again;
    null where it does not. `tokens_read` and `epochs_read`: by now, where the run has begun."""

    source: str
    share: float
    tokens: float
    unique_tokens: float | None
    epochs: float | None
    max_epochs: float | None
    first_repeat_token: float | None
    first_repeat_stage: str | None
    first_repeat_step: int | None
    tokens_read: float | None
    epochs_read: float | None


def plan_exposure(
    config: RunConfig,
    *,
    sizes: Sizes | None = None,
    tables: Tables | None = None,
    samples_read: Mapping[str, int] | None = None,
) -> list[Exposure]:
    """A row a source, in the order the stages first name them. `sizes`: what manifests say, by source; `tables`: the phases
    that the run has recorded; `samples_read`: of each stage, by now."""
    known = {**assumed_sizes(config), **(sizes or {})}
    rows = {**plan_tables(config, sizes=known), **(tables or {})}
    planned = readings(stage_uses(config, sizes=known, tables=rows), seed=config.run.seed)
    now = readings(stage_uses(config, sizes=known, tables=rows, samples=samples_read or {}), seed=config.run.seed)
    begun = bool(samples_read and any(samples_read.values()))
    return [
        _exposure(name, found=by_source(planned, name), now=by_source(now, name), config=config, sizes=known, begun=begun)
        for name in all_sources(config)
    ]


def by_source(found: list[Reading], name: str) -> list[Reading]:
    return [reading for reading in found if reading.source == name]


def _exposure(name: str, *, found: list[Reading], now: list[Reading], config: RunConfig, sizes: Sizes, begun: bool) -> Exposure:
    most = max(found, key=lambda reading: reading.tokens_after, default=None)
    read = max(now, key=lambda reading: reading.tokens_after, default=None)
    caps = [stage.mixture.sources[name].max_epochs for stage in config.stages if name in stage.mixture.sources]
    repeat = next((reading for reading in found if reading.first_repeat is not None), None)
    tokens = most.tokens_after if most else 0.0
    return Exposure(
        source=name,
        share=tokens / sum(stage.stage.tokens for stage in config.stages),
        tokens=tokens,
        unique_tokens=sizes[name].tokens if name in sizes else None,
        epochs=most.epochs if most else 0.0,
        max_epochs=min((cap for cap in caps if cap is not None), default=None),
        first_repeat_token=_token_of(repeat, config=config),
        first_repeat_stage=repeat.stage if repeat else None,
        first_repeat_step=_step_of(repeat, config=config),
        tokens_read=(read.tokens_after if read else 0.0) if begun else None,
        epochs_read=(read.epochs if read else 0.0) if begun else None,
    )


def _token_of(repeat: Reading | None, *, config: RunConfig) -> float | None:
    """The run's token count at a reading's first repeat: its stages one after another."""
    if repeat is None or repeat.first_repeat is None:
        return None
    before = config.stages[: config.stage_names.index(repeat.stage)]
    here = repeat.first_repeat * config.stage(repeat.stage).stage.seq_length
    return float(here + sum(stage.stage.num_samples * stage.stage.seq_length for stage in before))


def _step_of(repeat: Reading | None, *, config: RunConfig) -> int | None:
    """The step of the stage (from 1) whose batch holds the first repeat."""
    if repeat is None or repeat.first_repeat is None:
        return None
    return plan_stage(config.stage(repeat.stage), cluster=config.cluster).steps_at(repeat.first_repeat + 1)
