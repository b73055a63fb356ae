"""Mixture rules: shares, one meaning for each source name, and how often a source may be read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from data_prep.spec import Source
from launcher.config.errors import Problem
from launcher.config.schema import RunConfig, StageConfig

SHARE_TOLERANCE = 1e-6  # data_prep.order's
IDENTITY = ("inputs", "format", "text_field", "unique_tokens")


@dataclass(frozen=True)
class Reading:
    """What one stage reads of one source. `before` and `after` are the tokens read since the run's start."""

    stage: StageConfig
    name: str
    source: Source
    before: float
    after: float


def readings(config: RunConfig) -> Iterator[Reading]:
    """Every stage's use of every source, in the order of training; shares of the stage's token horizon."""
    read: dict[str, float] = {}
    for stage in config.stages:
        for name, source in stage.mixture.sources.items():
            before = read.get(name, 0.0)
            read[name] = before + source.share * stage.stage.tokens
            yield Reading(stage, name, source, before, read[name])


def check_mixtures(config: RunConfig) -> Iterator[tuple[str | None, Problem]]:
    for stage in config.stages:
        for problem in check_shares(stage):
            yield stage.stage.name, problem
    yield from check_identity(config)
    yield from check_caps(config)


def check_shares(stage: StageConfig) -> Iterator[Problem]:
    shares = {name: source.share for name, source in stage.mixture.sources.items()}
    total = math.fsum(shares.values())
    if abs(total - 1) > SHARE_TOLERANCE:
        found = f"shares {', '.join(f'{name} {share:g}' for name, share in shares.items())}, in sum {total:.8g}"
        fix = "in proportion: " + ", ".join(f"{name} {share / total:.6g}" for name, share in shares.items())
        yield Problem("mixture.sources", found, "the shares of a stage's tokens must sum to 1", fix)


def check_identity(config: RunConfig) -> Iterator[tuple[str | None, Problem]]:
    """One name is one source for the whole run: its shards and its place in the data order go by the name."""
    first: dict[str, Reading] = {}
    for reading in readings(config):
        before = first.setdefault(reading.name, reading)
        for field in IDENTITY:
            here, there = getattr(reading.source, field), getattr(before.source, field)
            if here != there:
                rule = f"in stage {before.stage.stage.name} it is {_shown(there)}, and one name is one source for the whole run"
                path = f"mixture.sources.{reading.name}.{field}"
                yield reading.stage.stage.name, Problem(path, _shown(here), rule, "give the other source a name of its own")


def check_caps(config: RunConfig, *, unique_tokens: Mapping[str, float] | None = None) -> Iterator[tuple[str | None, Problem]]:
    """Sources read more often than max_epochs allows. `unique_tokens`: the truth where shards exist."""
    for reading in readings(config):
        unique = (unique_tokens or {}).get(reading.name, reading.source.unique_tokens)
        cap = reading.source.max_epochs
        if unique is None or cap is None or reading.after <= cap * unique:
            continue
        rule = (
            f"{reading.after:.4g} tokens of {unique:.4g} unique ones are {reading.after / unique:.4g} epochs by the end of it"
        )
        room = max(0.0, (cap * unique - reading.before) / reading.stage.stage.tokens)
        fix = f"a share of at most {math.floor(room * 1e6) / 1e6:g}, fewer stage.tokens, more text, or a higher cap"
        yield reading.stage.stage.name, Problem(f"mixture.sources.{reading.name}.max_epochs", f"{cap:g}", rule, fix)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
