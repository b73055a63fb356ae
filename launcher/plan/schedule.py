"""megatron-core's pipeline schedules as data: who runs what, in which order, when, and how much a rank holds meanwhile.

1F1B where a rank holds one chunk of the model (vpp = 1), interleaved 1F1B where it holds several (Narayanan et al. 2021).
Orders are those of forward_backward_pipelining_with(out)_interleaving in megatron-core 0.16.1, with groups of pp microbatches.
Chunk c of rank s is virtual stage c * pp + s; times are seconds of one microbatch through one chunk, `forward_s[stage][chunk]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Times = Sequence[Sequence[float]]  # [stage][chunk]


@dataclass(frozen=True)
class Task:
    """One microbatch through one chunk of a pipeline rank, forward or backward."""

    stage: int
    chunk: int
    microbatch: int
    forward: bool


@dataclass(frozen=True)
class Span:
    """A task and when it runs, in seconds from the step's start."""

    task: Task
    start_s: float
    end_s: float


def num_warmup(*, pp: int, vpp: int, num_microbatches: int, stage: int) -> int:
    """Forwards of a rank before its first pair of a forward and a backward: get_pp_rank_microbatches."""
    warmup = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    return min(warmup, num_microbatches * vpp)


def rank_order(*, pp: int, vpp: int, num_microbatches: int, stage: int) -> list[Task]:
    """What the rank runs, in its order. ValueError on microbatches that Megatron refuses."""
    slots = _slots(pp=pp, vpp=vpp, num_microbatches=num_microbatches)
    forwards = [Task(stage, chunk, microbatch, True) for microbatch, chunk in slots]
    backwards = [Task(stage, vpp - 1 - chunk, microbatch, False) for microbatch, chunk in slots]
    warmup = num_warmup(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage)
    pairs = zip(forwards[warmup:], backwards, strict=False)
    return [*forwards[:warmup], *(task for pair in pairs for task in pair), *backwards[len(slots) - warmup :]]


def _slots(*, pp: int, vpp: int, num_microbatches: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) of each forward: pp microbatches through a chunk, then through the next. get_schedule_table."""
    _require_groups(pp=pp, vpp=vpp, num_microbatches=num_microbatches)
    group = pp if vpp > 1 else num_microbatches
    starts = range(0, num_microbatches, group)
    return [(start + place, chunk) for start in starts for chunk in range(vpp) for place in range(group)]


def _require_groups(*, pp: int, vpp: int, num_microbatches: int) -> None:
    if num_microbatches < 1:
        raise ValueError(f"{num_microbatches} microbatches: a step needs at least one")
    if vpp > 1 and num_microbatches % pp:
        raise ValueError(
            f"{num_microbatches} microbatches over pp {pp} with vpp {vpp}: the interleaved schedule takes groups of pp "
            f"microbatches. Fix: a batch of a multiple of {pp} microbatches, or vpp=1"
        )


def simulate(
    *, pp: int, vpp: int, num_microbatches: int, forward_s: Times, backward_s: Times, send_s: float = 0.0
) -> list[Span]:
    """Every task of a step, by rank and in the rank's order.

    A task starts when its rank is free, in rank order, and its input is there: the end of the neighbouring virtual stage, and
    `send_s` later where that lies on another rank. A send costs its sender nothing. ValueError as rank_order."""
    orders = [rank_order(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage) for stage in range(pp)]
    rows: list[list[Span]] = [[] for _ in range(pp)]
    ends: dict[tuple[int, int, bool], float] = {}  # (virtual stage, microbatch, forward)
    last, left, stage = pp * vpp - 1, 2 * pp * vpp * num_microbatches, 0
    while left:
        order, row = orders[stage], rows[stage]
        while len(row) < len(order):
            task = order[len(row)]
            place = task.chunk * pp + stage
            source = _source(place, forward=task.forward, last=last)
            ready = 0.0
            if source is not None:
                end = ends.get((source[0], task.microbatch, source[1]))
                if end is None:
                    break
                ready = end if source[0] % pp == stage else end + send_s
            start = max(ready, row[-1].end_s if row else 0.0)
            finish = start + (forward_s if task.forward else backward_s)[stage][task.chunk]
            ends[place, task.microbatch, task.forward] = finish
            row.append(Span(task, start, finish))
            left -= 1
        stage = (stage + 1) % pp
    return [span for row in rows for span in row]


def _source(place: int, *, forward: bool, last: int) -> tuple[int, bool] | None:
    """Virtual stage and direction that a task's input comes from; None: from the data."""
    if forward:
        return (place - 1, True) if place else None
    return (place + 1, False) if place < last else (last, True)


