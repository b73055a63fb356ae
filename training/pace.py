"""Who is slow: the seconds each rank spends in its own forward computation, compared among ranks that compute the same.

Step times say nothing of it: all ranks wait for the slowest one. Forward computation does not wait, but for the ranks of its
own tensor- and context-parallel group; these are judged together.
"""

import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from launcher.config.monitoring import Straggler
from training.parallel import Rank


class ComputeClock:
    """Adds up what lies between `start` and `stop`. On a GPU these are events in its stream, which cost the host microseconds
    and are read when `take` is called, after the step has ended."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.seconds, self.began = 0.0, 0.0
        self.events: list[torch.cuda.Event] = []  # start, stop, start, stop, ...
        self.free: list[torch.cuda.Event] = []

    def start(self) -> None:
        """Begins a forward pass; one that was not stopped, for an error, is forgotten."""
        if self.on_gpu:
            del self.events[len(self.events) // 2 * 2 :]
            self._mark()
        else:
            self.began = time.perf_counter()

    def stop(self) -> None:
        if self.on_gpu:
            self._mark()
        else:
            self.seconds += time.perf_counter() - self.began

    def take(self) -> float:
        """The seconds since it was called last; waits for the GPU where it is not done with them."""
        if self.events:
            self.events[-1].synchronize()
            pairs = zip(self.events[::2], self.events[1::2], strict=False)
            self.seconds += sum(first.elapsed_time(last) for first, last in pairs) / 1e3
            self.free += self.events
            self.events = []
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _mark(self) -> None:
        event = self.free.pop() if self.free else torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)


@dataclass(frozen=True)
class Place:
    """Where a rank runs, and its place in the layout."""

    node: str
    pp_rank: int
    dp_rank: int

    @property
    def group(self) -> tuple[int, int]:
        """What the ranks of a tensor- and context-parallel group have alike."""
        return self.pp_rank, self.dp_rank


@dataclass(frozen=True)
class RankPace:
    """Of one rank, in seconds a step: in forward computation, until its batch was there, and all of the step."""

    rank: int
    place: Place
    forward_s: float
    wait_s: float
    step_s: float


@dataclass(frozen=True)
class Slow:
    """A rank whose forward computation takes `ratio` times as long as the median of its pipeline stage. Of a tensor- and
    context-parallel group that is slow it is the slowest one, though any of them may be the cause."""

    rank: int
    place: Place
    ratio: float

    @property
    def node(self) -> str:
        return self.place.node


def gather_places(rank: Rank) -> list[Place]:
    """Of every rank; once at a start. Collective over the world."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    places: list[Any] = [None] * rank.world_size
    dist.all_gather_object(places, Place(node, rank.pp_rank, rank.dp_rank))
    return places


def gather_pace(rank: Rank, *, places: Sequence[Place], forward_s: float, wait_s: float, step_s: float) -> list[RankPace]:
    """The pace of every rank, on every rank. Collective over the world: three numbers a rank, at a metrics row."""
    own = torch.tensor([forward_s, wait_s, step_s], dtype=torch.float64, device=rank.device)
    gathered = torch.empty(rank.world_size * len(own), dtype=torch.float64, device=rank.device)
    dist.all_gather_into_tensor(gathered, own)
    rows = gathered.view(rank.world_size, -1).tolist()
    return [RankPace(index, place, *row) for index, (place, row) in enumerate(zip(places, rows, strict=True))]


def ratios(paces: Sequence[RankPace]) -> list[Slow]:
    """Of each tensor- and context-parallel group the slowest rank, against the median of its pipeline stage; slowest first. Not
    of a stage that is one such group. Of two groups the faster one is the median."""
    groups: dict[tuple[int, int], RankPace] = {}
    for pace in paces:
        known = groups.get(pace.place.group, pace)
        groups[pace.place.group] = max(known, pace, key=lambda one: one.forward_s)
    stages = defaultdict[int, list[RankPace]](list)
    for (stage, _), pace in groups.items():
        stages[stage].append(pace)
    found = []
    for members in stages.values():
        middle = statistics.median_low(pace.forward_s for pace in members)
        if len(members) > 1 and middle > 0:
            found += [Slow(pace.rank, pace.place, round(pace.forward_s / middle, 3)) for pace in members]
    return sorted(found, key=lambda slow: -slow.ratio)


class StragglerWatch:
    """Remembers for how many rows each tensor- and context-parallel group has been slow. The same on every rank."""

    def __init__(self, settings: Straggler):
        self.settings = settings
        self.rows: dict[tuple[int, int], int] = {}

    def judge(self, compared: Sequence[Slow]) -> list[Slow]:
        """Of what `ratios` found: those that have now been slow in enough rows in a row, slowest first; each once, until it was
        not slow in a row."""
        slow = {one.place.group: one for one in compared if one.ratio > self.settings.factor}
        self.rows = {group: self.rows.get(group, 0) + 1 for group in slow}
        return [one for group, one in slow.items() if self.rows[group] == self.settings.rows]


def summary(paces: Sequence[RankPace], *, compared: Sequence[Slow]) -> dict[str, Any]:
    """What a metrics row says of the ranks: seconds a step, and who is slowest where ranks can be `compared`."""
    forward, step = [pace.forward_s for pace in paces], [pace.step_s for pace in paces]
    row: dict[str, Any] = {
        "forward_s": round(statistics.fmean(forward), 6),
        "forward_max_s": round(max(forward), 6),
        "rank_step_s": round(statistics.fmean(step), 6),
        "rank_step_max_s": round(max(step), 6),
        "data_wait_max_s": round(max(pace.wait_s for pace in paces), 6),
    }
    if compared:
        slowest = compared[0]
        row |= {"slowest_rank": slowest.rank, "slowest_node": slowest.node, "slowest_ratio": slowest.ratio}
    return row
