"""The charts of the report by group: what they are called, and how page.js writes their numbers."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# `format`: d3's, of a number on hover; `tick`: of the axis; `suffix`: its unit; `zero`: the axis begins there. Those that are
# `always` there say so where nothing is logged; others are left out.
CHARTS: dict[str, dict[str, Any]] = {
    "loss": {"format": ".4f", "big": True},
    "sources": {"format": ".4f", "big": True},
    "throughput": {"title": "Tokens per second", "format": ",.4s", "zero": True, "always": True},
    "mfu": {"title": "MFU", "format": ".1%", "tick": ".0%", "zero": True},
    "memory": {"title": "Memory of the fullest rank", "format": ".2f", "suffix": " GiB", "zero": True},
    "split": {"title": "Seconds of a step", "format": ".3~g", "suffix": " s", "zero": True, "stacked": True},
    "slowest_ratio": {"title": "Forward time, slowest rank over the mean", "format": ".3f"},
    "lr": {"title": "Learning rate", "format": ".3e", "exponent": True, "zero": True, "always": True},
    "grad_norm": {"title": "Gradient norm", "format": ".4f", "always": True},
    "weight_norm": {"title": "Weight norm", "format": ",.5~g"},
    "update_ratio": {"title": "Update ratio (norms of update and weights)", "format": ".3e", "exponent": True},
    "zero_grads": {"title": "Gradient elements that are zero", "format": ".2%", "tick": "~%", "zero": True},
    "fp8_scale_min": {"title": "FP8: smallest scale", "format": ".4~g"},
    "fp8_amax_max": {"title": "FP8: largest amax", "format": ".4~g"},
    "fp8_overflows": {"title": "FP8: overflows", "format": ",.4~g", "zero": True},
    "epochs": {"title": "Epochs of each source", "format": ".3f", "zero": True, "wide": True},
}
GROUPS: dict[str, tuple[str, ...]] = {
    "speed": ("throughput", "mfu", "memory", "slowest_ratio"),
    "split": ("split",),
    "optimization": (
        *("lr", "grad_norm", "weight_norm", "update_ratio", "zero_grads"),
        *("fp8_scale_min", "fp8_amax_max", "fp8_overflows"),
    ),
    "epochs": ("epochs",),
}


def charts_html(group: str, *, traces: Mapping[str, Sequence[Any]]) -> str:
    """Places for the charts of a group that have something to show; page.js fills them."""
    names = [name for name in GROUPS[group] if traces[name] or CHARTS[name].get("always")]
    return "".join(_figure(name) for name in names)


def _figure(name: str) -> str:
    title, tall = escape(CHARTS[name]["title"]), " medium" if CHARTS[name].get("stacked") or CHARTS[name].get("wide") else ""
    chart = f'<div class="chart{tall}" id="chart-{name}" role="img" aria-label="{title}, over tokens"></div>'
    return f"<figure><figcaption>{title}</figcaption>{chart}</figure>"
