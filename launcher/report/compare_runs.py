"""What a comparison reads of runs: held-out losses over the tokens trained and the shares they were trained on; and whether
those losses measure the same thing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.mixing import mean_shares
from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.plan.parameters import flops_per_token
from launcher.report.compare_history import Column, StageLosses, read_losses
from launcher.report.format import format_count
from launcher.rundir.freeze import read_config
from launcher.rundir.order import recorded_held_out, recorded_shards, recorded_tables, stage_shares
from launcher.rundir.paths import RunDir

CONVENTION = "causal"  # FLOPs as the planner's MFU counts them


@dataclass(frozen=True)
class Curve:
    """Held-out losses of a run in one stage, a row a validation: nats per token, by source, and `own`, their mean by the run's
    own shares. `tokens` counts over the run, with the stages before (`tokens_before`, `flops_before`). `evaluated`: held-out
    tokens of each source; `planned`: tokens of the run by the stage's end."""

    run: RunDir
    config: RunConfig
    stage: str
    tokens: Column
    losses: Mapping[str, Column]
    own: Column
    evaluated: Mapping[str, int]
    tokens_before: float
    flops_before: float
    flops_per_token: float
    planned: float

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def reached(self) -> float:
        """Tokens at the last validation."""
        return float(self.tokens[-1])

    def flops_at(self, tokens: float) -> float:
        return self.flops_before + (tokens - self.tokens_before) * self.flops_per_token

    def tokens_at(self, flops: float) -> float:
        return self.tokens_before + (flops - self.flops_before) / self.flops_per_token

    def shares_at(self, tokens: float) -> dict[str, float] | None:
        """The mean share of each source in the stage up to there, as order.json has it; as planned where nothing is recorded.
        None where that cannot be known."""
        rows = recorded_tables(self.run).get(self.stage)
        if rows is None:
            return stage_shares(self.run, self.config).get(self.stage)
        seq_length = self.config.stage(self.stage).stage.seq_length
        return mean_shares(rows, num_samples=max(1, round((tokens - self.tokens_before) / seq_length)))


def read_curves(runs: Sequence[RunDir], *, stage: str | None = None) -> list[Curve]:
    """The validated part of `stage` of each run; without one, of the last stage that all have validated. ConfigError: fewer
    than two runs, a run without validation rows, no stage in common."""
    if len(runs) < 2:
        found = f"one run, {runs[0].name}" if runs else "no run"
        rule = "a comparison is between two runs or more"
        raise ConfigError(Problem("run", found, rule, "name another, or a pattern in quotes: 'ablation-*'"))
    read = [(run, read_config(run), read_losses(run)) for run in runs]
    name = stage or common_stage({run.name: history for run, _, history in read})
    if missing := [run.name for run, _, history in read if name not in validated_stages(history)]:
        rule = f"held-out loss in stage {name} is compared"
        fix = "leave them out, or wait for their first validation (stage.validation.interval_tokens)"
        raise ConfigError(Problem("run", f"no validation row of it in {', '.join(missing)}", rule, fix))
    return [_curve(run, config, history, stage=name) for run, config, history in read]


def validated_stages(history: Mapping[str, StageLosses]) -> list[str]:
    return [name for name, stage in history.items() if stage.by_source("loss_by_source")]


def common_stage(histories: Mapping[str, Mapping[str, StageLosses]]) -> str:
    """The last one of the first run that every run has validated."""
    stages = {name: validated_stages(history) for name, history in histories.items()}
    if empty := [name for name, found in stages.items() if not found]:
        fix = "leave them out, or wait for their first validation (stage.validation.interval_tokens)"
        found = f"no validation row in metrics.jsonl of {', '.join(empty)}"
        raise ConfigError(Problem("run", found, "runs are compared by held-out loss", fix))
    first = next(iter(stages.values()))
    common = [name for name in first if all(name in others for others in stages.values())]
    if not common:
        found = "; ".join(f"{name} has {', '.join(found)}" for name, found in stages.items())
        raise ConfigError(Problem("stage", found, "one stage that all runs have validated is compared", "other runs"))
    return common[-1]


def _curve(run: RunDir, config: RunConfig, history: Mapping[str, StageLosses], *, stage: str) -> Curve:
    names, found, settings = list(history), history[stage], config.stage(stage).stage
    before = {name: history[name].tokens for name in names[: names.index(stage)]}
    losses, counts = found.by_source("loss_by_source"), found.by_source("tokens_by_source")
    known = np.isfinite(list(losses.values())).any(axis=0)  # not those of a run that has diverged
    return Curve(
        run=run,
        config=config,
        stage=stage,
        tokens=sum(before.values()) + found.column("tokens")[known],
        losses={name: column[known] for name, column in losses.items()},
        own=found.column("loss")[known],
        evaluated={name: int(column[np.isfinite(column)][-1]) for name, column in counts.items()},
        tokens_before=sum(before.values()),
        flops_before=sum(tokens * _flops(config, name) for name, tokens in before.items()),
        flops_per_token=_flops(config, stage),
        planned=sum(before.values()) + settings.num_samples * settings.seq_length,
    )


def _flops(config: RunConfig, stage: str) -> float:
    return flops_per_token(config.model, seq_length=config.stage(stage).stage.seq_length)[CONVENTION]


