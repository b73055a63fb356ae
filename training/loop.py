"""Training one stage, on one page."""

import gc
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist

from launcher.config.reading import replay_sample
from launcher.config.schema import RunConfig, StageConfig
from launcher.plan.stage import StagePlan, plan_stage
from launcher.rundir.checkpoints import (
    FORMAT_VERSION,
    CheckpointError,
    Meta,
    Saved,
    newest_checkpoint,
    set_torn_aside,
    stage_end,
)
from launcher.rundir.exits import ExitClass
from launcher.rundir.order import recorded_shards, recorded_tables
from launcher.rundir.paths import RunDir
from training.checkpoint import Checkpointer, layout_key
from training.data import HeldOutFeed, StageData, TrainingFeed, ledger_from_json, ledger_to_json
from training.errors import NonFiniteError
from training.heartbeat import Heartbeat
from training.metrics import Metrics, StepTimes
from training.model import build_model
from training.optimizer import build_optimizer, build_schedule, set_schedule
from training.parallel import Rank
from training.step import Stepper, Sums, mixture_loss

COLLECTION_INTERVAL = 100  # steps
Found = TypeVar("Found")
LedgerRows = dict[str, dict[str, Any]]


@dataclass
class Progress:
    """What changes while a stage trains. Samples are the key: a step is another number of them once the batch changes."""

    samples: int = 0
    step: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    last_batch: int = 0


def train_stage(run: RunDir, config: RunConfig, *, stage_name: str, rank: Rank, heartbeat: Heartbeat) -> ExitClass:
    """Trains a stage from its newest checkpoint (or the stage it starts from) to its end, or until asked to stop."""
    stage = config.stage(stage_name)
    plan = plan_stage(stage, cluster=config.cluster)
    trainer = Trainer(run, config, stage=stage, plan=plan, rank=rank, heartbeat=heartbeat)
    with stop_signals() as asked, quiet_garbage_collector():
        trainer.restore()
        while not trainer.is_finished:
            stop = trainer.train_step(stop=bool(asked) or trainer.sees_stop_flag())
            if stop and not trainer.is_finished:
                trainer.save()
                return trainer.finish("stop", ExitClass.INTERRUPTED)
            if trainer.due(plan.validation_samples):
                trainer.validate()
            if trainer.due(plan.checkpoint_samples):
                trainer.save()
            if trainer.progress.step % COLLECTION_INTERVAL == 0:
                gc.collect(1)
        trainer.validate()
        trainer.save()
    return trainer.finish("stage_done", ExitClass.DONE)


