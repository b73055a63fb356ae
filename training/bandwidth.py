"""How fast the nodes of a job are before it trains: `python -m training.bandwidth <out.json> --max-s 60`, once a rank.

BF16 products on every GPU, all-reduce among the GPUs of a node, between neighbours, and among all ranks. The nodes are a ring
whose every link is measured alone: a node that is slow on both of its links is the bad one, so its figure is the better of the
two. Between nodes all their ranks take part, so that every network adapter works.

Ranks speak through a store on the first one, not through a group: one that is missing, or fails, is named. Rank 0 writes what
is known after each part. Speeds of all-reduce are bus bandwidths, 2(n-1)/n x bytes / s (NVIDIA's nccl-tests, PERFORMANCE.md).
"""

import argparse
import json
import math
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from launcher.rundir.records import write_json
from training.processes import adopt_slurm_rank

JOIN_S = 60.0  # between the first rank and the last: they import torch from one file system
GRACE_S = 10.0  # beyond --max-s a rank ends itself, whatever it hangs in
REPEATS_S = 2.0  # of one all-reduce


class Sizes(NamedTuple):
    """`gemm`: rows of the square matrices. `repeats`: of each measurement, at most."""

    gemm: int
    gemm_repeats: int
    reduce_bytes: int
    reduce_repeats: int


SIZES = {"cuda": Sizes(8192, 200, 1 << 30, 20), "cpu": Sizes(256, 10, 1 << 20, 5)}


@dataclass(frozen=True)
class Place:
    """This rank, and the machine it is on."""

    rank: int
    world_size: int
    local_rank: int
    node: str
    device: torch.device


class Part(NamedTuple):
    """`groups`: the ranks that work together; a rank of none has nothing to do."""

    name: str
    groups: list[list[int]]


class Missing(Exception):
    """Ranks that did not answer, with what the others said."""

    def __init__(self, ranks: Sequence[int], answers: Mapping[int, Any]):
        super().__init__(f"no answer of ranks {list(ranks)}")
        self.ranks, self.answers = ranks, answers


class Meeting:
    """Words between the ranks, through the store of rank 0."""

    def __init__(self, place: Place, *, address: str, port: int, timeout_s: float):
        self.place, timeout = place, timedelta(seconds=timeout_s)
        self.store = dist.TCPStore(address, port, place.world_size, place.rank == 0, timeout, wait_for_workers=False)

    def gather(self, name: str, value: Any, *, timeout_s: float) -> dict[int, Any]:
        """What each rank says, on rank 0; nothing elsewhere. Missing where some say nothing in time."""
        self.store.set(f"{name}/{self.place.rank}", json.dumps(value))
        if self.place.rank != 0:
            return {}
        ranks, deadline = range(self.place.world_size), time.monotonic() + timeout_s
        there = [rank for rank in ranks if self.has(f"{name}/{rank}", wait_s=deadline - time.monotonic())]
        answers = {rank: json.loads(self.store.get(f"{name}/{rank}")) for rank in there}
        if missing := [rank for rank in ranks if rank not in answers]:
            raise Missing(missing, answers)
        return answers

    def has(self, key: str, *, wait_s: float) -> bool:
        try:
            self.store.wait([key], timedelta(seconds=max(wait_s, 0.01)))
        except RuntimeError:  # of torch's, with several names over its versions
            return False
        return True

    def decide(self, name: str, value: Any = None, *, timeout_s: float) -> Any:
        """What rank 0 says, on all ranks."""
        if self.place.rank == 0:
            self.store.set(name, json.dumps(value))
            return value
        self.store.wait([name], timedelta(seconds=timeout_s))
        return json.loads(self.store.get(name))


@dataclass
class Book:
    """What is known so far, written by rank 0 after each part. `at`: the part that is under way; `failed`: the one that ended
    the measurement, with the nodes it failed on. `left_out`: parts that no longer fit in the time."""

    path: Path
    roster: list[str] = field(default_factory=list)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    all_reduce_gb_per_s: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failed: dict[str, Any] | None = None
    at: str | None = "join"

    def enter(self, hellos: Mapping[int, Mapping[str, Any]]) -> None:
        """The nodes, from what their ranks say of themselves."""
        self.roster = [hello["node"] for _, hello in sorted(hellos.items())]
        for hello in hellos.values():
            empty = dict.fromkeys(("gemm_tflops", "node_all_reduce_gb_per_s", "pair_all_reduce_gb_per_s"))
            row = self.nodes.setdefault(hello["node"], {"ranks": 0, "nccl": hello["nccl"], "torch": hello["torch"], **empty})
            row["ranks"] += 1

    def add(self, part: str, answers: Mapping[int, Mapping[str, Any]]) -> None:
        """The lowest figure of the ranks of a node; of neighbours, the higher of its links."""
        figures: dict[str, float] = {}
        for rank, answer in answers.items():
            if answer["figure"] is not None:
                node = self.roster[rank]
                figures[node] = min(answer["figure"], figures.get(node, math.inf))
        if part == "all-reduce of all" and figures:
            self.all_reduce_gb_per_s = min(figures.values())
            return
        name = {"gemm": "gemm_tflops", "node all-reduce": "node_all_reduce_gb_per_s"}.get(part, "pair_all_reduce_gb_per_s")
        for node, figure in figures.items():
            self.nodes[node][name] = max(figure, self.nodes[node][name] or 0.0)

    def fail(self, part: str, reasons: Mapping[str, str]) -> None:
        self.failed, self.at = {"part": part, "nodes": dict(reasons)}, None


