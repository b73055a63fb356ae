"""A run by wall time: bands of what it did, marks of what happened, as plain data that page_timeline.js draws."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.report.format import format_cause, format_duration
from launcher.report.report_bands import Band
from launcher.report.tables import describe_event
from launcher.rundir.losses import is_number
from launcher.rundir.phases import QUEUE, STOPPED, TRAINING

Event = Mapping[str, Any]

# Marks by lane, from the top down; an event of no lane is one of the last.
LANES = {
    "stages": ("stage_start", "stage_done", "phase", "stage_added"),
    "starts": ("submitted", "job_start", "start", "started", "resume"),
    "ends": ("stop", "job_end"),
    "faults": (
        *("fault", "hang", "no_start", "bad_node", "lost_node", "device_error"),
        *("corruption", "non_finite", "checkpoint_failed", "checkpoint_refused"),
    ),
    "rewinds": ("rewind", "skip"),
    "checkpoints": ("checkpoint",),
    "other": (),
}
# Marks of a lane and bands; more are no longer told apart on a screen.
MOST_MARKS = 400
MOST_BANDS = 600
WORDS = 160


def build_timeline(events: Sequence[Event], *, bands: Sequence[Band]) -> dict[str, Any]:
    """Times in milliseconds; `hidden`: how many marks of a lane are left out."""
    lane_of = {kind: lane for lane, kinds in LANES.items() for kind in kinds}
    lanes: dict[str, list[Event]] = {lane: [] for lane in LANES}
    for event in events:
        if is_number(event.get("time")):
            lanes[lane_of.get(str(event.get("kind")), "other")].append(event)
    return {
        "bands": [_band(band) for band in _longest(bands)],
        "lanes": [_lane(name, events=found) for name, found in lanes.items() if found],
    }


def _longest(bands: Sequence[Band]) -> list[Band]:
    if len(bands) <= MOST_BANDS:
        return list(bands)
    least = sorted((band.seconds for band in bands), reverse=True)[MOST_BANDS - 1]
    return [band for band in bands if band.seconds >= least][:MOST_BANDS]


def _band(band: Band) -> dict[str, Any]:
    stage = f" {band.stage}" if band.stage and band.cause not in (QUEUE, STOPPED) else ""
    words = f"{format_cause(band.cause)}{stage}, {format_duration(band.seconds)}"
    kind = "training" if band.cause == TRAINING else "away" if band.cause in (QUEUE, STOPPED) else band.cause
    return {"kind": kind, "begin": _ms(band.begin), "end": _ms(band.end), "words": words}


def _lane(name: str, *, events: Sequence[Event]) -> dict[str, Any]:
    """Evenly thinned out where there are too many."""
    every = math.ceil(len(events) / MOST_MARKS)
    shown = events[::every]
    marks = {"times": [_ms(event["time"]) for event in shown], "words": [words_of(event) for event in shown]}
    return {"name": name, **marks, "hidden": len(events) - len(shown)}


def words_of(event: Event) -> str:
    """Kind, stage and what there is to say, cut where it is long."""
    told = (str(event.get("kind")).replace("_", " "), event.get("stage"), describe_event(event))
    words = " · ".join(str(word) for word in told if word)
    return words if len(words) <= WORDS else f"{words[: WORDS - 1]}…"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
