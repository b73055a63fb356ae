"""What torch's profiler saw of a step, by kind of kernel: matrix products, attention, what stands in for communication, the
rest."""

import re
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType

from training.standin import BACKEND

TOP = 40
# By name: of GPU kernels (cuBLAS, CUTLASS, cuDNN, FlashAttention), and of torch's operations where the CPU computes.
KINDS = (
    ("attention", re.compile(r"flash|fmha|sdpa|attention|cudnn_generated_fort_native", re.I)),
    ("gemm", re.compile(r"gemm|cutlass|nvjet|xmma|cublas|::(addmm|mm|bmm|baddbmm)$", re.I)),
)


def kernel_table(events: Iterable[Any], *, on_gpu: bool) -> tuple[str, dict[str, float]]:
    """A table of the TOP kernels by their own time, and seconds by group. `events`: of the profiler's key_averages."""
    events = list(events)
    rows = sorted(((own_s(event, on_gpu=on_gpu), event.count, event.key) for event in events), reverse=True)
    rows = [row for row in rows if row[0] > 0]
    total = sum(seconds for seconds, _, _ in rows)
    groups = {name: sum(seconds for seconds, _, key in rows if kind_of(key) == name) for name in ("gemm", "attention")}
    groups["stand_in"] = stand_in_s(events, on_gpu=on_gpu)
    groups["other"] = max(0.0, total - sum(groups.values()))
    lines = [f"{name:<10}{seconds * 1e3:12.3f} ms  {share(seconds, total)}" for name, seconds in groups.items()]
    lines += ["", f"{'ms':>12}  {'of all':>7}  {'times':>7}  {'group':<10}kernel"]
    for seconds, count, key in rows[:TOP]:
        lines.append(f"{seconds * 1e3:12.3f}  {share(seconds, total)}  {count:7,}  {kind_of(key):<10}{key}")
    return "\n".join(lines) + "\n", groups


def share(seconds: float, total: float) -> str:
    return f"{seconds / total if total else 0.0:7.1%}"


def own_s(event: Any, *, on_gpu: bool) -> float:
    """Its own seconds on the device that computes; a range that was only named has none there."""
    if on_gpu:
        is_kernel = event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        return float(event.self_device_time_total) / 1e6 if is_kernel and event.key != BACKEND else 0.0
    return float(event.self_cpu_time_total) / 1e6


def stand_in_s(events: Iterable[Any], *, on_gpu: bool) -> float:
    """Of what ran within the ranges that the stand-ins name."""
    ranges = [event for event in events if event.key == BACKEND and event.device_type == DeviceType.CPU]
    return sum(float(event.device_time_total if on_gpu else event.cpu_time_total) for event in ranges) / 1e6


def kind_of(key: str) -> str:
    return next((name for name, pattern in KINDS if pattern.search(key)), "other")
