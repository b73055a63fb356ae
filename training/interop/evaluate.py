"""`python -m training.interop.evaluate <run directory> --stage NAME [--step N | --every-step]`: what a stage's exported folder
is worth, measured through transformers alone. eval/<stage>.json, or eval/<stage>@<step>.json of a chosen checkpoint, says which
export that was, and has one section for each thing measured.

`held_out`: its loss on the windows that the run's own validation reads. It is what the run measured at the same samples, or the
folder is not the model that was trained. `long_context` and `tasks`: see the modules of these names.

Shapes: N windows, B of them at once, S sequence, V vocabulary.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError

from data_prep.errors import DataError
from launcher.config.schema import Precision, RunConfig, StageConfig
from launcher.rundir.checkpoints import CheckpointError, newest_checkpoint, whole_numbers
from launcher.rundir.exits import ExitClass, RunStateError
from launcher.rundir.freeze import read_config
from launcher.rundir.order import recorded_tables
from launcher.rundir.paths import RunDir, at_step
from launcher.rundir.records import append_record, read_json, read_records, write_json
from training.batch import PADDING, Rows, to_device
from training.data import HeldOutFeed, StageData, ledger_from_json, masked_rows
from training.errors import exit_class
from training.interop import long_context, tasks
from training.interop.export import export
from training.interop.long_context import LongContext, measure_long_context
from training.interop.tasks import Asked, Tasks, kept
from training.interop.tokenizer import load_tokenizer
from training.parallel import Rank
from training.step import Sums, mixture_loss

FORMAT_VERSION = 1
TOKENS_AT_ONCE = 4096  # of the windows in one forward pass
# Nats per token that two implementations may lie apart, by the coarser of the run's arithmetic and this one's. Measured on CPUs
# over 256 tokens a source: 2e-7 in fp32, 6e-4 in bf16. Of fp8 it is assumed.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3, "fp8": 5e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")
# Validation reads the same windows whatever the layout; here one process reads them all.
ALONE = Rank(
    rank=0, world_size=1, dp_rank=0, dp_size=1, tp_rank=0, pp_rank=0, cp_rank=0, device=CPU, is_first_stage=True,
    is_last_stage=True,
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A folder that `phidias export` wrote: of which step, and which files they are (`written`: the newest, Unix seconds).
    `name`: what it and its figures are called, `<stage>` or `<stage>@<step>`."""

    path: Path
    name: str
    stage: str
    step: int
    tokens: int
    bytes: int
    written: float


@dataclass(frozen=True)
class Figures:
    """Mean loss per label token in nats; `run_loss` is the run's own, None where it measured none at these samples."""

    loss: float
    tokens: int
    run_loss: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def difference(self) -> float | None:
        return None if self.run_loss is None else self.loss - self.run_loss

    def agrees(self, tolerance: float) -> bool:
        """NaN does not."""
        return self.difference is None or abs(self.difference) <= tolerance

    def to_json(self) -> dict[str, float | None]:
        row = asdict(self) | {"perplexity": self.perplexity, "difference": self.difference}
        return {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}


@dataclass(frozen=True)
class HeldOut:
    """What was measured on the held-out windows. `run_step` is None where the run has no validation to compare with."""

    dtype: str
    device: str
    tolerance: float
    run_step: int | None
    mixture: Figures
    by_source: dict[str, Figures]
    left_out: dict[str, str]

    @property
    def apart(self) -> dict[str, Figures]:
        """What lies further from the run's own figures than the tolerance."""
        rows = {**self.by_source, "mixture": self.mixture}
        return {name: figures for name, figures in rows.items() if not figures.agrees(self.tolerance)}

    @property
    def agrees(self) -> bool | None:
        return None if self.run_step is None else not self.apart

    def to_json(self) -> dict[str, Any]:
        figures = {"mixture": self.mixture.to_json(), "by_source": {n: row.to_json() for n, row in self.by_source.items()}}
        return {**vars(self), **figures, "agrees": self.agrees}


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
    loaded, long = Loaded(exported, run), wanted.long
    held_out = measure_held_out(run, config, loaded=loaded)
    before = trained_length(config, stage=config.stage(stage))
    found: LongContext | None = None
    if long or (long is None and before is not None):
        feed = HeldOutFeed(config, config.stage(stage), rank=ALONE)
        found = measure_long_context(loaded.model, loaded.tokenizer, feed=feed, trained_length=before, losses=token_losses)
    scores = wanted.tasks.measure(loaded.model, loaded.tokenizer) if wanted.tasks else None
    sections = {"held_out": held_out.to_json()} | ({"long_context": found.to_json()} if found else {})
    rows = kept(earlier(run, exported), scores)
    write_evaluation(
        run, exported, seconds=round(time.monotonic() - began, 3), **sections, **({"tasks": rows} if rows["rows"] else {})
    )
    return Evaluation(exported, held_out, found, scores)