def pipeline_time(*, num_microbatches: int, forward_s: Times, backward_s: Times, send_s: float = 0.0) -> float:
    """Seconds from the first forward to the last backward: simulate's makespan without simulating, 0.1 ms at pp 8 x vpp 6.

    The longest of the paths through the schedule that keep to one rank in the steady state: until that rank's first backward
    can start, then its work, then what is left after its last forward, which is the beginning read backwards in time.
    Exact for equal stages with sends up to a tenth of a forward. Else a lower bound: of some 10,000 uneven layouts (embedding,
    LM head, a layer or two less on the first and last chunk, sends up to 5% of a chunk) most are exact and the worst is 1.1%
    below the simulation; where a chunk has no layer 4%, where the first has a layer more 2.4%.
    ValueError as rank_order."""
    pp, vpp = len(forward_s), len(forward_s[0])
    _require_groups(pp=pp, vpp=vpp, num_microbatches=num_microbatches)
    early = [_early_forwards(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage) for stage in range(pp)]
    head_s = _first_backwards(forward_s, backward_s, num_microbatches=num_microbatches, early=early, send_s=send_s)
    tail_s = _first_backwards(backward_s, forward_s, num_microbatches=num_microbatches, early=early, send_s=send_s)
    longest, lead_s, trail_s = 0.0, 0.0, 0.0
    for stage, (forward, backward) in enumerate(zip(forward_s, backward_s, strict=True)):
        down_s, up_s = num_microbatches * sum(forward), num_microbatches * sum(backward)
        if _warms_up_on_all(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage):
            path_s = max(head_s[stage] + up_s + trail_s, lead_s + down_s + tail_s[stage])
        else:
            before_s = _early_work(forward, early=early[stage], pp=pp) + _early_work(backward, early=early[stage], pp=pp)
            path_s = head_s[stage] + down_s + up_s - before_s + tail_s[stage]
        longest = max(longest, path_s)
        lead_s, trail_s = lead_s + forward[0] + send_s, trail_s + backward[0] + send_s
    if vpp == 1 and send_s:
        return max(longest, _zigzag_time(forward_s, backward_s, num_microbatches=num_microbatches, send_s=send_s))
    return longest


def _warms_up_on_all(*, pp: int, vpp: int, num_microbatches: int, stage: int) -> bool:
    """Whether the rank has run every forward before its first backward."""
    warmup = num_warmup(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage)
    return warmup + 1 >= num_microbatches * vpp


def _early_forwards(*, pp: int, vpp: int, num_microbatches: int, stage: int) -> int:
    """Forwards before a rank's first backward that come after its first group has left all chunks but the last."""
    warmup = num_warmup(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage)
    return min(warmup + 1, num_microbatches * vpp) - (vpp - 1) * pp


def _early_work(times: Sequence[float], *, early: int, pp: int) -> float:
    """Seconds of a rank's forwards before its first backward; the second group's first chunk may have begun."""
    if len(times) == 1:
        return early * times[0]
    return pp * sum(times[:-1]) + min(early, pp) * times[-1] + max(0, early - pp) * times[0]


