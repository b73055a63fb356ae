"""A checkpoint of another run that a stage starts from: which one a path names, and whether the run can go on from it. That run
is read, and never written: another one may be training in it.

    /runs/a                                 the newest valid checkpoint of its last stage that has one
    /runs/a/checkpoints/pretrain            the newest valid one of that stage
    /runs/a/checkpoints/pretrain/step_...   that one
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.spec import TokenizerSpec
from data_prep.tokenizers import build_tokenizer
from launcher.config.check import unlike_optimizers
from launcher.config.errors import Problem
from launcher.config.reading import all_sources
from launcher.config.schema import RunConfig, StageConfig
from launcher.config.validate import shown
from launcher.plan.prepared import open_source
from launcher.rundir.checkpoints import DP_RESHARDABLE, CheckpointError, Saved, checkpoint_at, file_digest, newest_checkpoint
from launcher.rundir.exits import RunStateError
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.reshard import reshard_key, unlike

START = "stage.init_from"
# What a model is beside its weights: a label, what it exports to, how it is drawn, what it forgets on the way.
FREE = ("name", "family", "init_method_std", "hidden_dropout", "attention_dropout")
LedgerRows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Ancestor:
    """A valid checkpoint of another run, by its meta.json and the sizes of its files, and that run's frozen config."""

    run: RunDir
    config: RunConfig
    saved: Saved

    @property
    def stage(self) -> StageConfig:
        return self.config.stage(self.saved.meta.stage)

    def origin(self) -> dict[str, Any]:
        """What a run's events say of where it came from."""
        meta = self.saved.meta
        found = {"run": str(self.run.root), "stage": meta.stage, "step": meta.step, "tokens": meta.tokens}
        return {**found, "digest": file_digest(self.saved.path / "meta.json")}


def place_of(path: Path) -> tuple[RunDir, str | None, str | None] | None:
    """The run, stage and step that a path names; None where it is of no run: a Hugging Face folder, or nothing."""
    if (path / "config.json").is_file():
        return None
    above = (path, None, None), (path.parent.parent, path.name, None), (path.parent.parent.parent, path.parent.name, path.name)
    for root, stage, step in above:
        if RunDir(root).config.is_file() and (stage is None or RunDir(root).checkpoints(stage) in (path, path.parent)):
            return RunDir(root), stage, step
    return None


def find_ancestor(path: Path, *, passing: Mapping[str, str] | None = None) -> Ancestor:
    """The checkpoint that a path names; not one of `passing`, `<stage>/<step>` that were found damaged, with the reasons.
    CheckpointError where none is valid, RunStateError where the run's config cannot be read."""
    place = place_of(path)
    if place is None:
        raise CheckpointError(f"{path} is of no run: none of the folders above it has a config.yaml")
    run, stage, step = place
    config, refused = read_config(run), list((passing or {}).values())
    for name in [stage] if stage else reversed(config.run.stages):
        own = {key.removeprefix(f"{name}/"): reason for key, reason in (passing or {}).items() if key.startswith(f"{name}/")}
        found, why = newest_of(run, name, step=step, passing=own)
        refused += why
        if found and name in config.stage_names:
            return Ancestor(run, config, found)
    raise CheckpointError(f"{path} has no valid checkpoint ({'; '.join(refused[:3]) or 'none was written'})")


def newest_of(run: RunDir, stage: str, *, step: str | None, passing: Mapping[str, str]) -> tuple[Saved | None, list[str]]:
    """Of a stage, or that step of it; and why others were passed over."""
    if step is None:
        return newest_checkpoint(run, stage, passing=passing)
    try:
        number = int(step.removeprefix("step_"))
        return (None if f"step_{number:08d}" in passing else checkpoint_at(run, stage, step=number)), []
    except ValueError:
        return None, [f"{step} is the name of no checkpoint"]
    except CheckpointError as error:
        return None, [str(error)]


def check_ancestor(stage: StageConfig, *, config: RunConfig) -> list[Problem]:
    """Everything that keeps a stage from starting from the checkpoint that its path names."""
    path = Path(str(stage.stage.folder))
    try:
        found = find_ancestor(path)
    except (CheckpointError, RunStateError) as error:
        return [Problem(START, str(error), "a stage starts from a valid checkpoint", "another run, or another one of it")]
    if found.run.root.resolve() == (Path(config.run.runs_dir) / config.run.name).resolve():
        fix = f"{START}={found.saved.meta.stage}"
        return [Problem(START, str(path), "it is a checkpoint of this very run, whose stages go by name", fix)]
    return [
        *check_model(found, config=config),
        *check_tokenizer(found, spec=config.tokenizer),
        *check_length(found, stage=stage),
        *check_moments(found, stage=stage, config=config),
    ]


