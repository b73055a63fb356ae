"""How time is taken on a device, and the state it was in. Without a GPU the same code measures the CPU: a rehearsal."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 1 << 28  # several times the L2 of an H200
Figures = dict[str, Any]
Keep = Callable[[str, Any], None]  # writes one figure of a part, at once


@dataclass(frozen=True)
class Spread:
    """Milliseconds of the repeats of one thing."""

    median: float
    fastest: float
    slowest: float

    def rates(self, *, flops: float) -> Figures:
        """Beside its TFLOP/s."""
        return {**self.figures(), "tflops": round(flops / self.median / 1e9, 1 if flops > 1e9 else 6)}

    def figures(self) -> Figures:
        return {"ms": round(self.median, 4), "fastest": round(self.fastest, 4), "slowest": round(self.slowest, 4)}


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle() -> None:
    """Until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(act: Callable[[], object]) -> float:
    """Of the clock, with the device waited for at both ends."""
    settle()
    began = time.perf_counter()
    act()
    settle()
    return time.perf_counter() - began


class Timer:
    """Milliseconds of work on the device, each repeat from a cold L2: events on a GPU, so that the host's own time is not in
    them as long as the device has work waiting."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if torch.cuda.is_available() else None

    def ms(self, act: Callable[[], object], *, repeats: int = 20, warmup: int = 3) -> Spread:
        for _ in range(warmup):
            act()
        settle()
        marks = [self._once(act) for _ in range(repeats)]
        settle()
        return spread([begin.elapsed_time(end) for begin, end in marks])

    def _once(self, act: Callable[[], object]) -> tuple[Any, Any]:
        self.cool()
        begin = mark()
        act()
        return begin, mark()

    def passes(
        self, forward: Callable[[], torch.Tensor], *, leaves: Sequence[torch.Tensor], repeats: int = 10, warmup: int = 3
    ) -> tuple[Spread, Spread]:
        """Of a forward pass and of its backward pass, each from a cold L2. `leaves` lose their gradients in between."""
        gradient = torch.randn_like(forward())
        rows = [self._pass(forward, gradient=gradient, leaves=leaves) for _ in range(warmup + repeats)][warmup:]
        settle()
        columns = [[begin.elapsed_time(end) for begin, end in column] for column in zip(*rows, strict=True)]
        return spread(columns[0]), spread(columns[1])

    def _pass(
        self, forward: Callable[[], torch.Tensor], *, gradient: torch.Tensor, leaves: Sequence[torch.Tensor]
    ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        for leaf in leaves:
            leaf.grad = None
        self.cool()
        began = mark()
        out = forward()
        between = mark()
        self.cool()
        turned = mark()
        out.backward(gradient)
        return (began, between), (turned, mark())

    def cool(self) -> None:
        """Empties the L2. It also keeps the device busy while the host queues what is timed."""
        if self.flush is not None:
            self.flush.zero_()


class HostMark:
    """What a CUDA event is, on a machine without one."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "HostMark") -> float:
        return 1e3 * (other.at - self.at)


def mark() -> Any:
    """Now, in the device's queue."""
    if not torch.cuda.is_available():
        return HostMark()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def device_state() -> Figures:
    """Clock, power and temperature by NVML; nothing where there is none. Reads, sets nothing."""
    if not torch.cuda.is_available() or importlib.util.find_spec("pynvml") is None:
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    except pynvml.NVMLError as error:
        return {"nvml": str(error)}


def describe_device() -> Figures:
    """Of the accelerator, beside benchmarks.machine.describe."""
    from benchmarks.machine import version

    packages = {name: version(name) for name in ("transformer-engine", "nvidia-cudnn-cu13", "nvidia-cublas")}
    if not torch.cuda.is_available():
        return {"gpu": None, **packages}
    properties = torch.cuda.get_device_properties(0)
    size = {"memory_gib": round(properties.total_memory / 2**30, 1), "multiprocessors": properties.multi_processor_count}
    return {"gpu": properties.name, **size, "cuda": torch.version.cuda, **packages}
