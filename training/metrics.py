"""Where numbers go: metrics.jsonl and status.json always, TensorBoard and W&B where the config asks. Rank 0 only."""

import math
import time
from typing import Any

from launcher.config.schema import RunConfig
from launcher.plan.stage import StagePlan
from launcher.rundir.goodput import goodput_fields
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, write_json
from training.wandb_history import flatten
from training.wandb_sink import WandbSink


class TensorBoardSink:
    """Scalars by samples, one folder a stage."""

    def __init__(self, run: RunDir, *, stage: str):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.tensorboard / stage))

    def write(self, values: dict[str, float], *, samples: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, samples)

    def close(self) -> None:
        self.writer.close()


class Metrics:
    """Writes the rows of one stage. On ranks other than 0 every method does nothing."""

    def __init__(self, run: RunDir, config: RunConfig, *, stage: str, plan: StagePlan, is_writer: bool):
        self.run, self.stage, self.plan, self.is_writer = run, stage, plan, is_writer
        self.seq_length = config.stage(stage).stage.seq_length
        self.tensorboard = TensorBoardSink(run, stage=stage) if is_writer and config.monitor.tensorboard else None
        self.wandb: WandbSink | None = None  # reads the rows from the run's files
        if is_writer and config.monitor.wandb.mode != "disabled":
            try:
                self.wandb = WandbSink(run, stage=stage)
            except OSError as error:
                self.event("wandb", mode="off", reason=f"its process does not start: {error}")
        self.last: dict[str, Any] = {"step": 0, "tokens": 0, "loss": None, "tokens_per_s": None}

    def event(self, kind: str, **fields: Any) -> None:
        if self.is_writer:
            append_record(self.run.events, kind, stage=self.stage, **fields)

    def own_event(self, kind: str, **fields: Any) -> None:
        """Of any rank: what the first one does not see."""
        append_record(self.run.events, kind, stage=self.stage, **fields)

    def train(self, step: int, *, samples: int, **fields: Any) -> None:
        """A row of training. `step` counts finished steps, `samples` the sequences of this stage read by them."""
        self._row("train", step, samples, fields)

    def validation(self, step: int, *, samples: int, **fields: Any) -> None:
        self._row("validation", step, samples, fields)

    def goodput(self, *, samples: int) -> None:
        """To W&B and TensorBoard: what the run's time has gone into. At checkpoints: the first time it reads all rows."""
        if self.wandb:
            self.wandb.goodput(samples=samples)
        if self.tensorboard:
            self.tensorboard.write(goodput_fields(self.run), samples=samples)

    def at(self, step: int, *, samples: int) -> None:
        """Where the stage stands, as the next status says it."""
        self.last = self.last | {"step": step, "tokens": samples * self.seq_length}

    def status(self, state: str) -> None:
        """Where the stage stands; `eta_s` from the speed of the last row."""
        if not self.is_writer:
            return
        stage_tokens = self.plan.num_samples * self.seq_length
        speed = self.last["tokens_per_s"]
        eta_s = round(max(0, stage_tokens - self.last["tokens"]) / speed, 1) if speed else None
        row = {"name": self.run.name, "stage": self.stage, "state": state, **self.last, "eta_s": eta_s}
        row |= {"num_steps": self.plan.num_steps, "stage_tokens": stage_tokens, "time": round(time.time(), 3)}
        write_json(self.run.status, row)

    def close(self) -> None:
        for sink in (self.tensorboard, self.wandb):
            if sink:
                sink.close()

    def _row(self, kind: str, step: int, samples: int, fields: dict[str, Any]) -> None:
        if not self.is_writer:
            return
        counts = {"step": step, "samples": samples, "tokens": samples * self.seq_length}
        fields = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
        }
        row = append_record(self.run.metrics, kind, stage=self.stage, **counts, **fields)
        self.last = self.last | {key: row[key] for key in ("step", "tokens", "tokens_per_s") if key in row}
        if kind == "train":
            self.last["loss"] = row["loss"]
        if self.tensorboard:
            self.tensorboard.write(flatten(fields, prefix=kind), samples=samples)