def refuse_ancestor(stage: StageConfig, *, config: RunConfig) -> None:
    """CheckpointError where what the path names is no longer what the launch found."""
    if problems := check_ancestor(stage, config=config):
        raise CheckpointError("; ".join(map(str, problems)))


def check_model(found: Ancestor, *, config: RunConfig) -> Iterator[Problem]:
    theirs = vars(found.config.model)
    for field, ours in vars(config.model).items():
        if field not in FREE and ours != theirs[field]:
            rule, fix = f"the model of {found.run.root} has {shown(theirs[field])}", f"model.{field}={shown(theirs[field])}"
            yield Problem(f"model.{field}", shown(ours), rule, fix)


def check_tokenizer(found: Ancestor, *, spec: TokenizerSpec) -> Iterator[Problem]:
    """By their fingerprints; where the file of one is not there any more, by what the configs say."""
    theirs = found.config.tokenizer
    ids = None
    with suppress(DataError, OSError):
        ids = None if theirs == spec else [build_tokenizer(one).fingerprint for one in (spec, theirs)]
    if (spec.kind, spec.eod) != (theirs.kind, theirs.eod) or (ids and ids[0] != ids[1]):
        told = f"fingerprints {ids[0]} and {ids[1]}" if ids else f"{spec.kind} and {theirs.kind}"
        rule = "text must become the ids that the weights were trained on"
        found_here = f"another one than that of {found.run.root} ({told})"
        yield Problem("tokenizer", found_here, rule, "that run's tokenizer, and data made by it")


def check_length(found: Ancestor, *, stage: StageConfig) -> Iterator[Problem]:
    before = found.stage.stage.seq_length
    if stage.stage.seq_length < before:
        rule = f"it must not be shorter than in {found.saved.path} ({before}), which it starts from"
        yield Problem("stage.seq_length", str(stage.stage.seq_length), rule, f"use {before} or more")


def check_moments(found: Ancestor, *, stage: StageConfig, config: RunConfig) -> Iterator[Problem]:
    if not stage.optim.keep_moments:
        return
    for path, (before, now) in unlike_optimizers(found.stage, after=stage).items():
        rule = f"with optim.keep_moments the optimizer is that of {found.saved.path}, which has {shown(before)}"
        yield Problem(path, shown(now), rule, f"{path}={shown(before)}, or optim.keep_moments=false")
    meta, key = found.saved.meta, reshard_key(stage, cluster=config.cluster)
    differing = unlike(meta, key)
    if meta.sharding == DP_RESHARDABLE and meta.reshard.get("bucket_size") != key["bucket_size"]:
        differing["bucket_size"] = [meta.reshard.get("bucket_size"), key["bucket_size"]]
    if differing:
        told = ", ".join(f"{name} {shown(old)} -> {shown(new)}" for name, (old, new) in differing.items())
        rule = f"{found.saved.path} is {DP_RESHARDABLE}, the form that is written fast, which only its own layout reads: {told}"
        convert = f"`phidias checkpoint {found.run.name} action=convert stage={meta.stage}`"
        yield Problem("optim.keep_moments", "true", rule, f"{convert} first, or optim.keep_moments=false")


def take_over(found: Ancestor, *, config: RunConfig) -> tuple[LedgerRows, dict[str, str]]:
    """What of that run's ledger is this run's as well, so that its sources are read on from there; and why not, of the sources
    that have the same name and begin anew."""
    ledger, ours = found.saved.meta.ledger, all_sources(config)
    kept: LedgerRows = {}
    anew: dict[str, str] = {}
    for name in ledger.keys() & ours.keys():
        if reason := other_order(found.config, config=config):
            anew[name] = reason
        elif open_source(config, name).digest != ledger[name]["digest"]:
            anew[name] = "its shards are others"
        else:
            kept[name] = ledger[name]
    return kept, anew


def other_order(before: RunConfig, *, config: RunConfig) -> str | None:
    """Why a place in the order of one run's sources is none in the other's."""
    keys = {
        "run.seed": (before.run.seed, config.run.seed),
        "data.chunk_tokens": (before.data.chunk_tokens, config.data.chunk_tokens),
        "data.group_tokens": (before.data.group_tokens, config.data.group_tokens),
    }
    differing = [f"{name} was {old}, is {new}" for name, (old, new) in keys.items() if old != new]
    return f"it is read in another order: {', '.join(differing)}" if differing else None