def evaluate_steps(run: RunDir, config: RunConfig, *, stage: str, wanted: Wanted) -> Iterator[Evaluation]:
    """The stage's checkpoints that are there and have not all the figures yet, oldest first: what is exported for it goes
    again. A checkpoint that the stage's own export is of is left out."""
    whole = read_export(run, stage=stage).step if run.export(stage).exists() else None
    for step in whole_numbers(run, stage):
        folder = run.export(at_step(stage, step))
        if step == whole or has_figures(run, name=at_step(stage, step), wanted=wanted):
            continue
        is_ours = not folder.exists()
        if is_ours:
            export(run, config, stage=stage, step=step)
        yield evaluate(run, config, stage=stage, step=step, wanted=wanted)
        if is_ours:
            shutil.rmtree(folder)


def has_figures(run: RunDir, *, name: str, wanted: Wanted) -> bool:
    before = read_json(run.eval(name)) if run.eval(name).exists() else {}
    known = (before.get("tasks") or {}).get("asked", ())
    return bool(before) and all(task in known for task in (wanted.tasks.asked.names if wanted.tasks else ()))


def earlier(run: RunDir, exported: Exported) -> dict[str, Any]:
    """What was measured of the same files before."""
    path = run.eval(exported.name)
    before = read_json(path) if path.exists() else {}
    return before if before.get("export") == folder_of(exported) else {}


def folder_of(exported: Exported) -> dict[str, Any]:
    return {"path": str(exported.path), "bytes": exported.bytes, "written": exported.written}


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


def read_export(run: RunDir, *, stage: str, step: int | None = None) -> Exported:
    """What lies in a stage's folder of the run. RunStateError: nothing, or nothing that says what it is."""
    name = at_step(stage, step)
    folder, fix = run.export(name), f"Fix: phidias export {run.name} stage={stage}{'' if step is None else f' step={step}'}"
    if not folder.is_dir():
        raise RunStateError(f"{folder} is missing: stage {stage} has no export, and eval reads what export wrote. {fix}")
    try:
        source = read_json(folder / "phidias.json")
        found_step, tokens = int(source["step"]), int(source["tokens"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        found = f"{folder / 'phidias.json'} is missing or unreadable ({error}); it says which checkpoint was exported"
        raise RunStateError(f"{found}. {fix}") from error
    files = [file.stat() for file in folder.iterdir()]
    size, written = sum(file.st_size for file in files), max(file.st_mtime for file in files)
    return Exported(folder, name, stage, found_step, tokens, size, round(written, 3))


class Loaded:
    """The model, in memory once it is asked for: what can be refused without it comes first."""

    def __init__(self, exported: Exported, run: RunDir):
        self.exported, self.run = exported, run
        self.device = torch.device("cuda") if torch.cuda.is_available() else CPU
        self.dtype = "fp32" if self.device.type == "cpu" else "bf16"

    @cached_property
    def model(self) -> Any:
        return load_model(self.exported, dtype=self.dtype, device=self.device, run=self.run)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.exported.path)


def measure_held_out(run: RunDir, config: RunConfig, *, loaded: Loaded) -> HeldOut:
    """Loss by source through transformers, beside the run's own at the same samples."""
    exported, device, dtype = loaded.exported, loaded.device, loaded.dtype
    stage = config.stage(exported.stage)
    samples = exported.tokens // stage.stage.seq_length
    shares = shares_at(run, config, stage=stage, samples=samples)
    feed = HeldOutFeed(config, stage, rank=ALONE)
    rows, own = held_out_rows(feed), own_validation(run, stage=stage, samples=samples)
    refuse_other_windows(run, count_labels(rows, names=feed.names), own=own)
    sums = sum_losses(loaded.model, rows, num_sources=len(feed.names))
    losses, tokens = sums.loss_by_source(feed.names), sums.tokens_by_source(feed.names)
    of_run = own["loss_by_source"] if own else {}
    return HeldOut(
        dtype=dtype,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        tolerance=tolerance_of(stage.precision, dtype=dtype),
        run_step=own["step"] if own else None,
        mixture=Figures(mixture_loss(losses, shares=shares), sum(tokens.values()), own["loss"] if own else None),
        by_source={name: Figures(loss, tokens[name], of_run.get(name)) for name, loss in losses.items()},
        left_out={name: why_left_out(name, stage=stage) for name, count in tokens.items() if not count},
    )


def shares_at(run: RunDir, config: RunConfig, *, stage: StageConfig, samples: int) -> dict[str, float]:
    """The shares that the run's validation weighs the sources by. DataError: text that is not there, or prepared anew since
    the run read from it."""
    saved, _ = newest_checkpoint(run, stage.stage.name)
    start, consumed = (saved.meta.start_ledger, saved.meta.ledger) if saved else ({}, {})
    phases = recorded_tables(run).get(stage.stage.name)
    data = StageData(config, stage, ledger=ledger_from_json(start), consumed=ledger_from_json(consumed), phases=phases)
    return data.shares_at(samples)


def held_out_rows(feed: HeldOutFeed) -> Rows:
    """Every window that validation reads, under the stage's masks. DataError: there is none."""
    places = [(source, index) for source, index in feed.rows if source != PADDING]
    if not places:
        rule = f"a held-out window is {feed.seq_length + 1} tokens of one source"
        raise DataError(
            f"stage {feed.stage.stage.name}: no source has held-out text to evaluate on; {rule}. Fix: a larger "
            "data.held_out_fraction and `phidias data`, for another run"
        )
    windows = np.stack([feed.streams[source].read(index * feed.seq_length, feed.seq_length + 1) for source, index in places])
    sources = np.array([source for source, _ in places], dtype=np.int32)
    return masked_rows(windows, source=sources, eod_id=feed.streams[0].eod_id, stage=feed.stage)


def count_labels(rows: Rows, *, names: list[str]) -> dict[str, int]:
    """Labels that count, by source."""
    counts = np.bincount(rows.source, weights=rows.is_in_loss.sum(axis=1), minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts.tolist(), strict=True) if count}


