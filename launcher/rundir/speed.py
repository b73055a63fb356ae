"""Measured speed and memory in the plan's terms: its FLOPs, its peak, beside its predictions. `plan`: a stage of plan.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.plan.memory import GIB
from launcher.rundir.losses import is_number

Row = Mapping[str, Any]


def read_plan(path: Path) -> dict[str, dict[str, Any]]:
    """The plan of each stage, by name; empty where there is none that can be read."""
    try:
        return {row["stage"]: row for row in json.loads(path.read_text())}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def tflops_of(plan: Row, *, tokens_per_s: Any) -> float | None:
    """TFLOP/s of a GPU (or CPU rank), causal FLOPs. None where either is not known."""
    flops, world = plan.get("flops_per_token"), plan.get("world_size")
    if not is_number(tokens_per_s) or not flops or not is_number(world):
        return None
    return float(flops["causal"] * tokens_per_s / world / 1e12)


def mfu_of(plan: Row, *, tokens_per_s: Any) -> float | None:
    """As the plan counts it: causal FLOPs, against the dense peak of the precision. None on CPU ranks."""
    peak: Any = plan.get("mfu_peak_tflops")
    tflops = tflops_of(plan, tokens_per_s=tokens_per_s)
    return tflops / peak if tflops is not None and is_number(peak) else None


def speed_fields(plan: Row, *, tokens_per_s: float, memory_bytes: float) -> dict[str, float]:
    """What a metrics row says of them. `*_vs_plan`: the measured over the predicted, where the plan predicts."""
    peak_gib = (plan.get("memory_gib") or {}).get("peak") if plan.get("hardware") else None
    found = {
        "tokens_per_s_per_gpu": tokens_per_s / plan["world_size"] if plan.get("world_size") else None,
        "tflops_per_gpu": tflops_of(plan, tokens_per_s=tokens_per_s),
        "mfu": mfu_of(plan, tokens_per_s=tokens_per_s),
        "speed_vs_plan": tokens_per_s / plan["tokens_per_s"] if plan.get("tokens_per_s") else None,
        "memory_vs_plan": memory_bytes / GIB / peak_gib if peak_gib else None,
    }
    return {name: float(f"{value:.6g}") for name, value in found.items() if value is not None}