def value_at(curve: Curve, column: Column, *, tokens: float) -> float | None:
    """The value there: a validation's own, or between two of them on the straight line. None outside the first and the last:
    nothing is extrapolated."""
    known = np.isfinite(column)
    x, y = curve.tokens[known], column[known]
    if not len(x) or not x[0] <= tokens <= x[-1]:
        return None
    return float(np.interp(tokens, x, y))


def refuse_incomparable(curves: Sequence[Curve]) -> None:
    """ConfigError where a nat per token is not the same measure in all of them."""
    if problems := list(incomparable(curves)):
        raise ConfigError(*problems)


def incomparable(curves: Sequence[Curve]) -> Iterator[Problem]:
    rule = "nats per token of different tokens are different measures"
    for key in ("kind", "eod"):
        yield from _differing(f"tokenizer.{key}", {curve.name: getattr(curve.config.tokenizer, key) for curve in curves}, rule)
    yield from _differing("model.vocab_size", {curve.name: curve.config.model.vocab_size for curve in curves}, rule)
    yield from _differing("tokenizer.file", tokenizer_files(curves), rule)
    rule = "a held-out token is easier to predict with more before it"
    lengths = {curve.name: curve.config.stage(curve.stage).stage.seq_length for curve in curves}
    yield from _differing("stage.seq_length", lengths, rule)
    rule = "it says which held-out tokens count"
    masks = {curve.name: curve.config.stage(curve.stage).stage.eod_mask_loss for curve in curves}
    yield from _differing("stage.eod_mask_loss", masks, rule)


def _differing(path: str, values: Mapping[str, Any], rule: str) -> Iterator[Problem]:
    """A problem where not all runs have the same value; it names a run of each."""
    runs: dict[str, str] = {}
    for name, value in values.items():
        runs.setdefault(repr(value), name)
    if len(runs) > 1:
        found = " and ".join(f"{value} in {name}" for value, name in runs.items())
        yield Problem(path, found, rule, "compare the runs of one value")


def tokenizer_files(curves: Sequence[Curve]) -> dict[str, str]:
    """By run, the first of the paths that hold the same tokenizer; files that are not here are taken to be the same."""
    paths = {curve.name: Path(curve.config.tokenizer.file or curve.config.tokenizer.ranks_file or "") for curve in curves}
    contents = {path: path.read_bytes() for path in set(paths.values()) if path.is_file()}
    known: dict[bytes, str] = {}
    files = {name: known.setdefault(contents[path], str(path)) for name, path in paths.items() if path in contents}
    return files if len(files) == len(paths) or len(known) > 1 else {}


def shared_sources(curves: Sequence[Curve]) -> tuple[list[str], list[str]]:
    """The sources on whose held-out text all runs are measured alike, and a line for each that is left out. ConfigError where
    none remains.

    Text differs where validations read another number of its tokens, or order.json has another digest of it. Runs from before
    that was recorded are taken to differ where shards of the same name have another size: those were prepared anew."""
    named = [name for curve in curves for name in curve.config.stage(curve.stage).mixture.sources]
    every = [name for name in dict.fromkeys(named) if any(name in curve.losses for curve in curves)]
    shards = [recorded_shards(curve.run) for curve in curves]
    sizes = [{name: {file: state.size for file, state in files.items()} for name, files in row.items()} for row in shards]
    left_out = {name: why for name in every if (why := _why_not(name, curves=curves, sizes=sizes))}
    shared = [name for name in every if name not in left_out]
    lines = [f"{name} is not in the shared mean: {why}" for name, why in left_out.items()]
    if not shared:
        rule = "runs are compared on held-out text that all of them were measured on"
        raise ConfigError(Problem("run", "; ".join(lines), rule, "compare runs with a source in common, of the same data"))
    return shared, lines


def _why_not(name: str, *, curves: Sequence[Curve], sizes: Sequence[Mapping[str, Mapping[str, int]]]) -> str:
    if missing := [curve.name for curve in curves if name not in curve.losses]:
        return f"{missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''} did not measure it"
    counts = {curve.evaluated.get(name): curve.name for curve in curves}
    if len(counts) > 1:
        return "its held-out text differs: " + ", ".join(f"{count} tokens in {run}" for count, run in counts.items())
    texts = {text: curve.name for curve in curves if (text := recorded_held_out(curve.run).get(name))}
    if len(texts) > 1:
        return "its held-out text differs: it was prepared in another way for " + " and ".join(texts.values())
    for row, curve in zip(sizes, curves, strict=True):
        first = sizes[0].get(name, {})
        if changed := [file for file, size in row.get(name, {}).items() if first.get(file, size) != size]:
            return f"it was prepared anew between {curves[0].name} and {curve.name} ({changed[0]} has another size)"
    return ""


def unfinished(curves: Sequence[Curve]) -> Iterator[str]:
    """A line for each run that has not reached its horizon."""
    for curve in curves:
        if curve.reached < curve.planned * (1 - 1e-6):
            part = curve.reached / curve.planned
            told = f"validated up to {format_count(curve.reached)} of {format_count(curve.planned)} tokens ({part:.0%})"
            yield f"{curve.name} is not finished: {told}"
