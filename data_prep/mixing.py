"""From what a mixture says (shares, epochs, tokens, phases) to one exact table: how many slots each source has from which
sample on. What a run has begun to read is never moved: a change is a new phase.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from data_prep.errors import DataError
from data_prep.order import SLOTS, Schedule, quantise
from data_prep.spec import Amount, Mixture

SHARE_TOLERANCE = 1e-6


def slack(num_samples: int) -> float:
    """How far a source's count over so many samples may lie from its share. 4 over a batch; the golden step's discrepancy grows
    with the logarithm (worst over all arcs: 12.1 at 10.9 million samples)."""
    return 4 + math.log2(max(1, num_samples)) / 2


class AmountError(DataError):
    """An amount that cannot be read: where it stands (`sources.<name>...`, below the mixture), and found, rule, fix."""

    def __init__(self, path: str, found: str, rule: str, fix: str):
        super().__init__(f"{path}: {found}; {rule}; {fix}")
        self.path, self.found, self.rule, self.fix = path, found, rule, fix


class UnknownSize(AmountError):
    """Epochs of a source that is neither prepared nor assumed to be of a size."""


@dataclass(frozen=True)
class Extent:
    """How long a stage is, in samples of `seq_length` tokens, and how many windows an epoch of each source has (None where
    that is not known)."""

    seq_length: int
    num_samples: int
    num_windows: Mapping[str, int | None]

    def tokens(self, samples: int) -> int:
        return samples * self.seq_length


@dataclass(frozen=True)
class Declared:
    """A phase as the config says it, at `path`, from its first sample to the one behind its last."""

    path: str
    start: int
    end: int
    amounts: dict[str, Amount]

    @property
    def key(self) -> dict[str, Any]:
        """What makes it another phase when it changes; where it ends matters only to amounts that are not shares."""
        absolute = any("share" not in amount.stated for amount in self.amounts.values())
        stated = {name: amount.stated for name, amount in self.amounts.items()}
        return {"start": self.start, "end": self.end if absolute else None, "amounts": stated}


@dataclass(frozen=True)
class PhaseRow:
    """A phase as it is read: slots (out of 2^32) of each source from `start_sample` on. `declared` is the key of the phase of
    the config that it comes from."""

    start_sample: int
    slots: dict[str, int]
    declared: dict[str, Any]


def declared_phases(mixture: Mixture, *, extent: Extent) -> list[Declared]:
    """The phases of a stage. AmountError: a phase that does not start after the one before, or never."""
    starts = [0, *(math.ceil(phase.start_tokens / extent.seq_length) for phase in mixture.phases)]
    first = {name: Amount(**source.stated) for name, source in mixture.sources.items() if source.stated}
    amounts: list[dict[str, Amount]] = [first, *(dict(phase.sources) for phase in mixture.phases)]
    _check_starts(mixture, starts=starts, extent=extent)
    ends = [*starts[1:], extent.num_samples]
    paths = ["sources", *(f"phases.{index}.sources" for index in range(len(mixture.phases)))]
    return [Declared(*row) for row in zip(paths, starts, ends, amounts, strict=True)]


def _check_starts(mixture: Mixture, *, starts: Sequence[int], extent: Extent) -> None:
    for index, phase in enumerate(mixture.phases):
        path, found = f"phases.{index}.start_tokens", f"{phase.start_tokens:g}"
        if starts[index + 1] <= starts[index]:
            before = extent.tokens(starts[index])
            raise AmountError(path, found, f"the phase before starts at {before}", f"start it later than {before}")
        if starts[index + 1] >= extent.num_samples:
            rule = f"the stage ends at {extent.tokens(extent.num_samples)} tokens: it would never start"
            raise AmountError(path, found, rule, "start it earlier, leave it out, or raise stage.tokens")


def plan_phases(mixture: Mixture, *, extent: Extent) -> list[PhaseRow]:
    """The table of a stage that has read nothing yet. AmountError: an amount that cannot be met."""
    return [_row(phase, extent=extent) for phase in declared_phases(mixture, extent=extent)]


def amend_phases(
    recorded: Sequence[PhaseRow], mixture: Mixture, *, extent: Extent, samples_read: int, seed: int
) -> list[PhaseRow]:
    """The table of a stage that has read `samples_read` by `recorded`, under a mixture or a horizon that may have changed.

    What was read stays; a changed mixture holds from here on. AmountError: a phase is added to the past or changed there, or
    an amount is below what was read of it."""
    phases = declared_phases(mixture, extent=extent)
    past = [row for row in recorded if row.start_sample < samples_read]
    if not past:
        return [_row(phase, extent=extent) for phase in phases]
    begun = [phase for phase in phases if phase.start < samples_read]
    _check_past(begun, past=past, extent=extent, samples_read=samples_read)
    later = [_row(phase, extent=extent) for phase in phases if phase.start >= samples_read]
    active = begun[-1]
    if active.key == past[-1].declared or samples_read >= active.end:
        return [*past, *later]
    read = samples_by_source(past, first=active.start, end=samples_read, seed=seed)
    return [*past, _row(active, extent=extent, start=samples_read, read=read), *later]


def _check_past(begun: Sequence[Declared], *, past: Sequence[PhaseRow], extent: Extent, samples_read: int) -> None:
    """Phases that have begun are the recorded ones, and those that have ended read as they did."""
    last = {row.declared["start"]: row.declared for row in past}
    here = extent.tokens(samples_read)
    added = [phase for phase in begun if phase.start not in last]
    if added:
        rule = f"the stage has read {here} tokens, and what was read stays"
        fix = f"start it at {here} or later, or change the amounts of the phase that holds now"
        found = f"a phase that starts at {extent.tokens(added[0].start)} tokens, in the past"
        raise AmountError("phases", found, rule, fix)
    for phase in begun:
        # Where it ended is where the next one began, which is checked by itself.
        is_last = phase.end >= extent.num_samples
        if not is_last and phase.end <= samples_read and phase.key["amounts"] != last[phase.start]["amounts"]:
            rule = f"it ended before the {here} tokens that were read, and what was read stays"
            fix = "leave it as it was; add a phase, or change the one that holds now"
            raise AmountError("phases", f"another mixture from {extent.tokens(phase.start)} tokens on", rule, fix)
    gone = sorted(set(last) - {phase.start for phase in begun})
    if gone:
        rule = f"a phase of the run began there, before the {here} tokens that were read"
        raise AmountError("phases", f"no phase at {extent.tokens(gone[0])} tokens", rule, "leave it in; add a later one")


def _row(phase: Declared, *, extent: Extent, start: int | None = None, read: Mapping[str, int] | None = None) -> PhaseRow:
    """`start` and `read`: where in the phase it begins anew, and what the phase has read of each source by then."""
    begin = phase.start if start is None else start
    parts = resolve(phase, num_samples=phase.end - begin, extent=extent, read=read or {})
    return PhaseRow(begin, dict(zip(parts, quantise(list(parts.values())), strict=True)), phase.key)


def resolve(phase: Declared, *, num_samples: int, extent: Extent, read: Mapping[str, int]) -> dict[str, Fraction]:
    """The part of the next `num_samples` that each source has; the parts sum to 1.

    Tokens and epochs count over the phase, so that what is `read` of them is taken off; shares divide what those leave. A few
    samples past amounts that are met go on in their proportion."""
    path = phase.path
    _check_stated(phase.amounts, path=path)
    counted = {name: amount for name, amount in phase.amounts.items() if amount.share is None}
    wanted = {name: _samples_of(name, amount, path=path, extent=extent) for name, amount in counted.items()}
    left = {name: _left(name, wanted[name], read=read.get(name, 0), path=path, extent=extent) for name in counted}
    shares = {name: Fraction(amount.share) for name, amount in phase.amounts.items() if amount.share}
    room = num_samples - sum(left.values(), Fraction(0))
    _check_sums(shares, path=path, room=room, num_samples=num_samples, num_counted=len(left), seq_length=extent.seq_length)
    unit = room / sum(shares.values()) if shares else Fraction(0)
    samples = {**(left if shares or any(left.values()) else wanted), **{name: share * unit for name, share in shares.items()}}
    whole = sum(samples.values(), Fraction(0))
    return {name: samples.get(name, Fraction(0)) / whole for name in phase.amounts}


def _check_stated(amounts: Mapping[str, Amount], *, path: str) -> None:
    for name, amount in amounts.items():
        if len(amount.stated) != 1:
            found = " and ".join(f"{key} {value:g}" for key, value in amount.stated.items()) or "no amount"
            raise AmountError(f"{path}.{name}", found, "a source has one of share, epochs, tokens", "keep one of them")
    if not any(value for amount in amounts.values() for value in amount.stated.values()):
        fix = "give one share, epochs or tokens"
        raise AmountError(path, "no source with an amount above 0", "a phase reads at least one", fix)


def _left(name: str, samples: Fraction, *, read: int, path: str, extent: Extent) -> Fraction:
    """What is left of an amount of `samples`, which may be over-read by as much as counts lie from their shares."""
    if samples - read < -2 * slack(extent.num_samples):  # a phase has two ends
        found = f"{float(samples) * extent.seq_length:.6g} tokens in this phase"
        rule = f"{extent.tokens(read)} of it were read already, and what was read stays"
        raise AmountError(f"{path}.{name}", found, rule, f"tokens={extent.tokens(read)} or more, or leave the source out")
    return max(Fraction(0), samples - read)


def _samples_of(name: str, amount: Amount, *, path: str, extent: Extent) -> Fraction:
    if amount.tokens is not None:
        return Fraction(amount.tokens) / extent.seq_length
    num_windows = extent.num_windows.get(name)
    if num_windows is None:
        rule = "the size of an epoch is known from the prepared data, or assumed in unique_tokens"
        fix = f"set sources.{name}.unique_tokens, or run `phidias data` first"
        raise UnknownSize(f"{path}.{name}.epochs", f"{amount.epochs:g} of a source of unknown size", rule, fix)
    return Fraction(amount.epochs or 0) * num_windows


def _check_sums(
    shares: Mapping[str, Fraction], *, path: str, room: Fraction, num_samples: int, num_counted: int, seq_length: int
) -> None:
    counted = float(num_samples - room) * seq_length
    found = f"epochs and tokens of {counted:.10g} tokens in a phase of {num_samples * seq_length}"
    rounding = max(2 * slack(num_samples) * num_counted, SHARE_TOLERANCE * num_samples)
    if not shares and abs(room) > rounding:
        rule = "without shares they must fill the phase"
        fix = f"a length of {counted:.10g} tokens for it (stage.tokens), or a source with a share to take the rest"
        raise AmountError(path, found, rule, fix)
    if shares and room <= 0:
        raise AmountError(path, found, "they leave nothing to the shares", "smaller amounts, or a longer phase (stage.tokens)")
    total = sum(shares.values(), Fraction(0))
    if shares and abs(total - 1) > Fraction(SHARE_TOLERANCE):
        said = ", ".join(f"{name} {float(share):g}" for name, share in shares.items())
        rule = "the shares of what tokens and epochs leave must sum to 1" if num_counted else "the shares must sum to 1"
        fix = "in proportion: " + ", ".join(f"{name} {float(share / total):.6g}" for name, share in shares.items())
        raise AmountError(path, f"shares {said}, in sum {float(total):.8g}", rule, fix)


def names_of(rows: Iterable[PhaseRow], *, first: Iterable[str] = ()) -> list[str]:
    """The sources of a table, in the order of `first` and then of the phases."""
    return list(dict.fromkeys([*first, *(name for row in rows for name in row.slots)]))


def mean_shares(rows: Sequence[PhaseRow], *, num_samples: int) -> dict[str, float]:
    """The share of each source over a stage of `num_samples`: that of its phases, by how long they last."""
    ends = [min(row.start_sample, num_samples) for row in rows[1:]] + [num_samples]
    parts = [
        (end - row.start_sample) / num_samples if end > row.start_sample else 0.0 for row, end in zip(rows, ends, strict=True)
    ]
    return {
        name: sum(part * row.slots.get(name, 0) / SLOTS for row, part in zip(rows, parts, strict=True))
        for name in names_of(rows)
    }


def schedule_of(rows: Sequence[PhaseRow], *, names: Sequence[str], seed: int) -> Schedule:
    """The table as arithmetic; sources are numbered in the order of `names`."""
    return Schedule([(row.start_sample, [row.slots.get(name, 0) for name in names]) for row in rows], seed=seed)


def samples_by_source(rows: Sequence[PhaseRow], *, first: int, end: int, seed: int) -> dict[str, int]:
    """How many of the samples first..end-1 each source has."""
    names = names_of(rows)
    schedule = schedule_of(rows, names=names, seed=seed)
    counts = schedule.counts(end) - schedule.counts(first)
    return dict(zip(names, counts.tolist(), strict=True))


def rows_to_json(rows: Iterable[PhaseRow]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def rows_from_json(rows: Iterable[Mapping[str, Any]]) -> list[PhaseRow]:
    return [PhaseRow(**row) for row in rows]