def own_validation(run: RunDir, *, stage: StageConfig, samples: int) -> dict[str, Any] | None:
    """The run's last validation at these samples of the stage."""
    rows = [row for row in read_records(run.metrics) if row["kind"] == "validation" and row["stage"] == stage.stage.name]
    return next((row for row in reversed(rows) if row["samples"] == samples), None)


def refuse_other_windows(run: RunDir, here: Mapping[str, int], *, own: Mapping[str, Any] | None) -> None:
    """RunStateError where the run validated on other text, or more or less of it: the losses could not be compared."""
    before = {name: tokens for name, tokens in own["tokens_by_source"].items() if tokens} if own else here
    if before != here:
        raise RunStateError(
            f"{run.root}: held-out tokens are {shown(here)}; the run validated on {shown(before)}, and losses of other text "
            "cannot be compared. Fix: restore the held-out shards, and stage.validation.max_tokens as it was"
        )


def shown(tokens: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in tokens.items())


def load_model(exported: Exported, *, dtype: str, device: torch.device, run: RunDir) -> Any:
    """The model as any user would load it, from this folder alone. RunStateError where that fails, or leaves a weight out."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    fix = f"Fix: phidias export {run.name} stage={exported.stage}"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            exported.path,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunStateError(f"{exported.path} does not load through transformers ({error}). {fix}") from error
    wrong = [f"{kind} {', '.join(sorted(map(str, keys))[:3])}" for kind, keys in report.items() if keys]
    if wrong:
        raise RunStateError(
            f"{exported.path} loads with {'; '.join(wrong)}; transformers would draw these anew or drop them, and every weight "
            f"must come from the folder. {fix}"
        )
    return model.eval().to(device)


@torch.no_grad()
def sum_losses(model: Any, rows: Rows, *, num_sources: int) -> Sums:
    """Loss and label tokens by source, as validation sums them."""
    loss_N, tokens_N = np.zeros(num_sources), np.zeros(num_sources, dtype=np.int64)
    for some in in_parts(rows):
        counted_BS = some.is_in_loss
        loss_BS = token_losses(model, some).double().cpu().numpy()
        np.add.at(loss_N, some.source, np.where(counted_BS, loss_BS, 0.0).sum(axis=1))
        np.add.at(tokens_N, some.source, counted_BS.sum(axis=1))
    return Sums(tuple(loss_N.tolist()), tuple(tokens_N.tolist()))


def in_parts(rows: Rows) -> Iterator[Rows]:
    """As many windows at once as have TOKENS_AT_ONCE tokens, one at least."""
    count = max(1, TOKENS_AT_ONCE // rows.tokens.shape[1])
    for first in range(0, len(rows.tokens), count):
        part = slice(first, first + count)
        document = None if rows.document is None else rows.document[part]
        yield Rows(rows.tokens[part], rows.labels[part], rows.counted[part], document, rows.source[part])


def token_losses(model: Any, rows: Rows) -> torch.Tensor:
    """Loss of each label [B, S], fp32. Rotary scores depend on distances alone, so that documents need no positions of their
    own, only attention of their own."""
    tokens_BS, labels_BS = (to_device(values, device=model.device) for values in (rows.tokens, rows.labels))
    bias = None if rows.document is None else document_bias(rows.document, dtype=model.dtype, device=model.device)
    logits_BSV = model(input_ids=tokens_BS, attention_mask=bias, use_cache=False).logits
    # By window: fp32 logits are the largest thing in memory.
    losses = [F.cross_entropy(row.float(), labels, reduction="none") for row, labels in zip(logits_BSV, labels_BS, strict=True)]
    return torch.stack(losses)


def document_bias(document: NDArray[np.int32], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[B, 1, S, S] added to the scores: 0 for what a token sees, itself and what is before it in its document. transformers
    takes a mask of four dimensions as it is."""
    document_BS = torch.from_numpy(document).to(device)
    seen_BSS = (document_BS[:, :, None] == document_BS[:, None, :]).tril()
    return torch.zeros(seen_BSS.shape, dtype=dtype, device=device).masked_fill_(~seen_BSS, torch.finfo(dtype).min)[:, None]


