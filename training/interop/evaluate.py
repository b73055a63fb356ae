"""`python -m training.interop.evaluate <run directory> --stage NAME [--step N | --every-step]`: what a stage's exported folder
is worth, measured through transformers alone. eval/<stage>.json, or eval/<stage>@<step>.json of a chosen checkpoint, says which
export that was, and has one section for each thing measured: `held_out`, `long_context`, `tasks` (the modules of these names).
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import DataError
from launcher.config.schema import RunConfig, StageConfig
from launcher.rundir.checkpoints import CheckpointError, checkpoint_at, file_digest, whole_numbers
from launcher.rundir.exits import ExitClass, RunStateError
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir, at_step
from launcher.rundir.records import append_record, read_json, write_json
from training.data import HeldOutFeed
from training.errors import exit_class
from training.interop import long_context, tasks
from training.interop.export import export
from training.interop.exported import Exported, Loaded, folder_of, read_export
from training.interop.held_out import ALONE, HeldOut, caveats, measure_held_out, table, token_losses, verdict
from training.interop.long_context import LongContext, measure_long_context
from training.interop.tasks import Asked, Tasks, kept

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """`long_context` and `tasks` are None where they were not asked for."""

    exported: Exported
    held_out: HeldOut
    long_context: LongContext | None
    tasks: dict[str, Any] | None = None


@dataclass(frozen=True)
class Wanted:
    """`long`: whether long context is measured; None: where the stage has longer sequences than the one it starts from."""

    long: bool | None = None
    tasks: Tasks | None = None


PLAIN = Wanted()


def evaluate(run: RunDir, config: RunConfig, *, stage: str, step: int | None = None, wanted: Wanted = PLAIN) -> Evaluation:
    """Measures a stage's export, or that of a chosen checkpoint, and writes its figures and an event, whether it agrees with
    the run or not.

    RunStateError: no export, one that does not load, or windows that are not those of the run's validation. DataError: no data
    here, or no held-out window. Then nothing is written."""
    began, exported = time.monotonic(), read_export(run, stage=stage, step=step)
    loaded, long, was = Loaded(exported, run), wanted.long, earlier(run, exported)
    held_out = measure_held_out(run, config, loaded=loaded)
    before = trained_length(config, stage=config.stage(stage))
    found: LongContext | None = None
    if long or (long is None and before is not None):
        feed = HeldOutFeed(config, config.stage(stage), rank=ALONE)
        found = measure_long_context(loaded.model, loaded.tokenizer, feed=feed, trained_length=before, losses=token_losses)
    scores = wanted.tasks.measure(loaded.model, loaded.tokenizer) if wanted.tasks else None
    positions = found.to_json() if found else was.get("long_context")
    sections = {"held_out": held_out.to_json()} | ({"long_context": positions} if positions else {})
    rows = kept(was, scores)
    write_evaluation(
        run, exported, seconds=round(time.monotonic() - began, 3), **sections, **({"tasks": rows} if rows["rows"] else {})
    )
    return Evaluation(exported, held_out, found, scores)


def evaluate_steps(run: RunDir, config: RunConfig, *, stage: str, wanted: Wanted) -> Iterator[Evaluation]:
    """The stage's checkpoints that are there and have not all the figures yet, oldest first: what is exported for it goes
    again. A checkpoint that the stage's own export is of is left out."""
    whole = read_export(run, stage=stage).checkpoint if run.export(stage).exists() else None
    for step in whole_numbers(run, stage):
        folder = run.export(at_step(stage, step))
        digest = file_digest(checkpoint_at(run, stage, step=step).path / "meta.json")
        if digest == whole or has_figures(run, name=at_step(stage, step), checkpoint=digest, wanted=wanted):
            continue
        is_ours = not folder.exists()
        if is_ours or read_export(run, stage=stage, step=step).checkpoint != digest:
            export(run, config, stage=stage, step=step)
        try:
            found = evaluate(run, config, stage=stage, step=step, wanted=wanted)
        finally:
            if is_ours:
                shutil.rmtree(folder, ignore_errors=True)
        yield found


def has_figures(run: RunDir, *, name: str, checkpoint: str, wanted: Wanted) -> bool:
    """Of this very checkpoint, and of the tasks as they are asked for now."""
    before = figures_of(run, name)
    known = (before.get("tasks") or {}).get("how", {})
    asked = wanted.tasks.asked.how if wanted.tasks else {}
    return before.get("checkpoint") == checkpoint and all(known.get(name) == row for name, row in asked.items())


