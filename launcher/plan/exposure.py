"""Exposure: how often each source is read over the stages of a run."""

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config.check_mixture import Reading, readings
from launcher.config.schema import RunConfig


@dataclass(frozen=True)
class Exposure:
    """One source over all selected stages. `share` is its part of all their tokens. `unique_tokens` is the manifest's count
    where the source is prepared, else what the mixture assumes; null where neither is known. `first_repeat_token`: the run's
    token count at which the source begins to repeat; null where it does not."""

    source: str
    share: float
    tokens: float
    unique_tokens: float | None
    epochs: float | None
    max_epochs: float | None
    first_repeat_token: float | None


def plan_exposure(config: RunConfig, *, unique_tokens: Mapping[str, float] | None = None) -> list[Exposure]:
    """A row a source, in the order the stages first name them. `unique_tokens`: what manifests say, by source."""
    by_source: dict[str, list[Reading]] = {}
    for reading in readings(config):
        by_source.setdefault(reading.name, []).append(reading)
    return [_exposure(rows, config=config, counted=(unique_tokens or {}).get(name)) for name, rows in by_source.items()]


def _exposure(rows: list[Reading], *, config: RunConfig, counted: float | None) -> Exposure:
    last, total = rows[-1], sum(stage.stage.tokens for stage in config.stages)
    unique = counted if counted is not None else last.source.unique_tokens
    caps = [row.source.max_epochs for row in rows if row.source.max_epochs is not None]
    return Exposure(
        source=last.name,
        share=last.after / total,
        tokens=last.after,
        unique_tokens=unique,
        epochs=None if unique is None else last.after / unique,
        max_epochs=min(caps, default=None),
        first_repeat_token=None if unique is None else _first_repeat(rows, config=config, unique=unique),
    )


def _first_repeat(rows: list[Reading], *, config: RunConfig, unique: float) -> float | None:
    """Shares are spread evenly over a stage, so the source's end is reached at a proportional place in it."""
    starts: dict[str, float] = {}
    for stage in config.stages:
        starts[stage.stage.name] = sum(starts_of.stage.tokens for starts_of in config.stages[: len(starts)])
    for row in rows:
        if row.before <= unique < row.after:
            return float(round(starts[row.stage.stage.name] + (unique - row.before) / row.source.share))
    return None
