"""Exposure: how often each source is read over the stages of a run, as exact arithmetic on the tables of mixing.py."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from data_prep.mixing import PhaseRow, names_of, schedule_of, slack
from data_prep.order import SLOTS, Schedule, SourceOrder, carry_over
from data_prep.spec import Source


@dataclass(frozen=True)
class Cut:
    """A source as one stage cuts it; `window_tokens` is what a window holds on average (less than S where packed)."""

    order: SourceOrder
    window_tokens: float


@dataclass(frozen=True)
class StageUse:
    """What one stage reads: `num_samples` of `seq_length` tokens by the table `rows`. `cuts` holds the sources whose size is
    known. `replay_sample`: the sample of the stage `init_from` at which the sources it read are taken up again."""

    name: str
    seq_length: int
    num_samples: int
    rows: Sequence[PhaseRow]
    sources: Mapping[str, Source]
    cuts: Mapping[str, Cut]
    init_from: str | None
    replay_sample: int | None


@dataclass(frozen=True)
class Reading:
    """What a stage reads of a source. Epochs are those of the most read tokens, whatever source they were read through; None
    where the size is not known. `first_repeat`: the first sample of the stage that reads a token again."""

    stage: str
    source: str
    samples: int
    tokens: float
    tokens_before: float
    epochs: float | None
    epochs_before: float | None
    first_repeat: int | None
    skipped_tokens: int

    @property
    def tokens_after(self) -> float:
        return self.tokens_before + self.tokens


@dataclass
class _Account:
    """What has been read of one source: how far, how much, and in epochs; `furthest` is where a replay stops being one."""

    order: SourceOrder | None = None
    position: int = 0
    furthest: tuple[int, int] = (0, 0)  # epoch, and tokens in it
    tokens: float = 0.0
    epochs: float | None = 0.0


_Accounts = dict[str, _Account]


def readings(stages: Sequence[StageUse], *, seed: int, find_repeats: bool = True) -> list[Reading]:
    """A reading for each source of each stage. A stage goes on from the one it starts from, whichever came between. Without
    `find_repeats`, which takes milliseconds a source, first_repeat is None."""
    roots = {name: source.parent or name for stage in stages for name, source in stage.sources.items()}
    starts: dict[str, _Accounts] = {}
    ends: dict[str, _Accounts] = {}
    by_name = {stage.name: stage for stage in stages}
    found: list[Reading] = []
    for stage in stages:
        accounts = _copy(ends.get(stage.init_from or "", {}))
        if stage.init_from in starts and stage.replay_sample is not None:
            _rewind(accounts, stage=stage, parent=by_name[stage.init_from], start=starts[stage.init_from], seed=seed)
        starts[stage.name], ends[stage.name] = _copy(accounts), accounts
        found += _read_stage(stage, accounts=accounts, roots=roots, seed=seed, find_repeats=find_repeats)
    return found


def _copy(accounts: _Accounts) -> _Accounts:
    return {name: replace(account) for name, account in accounts.items()}


def _rewind(accounts: _Accounts, *, stage: StageUse, parent: StageUse, start: _Accounts, seed: int) -> None:
    """Puts the sources that the parent read back to where they stood at one of its samples; what was read stays counted."""
    names = names_of(parent.rows)
    counts = schedule_of(parent.rows, names=names, seed=seed).counts(min(stage.replay_sample or 0, parent.num_samples))
    for name, count in zip(names, counts.tolist(), strict=True):
        if name in parent.cuts:
            begin, _ = _start(start.get(name), cut=parent.cuts[name])
            accounts[name].order, accounts[name].position = parent.cuts[name].order, begin + count


def _start(account: _Account | None, *, cut: Cut) -> tuple[int, int]:
    """Position at which a stage begins a source, and the tokens it skips by that."""
    if account is None or account.order is None:
        return 0, 0
    return carry_over(account.order, account.position, cut.order)


def _read_stage(
    stage: StageUse, *, accounts: _Accounts, roots: Mapping[str, str], seed: int, find_repeats: bool
) -> Iterator[Reading]:
    names = names_of(stage.rows)
    schedule = schedule_of(stage.rows, names=names, seed=seed)
    counts = dict(zip(names, schedule.counts(stage.num_samples).tolist(), strict=True))
    before = _copy(accounts)
    skipped = {name: _advance(accounts, name, samples=samples, stage=stage) for name, samples in counts.items()}
    for index, name in enumerate(names):
        unread = _unread_windows(name, stage=stage, before=before, counts=counts, roots=roots)
        repeats = find_repeats and unread is not None and unread < counts[name]
        earlier = before.get(name, _Account())
        yield Reading(
            stage=stage.name,
            source=name,
            samples=counts[name],
            tokens=accounts[name].tokens - earlier.tokens,
            tokens_before=earlier.tokens,
            epochs=_family_epochs(name, accounts=accounts, roots=roots),
            epochs_before=_family_epochs(name, accounts=before, roots=roots),
            first_repeat=_sample_of(index, count=unread, schedule=schedule) if repeats and unread is not None else None,
            skipped_tokens=skipped[name],
        )


def _advance(accounts: _Accounts, name: str, *, samples: int, stage: StageUse) -> int:
    """Reads on; returns the tokens skipped at the start."""
    account, cut = accounts.setdefault(name, _Account()), stage.cuts.get(name)
    account.tokens += samples * (cut.window_tokens if cut else stage.seq_length)
    if cut is None:
        account.epochs = None
        return 0
    begin, skipped = _start(account, cut=cut)
    account.order, account.position = cut.order, begin + samples
    account.furthest = max(account.furthest, _place(account.position, order=cut.order))
    if account.epochs is not None:
        account.epochs += samples / cut.order.num_windows
    return skipped


def _unread_windows(
    name: str, *, stage: StageUse, before: _Accounts, counts: Mapping[str, int], roots: Mapping[str, str]
) -> int | None:
    """How many windows this stage reads of a source before it comes to a token that was read; None where it is not known.
    A bucket repeats, at the earliest, from its first window where its parent or a sibling is read."""
    cut = stage.cuts.get(name)
    if cut is None:
        return None
    shared = [other for other in _family(name, roots=roots) if other != name]
    if any(before[other].tokens for other in shared if other in before):
        return 0
    if name != roots[name] and any(counts.get(other) for other in shared):
        return 0
    account = before.get(name, _Account())
    begin, _ = _start(account, cut=cut)
    return 0 if _place(begin, order=cut.order) < account.furthest else max(0, cut.order.num_windows - begin)


def _place(position: int, *, order: SourceOrder) -> tuple[int, int]:
    """Epoch, and tokens in it: to be compared over sequence lengths."""
    epoch, windows = divmod(position, order.num_windows)
    return epoch, windows * order.seq_length


def _family(name: str, *, roots: Mapping[str, str]) -> list[str]:
    """The sources that share documents with this one: itself, its parent, and buckets of the same parent."""
    return [other for other, root in roots.items() if root == roots[name]]


def _family_epochs(name: str, *, accounts: _Accounts, roots: Mapping[str, str]) -> float | None:
    """The longest documents of a family lie in its parent and in every bucket: they are read the most."""
    epochs = [accounts[other].epochs for other in _family(name, roots=roots) if other in accounts]
    known = [value for value in epochs if value is not None]
    return sum(known) if len(known) == len(epochs) else None


def _sample_of(index: int, *, count: int, schedule: Schedule) -> int:
    """The first sample of a stage that is number `count` (from 0) of a source: bisection, from where its share in the phase
    says. There is one."""
    phase = next(p for p in reversed(range(len(schedule.starts))) if schedule.counts(schedule.starts[p])[index] <= count)
    start, share = schedule.starts[phase], schedule.blends[phase].slots[index] / SLOTS
    while not share:  # the source pauses; the count is reached in a later phase
        phase += 1
        start, share = schedule.starts[phase], schedule.blends[phase].slots[index] / SLOTS
    expected = start + (count - int(schedule.counts(start)[index])) / share
    low, high = max(start, math.floor(expected - 32 / share)), math.ceil(expected + 32 / share)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if schedule.counts(middle)[index] <= count else (low, middle)
    return int(low)


def breaches(stages: Sequence[StageUse], *, found: Sequence[Reading]) -> Iterator[tuple[Reading, float]]:
    """Readings that end above a cap, and that cap: their source's, or the parent's that they are a part of, whose reading it
    then counts as."""
    by_name = {stage.name: stage for stage in stages}
    for reading in found:
        stage = by_name[reading.stage]
        cut = stage.cuts.get(reading.source)
        if cut is None or reading.epochs is None or not reading.samples:
            continue
        for name in dict.fromkeys((reading.source, stage.sources[reading.source].parent or reading.source)):
            cap = stage.sources[name].max_epochs if name in stage.sources else None
            if cap is not None and reading.epochs > cap + slack(stage.num_samples) / cut.order.num_windows:
                yield replace(reading, source=name), cap