class Trainer:
    """Everything one rank holds of a stage: model, optimizer, data, and where the stage stands."""

    def __init__(
        self, run: RunDir, config: RunConfig, *, stage: StageConfig, plan: StagePlan, rank: Rank, heartbeat: Heartbeat
    ):
        self.run, self.config, self.stage, self.plan, self.rank = run, config, stage, plan, rank
        self.progress, self.times, self.heartbeat = Progress(), StepTimes(), heartbeat
        self.metrics = Metrics(run, config, stage=stage.stage.name, plan=plan, is_writer=rank.rank == 0)
        self.metrics.status("starting")
        chunks = build_model(stage, model=config.model, seed=config.run.seed, hardware=config.hardware)
        optimizer = build_optimizer(stage, chunks=chunks)
        self.schedule = build_schedule(stage, plan=plan, optimizer=optimizer)
        self.stepper = Stepper(stage, chunks=chunks, optimizer=optimizer, rank=rank)
        self.checkpointer = Checkpointer(run, stage=stage.stage.name, layout=stage.layout, chunks=chunks, optimizer=optimizer)

    @property
    def is_finished(self) -> bool:
        return self.progress.samples >= self.plan.num_samples

    def restore(self) -> None:
        """Goes on from the newest valid checkpoint of the stage, else from the end of the stage it starts from."""
        init_from = self.stage.stage.init_from
        saved = self.find_sound()
        if saved:
            self.open_data(start=saved.meta.start_ledger, consumed=saved.meta.ledger)
            self.checkpointer.load(saved, self.stage.optim)
            self.progress = Progress(saved.meta.samples, saved.meta.step, dict(saved.meta.tokens_by_source))
            self.metrics.event("resume", step=saved.meta.step, path=saved.path.name)
        elif init_from:
            parent = on_rank_0(lambda: self.find_parent(init_from), rank=self.rank)
            if found := self.checkpointer.damages(parent):
                raise CheckpointError(f"{'; '.join(found[:3])}. Fix: restore it, or train stage {init_from} again")
            self.open_data(start=self.recalled(parent))
            self.checkpointer.load_weights(parent)
            self.metrics.event("stage_start", init_from=init_from, path=parent.path.name)
        else:
            self.open_data(start={})
            self.metrics.event("stage_start", init_from=None)
        skipped = {name: tokens for name, tokens in self.data.skipped_tokens.items() if tokens}
        if skipped and saved is None:
            self.metrics.event("ledger_skip", tokens_by_source=skipped)
        self.metrics.at(self.progress.step, samples=self.progress.samples)
        self.metrics.status("running")

    def find_sound(self) -> Saved | None:
        """The newest checkpoint of the stage whose files are what was written, read by all ranks together."""
        damaged: dict[str, str] = {}
        while True:
            saved = on_rank_0(lambda: self.find_checkpoint(damaged), rank=self.rank)
            found = self.checkpointer.damages(saved) if saved else []
            if saved is None:
                return None
            if not found:
                on_rank_0(lambda: self.set_aside(damaged), rank=self.rank)
                return saved
            damaged[saved.path.name] = "; ".join(found[:3])

    def find_checkpoint(self, damaged: Mapping[str, str]) -> Saved | None:
        """The checkpoint to go on from, by its meta.json and sizes. CheckpointError where there are some and none is valid: a
        run must not begin anew for that."""
        saved, torn = newest_checkpoint(self.run, self.stage.stage.name, passing=damaged)
        refused = [*damaged.values(), *torn]
        if saved is None and refused:
            raise CheckpointError("no checkpoint of this stage is valid: " + "; ".join(refused))
        return saved

    def set_aside(self, damaged: Mapping[str, str]) -> None:
        """What was passed over for a sound checkpoint; events say why."""
        _, torn = newest_checkpoint(self.run, self.stage.stage.name, passing=damaged)
        for reason in [*damaged.values(), *torn]:
            self.metrics.event("checkpoint_refused", reason=reason)
        if damaged or torn:
            set_torn_aside(self.run, self.stage.stage.name, damaged=damaged)

    def find_parent(self, name: str) -> Saved:
        """The end of the stage this one starts from, at the horizon that stage has now."""
        num_samples = plan_stage(self.config.stage(name), cluster=self.config.cluster).num_samples
        saved = stage_end(self.run, name, num_samples=num_samples)
        if saved is None:
            raise CheckpointError(
                f"stage {self.stage.stage.name} starts from stage {name}, which has no finished checkpoint at its "
                f"{num_samples} samples. Fix: train stage={name} to its end first"
            )
        return saved

    def recalled(self, parent: Saved) -> LedgerRows:
        """What the stage takes over as read: all that was or, in a replay, what was by a stated token of the parent."""
        sample = replay_sample(self.stage, config=self.config)
        if sample is None:
            return parent.meta.ledger
        before, start = self.config.stage(parent.meta.stage), ledger_from_json(parent.meta.start_ledger)
        phases = recorded_tables(self.run).get(parent.meta.stage)
        return ledger_to_json(StageData(self.config, before, ledger=start, phases=phases).ledger(sample))

    def open_data(self, *, start: LedgerRows, consumed: LedgerRows | None = None) -> None:
        self.data = StageData(
            self.config,
            self.stage,
            ledger=ledger_from_json(start),
            consumed=ledger_from_json(consumed) if consumed else None,
            phases=recorded_tables(self.run).get(self.stage.stage.name),
            shards=recorded_shards(self.run),
        )
        trace = self.run.window_trace if self.config.data.trace else None
        self.feed = TrainingFeed(self.data, self.stage, rank=self.rank, trace=trace)
        self.held_out = HeldOutFeed(self.config, self.stage, rank=self.rank)

    def sees_stop_flag(self) -> bool:
        """One rank looks; the step's all-reduce tells the others."""
        return self.rank.rank == 0 and self.run.stop_flag.exists()

    def train_step(self, *, stop: bool) -> bool:
        """Reads one global batch, takes one optimizer step, logs it. Returns whether any rank was asked to stop."""
        began = time.perf_counter()
        batches = self.feed.batch(self.progress.samples)
        read = time.perf_counter()
        first = self.progress.samples
        samples = first + self.plan.batch_size_at(first)
        lr = set_schedule(self.schedule, samples=samples)
        sums, grad_norm = self.stepper.train(batches, num_microbatches=self.plan.microbatches_at(first), stop=stop)
        self.progress.samples, self.progress.step, self.progress.last_batch = samples, self.progress.step + 1, samples - first
        self.count(sums)
        tokens = self.progress.last_batch * self.stage.stage.seq_length
        took = time.perf_counter() - began
        self.times.add(tokens=tokens, seconds=took, waited_s=read - began)
        self.heartbeat.step(self.progress.step, seconds=took)
        if self.progress.step % self.config.monitor.log_interval == 0 or self.is_finished:
            self.log(sums, lr=lr, grad_norm=grad_norm)
        if not sums.loss < float("inf"):
            raise NonFiniteError(f"step {self.progress.step}: loss is {sums.loss}; the last checkpoint is from before it")
        return sums.stop

    def count(self, sums: Sums) -> None:
        for name, tokens in sums.tokens_by_source(self.data.names).items():
            self.progress.tokens_by_source[name] = self.progress.tokens_by_source.get(name, 0) + tokens

    def log(self, sums: Sums, *, lr: float, grad_norm: float | None) -> None:
        """A row: the loss of this step, the times of all since the last row."""
        self.metrics.train(
            self.progress.step,
            samples=self.progress.samples,
            loss=sums.loss,
            loss_by_source=sums.loss_by_source(self.data.names),
            tokens_by_source=dict(self.progress.tokens_by_source),
            lr=lr,
            grad_norm=grad_norm,
            **self.times.means(),
        )
        self.times = StepTimes()
        self.metrics.status("running")

    def due(self, interval_samples: int) -> bool:
        """Whether the last batch came past a multiple of the interval; not shortly before the stage's end, with its own."""
        before = self.progress.samples - self.progress.last_batch
        left = self.plan.num_samples - self.progress.samples
        return before // interval_samples < self.progress.samples // interval_samples and left >= interval_samples / 2

    def validate(self) -> None:
        """Held-out loss per source. `loss` weighs the sources by their shares, as training does."""
        if not self.held_out.num_microbatches:
            return
        with self.heartbeat.pause("validation", step=self.progress.step):
            sums = self.stepper.evaluate(self.held_out.batches(), num_microbatches=self.held_out.num_microbatches)
        by_source = sums.loss_by_source(self.data.names)
        loss = mixture_loss(by_source, shares=self.data.shares_at(self.progress.samples))
        tokens = sums.tokens_by_source(self.data.names)
        self.metrics.validation(
            self.progress.step, samples=self.progress.samples, loss=loss, loss_by_source=by_source, tokens_by_source=tokens
        )

    def save(self) -> None:
        samples = self.progress.samples
        meta = Meta(
            format_version=FORMAT_VERSION,
            stage=self.stage.stage.name,
            step=self.progress.step,
            samples=samples,
            tokens=samples * self.stage.stage.seq_length,
            finished=self.is_finished,
            layout=layout_key(self.stage.layout),
            ledger=ledger_to_json(self.data.ledger(samples)),
            start_ledger=ledger_to_json(self.data.start_ledger),
            tokens_by_source=self.progress.tokens_by_source,
            files={},
        )
        with self.heartbeat.pause("checkpoint", step=self.progress.step):
            self.checkpointer.save(meta, policy=self.stage.stage.checkpoint)

    def finish(self, kind: str, exit_class: ExitClass) -> ExitClass:
        self.metrics.event(kind, exit=exit_class.name, step=self.progress.step)
        self.metrics.at(self.progress.step, samples=self.progress.samples)
        self.feed.close()
        self.metrics.status("done" if exit_class is ExitClass.DONE else "stopped")
        self.metrics.close()
        return exit_class


def on_rank_0(find: Callable[[], Found], *, rank: Rank) -> Found:
    """What rank 0 finds on disk, on every rank: shared file systems show ranks different moments. So does its error."""
    answer: list[Any] = [None, None]
    if rank.rank == 0:
        try:
            answer[0] = find()
        except CheckpointError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=rank.device)
    if answer[1] is not None:
        raise answer[1]
    found: Found = answer[0]
    return found


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGUSR1 while the block runs: any of them means save after this step and exit."""
    asked: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.signal(kind, lambda number, _: asked.append(number)) for kind in kinds]
    try:
        yield asked
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


@contextmanager
def quiet_garbage_collector() -> Iterator[None]:
    """Ranks that collect at different moments stall each other: all collect young objects at the same steps instead."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
