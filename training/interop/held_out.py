"""Section `held_out` of an evaluation: the export's loss on the windows that the run's own validation reads. It is what the run
measured at the same samples, or the folder is not the model that was trained.

Shapes: N windows, B of them at once, S sequence, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data_prep.errors import DataError
from launcher.config.schema import Precision, RunConfig, StageConfig
from launcher.rundir.checkpoints import newest_checkpoint
from launcher.rundir.exits import RunStateError
from launcher.rundir.order import recorded_tables
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records
from training.batch import PADDING, Rows, to_device
from training.data import HeldOutFeed, StageData, ledger_from_json, masked_rows
from training.interop.exported import CPU, Exported, Loaded
from training.parallel import Rank
from training.step import Sums, mixture_loss

TOKENS_AT_ONCE = 4096  # of the windows in one forward pass
# Nats per token that two implementations may lie apart, by the coarser of the run's arithmetic and this one's. Measured on CPUs
# over 256 tokens a source: 2e-7 in fp32, 6e-4 in bf16. Of fp8 it is assumed.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3, "fp8": 5e-2}
# Validation reads the same windows whatever the layout; here one process reads them all.
ALONE = Rank(
    rank=0, world_size=1, dp_rank=0, dp_size=1, tp_rank=0, pp_rank=0, cp_rank=0, device=CPU, is_first_stage=True,
    is_last_stage=True,
)  # fmt: skip


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
