"""Numbers as people read them. None and NaN, a figure nobody has, become a dash."""

import math
from collections.abc import Mapping

MISSING = "–"
LOSSES = 5  # of a run, in a line


def format_number(value: float | None, *, digits: int = 3) -> str:
    """A plain decimal with `digits` places: losses, ratios, epochs."""
    return MISSING if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def format_count(value: float | None) -> str:
    """Tokens, steps: whole below 10,000, three digits and a unit above."""
    if value is None or math.isnan(value):
        return MISSING
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,600 would round to "1000k": each unit starts where three digits of the one below end.
        if abs(value) >= (1e4 if unit == "k" else 0.9995 * size):
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:,.0f}"


def format_bytes(value: float) -> str:
    """Decimal units: kB, MB, GB, TB."""
    unit, size = next(((unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if value >= size), ("kB", 1e3))
    return f"{value / size:.2f} {unit}"


def format_percent(value: float | None, *, digits: int = 1) -> str:
    return MISSING if value is None or math.isnan(value) else f"{100 * value:.{digits}f}%"


def format_cause(cause: str) -> str:
    """Why time was lost."""
    return {"start_up": "start-up"}.get(cause, cause.replace("_", " "))


def format_losses(lost_s: Mapping[str, float], *, wall_s: float) -> str:
    """With their parts of the time, of those that are some; they come with the largest first."""
    parts = [
        f"{format_cause(cause)} {format_percent(lost / wall_s)}" for cause, lost in lost_s.items() if lost >= wall_s / 2000
    ]
    return ", ".join(parts[:LOSSES])


def format_duration(seconds: float | None) -> str:
    """The two largest units: 42 s, 3 min 05 s, 2 h 10 min, 20 d 4 h."""
    if seconds is None or math.isnan(seconds):
        return MISSING
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
