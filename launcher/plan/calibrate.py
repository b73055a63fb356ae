"""Fits a device's efficiency constants to measured runs.

Each row is a run with its layout and its tokens/s/GPU. Relative errors are made small by least squares over the logarithms of
the constants, each held near its starting value by a prior as wide as it is uncertain: a constant that the rows say nothing of
keeps its value, and rows of one model cannot bend a device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from launcher.config.hardware import Efficiency, Hardware
from launcher.config.schema import Cluster, ModelConfig, StageConfig
from launcher.plan.timing import Timing

Vector = NDArray[np.float64]

# How far, as a factor, each constant may well be from its starting value.
PRIORS = {
    "gemm_bf16": 1.15,
    "gemm_fp8": 1.15,
    "attention": 1.06,
    "memory": 1.25,
    "nvlink": 1.08,
    "network": 1.05,
    "tp_exposed": 1.4,
    "contention": 1.3,
    "jitter": 1.6,
    "step_s": 1.6,
}
# What a published or logged figure is itself uncertain by, as a factor.
NOISE = 1.03
STEP, ITERATIONS, CEILING = 1e-3, 12, 0.98


@dataclass(frozen=True)
class Measurement:
    """One measured run: what ran, where, and its tokens/s/GPU. `weight`: of rows alike, how much each counts."""

    name: str
    stage: StageConfig
    model: ModelConfig
    cluster: Cluster
    hardware: Hardware
    tokens_per_s_per_gpu: float
    weight: float = 1.0


def predict(row: Measurement, *, efficiency: Efficiency | None = None) -> float:
    """Tokens/s/GPU."""
    hardware = row.hardware if efficiency is None else replace(row.hardware, efficiency=efficiency)
    timing = Timing(row.stage, model=row.model, cluster=row.cluster, hardware=hardware)
    settings = row.stage.stage
    return settings.global_batch_size * settings.seq_length / timing.step.total / row.cluster.world_size


def fit(rows: Sequence[Measurement], *, start: Efficiency) -> Efficiency:
    """The constants that the rows say, from `start`: Gauss and Newton's steps with derivatives by differences."""
    names = list(PRIORS)
    widths = np.array([math.log(PRIORS[name]) for name in names])
    weights = np.sqrt([row.weight for row in rows]) / math.log(NOISE)

    def residuals(z: Vector) -> Vector:
        efficiency = moved(start, names=names, logs=z * widths)
        errors = np.array([math.log(predict(row, efficiency=efficiency) / row.tokens_per_s_per_gpu) for row in rows])
        return np.concatenate([errors * weights, z])

    return moved(start, names=names, logs=least_squares(residuals, size=len(names)) * widths)


def least_squares(residuals: Callable[[Vector], Vector], *, size: int) -> Vector:
    z = np.zeros(size)
    now = residuals(z)
    for _ in range(ITERATIONS):
        jacobian = np.column_stack([(residuals(z + STEP * axis) - now) / STEP for axis in np.eye(size)])
        move = np.linalg.lstsq(jacobian, -now, rcond=None)[0]
        scale = next((s for s in (1.0, 0.5, 0.25, 0.1) if np.sum(residuals(z + s * move) ** 2) < np.sum(now**2)), 0.0)
        if scale * np.abs(move).max() < STEP:
            break
        z = z + scale * move
        now = residuals(z)
    return z


def moved(start: Efficiency, *, names: Sequence[str], logs: Vector) -> Efficiency:
    changes = {name: min(CEILING, getattr(start, name) * math.exp(log)) for name, log in zip(names, logs, strict=True)}
    return replace(start, **changes)


@dataclass(frozen=True)
class Error:
    """Of one row: relative, positive where the prediction is too fast."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def errors(rows: Sequence[Measurement], *, efficiency: Efficiency) -> list[Error]:
    """A row each."""
    return [Error(row.name, row.tokens_per_s_per_gpu, predict(row, efficiency=efficiency)) for row in rows]
