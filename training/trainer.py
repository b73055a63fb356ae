"""What one rank holds of a stage, and the verbs that the loop is made of."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from launcher.config.schema import RunConfig, StageConfig
from launcher.plan.stage import StagePlan
from launcher.rundir.checkpoints import (
    FORMAT_VERSION,
    CheckpointError,
    Meta,
    Saved,
    newest_checkpoint,
    set_later_aside,
)
from launcher.rundir.exits import ExitClass
from launcher.rundir.order import recorded_shards, recorded_skips, recorded_tables
from launcher.rundir.paths import RunDir
from launcher.rundir.reshard import describe_key, reshard_key
from launcher.rundir.speed import read_plan, speed_fields
from launcher.rundir.stop import wants_any_layout
from training.checkpoint import Checkpointer, get_rng, layout_key, set_rng
from training.clocks import StepTimes
from training.data import HeldOutFeed, StageData, TrainingFeed, ledger_from_json, ledger_to_json
from training.errors import CorruptionError, NodeError, NothingBeforeError, UnhealthyError
from training.fp8 import Fp8Watch
from training.guard import Guard
from training.health import Finding, StepHealth
from training.heartbeat import Heartbeat
from training.metrics import Metrics
from training.model import build_model
from training.optimizer import build_optimizer, build_schedule, set_schedule
from training.parallel import Rank
from training.resuming import find_sound, is_before, is_readable, on_rank_0
from training.starting import begin_stage
from training.startup import Phases
from training.step import Flags, Result, Stepper, Sums, mixture_loss

LedgerRows = dict[str, dict[str, Any]]


@dataclass
class Progress:
    """What changes while a stage trains. Samples are the key: a step is another number of them once the batch changes."""

    samples: int = 0
    step: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    last_batch: int = 0


class Trainer:
    """Everything one rank holds of a stage: model, optimizer, data, and where the stage stands."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        *,
        stage: StageConfig,
        plan: StagePlan,
        rank: Rank,
        heartbeat: Heartbeat,
        phases: Phases,
    ):
        self.run, self.config, self.stage, self.plan, self.rank = run, config, stage, plan, rank
        self.progress, self.times, self.heartbeat, self.phases = Progress(), StepTimes(), heartbeat, phases
        self.metrics = Metrics(run, config, stage=stage.stage.name, plan=plan, is_writer=rank.rank == 0)
        self.metrics.status("starting")
        self.key = on_rank_0(self.reshard_key)
        bucket_size = self.key["bucket_size"]
        chunks = build_model(stage, model=config.model, seed=config.run.seed, hardware=config.hardware, bucket_size=bucket_size)
        phases.mark("model_s")
        optimizer = build_optimizer(stage, chunks=chunks)
        self.schedule = build_schedule(stage, plan=plan, optimizer=optimizer)
        self.stepper = Stepper(stage, chunks=chunks, optimizer=optimizer, rank=rank)
        self.fp8 = Fp8Watch(chunks, rank=rank, is_on=stage.precision.fp8 is not None)
        self.planned = read_plan(run.plan).get(stage.stage.name, {})
        self.checkpointer = Checkpointer(run, stage=stage.stage.name, layout=stage.layout, chunks=chunks, optimizer=optimizer)
        self.guard = Guard(run, config, stage=stage.stage.name, rank=rank, chunks=chunks, metrics=self.metrics)
        self.data: StageData | None = None
        self.validated: tuple[int, float] | None = None  # a step, and the held-out loss at it
        self.save_is_due = self.owes_validation = False
        phases.mark("optimizer_s")

    @property
    def is_finished(self) -> bool:
        return self.progress.samples >= self.plan.num_samples

    def reshard_key(self) -> dict[str, Any]:
        """What a fast checkpoint of this layout can be loaded by. Its buckets are those of the newest one, whatever the
        data-parallel size is by now."""
        key = reshard_key(self.stage, cluster=self.config.cluster)
        newest, _ = newest_checkpoint(self.run, self.stage.stage.name)
        before = newest.meta.reshard.get("bucket_size") if newest else None
        return key | {"bucket_size": before} if before and key["bucket_size"] else key

    def restore(self) -> None:
        """Goes on from the newest valid checkpoint of the stage, else from what the stage starts from."""
        saved = find_sound(self.run, self.stage.stage.name, checkpointer=self.checkpointer, note=self.metrics.event)
        if saved:
            self.open_data(start=saved.meta.start_ledger, consumed=saved.meta.ledger)
            self.load(saved)
        elif self.progress.step:
            raise NothingBeforeError("there is no checkpoint to rewind to; the ranks start again from where the stage starts")
        else:
            begin_stage(self)
        self.progress.samples = self.begin_at(self.progress.samples)
        skipped = {name: tokens for name, tokens in self.opened.skipped_tokens.items() if tokens}
        if skipped and saved is None:
            self.metrics.event("ledger_skip", tokens_by_source=skipped)
        self.metrics.at(self.progress.step, samples=self.progress.samples)
        self.metrics.status("running")
        self.phases.mark("load_s")

    def load(self, saved: Saved) -> None:
        meta = saved.meta
        if not is_readable(saved, key=self.key):
            raise CheckpointError(
                f"{saved.path} is {meta.sharding}, of the layout {describe_key(meta.reshard)}: this one cannot load it. Fix: "
                "give the stage that layout again, or a newer checkpoint back its files"
            )
        self.checkpointer.load(saved, self.stage.optim)
        self.progress = Progress(meta.samples, meta.step, dict(meta.tokens_by_source))
        self.times, self.validated = StepTimes(), None  # of steps that a rewind threw away
        self.stepper.clocks.take()
        self.guard.steps = StepHealth.from_json(self.config.monitor.health, meta.health)
        self.checkpointer.writer.last_bytes = sum(meta.files.values())
        since = meta.samples - self.plan.batch_size_at(max(0, meta.samples - 1))
        owed = self.due(self.plan.validation_samples, since=since, now=meta.samples)
        self.owes_validation = owed and meta.validation_loss is None  # it was stopped there
        self.metrics.event("resume", step=meta.step, path=saved.path.name)

    @property
    def opened(self) -> StageData:
        assert self.data is not None
        return self.data

    def open_data(self, *, start: LedgerRows, consumed: LedgerRows | None = None) -> None:
        """Once: a rewind reads on from the same."""
        if self.data is not None:
            return
        self.data = StageData(
            self.config,
            self.stage,
            ledger=ledger_from_json(start),
            consumed=ledger_from_json(consumed) if consumed else None,
            phases=recorded_tables(self.run).get(self.stage.stage.name),
            shards=recorded_shards(self.run),
            left_out=on_rank_0(lambda: recorded_skips(self.run, self.stage.stage.name)),
        )
        trace = self.run.window_trace if self.config.data.trace else None
        self.feed = TrainingFeed(self.data, self.stage, rank=self.rank, trace=trace)
        self.held_out = HeldOutFeed(self.config, self.stage, rank=self.rank)
        self.phases.mark("data_s")

    def own_flags(self, asked: list[int]) -> Flags:
        """One rank looks at the stop flag; the step's all-reduce tells the others."""
        is_up = self.rank.rank == 0 and self.run.stop_flag.exists()
        return Flags(
            stop=bool(asked) or is_up,
            any_layout=is_up and wants_any_layout(self.run),
            writing=self.checkpointer.writer.is_busy,
        )

    def train_step(self, own: Flags) -> Flags:
        """Reads one global batch, takes one optimizer step unless something is wrong with it, logs it. Returns what any rank
        was asked."""
        began = time.perf_counter()
        first = self.progress.samples
        batches = self.feed.batch(first)
        waited_s = time.perf_counter() - began
        self.phases.mark("first_batch_s")
        end = first + self.plan.batch_size_at(first)
        lr = set_schedule(self.schedule, samples=end)
        try:
            result, finding = self.compute(batches, flags=own, first=first, end=end)
            action = self.guard.act(finding, step=self.progress.step + 1) if finding else "note"
        except (UnhealthyError, CorruptionError, NodeError):  # on all ranks: what is being written is from before
            self.publish()
            raise
        watched = self.update(result, end=end) if action == "note" else {}
        took = time.perf_counter() - began
        self.times.add(tokens=(end - first) * self.stage.stage.seq_length, seconds=took, waited_s=waited_s)
        self.heartbeat.step(self.progress.step, seconds=took)
        self.phases.end(self.metrics)
        if action != "note":
            assert finding is not None
            self.leave_out(finding, first=first, end=end, action=action)
        elif self.is_row:
            self.log(result, lr=lr, watched=watched)
        self.guard.look_at_own(step=self.progress.step, waited_s=waited_s)
        if not result.sums.flags.writing:
            self.publish()
        return result.sums.flags

    def compute(self, batches: Any, *, flags: Flags, first: int, end: int) -> tuple[Result, Finding | None]:
        """Gradients of a batch and what is wrong with them; where something is, and every so often, computed twice."""
        rng = get_rng() if self.has_dropout else None
        count = self.plan.microbatches_at(first)
        result = self.stepper.gradients(batches, num_microbatches=count, flags=flags)
        finding = self.guard.judge(result, first=first, end=end)
        if self.guard.replays(finding, step=self.progress.step):
            if rng:
                set_rng(rng)
            again = self.stepper.gradients(batches, num_microbatches=count, flags=flags)
            self.guard.compare(result, again, step=self.progress.step + 1)
        # Now, before the update: after it the distributed optimizer gathers weights anew over whatever is damaged.
        is_due = self.due(self.plan.checkpoint_samples, since=first, now=end)
        saves = is_due or self.save_is_due or result.sums.flags.stop or end >= self.plan.num_samples
        if self.guard.checks_replicas(step=self.progress.step, saves=saves):
            self.guard.check_replicas(step=self.progress.step)
        return result, finding

    @property
    def has_dropout(self) -> bool:
        return self.config.model.hidden_dropout > 0 or self.config.model.attention_dropout > 0

    @property
    def is_row(self) -> bool:
        """Whether the step just taken has a row of its own."""
        return self.progress.step % self.config.monitor.log_interval == 0 or self.is_finished

    def update(self, result: Result, *, end: int) -> dict[str, float]:
        """Takes the step; what it did to the weights, where a row is to say so."""
        is_row = (self.progress.step + 1) % self.config.monitor.log_interval == 0 or end >= self.plan.num_samples
        watched = self.stepper.update(result.grad_norm, watch=is_row)
        self.guard.steps.accept(loss=result.sums.loss, grad_norm=result.grad_norm)
        self.count(result.sums)
        self.progress.step += 1
        self.go_to(end)
        return watched

    def go_to(self, sample: int) -> None:
        """The next batch begins there, or behind what is left out there. Losses of another mixture are not judged by those
        before."""
        before, self.progress.samples = self.progress.samples, self.begin_at(sample)
        self.progress.last_batch = self.progress.samples - before
        if any(before < row.start_sample <= self.progress.samples for row in self.opened.phases):
            self.guard.steps.forget()

    def begin_at(self, sample: int) -> int:
        """Where the batch begins that comes at `sample`. One that reaches into what is left out, for the batch size has changed
        since, is left out whole."""
        sample = self.opened.left_out.past(sample)
        while (end := self.opened.left_out.reaches(sample, sample + self.plan.batch_size_at(sample))) is not None:
            self.metrics.event(
                "skip", step=self.progress.step, first_sample=sample, num_samples=end - sample, cause="batch size"
            )
            self.opened.left_out.add(sample, end)
            sample = self.opened.left_out.past(sample)
        return sample

    def leave_out(self, finding: Finding, *, first: int, end: int, action: str) -> None:
        """Goes on behind the batches that a finding names, from here or from the checkpoint before them. For good: an event
        says so, and every later start reads it."""
        if action == "rewind":
            first = finding.first_sample
            self.make_way(first)
        cause, name = finding.kind, self.stage.stage.name
        self.metrics.event("skip", step=self.progress.step, first_sample=first, num_samples=end - first, cause=cause)
        self.opened.left_out.add(first, end)
        if action == "skip":
            self.go_to(end)
            return
        with self.heartbeat.pause("rewind", step=self.progress.step):
            on_rank_0(lambda: set_later_aside(self.run, name, samples=first))
            self.metrics.event("rewind", step=self.progress.step, first_sample=first, cause=cause)
            self.restore()

    def make_way(self, sample: int) -> None:
        """For a rewind to before it. UnhealthyError where no checkpoint is left that was written before: later ones are not
        thrown away for one step. Where the stage has none at all it begins anew."""
        write = self.checkpointer.writer.write
        if write is not None and write.meta.samples > sample:
            self.checkpointer.writer.abandon()  # published, it would push out the one to go back to
        self.publish()
        if on_rank_0(lambda: is_before(self.run, self.stage.stage.name, samples=sample, key=self.key)) is False:
            raise UnhealthyError(
                f"no checkpoint from before sample {sample} is left to rewind to; later ones are as they were. Fix: more of "
                "stage.checkpoint.keep_last, or another monitor.health action, and start again"
            )

    def count(self, sums: Sums) -> None:
        for name, tokens in sums.tokens_by_source(self.opened.names).items():
            self.progress.tokens_by_source[name] = self.progress.tokens_by_source.get(name, 0) + tokens

    def log(self, result: Result, *, lr: float, watched: dict[str, float]) -> None:
        """A row: the loss of this step, the times of all since the last row."""
        sums, times = result.sums, self.times.means()
        step_s, waited_s, spent = times["step_time_s"], times["data_wait_s"], self.stepper.clocks.take() / self.times.steps
        pace = self.guard.look_around(step=self.progress.step, step_s=step_s, spent=spent, waited_s=waited_s)
        speed = speed_fields(self.planned, tokens_per_s=times["tokens_per_s"], memory_bytes=pace["memory_max_bytes"])
        self.metrics.train(
            self.progress.step,
            samples=self.progress.samples,
            loss=sums.loss,
            loss_by_source=sums.loss_by_source(self.opened.names),
            tokens_by_source=dict(self.progress.tokens_by_source),
            epochs_by_source=self.opened.epochs(self.progress.samples),
            lr=lr,
            grad_norm=result.grad_norm,
            **watched,
            **times,
            **speed,
            **pace,
            **self.fp8.take(),
        )
        self.times = StepTimes()
        self.metrics.status("running")

    def due(self, interval_samples: int, *, since: int | None = None, now: int | None = None) -> bool:
        """Whether a batch (the last one) came past a multiple of the interval; not shortly before the stage's end, with its
        own."""
        now = self.progress.samples if now is None else now
        since = now - self.progress.last_batch if since is None else since
        return since // interval_samples < now // interval_samples and self.plan.num_samples - now >= interval_samples / 2

    def validate(self) -> None:
        """Held-out loss per source. `loss` weighs the sources by their shares, as training does."""
        if not self.held_out.num_microbatches:
            return
        began = time.perf_counter()
        with self.heartbeat.pause("validation", step=self.progress.step), self.stepper.clocks.standing():
            sums = self.stepper.evaluate(self.held_out.batches(), num_microbatches=self.held_out.num_microbatches)
        by_source = sums.loss_by_source(self.opened.names)
        loss = mixture_loss(by_source, shares=self.opened.shares_at(self.progress.samples))
        self.validated = (self.progress.step, loss)
        self.metrics.validation(
            self.progress.step,
            samples=self.progress.samples,
            loss=loss,
            loss_by_source=by_source,
            tokens_by_source=sums.tokens_by_source(self.opened.names),
            seconds=round(time.perf_counter() - began, 3),
        )

    def is_to_save(self) -> bool:
        """At an interval; not amid steps that may yet be rewound, which come first."""
        self.save_is_due |= self.due(self.plan.checkpoint_samples)
        return self.save_is_due and not self.guard.steps.is_in_doubt

    def save(self, *, any_layout: bool = False, is_last: bool = False) -> None:
        """Begins a checkpoint, unless no step has been taken yet: a start has all there is. The last one is waited for."""
        if not self.progress.step:
            return
        self.publish()
        self.save_is_due = False
        policy, step = self.stage.stage.checkpoint, self.progress.step
        with self.standing_still():
            self.guard.check_disk(step=step, last_bytes=self.checkpointer.writer.last_bytes)
            try:
                self.checkpointer.save(self.meta(), policy=policy, any_layout=any_layout, wait=is_last)
            except CheckpointError as error:
                self.guard.checkpoint_failed(error, step=step, is_last=True)
        if not policy.asynchronous:
            self.publish()

    def publish(self) -> None:
        """Ends the write of a checkpoint, where there is one. What all ranks have found alike to be wrong with it may be let
        pass."""
        if self.checkpointer.writer.write is None:
            return
        with self.standing_still():
            try:
                self.checkpointer.writer.finish()
                self.guard.failed_in_a_row = 0
            except CheckpointError as error:
                self.guard.checkpoint_failed(error, step=self.progress.step)
            self.metrics.goodput(samples=self.progress.samples)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """For a checkpoint: the seconds are in the next row."""
        began = time.perf_counter()
        with self.heartbeat.pause("checkpoint", step=self.progress.step):
            yield
        self.times.stall(time.perf_counter() - began)

    def meta(self) -> Meta:
        samples, (step, loss) = self.progress.samples, self.validated or (-1, None)
        return Meta(
            format_version=FORMAT_VERSION,
            stage=self.stage.stage.name,
            step=self.progress.step,
            samples=samples,
            tokens=samples * self.stage.stage.seq_length,
            finished=self.is_finished,
            layout=layout_key(self.stage.layout),
            ledger=ledger_to_json(self.opened.ledger(samples)),
            start_ledger=ledger_to_json(self.opened.start_ledger),
            tokens_by_source=dict(self.progress.tokens_by_source),
            files={},
            reshard=self.key,
            health=self.guard.steps.to_json(),
            skipped_samples=self.opened.left_out.before(samples),
            validation_loss=loss if step == self.progress.step else None,
        )

    def finish(self, kind: str, exit_class: ExitClass) -> ExitClass:
        self.heartbeat.end(step=self.progress.step)
        self.metrics.event(kind, exit=exit_class.name, step=self.progress.step)
        self.metrics.at(self.progress.step, samples=self.progress.samples)
        self.feed.close()
        self.metrics.status("done" if exit_class is ExitClass.DONE else "stopped")
        self.metrics.close()
        return exit_class