def figures_of(run: RunDir, name: str) -> dict[str, Any]:
    """RunStateError where the file is none."""
    path = run.eval(name)
    try:
        return read_json(path) if path.exists() else {}
    except ValueError as error:
        raise RunStateError(f"{path} is not what eval writes ({error}). Fix: move it away") from error


def earlier(run: RunDir, exported: Exported) -> dict[str, Any]:
    """What was measured of the same checkpoint before."""
    before = figures_of(run, exported.name)
    same = exported.checkpoint is not None and before.get("checkpoint") == exported.checkpoint
    return before if same or before.get("export") == folder_of(exported) else {}


def trained_length(config: RunConfig, *, stage: StageConfig) -> int | None:
    """The sequence length of the stage that this one starts from, where it is shorter."""
    parent = stage.stage.init_from
    if parent not in config.stage_names:
        return None
    before = config.stage(str(parent)).stage.seq_length
    return before if before < stage.stage.seq_length else None


def write_evaluation(run: RunDir, exported: Exported, *, seconds: float, **sections: dict[str, Any]) -> None:
    path = run.eval(exported.name)
    source = {"stage": exported.stage, "step": exported.step, "tokens": exported.tokens}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    header = {
        "format_version": FORMAT_VERSION,
        "run": run.name,
        **source,
        "checkpoint": exported.checkpoint,
        "export": folder_of(exported),
        "date": date,
        "seconds": seconds,
    }
    path.parent.mkdir(exist_ok=True)
    write_json(path, {**header, **sections})
    append_record(run.events, "eval", **source, path=str(path), seconds=seconds, **summary(**sections))


def summary(
    *, held_out: Mapping[str, Any], long_context: Mapping[str, Any] | None = None, tasks: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the event says of the sections."""
    total = held_out["mixture"]
    found = {"loss": total["loss"], "difference": total["difference"], "agrees": held_out["agrees"]}
    positions = (long_context or {}).get("positions")
    scores = {
        f"{name} {metric}": figures["value"]
        for name, row in (tasks or {}).get("rows", {}).items()
        for metric, figures in row["metrics"].items()
    }
    return found | ({"rises": positions["rises"]} if positions else {}) | ({"tasks": scores} if scores else {})


def show(found: Evaluation, *, run: RunDir) -> None:
    """Its figures, and what is to be known of them. RunStateError where it is not the model that was trained."""
    exported, held_out = found.exported, found.held_out
    print("\n".join([table(exported, held_out), *caveats(run, exported, held_out)]))
    if found.long_context:
        print(long_context.table(found.long_context))
    if found.tasks:
        print(tasks.table(found.tasks))
    print(*filter(None, [verdict(exported, held_out), f"written to {run.eval(exported.name)}"]), sep="\n")


def read_words(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.interop.evaluate", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--step", type=int, help="of a checkpoint that was exported by itself")
    parser.add_argument("--every-step", action="store_true", help="then also each checkpoint without figures")
    parser.add_argument("--long-context", choices=("true", "false"), help="null: where the stage has longer sequences")
    parser.add_argument("--tasks", help="names, with commas")
    parser.add_argument("--task-dir", type=Path)
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=int)
    return parser.parse_args(words)


def wanted_of(arguments: argparse.Namespace) -> Wanted:
    """With the tasks' data, so that what cannot be had is told before anything is measured."""
    names = tuple(filter(None, (arguments.tasks or "").split(",")))
    asked = Asked(names, arguments.task_dir, arguments.num_fewshot, arguments.limit)
    long = {None: None, "true": True, "false": False}[arguments.long_context]
    return Wanted(long, Tasks(asked) if names else None)


def main() -> ExitClass:
    arguments = read_words()
    run = RunDir(arguments.run_dir)
    try:
        config, stage, wanted = read_config(run), arguments.stage, wanted_of(arguments)
        show(evaluate(run, config, stage=stage, step=arguments.step, wanted=wanted), run=run)
        apart: list[str] = []
        for found in evaluate_steps(run, config, stage=stage, wanted=wanted) if arguments.every_step else ():
            print()
            try:
                show(found, run=run)
            except RunStateError as error:  # of this step; the others are measured too
                apart.append(str(error))
        if apart:
            raise RunStateError("; ".join(apart))
    except torch.OutOfMemoryError as error:
        fix = "Fix: CUDA_VISIBLE_DEVICES= evaluates on the CPU, in fp32"
        print(f"phidias: the exported model does not fit this GPU; eval runs on one ({error}). {fix}", file=sys.stderr)
        return ExitClass.REFUSED
    except (CheckpointError, DataError, RunStateError, OSError) as error:
        print(f"phidias: {error}", file=sys.stderr)
        return exit_class(error)
    return ExitClass.DONE


if __name__ == "__main__":
    sys.exit(main())
