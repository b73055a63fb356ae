"""What of a run is shown, logged and watched, and what is done about what is found."""

from dataclasses import KW_ONLY
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.spec import STRICT, Float, Int, Positive, PositiveInt
from launcher.config.hardware import NonNegative

Budget = Annotated[Int, Field(ge=0)]


@dataclass(config=STRICT, frozen=True)
class Wandb:
    """Weights & Biases. `offline` writes under the run directory without a network; `disabled` does not import it. `key_file`
    holds the API key, where WANDB_API_KEY is not in the environment; nobody else may read it."""

    _: KW_ONLY
    mode: Literal["online", "offline", "disabled"]
    key_file: str | None
    project: str
    entity: str | None
    group: str | None


@dataclass(config=STRICT, frozen=True)
class Hang:
    """When ranks count as hung, and are ended: no step for `factor` times the median one and at least `least_s`; no first step
    `start_s` after their start; a validation or checkpoint that lasts longer than `pause_s`."""

    _: KW_ONLY
    factor: Annotated[Float, Field(gt=1.0, allow_inf_nan=False)]
    least_s: Positive
    start_s: Positive
    pause_s: Positive


@dataclass(config=STRICT, frozen=True)
class NonFinite:
    """NaN or Inf in the loss or the gradients of a step, twice: it is computed again first."""

    _: KW_ONLY
    action: Literal["skip", "rewind", "stop"]
    budget: Budget


@dataclass(config=STRICT, frozen=True)
class Spike:
    """`patience_steps` steps in a row lie `z` deviations above the median of the window; both are robust."""

    _: KW_ONLY
    z: Positive
    patience_steps: PositiveInt
    action: Literal["note", "skip", "rewind", "stop"]
    budget: Budget


@dataclass(config=STRICT, frozen=True)
class Straggler:
    """A rank computes `factor` times as long as the median of its pipeline stage, in `rows` metrics rows in a row."""

    _: KW_ONLY
    factor: Annotated[Float, Field(gt=1.0, allow_inf_nan=False)]
    rows: PositiveInt
    action: Literal["note", "requeue", "stop"]
    budget: Budget


@dataclass(config=STRICT, frozen=True)
class Corruption:
    """A step computed twice differs by more than `tolerance` of its loss or gradient norm, or data-parallel ranks hold other
    weights. Looked for every `interval_steps` (null: never), weights before checkpoints too."""

    _: KW_ONLY
    interval_steps: PositiveInt | None
    tolerance: NonNegative
    action: Literal["restart", "requeue", "stop"]
    budget: Budget


@dataclass(config=STRICT, frozen=True)
class DataStall:
    """A rank waited longer than `limit_s` for its batch."""

    _: KW_ONLY
    limit_s: Positive
    action: Literal["note", "stop"]


@dataclass(config=STRICT, frozen=True)
class CheckpointFailure:
    """A checkpoint could not be written; a full disk always waits for a person. `note`: the next one is tried when due,
    and `budget` failures in a row are let pass."""

    _: KW_ONLY
    action: Literal["note", "restart", "stop"]
    budget: Budget


@dataclass(config=STRICT, frozen=True)
class DiskLow:
    """Less than `free_gib` are free where the run is written, or less than its next checkpoint needs."""

    _: KW_ONLY
    free_gib: NonNegative
    action: Literal["note", "stop"]


@dataclass(config=STRICT, frozen=True)
class DeviceError:
    """NVML tells of an XID or an uncorrected ECC error of a rank's GPU; it is asked every `interval_s`."""

    _: KW_ONLY
    interval_s: Positive
    action: Literal["note", "requeue", "stop"]
    budget: Budget


@dataclass(config=STRICT, frozen=True)
class Health:
    """What is watched while a stage trains, and what is done about it, at most `budget` times since a person last looked; then
    one is asked. What is only noted is not counted.

    `note` records an event; `skip` leaves the step's batch out; `rewind` goes back to the checkpoint before the fault and
    leaves its batches out, and `skip_before_steps` batches before them; `restart` starts the ranks again, `requeue` without the
    node that is at fault; `stop` ends the run for a person. Medians are those of the last `window_steps` steps."""

    _: KW_ONLY
    window_steps: Annotated[Int, Field(ge=16)]
    skip_before_steps: Annotated[Int, Field(ge=0)]
    non_finite: NonFinite
    loss_spike: Spike
    grad_norm: Spike
    straggler: Straggler
    corruption: Corruption
    data_stall: DataStall
    checkpoint: CheckpointFailure
    disk_low: DiskLow
    device_error: DeviceError


@dataclass(config=STRICT, frozen=True)
class Monitor:
    """What is shown, logged and watched: a metrics row every `log_interval` steps; `console` is the live view of
    `phidias train`."""

    _: KW_ONLY
    log_interval: PositiveInt
    console: Literal["auto", "rich", "plain"]
    tensorboard: bool
    hang: Hang
    health: Health
    wandb: Wandb