def write(book: Book, *, place: Place) -> None:
    """Rank 0 alone knows all of it."""
    if place.rank == 0:
        write_json(book.path, {name: value for name, value in vars(book).items() if name not in ("path", "roster")})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.bandwidth", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-s", type=float, required=True)
    parser.add_argument("--join-s", type=float, default=JOIN_S)
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    adopt_slurm_rank(os.environ)
    place = read_place(os.environ, device=arguments.device)
    rendezvous = {"address": os.environ["MASTER_ADDR"], "port": int(os.environ["MASTER_PORT"])}
    meeting = Meeting(place, **rendezvous, timeout_s=arguments.join_s)
    book = Book(arguments.out)
    whole = join(meeting, book, join_s=arguments.join_s) and measure(meeting, book, max_s=arguments.max_s)
    leave(meeting, wait_s=GRACE_S / 2 if whole else 1.0)
    return 0 if whole else 1


def read_place(environment: Mapping[str, str], *, device: str) -> Place:
    local_rank = int(environment["LOCAL_RANK"])
    return Place(
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        local_rank=local_rank,
        node=environment.get("SLURMD_NODENAME") or os.uname().nodename,
        device=torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu"),
    )


def join(meeting: Meeting, book: Book, *, join_s: float) -> bool:
    """Whether all ranks have come with what they need; then `book` knows the nodes, on every rank."""
    place, began, hellos = meeting.place, time.monotonic(), {}
    try:
        hellos = meeting.gather("join", hello(place), timeout_s=join_s)
        complete = True
    except Missing as missing:
        hellos, complete = dict(missing.answers), False
    if place.rank == 0:
        book.enter(hellos)
        book.seconds["join"] = round(time.monotonic() - began, 2)
        lacking = {said["node"]: said["lacks"] for said in hellos.values() if said["lacks"]}
        if lacking or not complete:
            book.fail("join", lacking)
        write(book, place=place)
        complete = complete and not lacking
    # Rank 0 may have come last.
    roster = meeting.decide("roster", book.roster if complete else [], timeout_s=2 * join_s)
    book.roster = roster
    return bool(roster)


def hello(place: Place) -> dict[str, Any]:
    """What a rank brings along. `lacks`: why it cannot take part."""
    lacks, nccl = None, None
    if place.device.type == "cuda":
        count = torch.cuda.device_count()
        if count <= place.local_rank:
            lacks = f"{count} CUDA devices in PyTorch {torch.__version__}; local rank {place.local_rank} needs its own"
        elif not dist.is_nccl_available():
            lacks = f"PyTorch {torch.__version__} has no NCCL"
        else:
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"node": place.node, "nccl": nccl, "torch": torch.__version__, "lacks": lacks}


def measure(meeting: Meeting, book: Book, *, max_s: float) -> bool:
    """Every part that fits in the time. False where one failed."""
    place, began, longest = meeting.place, time.monotonic(), 0.0
    end_by(place, seconds=max_s + GRACE_S)
    for part in parts(book.roster):
        left_s = max_s - (time.monotonic() - began)
        if not meeting.decide(f"begin {part.name}", longest < left_s, timeout_s=max_s + GRACE_S):
            book.left_out.append(part.name)
            continue
        part_began = time.monotonic()
        book.at = part.name
        write(book, place=place)
        answer = attempt(part, place=place, store=meeting.store, timeout_s=left_s)
        reasons = collect(meeting, book, part=part, answer=answer, timeout_s=left_s + GRACE_S / 2)
        longest = max(longest, time.monotonic() - part_began)
        book.seconds[part.name] = round(time.monotonic() - part_began, 2)
        if reasons:
            book.fail(part.name, reasons)
            write(book, place=place)  # before the others hear of it and end, which may end this rank as well
        if meeting.decide(f"end {part.name}", bool(reasons), timeout_s=max_s + GRACE_S):
            return False
    book.at = None
    write(book, place=place)
    return True