def _first_backwards(
    forward_s: Times, backward_s: Times, *, num_microbatches: int, early: Sequence[int], send_s: float
) -> list[float]:
    """When each rank can start its first backward.

    Until then a group of microbatches passes chunk after chunk as through a flow shop: `starts` is when a rank begins a chunk,
    `ends` when it is through with the group."""
    pp, vpp = len(forward_s), len(forward_s[0])
    group = pp if vpp > 1 else num_microbatches
    starts, ends, arrival = [0.0] * pp, [0.0] * pp, 0.0
    for chunk in range(vpp):
        above = 0.0
        for stage in range(pp):
            one = forward_s[stage][chunk]
            starts[stage] = start = max(arrival, ends[stage])
            ends[stage] = above = max(start + group * one, above + send_s + one if stage else 0.0)
            arrival = start + one + send_s  # at the next rank, or the first one's next chunk
    firsts, returned = [0.0] * pp, 0.0
    for stage in reversed(range(pp)):
        count, last, next_s = early[stage], forward_s[stage][-1], forward_s[stage][0]
        done = starts[stage] + count * last if count <= group else ends[stage] + (count - group) * next_s
        firsts[stage] = first = max(done, returned)
        returned = first + backward_s[stage][-1] + send_s
    return firsts


def _zigzag_time(forward_s: Times, backward_s: Times, *, num_microbatches: int, send_s: float) -> float:
    """1F1B hides no send: a path may go to and fro between two ranks all step long, once for each rank between them.

    A round over n ranks gains n microbatches and pays 2 (n - 1) sends. Rounds that turn before the last rank begin after one
    that does not; microbatches too few for a round turn nearer to the last rank."""
    pairs_s = [forward[0] + backward[0] for forward, backward in zip(forward_s, backward_s, strict=True)]
    pp, longest = len(pairs_s), 0.0
    turns_s = [sum(pairs_s[pp - count :]) + 2 * max(0, count - 1) * send_s for count in range(pp + 1)]  # of the last ranks
    for first in range(pp):
        deep, round_s = pp - first, -2 * send_s
        for count, pair_s in enumerate(pairs_s[first:], start=1):
            round_s += pair_s + 2 * send_s
            gained, spent_s = (0, 0.0) if count == deep else (deep, turns_s[deep])
            rounds, left = divmod(num_microbatches - 1 - gained, count)
            if rounds >= 0:
                rest_s = max(left * pairs_s[-1], turns_s[left])
                longest = max(longest, turns_s[pp] + spent_s + rounds * round_s + rest_s)
    return longest


def chunks_in_flight(*, pp: int, vpp: int, num_microbatches: int, stage: int) -> int:
    """The most microbatches times chunks whose activations a rank holds at once: its warm-up and one more forward."""
    warmup = num_warmup(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage)
    return min(warmup + 1, num_microbatches * vpp)


def chunks_in_flight_by_chunk(*, pp: int, vpp: int, num_microbatches: int, stage: int) -> list[tuple[int, ...]]:
    """How many microbatches of each chunk a rank holds, at each moment that can be its fullest.

    Their sum is always chunks_in_flight; what they weigh depends on the chunks. In the steady state the counts change linearly
    between borders of groups, so that a weighted maximum over all time lies at one of these at most 2 vpp + 1 moments."""
    held = chunks_in_flight(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage)
    if vpp == 1:
        return [(held,)]
    last = min(num_microbatches * vpp, held + pp * vpp)  # one period
    moments = {held, last} | {n for n in range(held, last) if n % pp == 0 or (n - held) % pp == 0}
    counts = {
        tuple(
            _passed(n, chunk=chunk, pp=pp, vpp=vpp) - _passed(n - held, chunk=vpp - 1 - chunk, pp=pp, vpp=vpp)
            for chunk in range(vpp)
        )
        for n in moments
    }
    return sorted(counts)


def _passed(slots: int, *, chunk: int, pp: int, vpp: int) -> int:
    """Of so many forwards of a rank, those through a chunk."""
    groups, rest = divmod(slots, pp * vpp)
    return groups * pp + min(max(rest - chunk * pp, 0), pp)
