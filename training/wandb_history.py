"""The history of a run as W&B shows it: a function of metrics.jsonl and events.jsonl, whatever was killed, restarted or
rewound."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from launcher.rundir.exits import ExitClass
from launcher.rundir.goodput import Tail, is_event
from launcher.rundir.paths import RunDir

COUNTS = ("time", "kind", "stage", "step", "samples", "tokens")
# What a person on call must see at once.
ALERTS = {"fault", "hang", "corruption", "non_finite", "loss_spike", "grad_norm", "rewind", "skip", "straggler", "data_stall"}
ALERTS |= {"device_error", "disk_low", "checkpoint_failed", "bad_node", "lost_node", "no_start"}
GRAVE = ("fault", "hang", "corruption", "no_start", "job_end")
MOST_CHARACTERS = 300


class History:
    """The rows of W&B, from the run's files. An event is counted in the first row behind it: `<stage>/event/<kind>`."""

    def __init__(self, run: RunDir):
        self.rows, self.events = Tail(run.metrics), Tail(run.events)
        self.waiting: list[Any] = []  # events
        self.samples: dict[str, int] = {}  # the last ones of a stage
        self.highest: dict[tuple[str, str], int] = {}  # by stage and kind
        self.counts: Counter[str] = Counter()

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """What is new: where each row ends, and its values."""
        self.waiting += [event for event in self.events.documents() if is_event(event)]
        place = self.rows.offset
        for line in self.rows.lines():
            place += len(line)
            with suppress(ValueError, KeyError, TypeError):  # cut off by a crash
                if values := self.take(json.loads(line)):
                    yield place, values

    def take(self, row: dict[str, Any]) -> dict[str, float]:
        """Empty for a row that was there before a restart or rewind: resuming is exact, so that it says the same."""
        stage, kind, samples, at = row["stage"], row["kind"], int(row["samples"]), float(row["time"])
        if samples <= self.highest.get((stage, kind), -1):
            return {}
        self.highest[stage, kind] = self.samples[stage] = samples
        fields = {name: value for name, value in row.items() if name not in COUNTS}
        values: dict[str, float] = {f"{stage}/{name}": value for name, value in flatten(fields, prefix=kind).items()}
        for event in [event for event in self.waiting if event["time"] <= at]:
            where = event.get("stage") if event.get("stage") in self.samples else stage
            name = f"{where}/event/{event.get('kind')}"
            self.counts[name] += 1
            values |= {name: self.counts[name], f"{where}/samples": self.samples[str(where)]}
        self.waiting = [event for event in self.waiting if event["time"] > at]
        return values | {f"{stage}/samples": samples, "_timestamp": at}


def flatten(fields: dict[str, Any], *, prefix: str) -> dict[str, float]:
    """`{"loss_by_source": {"web": 2.0}}` -> `{"train/loss_by_source/web": 2.0}`; what is no finite number is left out."""
    flat: dict[str, float] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= flatten(value, prefix=f"{prefix}/{name}")
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[f"{prefix}/{name}"] = value
    return flat


def is_loud(event: Any) -> bool:
    return event.get("kind") in ALERTS or (
        event.get("kind") == "job_end"
        and event.get("after") == "end"
        and event.get("exit") not in (ExitClass.DONE.name, ExitClass.INTERRUPTED.name)
    )


def is_grave(event: Any) -> bool:
    return event["kind"] in GRAVE or event.get("action") == "stop"


def event_text(event: Any) -> str:
    """One line."""
    named = ("step", "rank", "node", "job", "value", "limit")
    words = [str(event["stage"])] if event.get("stage") else []
    words += [f"{name} {event[name]}" for name in named if event.get(name) is not None]
    words += [str(event[name]) for name in ("action", "exit", "after") if event.get(name)]
    told = str(event.get("error") or event.get("reason") or event.get("cause") or "")
    return ", ".join([*words, *told.splitlines()[:1]])[:MOST_CHARACTERS]
