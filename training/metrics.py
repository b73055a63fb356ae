"""Where numbers go: metrics.jsonl and status.json always, W&B and TensorBoard where the config asks. Rank 0 only."""

import math
import secrets
import time
from dataclasses import dataclass
from typing import Any, Protocol

from launcher.config.schema import RunConfig
from launcher.plan.stage import StagePlan
from launcher.rundir.goodput import goodput_fields
from launcher.rundir.paths import RunDir
from launcher.rundir.permissions import lend_key
from launcher.rundir.records import append_record, write_json


class Sink(Protocol):
    """Takes flat numbers at a count of the stage's samples."""

    def write(self, values: dict[str, float], *, samples: int) -> None: ...

    def close(self) -> None: ...


class WandbSink:
    """One W&B run per Phidias run: its id is kept in the run directory, so that a resume and the next stage go on in it."""

    def __init__(self, run: RunDir, config: RunConfig, *, stage: str):
        import wandb
        from pydantic import TypeAdapter

        settings = config.monitor.wandb
        lend_key(config)
        self.stage = stage
        self.run = wandb.init(
            mode=settings.mode,
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            id=wandb_id(run),
            name=run.name,
            resume="allow",
            dir=run.root,
            config=TypeAdapter(RunConfig).dump_python(config, mode="json"),
        )
        self.run.define_metric(f"{stage}/samples")
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/samples")

    def write(self, values: dict[str, float], *, samples: int) -> None:
        self.run.log({f"{self.stage}/{name}": value for name, value in values.items()} | {f"{self.stage}/samples": samples})

    def close(self) -> None:
        self.run.finish()


def wandb_id(run: RunDir) -> str:
    """Unique in the project, though others may have a run of the same name."""
    path = run.wandb / "phidias_run_id"
    if not path.exists():
        run.wandb.mkdir(exist_ok=True)
        path.write_text(f"{run.name}-{secrets.token_hex(4)}")
    return path.read_text()


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


@dataclass
class StepTimes:
    """The steps since the last row. What lies between steps, validations and checkpoints, is not in their seconds."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0

    def add(self, *, tokens: int, seconds: float, waited_s: float) -> None:
        """One step; `waited_s` of its seconds went by until its batch was there."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.waited_s += waited_s

    def means(self) -> dict[str, float]:
        """What a row says of them."""
        return {
            "tokens_per_s": round(self.tokens / self.seconds, 1),
            "step_time_s": round(self.seconds / self.steps, 4),
            "data_wait_s": round(self.waited_s / self.steps, 4),
        }


class Metrics:
    """Writes the rows of one stage. On ranks other than 0 every method does nothing."""

    def __init__(self, run: RunDir, config: RunConfig, *, stage: str, plan: StagePlan, is_writer: bool):
        self.run, self.stage, self.plan, self.is_writer = run, stage, plan, is_writer
        self.seq_length = config.stage(stage).stage.seq_length
        self.sinks: list[Sink] = []
        if is_writer and config.monitor.wandb.mode != "disabled":
            self.sinks.append(WandbSink(run, config, stage=stage))
        if is_writer and config.monitor.tensorboard:
            self.sinks.append(TensorBoardSink(run, stage=stage))
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
        if self.sinks:
            fields = goodput_fields(self.run)
            for sink in self.sinks:
                sink.write(fields, samples=samples)

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
        for sink in self.sinks:
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
        for sink in self.sinks:
            sink.write(flatten(fields, prefix=kind), samples=samples)


def flatten(fields: dict[str, Any], *, prefix: str) -> dict[str, float]:
    """`{"loss_by_source": {"web": 2.0}}` -> `{"train/loss_by_source/web": 2.0}`; what is not a number is left out."""
    flat: dict[str, float] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= flatten(value, prefix=f"{prefix}/{name}")
        elif isinstance(value, int | float):
            flat[f"{prefix}/{name}"] = value
    return flat
