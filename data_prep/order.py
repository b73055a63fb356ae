"""The stateless data order: which tokens the g-th sample of a run reads, as arithmetic. No index files, no state.

A window is S + 1 consecutive tokens of a source at stride S. A position is the running number of a window over all epochs
of its source, in reading order: position p is the p-th window that the source ever gives. See docs/data_order.md.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Uint64s = NDArray[np.uint64]

ROUNDS = 16  # 8 would do for large sizes, but leave orders of 5 to 16 windows measurably uneven
CHUNKS = -1  # in the place of a group: the key of an epoch's permutation of chunks
SLOTS = 2**32  # Q: shares are quantised to integers with this sum
GOLDEN_STEP = 0x9E3779B9  # G: odd, nearest to Q / golden ratio


@lru_cache(maxsize=4096)
def round_keys(seed: int, name: str, epoch: int, group: int) -> Uint64s:
    """Keys [ROUNDS] of one permutation. JSON keeps the parts apart, so that no two tuples share a key."""
    key = json.dumps([seed, name, epoch, group]).encode()
    halves = [blake2b(key, digest_size=4 * ROUNDS, salt=half, person=b"phidias-order").digest() for half in (b"0", b"1")]
    return np.frombuffer(b"".join(halves), dtype="<u8").astype(np.uint64, copy=False)


def permute(index: Int64s, *, size: Int64s, keys: Uint64s) -> Int64s:
    """Keyed bijection of 0..size-1 for each element: index and size [N], keys [ROUNDS, N]. An index past its size stays.

    A Feistel network on a rows x columns grid just above size (the excess is below its square root), with modular
    addition in place of xor (Black and Rogaway 2002); a value outside walks its cycle until it is back inside."""
    bound = size.astype(np.uint64)
    rows = np.ceil(np.sqrt(np.maximum(bound, 1))).astype(np.uint64)
    columns = -(-np.maximum(size, 1) // rows.astype(np.int64)).astype(np.uint64)
    value = index.astype(np.uint64)
    walking = np.flatnonzero(value < bound)
    while walking.size:
        value[walking] = _feistel(value[walking], rows=rows[walking], columns=columns[walking], keys=keys[:, walking])
        walking = walking[value[walking] >= bound[walking]]
    return value.astype(np.int64)


def _feistel(value: Uint64s, *, rows: Uint64s, columns: Uint64s, keys: Uint64s) -> Uint64s:
    row, column = np.divmod(value, columns)
    for r in range(0, ROUNDS, 2):
        row = (row + _hash(column ^ keys[r])) % rows
        column = (column + _hash(row ^ keys[r + 1])) % columns
    return row * columns + column


def _hash(value: Uint64s) -> Uint64s:
    """The splitmix64 finaliser (Stafford's variant 13), less one bit: the sum in _feistel must not wrap at 2^64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (value ^ (value >> np.uint64(31))) >> np.uint64(1)


class SourceOrder:
    """One source read at one sequence length.

    An epoch permutes the full chunks and takes them in groups; inside a group the windows are permuted. The windows behind
    the last full chunk belong to the last group, so that fewer than S tokens of an epoch are read by no window. `windows`
    other than stream: the rows of a window table, laid end to end as a stream of num_windows x S + 1 tokens."""

    def __init__(
        self,
        *,
        name: str,
        num_tokens: int,
        seq_length: int,
        chunk_tokens: int,
        group_tokens: int,
        seed: int,
        windows: str = "stream",
    ):
        _check_source(name, num_tokens=num_tokens, seq_length=seq_length, chunk_tokens=chunk_tokens, group_tokens=group_tokens)
        self.name, self.num_tokens, self.seq_length, self.windows = name, num_tokens, seq_length, windows
        self.chunk_tokens, self.group_tokens, self.seed = chunk_tokens, group_tokens, seed
        self.chunk_windows = chunk_tokens // seq_length
        self.full_chunks = (num_tokens - 1) // chunk_tokens  # the last token of a source is only ever a label
        self.group_chunks = max(1, group_tokens // chunk_tokens)
        self.num_groups = max(1, -(-self.full_chunks // self.group_chunks))
        # Of full chunks and tail together, as S divides C. It is also the first position that repeats tokens.
        self.num_windows = (num_tokens - 1) // seq_length

    @property
    def geometry(self) -> tuple[int, int, int, int, int, int]:
        """What `_locate` needs, in its order."""
        return (
            self.num_windows,
            self.num_groups,
            self.group_chunks * self.chunk_windows,
            self.full_chunks,
            self.chunk_windows,
            self.seq_length,
        )

    def locate(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epoch, and token offset in the source of the window's first token, of each position."""
        _check_not_negative("position", int(positions.min(initial=0)))
        return _locate(
            [self], geometry=geometry_table([self]), source=np.zeros(positions.shape, dtype=np.int32), position=positions
        )

    def epochs(self, position: int) -> float:
        """How often the source has been read when `position` windows are consumed; above 1 tokens repeat."""
        return position / self.num_windows

    def border_after(self, position: int) -> int:
        """Ordinal (epoch x num_groups + group) of the first group border at or after this position. Ordinals do not depend
        on the sequence length: the groups of an epoch hold the same chunks at every one."""
        epoch, rest = divmod(position, self.num_windows)
        group = -(-rest // (self.group_chunks * self.chunk_windows))
        return epoch * self.num_groups + min(group, self.num_groups)

    def position_of_border(self, border: int) -> int:
        """Position of the first window after a border; the inverse of `border_after` on borders."""
        epoch, group = divmod(border, self.num_groups)
        return epoch * self.num_windows + group * self.group_chunks * self.chunk_windows


def _check_source(name: str, *, num_tokens: int, seq_length: int, chunk_tokens: int, group_tokens: int) -> None:
    if min(seq_length, chunk_tokens, group_tokens) < 1:
        raise DataError(
            f"source {name}: seq_length {seq_length}, chunk_tokens {chunk_tokens}, group_tokens {group_tokens}; "
            "each must be at least 1"
        )
    if chunk_tokens % seq_length:
        near = max(1, round(chunk_tokens / seq_length)) * seq_length
        raise DataError(
            f"source {name}: chunk_tokens {chunk_tokens} is no multiple of seq_length {seq_length}; chunks are cut into whole "
            f"windows; set data.chunk_tokens to a common multiple of all stages' seq_lengths (for this one alone {near} fits)"
        )
    if num_tokens < seq_length + 1:
        raise DataError(
            f"source {name} holds {num_tokens} tokens, but one window at seq_length {seq_length} needs {seq_length + 1}; "
            "add documents to it, shorten seq_length, or leave it out of the mixture"
        )


def _check_not_negative(what: str, value: int) -> None:
    if value < 0:
        raise DataError(f"{what} {value}: samples and positions are counted from 0; pass 0 or more")


def geometry_table(orders: Sequence[SourceOrder]) -> Int64s:
    """The geometry of each source, a column a source."""
    return np.array([order.geometry for order in orders], dtype=np.int64).T


def _locate(orders: Sequence[SourceOrder], *, geometry: Int64s, source: Int32s, position: Int64s) -> tuple[Int64s, Int64s]:
    """Epoch and token offset [N] of windows of several sources at once: `source` [N] indexes `orders`."""
    num_windows, num_groups, group_windows, full_chunks, chunk_windows, seq_length = geometry[:, source]
    epoch, rest = np.divmod(position, num_windows)
    group = np.minimum(rest // group_windows, num_groups - 1)
    first = group * group_windows
    size = np.where(group < num_groups - 1, group_windows, num_windows - first)
    chunk_keys, window_keys = _keys(orders, source=source, epoch=epoch, group=group, border=epoch * num_groups + group)
    window = first + permute(rest - first, size=size, keys=window_keys)
    # A window number in the order of permuted chunks. The tail is the chunk behind the last full one: permute leaves it.
    chunk, inside = np.divmod(window, chunk_windows)
    chunk = permute(chunk, size=full_chunks, keys=chunk_keys)
    return epoch, (chunk * chunk_windows + inside) * seq_length


def _keys(
    orders: Sequence[SourceOrder], *, source: Int32s, epoch: Int64s, group: Int64s, border: Int64s
) -> tuple[Uint64s, Uint64s]:
    """Round keys [ROUNDS, N] of the chunk and of the window permutations: hashed once for each group that occurs."""
    _, seen, which = np.unique(border * len(orders) + source, return_index=True, return_inverse=True)
    groups = [
        (orders[s].seed, orders[s].name, e, g)
        for s, e, g in zip(source[seen].tolist(), epoch[seen].tolist(), group[seen].tolist(), strict=True)
    ]
    chunks = np.array([round_keys(seed, name, e, CHUNKS) for seed, name, e, _ in groups], dtype=np.uint64)
    windows = np.array([round_keys(*key) for key in groups], dtype=np.uint64)
    return chunks.reshape(-1, ROUNDS).T[:, which], windows.reshape(-1, ROUNDS).T[:, which]


class Blend:
    """Which source each global sample reads: g lies at slot (g x G + phase) mod Q of Q slots that the sources divide.

    The golden step G spreads every stretch of consecutive samples evenly over the slots, hence over the sources."""

    def __init__(self, slots: Sequence[int], *, seed: int):
        """`slots`: how many of the Q each source has, from `quantise`; a source with none is not read."""
        if sum(slots) != SLOTS or min(slots, default=0) < 0:
            raise DataError(f"slots sum to {sum(slots)} over {len(slots)} sources; the rule is {SLOTS}; make them by quantise")
        self.slots = np.array(slots, dtype=np.int64)
        self.edges = np.concatenate([[0], np.cumsum(self.slots)])
        self.phase = int.from_bytes(blake2b(str(seed).encode(), digest_size=4, person=b"phidias-blend").digest(), "little")

    def assign(self, first: int, count: int) -> tuple[Int32s, Int64s]:
        """Source index, and number of earlier samples of that source, of samples first..first+count-1."""
        _check_not_negative("first sample", first)
        _check_not_negative("sample count", count)
        sample = np.arange(first, first + count, dtype=np.uint64)  # its product wraps at 2^64, a multiple of Q
        slot = (sample * np.uint64(GOLDEN_STEP) + np.uint64(self.phase)) % np.uint64(SLOTS)
        source = np.searchsorted(self.edges, slot.astype(np.int64), side="right").astype(np.int32) - np.int32(1)
        return source, self.counts(first)[source] + _earlier_equals(source, len(self.slots))

    def counts(self, num_samples: int) -> Int64s:
        """Samples of each source among the first `num_samples`, in closed form; Q samples are one turn of all slots.

        With x = g x G + phase, slot(g) lies in [low, high) where floor((x - low) / Q) - floor((x - high) / Q) is 1 and
        elsewhere that is 0; a sum of such floors over g takes logarithmic time."""
        _check_not_negative("sample count", num_samples)
        turns, rest = divmod(num_samples, SLOTS)
        start = self.phase + SLOTS  # keeps the numerators positive; cancels in the difference
        sums = _floor_sums(rest, m=SLOTS, a=GOLDEN_STEP, b=(start - self.edges).astype(np.uint64))
        return turns * self.slots - np.diff(sums).view(np.int64)


def quantise(shares: Sequence[float | Fraction]) -> list[int]:
    """Slots of each source: integers of at least 1 (of 0 for a share of 0) that sum to SLOTS, by largest remainder."""
    bad = [(index, share) for index, share in enumerate(shares) if not (math.isfinite(share) and share >= 0)]
    if bad:
        index, share = bad[0]
        raise DataError(f"share {share} of source number {index}: a share must be finite and not negative; correct or drop it")
    total = sum((Fraction(share) for share in shares), Fraction(0))
    if abs(total - 1) > Fraction(1, 10**6):
        found = f"shares sum to {float(total):.8g} over {len(shares)} sources"
        raise DataError(f"{found}; they must sum to 1 within 1e-6; rescale them")
    exact = [Fraction(share) * SLOTS / total for share in shares]
    slots = [max(1, math.floor(part)) if part else 0 for part in exact]
    left = SLOTS - sum(slots)
    read = [index for index, part in enumerate(exact) if part]
    for index in sorted(read, key=lambda i: (slots[i] - exact[i], i))[: max(0, left)]:
        slots[index] += 1
    slots[slots.index(max(slots))] += min(0, left)  # the sources lifted to 1 may have taken more than there is
    return slots


def _floor_sums(n: int, *, m: int, a: int, b: Uint64s) -> Uint64s:
    """Sum of (a i + b) // m over i = 0..n-1 for each b, modulo 2^64, by Euclid's algorithm on (a, m); n, a, m at most 2^32.

    (a, m) are the same for every b, so that all go through the steps together; one that is done has come to n = 0."""
    total, count = np.zeros(b.shape, dtype=np.uint64), np.full(b.shape, n, dtype=np.uint64)
    while count.any():
        pairs = np.where(count > 0, count * (count - np.uint64(1)) // np.uint64(2), np.uint64(0))
        total += pairs * np.uint64(a // m) + count * (b // np.uint64(m))
        a, b = a % m, b % np.uint64(m)
        count, b = np.divmod(np.uint64(a) * count + b, np.uint64(m))
        m, a = a, m
        if m == 0:  # a divided m: what is left are terms below 1
            break
    return total


def _earlier_equals(source: Int32s, num_sources: int) -> Int64s:
    """For each element, how many before it are equal to it."""
    sizes = np.bincount(source, minlength=num_sources)
    earlier = np.empty(source.size, dtype=np.int64)
    earlier[np.argsort(source, kind="stable")] = np.arange(source.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return earlier


@dataclass(frozen=True)
class Windows:
    """Consecutive samples, arrays [N]: the source's index, its epoch, the offset of the window's first token in the source,
    and the position: the running number of the window over all epochs of the source."""

    source: Int32s
    epoch: Int64s
    offset: Int64s
    position: Int64s


class Schedule:
    """Which source each sample of a stage reads, through the phases of its mixture.

    A phase holds from its first sample to the start of the next. Samples are counted through: a phase cut in two of the same
    slots is the same order."""

    def __init__(self, phases: Sequence[tuple[int, Sequence[int]]], *, seed: int):
        """`phases`: first sample, and slots of every source (0 where the phase does not read it)."""
        self.starts = [start for start, _ in phases]
        if self.starts[:1] != [0] or any(after <= before for before, after in pairwise(self.starts)):
            raise DataError(
                f"phases start at samples {self.starts}; the first starts at 0, each later one after the one before"
            )
        self.blends = [Blend(slots, seed=seed) for _, slots in phases]
        self.num_sources = len(self.blends[0].slots)
        # What to add to a blend's own count to have the samples of a source since the stage's start.
        self.offsets = [np.zeros(self.num_sources, dtype=np.int64)]
        for before, after, start in zip(self.blends, self.blends[1:], self.starts[1:], strict=False):
            self.offsets.append(self.offsets[-1] + before.counts(start) - after.counts(start))

    def assign(self, first: int, count: int) -> tuple[Int32s, Int64s]:
        """Source index, and number of earlier samples of that source in the stage, of samples first..first+count-1."""
        _check_not_negative("first sample", first)
        _check_not_negative("sample count", count)
        parts = [self._assign(phase, low, high) for phase, low, high in self._overlaps(first, first + count)]
        return np.concatenate([source for source, _ in parts]), np.concatenate([position for _, position in parts])

    def counts(self, num_samples: int) -> Int64s:
        """Samples of each source among the first `num_samples` of the stage."""
        phase = bisect_right(self.starts, num_samples) - 1
        return self.offsets[max(0, phase)] + self.blends[max(0, phase)].counts(num_samples)

    def _overlaps(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Phase, first sample and end of each part of a stretch; a stretch of no samples is one empty part."""
        borders = [*self.starts[1:], max(end, self.starts[-1]) + 1]
        for phase, (start, border) in enumerate(zip(self.starts, borders, strict=True)):
            low, high = max(first, start), min(end, border)
            if low < high or (first == end and start <= first < border):
                yield phase, low, high

    def _assign(self, phase: int, low: int, high: int) -> tuple[Int32s, Int64s]:
        source, position = self.blends[phase].assign(low, high - low)
        return source, position + self.offsets[phase][source]


class StageOrder:
    """The order of one stage: its schedule, the order of each source, and the position of each at the stage's first sample."""

    def __init__(self, *, orders: Sequence[SourceOrder], schedule: Schedule, starts: Sequence[int]):
        if not len(orders) == schedule.num_sources == len(starts):
            raise DataError(
                f"{len(orders)} source orders, {schedule.num_sources} in the schedule and {len(starts)} starts; a stage needs "
                "one of each for every source; build the three from the same mixture"
            )
        lengths = sorted({order.seq_length for order in orders})
        if len(lengths) > 1:
            raise DataError(f"sources at seq_lengths {lengths} in one stage; a stage has one; split it into stages")
        _check_not_negative("start", min(starts))
        self.orders, self.schedule, self.starts = tuple(orders), schedule, np.array(starts, dtype=np.int64)
        self._geometry = geometry_table(orders)

    def windows(self, first_sample: int, count: int) -> Windows:
        """The windows of samples first_sample..first_sample+count-1 of this stage, whatever was asked before."""
        source, position = self.schedule.assign(first_sample, count)
        position += self.starts[source]
        epoch, offset = _locate(self.orders, geometry=self._geometry, source=source, position=position)
        return Windows(source, epoch, offset, position)

    def positions(self, num_samples: int) -> Int64s:
        """Position of each source after `num_samples` of this stage: what the ledger says and where the next stage goes on."""
        return self.starts + self.schedule.counts(num_samples)


def carry_over(before: SourceOrder, position: int, after: SourceOrder) -> tuple[int, int]:
    """Position at which `after` goes on where `before` stopped, and the tokens that this leaves unread in that epoch.

    The same windows go on at once. A stream at another sequence length cuts other windows, so it starts at the next group
    border: the tokens read before and after lie in different chunks. Windows of another kind, or from another table, start at
    the next epoch. DataError where the two are not the same source under the same shuffle."""
    _check_not_negative("position", position)
    same_length = before.seq_length == after.seq_length
    if before.windows == after.windows and (same_length or before.windows == "stream"):
        _check_same_shuffle(before, after)
        if same_length:
            return position, 0
        border = before.border_after(position)
        return after.position_of_border(border), (before.position_of_border(border) - position) * before.seq_length
    epoch, rest = divmod(position, before.num_windows)
    left = before.num_windows - rest if rest else 0
    return (epoch + (1 if rest else 0)) * after.num_windows, left * before.seq_length


def _check_same_shuffle(before: SourceOrder, after: SourceOrder) -> None:
    for field in ("name", "num_tokens", "chunk_tokens", "group_tokens", "seed"):
        found, wanted = getattr(after, field), getattr(before, field)
        if found != wanted:
            raise DataError(
                f"source {before.name} was read with {field} {wanted} and would go on with {found}; another {field} is another "
                "order, which repeats and drops tokens; restore it, or give new data a source name of its own"
            )
