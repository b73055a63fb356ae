"""The checkpoints of a run. action=list (the default) shows them; action=verify reads every file and compares it with what was
written; action=prune keep=N removes all but the newest N of each stage, ends of stages and those that the config keeps;
action=convert rewrites the newest one, where only the layout it was saved in can go on from it, so that any can.

Keys: action=list  stage=<all>  keep=N  runs_dir=runs"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.jobs.convert import convert_newest
from launcher.report.format import format_bytes, format_count
from launcher.rundir.checkpoints import (
    FULLY_RESHARDABLE,
    CheckpointError,
    Meta,
    Saved,
    damages,
    indexed,
    prune,
    read_checkpoint,
)
from launcher.rundir.exits import ExitClass, RunStateError
from launcher.rundir.freeze import read_config
from launcher.rundir.lock import describe_holder, is_live
from launcher.rundir.paths import RunDir
from launcher.rundir.reshard import describe_key
from launcher.verbs.request import read_run_words, take_options
from launcher.verbs.runs import RUNS_DIR, find_run, one_or_more


@dataclass(frozen=True)
class Found:
    """A checkpoint as it lies there; `problem`: why it cannot be gone on from."""

    stage: str
    path: Path
    saved: Saved | None
    problem: str | None


def run(words: Sequence[str]) -> int:
    words, flags = take_options(words, allowed={"action": ("list", "verify", "prune", "convert")})
    names, options = read_run_words(words, keys=("stage", "keep", "runs_dir"))
    if len(one_or_more(names)) > 1:
        raise ConfigError(Problem("run", " ".join(names), "checkpoint takes one run", f"phidias checkpoint {names[0]}"))
    found = find_run(names[0], runs_dir=options.get("runs_dir", RUNS_DIR))
    config, action = read_config(found), flags.get("action", "list")
    stages = chosen_stages(found, config, stage=options.get("stage"))
    if action == "prune":
        return remove(found, config, stages=stages, keep=read_keep(options))
    if "keep" in options:
        raise ConfigError(Problem("keep", options["keep"], "it says what action=prune leaves", "action=prune, or leave it out"))
    if action == "convert":
        return convert(found, config, stages=stages)
    rows = [row for stage in stages for row in find_all(found, stage=stage, whole=action == "verify")]
    show(rows)
    return ExitClass.STATE if action == "verify" and any(row.problem for row in rows) else ExitClass.DONE


def chosen_stages(run: RunDir, config: RunConfig, *, stage: str | None) -> list[str]:
    if stage is not None and stage not in config.stage_names:
        rule = f"run {run.name} has {', '.join(config.stage_names)}"
        raise ConfigError(Problem("stage", repr(stage), rule, f"stage={config.stage_names[-1]}"))
    return [stage] if stage else list(config.stage_names)


def read_keep(options: dict[str, str]) -> int:
    said = options.get("keep", "")
    if not said.isdigit() or not int(said):
        raise ConfigError(Problem("keep", repr(said), "prune leaves the newest ones of each stage", "keep=1, or more"))
    return int(said)


def find_all(run: RunDir, *, stage: str, whole: bool) -> Iterator[Found]:
    """Newest first. `whole`: contents are read too."""
    for path, digest in indexed(run, stage):
        try:
            saved = read_checkpoint(path, digest=digest)
        except CheckpointError as error:
            yield Found(stage, path, None, str(error))
            continue
        yield Found(stage, path, saved, "; ".join(damages(saved)[:3]) or None if whole else None)


def show(rows: Sequence[Found]) -> None:
    console = Console(highlight=False, markup=False)
    if not rows:
        console.print("no checkpoints")
        return
    table = Table(box=None, pad_edge=False, header_style="bold cyan")
    for column in ("stage", "checkpoint"):
        table.add_column(column, no_wrap=True)
    for column in ("tokens", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("UTC", "layout", "state"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        written = time.strftime("%m-%d %H:%M", time.gmtime(row.path.stat().st_mtime))
        meta = row.saved.meta if row.saved else None
        figures = (format_count(meta.tokens), format_bytes(sum(meta.files.values()))) if meta else ("–", "–")
        state = "refused" if row.problem else "stage end" if meta and meta.finished else "whole"
        table.add_row(row.stage, row.path.name, *figures, written, readers(meta), state)
    console.print(table)
    for row in rows:
        if row.problem:
            console.print(row.problem, soft_wrap=True)


def readers(meta: Meta | None) -> str:
    """The layouts that can go on from it; of a fast one, whatever the data-parallel size."""
    if meta is None:
        return "–"
    return "any" if meta.sharding == FULLY_RESHARDABLE else describe_key(meta.reshard)


def convert(run: RunDir, config: RunConfig, *, stages: Sequence[str]) -> int:
    """Of each stage; the first that fails ends it."""
    for stage in stages:
        ended = convert_newest(run, config, stage=stage)
        if ended is not ExitClass.DONE:
            return ended
    return ExitClass.DONE


def remove(run: RunDir, config: RunConfig, *, stages: Sequence[str], keep: int) -> int:
    if is_live(run):
        raise RunStateError(describe_holder(run))
    for stage in stages:
        policy = config.stage(stage).stage.checkpoint
        every, best = policy.keep_every_tokens, policy.keep_best
        removed = prune(run.checkpoints(stage), keep_last=keep, keep_every_tokens=every, keep_best=best)
        print(f"{stage}: removed {', '.join(removed) or 'nothing'}")
    return ExitClass.DONE
