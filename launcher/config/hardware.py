"""A device: its public figures, and how much of them training attains. One YAML file each, read by name.

`cluster.gpu` names a file of model_configs/hardware, whose `efficiency` names one of model_configs/efficiency. Files of the
folder that --config-dir names come first. `phidias calibrate` writes both from runs that were measured.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.spec import STRICT, Float, Positive, PositiveInt
from launcher.config.files import read_file

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
NonNegative = Annotated[Float, Field(ge=0.0, allow_inf_nan=False)]
Fraction = Annotated[Float, Field(gt=0.0, le=1.0)]
Part = Annotated[Float, Field(ge=0.0, le=1.0)]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]


@dataclass(config=STRICT, frozen=True)
class Efficiency:
    """What training attains of a device's public figures: few constants, fitted to measured runs (launcher/plan/calibrate.py).

    gemm_bf16, gemm_fp8     of peak, by a large matrix product (smaller ones attain less: launcher/plan/device.py)
    attention               of BF16 peak, by causal attention forward over a long sequence; backward attains 0.8 of it
    memory                  of the memory bandwidth, by what is not a matrix product
    nvlink, network         of the bandwidth inside and between nodes, by large messages
    tp_exposed              part of the tensor-parallel communication that overlap does not hide
    contention              seconds that compute loses to each second of communication beside it
    jitter                  standard deviation of a step's time from GPU to GPU: the slowest one sets the pace
    step_s                  of each step, whatever it does"""

    _: KW_ONLY
    name: Name
    source: str
    gemm_bf16: Fraction
    gemm_fp8: Fraction
    attention: Fraction
    memory: Fraction
    nvlink: Fraction
    network: Fraction
    tp_exposed: Part
    contention: Part
    jitter: Part
    step_s: NonNegative


@dataclass(config=STRICT, frozen=True)
class Hardware:
    """One GPU: dense peaks, without sparsity; `nvlink_gb_per_s` in one direction, between `nvlink_domain` GPUs (null: those of
    a node); `memory_gib` as CUDA reports it; `fp8`: the recipes that it computes; `multicast`: whether one write reaches all
    GPUs of a node, which overlapping tensor-parallel communication needs."""

    _: KW_ONLY
    name: Name
    source: str
    memory_gib: Positive
    memory_gb_per_s: Positive
    num_sms: PositiveInt
    peak_fp32_tflops: Positive
    peak_bf16_tflops: Positive
    peak_fp8_tflops: Positive | None
    fp8: tuple[Fp8Recipe, ...]
    nvlink_gb_per_s: Positive
    nvlink_domain: PositiveInt | None
    multicast: bool
    efficiency: Efficiency


def read_hardware(name: str, *, folders: Sequence[Path] = ()) -> dict[str, Any]:
    """The plain tree of a device with its efficiency in it. ConfigError where a file is missing or no mapping."""
    tree = read_file("hardware", name, folders=folders, path="cluster.gpu")
    efficiency = tree.get("efficiency")
    if isinstance(efficiency, str):
        path = f"efficiency of hardware/{name}.yaml"
        tree = {**tree, "efficiency": read_file("efficiency", efficiency, folders=folders, path=path)}
    return tree