def attempt(part: Part, *, place: Place, store: dist.Store, timeout_s: float) -> dict[str, Any]:
    """The figure of this rank, null where the part is not for it; or what went wrong."""
    group = next((group for group in part.groups if place.rank in group), None)
    if group is None:
        return {"figure": None, "error": None}
    sizes = SIZES[place.device.type]
    try:
        if place.device.type == "cuda":
            torch.cuda.set_device(place.device)  # events are taken on the current one
        if part.name == "gemm":
            figure = gemm_tflops(place.device, size=sizes.gemm, repeats=sizes.gemm_repeats)
        else:
            with world_of(group, place=place, store=dist.PrefixStore(part.name, store), timeout_s=timeout_s):
                figure = all_reduce_gb_per_s(device=place.device, sizes=sizes)
    except Exception as error:  # whatever CUDA and NCCL say of a bad device: it is this node's answer
        traceback.print_exc()
        return {"figure": None, "error": f"rank {place.rank}: {type(error).__name__}: {error}"[:300]}
    return {"figure": figure, "error": None}


def collect(meeting: Meeting, book: Book, *, part: Part, answer: Mapping[str, Any], timeout_s: float) -> dict[str, str]:
    """Enters the figures of all ranks on rank 0. The nodes that failed, and why."""
    reasons: dict[str, str] = {}
    try:
        answers: Mapping[int, Any] = meeting.gather(part.name, answer, timeout_s=timeout_s)
    except Missing as missing:
        answers = missing.answers
        reasons = {book.roster[rank]: f"rank {rank} did not end in time" for rank in missing.ranks}
    reasons |= {book.roster[rank]: said["error"] for rank, said in answers.items() if said["error"]}
    book.add(part.name, answers)
    return reasons


def parts(roster: Sequence[str]) -> list[Part]:
    """What is measured on ranks whose nodes `roster` names, in order. Groups of one rank have nobody to talk to."""
    ranks = {node: [rank for rank, other in enumerate(roster) if other == node] for node in dict.fromkeys(roster)}
    each = list(ranks.values())
    found = [Part("gemm", [[rank] for rank in range(len(roster))])]
    found += [Part("node all-reduce", [group for group in each if len(group) > 1])]
    for number, links in enumerate(ring_rounds(len(each)), start=1):
        found.append(Part(f"pair all-reduce {number}", [sorted(each[a] + each[b]) for a, b in links]))
    if len(each) > 1:
        found.append(Part("all-reduce of all", [list(range(len(roster)))]))
    return [part for part in found if part.groups]


def ring_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Every link of a ring of nodes, in rounds in which no node has two: each node is measured with both of its neighbours."""
    if num_nodes < 3:
        return [[(0, 1)]] if num_nodes == 2 else []
    links = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    even = num_nodes - num_nodes % 2
    return [rest for rest in (links[0:even:2], links[1:even:2], links[even:]) if rest]


def gemm_tflops(device: torch.device, *, size: int, repeats: int) -> float:
    """Of BF16 products of random matrices: zeros would draw less power and run faster than what training does."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [timed(lambda: left @ right, device=device) for _ in range(3 + repeats)]
    return 2 * size**3 / statistics.median(seconds[3:]) / 1e12


@contextmanager
def world_of(ranks: Sequence[int], *, place: Place, store: dist.Store, timeout_s: float) -> Iterator[None]:
    """A world of these ranks alone: groups of one world are made by all of its ranks, which takes minutes of a large job."""
    dist.init_process_group(
        "nccl" if place.device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"of {ranks[0]}", store),
        rank=ranks.index(place.rank),
        world_size=len(ranks),
        timeout=timedelta(seconds=max(timeout_s, 1.0)),
    )
    yield
    dist.destroy_process_group()  # not where something failed: it could wait for ever


def all_reduce_gb_per_s(*, device: torch.device, sizes: Sizes) -> float:
    """Bus bandwidth among the ranks of the world."""
    data = torch.zeros(sizes.reduce_bytes // 2, device=device, dtype=torch.bfloat16)
    dist.all_reduce(data[:1024])  # opens the connections
    first = torch.tensor([timed(lambda: dist.all_reduce(data), device=device)], device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MAX)  # all must repeat as often
    repeats = min(sizes.reduce_repeats, int(REPEATS_S / first.item()))
    seconds = [timed(lambda: dist.all_reduce(data), device=device) for _ in range(repeats)]
    count = dist.get_world_size()
    return 2 * (count - 1) / count * sizes.reduce_bytes / statistics.median(seconds or [first.item()]) / 1e9


def timed(work: Callable[[], object], *, device: torch.device) -> float:
    """Seconds of one call, on the device's own clock where it has one."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def leave(meeting: Meeting, *, wait_s: float) -> None:
    """Rank 0, which holds the store, goes last."""
    try:
        meeting.gather("leave", None, timeout_s=wait_s)
    except Missing:
        return


def end_by(place: Place, *, seconds: float) -> None:
    """Ends this process, also one that waits for a device that will not answer."""

    def end() -> None:
        print(f"rank {place.rank} on {place.node} did not end in {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no rank may hang in a destructor