def tolerance_of(precision: Precision, *, dtype: str) -> float:
    if precision.fp8:
        return TOLERANCE["fp8"]
    return TOLERANCE["bf16" if "bf16" in (precision.params_dtype, dtype) else "fp32"]


def why_left_out(name: str, *, stage: StageConfig) -> str:
    parent = stage.mixture.sources[name].parent
    if parent in stage.mixture.sources:
        return f"evaluated with {parent}, whose documents it holds"
    return f"its held-out text has no window of {stage.stage.seq_length + 1} tokens"


def table(exported: Exported, held_out: HeldOut) -> str:
    """Losses by source and over the mixture, beside the run's own."""
    where = f"step {exported.step} ({exported.tokens:,} tokens), {held_out.dtype} on {held_out.device}"
    head = ("source", "tokens", "loss", "perplexity", "in training", "difference")
    body = [row_of(name, figures) for name, figures in {**held_out.by_source, "mixture": held_out.mixture}.items()]
    width = max(len(row[0]) for row in (head, *body))
    lines = [name.ljust(width) + "".join(cell.rjust(13) for cell in cells) for name, *cells in (head, *body)]
    return "\n".join([f"held-out loss of stage {exported.stage} as exported, {where}", *lines])


def row_of(name: str, figures: Figures) -> tuple[str, ...]:
    own = "-" if figures.run_loss is None else f"{figures.run_loss:.4f}"
    apart = "-" if figures.difference is None else f"{figures.difference:+.1e}"
    return name, f"{figures.tokens:,}", f"{figures.loss:.4f}", f"{figures.perplexity:,.2f}", own, apart


def caveats(run: RunDir, exported: Exported, held_out: HeldOut) -> list[str]:
    """What a reader of the figures must know."""
    saved, _ = newest_checkpoint(run, exported.stage)
    lines = [f"left out: {name}, {reason}" for name, reason in held_out.left_out.items()]
    if saved and saved.meta.step != exported.step and exported.name == exported.stage:
        lines.append(
            f"the export is of step {exported.step}, the newest checkpoint of step {saved.meta.step}: "
            f"`phidias export {run.name} stage={exported.stage}` writes that one"
        )
    if held_out.run_step is None:
        lines.append(f"NOT compared: the run did not validate at step {exported.step} itself; it does at the stage's end")
    return lines


def verdict(exported: Exported, held_out: HeldOut) -> str:
    """That it agrees; nothing where there was nothing to compare with. RunStateError: it does not agree."""
    if held_out.run_step is None:
        return ""
    rule = f"at most {held_out.tolerance:g} nats"
    if held_out.apart:
        found = "; ".join(f"{name} {row.loss:.6f}, not {row.run_loss:.6f}" for name, row in held_out.apart.items())
        raise RunStateError(
            f"{exported.path} is not the model that was trained: its held-out loss is {found} as in the run's validation at "
            f"step {held_out.run_step}; they may lie {rule} apart. Fix: `phidias export` again, then eval; if that says the "
            "same, the export of this model is wrong, or the held-out text changed: do not release it"
        )
    largest = max(abs(row.difference or 0.0) for row in (*held_out.by_source.values(), held_out.mixture))
    return f"agrees with the run's validation at step {held_out.run_step}: {largest:.1e} nats apart, {rule} allowed"


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
        for found in evaluate_steps(run, config, stage=stage, wanted=wanted) if arguments.every_step else ():
            print()
            show(found, run=run)
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
