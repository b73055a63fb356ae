"""Who is slow: the seconds each rank spends in its own forward computation, compared among ranks that compute the same.

Step times say nothing of it: all ranks wait for the slowest one. Forward computation does not wait, but for the ranks of its
own tensor- and context-parallel group; these are judged together.
"""

import os
import resource
import socket
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from launcher.config.monitoring import Straggler
from training.clocks import Spent
from training.parallel import Rank


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
    """Of one rank, in seconds a step: in forward and backward computation and the optimizer, until its batch was there, and all
    of the step. `memory_bytes`: the most it has held."""

    rank: int
    place: Place
    forward_s: float
    backward_s: float
    optimizer_s: float
    wait_s: float
    step_s: float
    memory_bytes: float

    @property
    def exposed_s(self) -> float:
        """Neither computing nor without data: it waited for other ranks or for its own communication."""
        return max(0.0, self.step_s - self.wait_s - self.forward_s - self.backward_s - self.optimizer_s)


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


def peak_memory_bytes(device: torch.device) -> int:
    """The most that tensors have taken of a GPU since the start; of a CPU rank its resident memory at its height."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gather_pace(rank: Rank, *, places: Sequence[Place], spent: Spent, wait_s: float, step_s: float) -> list[RankPace]:
    """The pace of every rank, on every rank. Collective over the world: six numbers a rank, at a metrics row."""
    told = [*astuple(spent), wait_s, step_s, float(peak_memory_bytes(rank.device))]
    own = torch.tensor(told, dtype=torch.float64, device=rank.device)
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
        "backward_s": round(statistics.fmean(pace.backward_s for pace in paces), 6),
        "optimizer_s": round(statistics.fmean(pace.optimizer_s for pace in paces), 6),
        "exposed_s": round(statistics.fmean(pace.exposed_s for pace in paces), 6),
        "rank_step_s": round(statistics.fmean(step), 6),
        "rank_step_max_s": round(max(step), 6),
        "data_wait_max_s": round(max(pace.wait_s for pace in paces), 6),
        "memory_max_bytes": int(max(pace.memory_bytes for pace in paces)),
    }
    if compared:
        slowest = compared[0]
        row |= {"slowest_rank": slowest.rank, "slowest_node": slowest.node, "slowest_ratio": slowest.ratio}
    return row
