"""Samples of a stage that no step is taken on: ranges that were found to spoil it. They count as read, so that nothing else
moves; the run's events hold them."""

from collections.abc import Iterable


class LeftOut:
    """Ranges [first, end) of the stage's samples; they may overlap."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()):
        self.ranges = list(ranges)

    def add(self, first: int, end: int) -> None:
        self.ranges.append((first, end))

    def past(self, sample: int) -> int:
        """Where the batch begins that comes at `sample`: there, or behind what is left out there."""
        ends = [end for first, end in self.ranges if first <= sample < end]
        return self.past(max(ends)) if ends else sample

    def reaches(self, first: int, end: int) -> int | None:
        """The end of what is left out that begins behind `first` and before `end`; None where nothing does."""
        ends = [last for begin, last in self.ranges if first < begin < end]
        return max(ends) if ends else None

    def before(self, sample: int) -> int:
        """How many of the samples before this one are left out."""
        count = reached = 0
        for first, end in sorted(self.ranges):
            first, end = max(first, reached), min(end, sample)
            count, reached = count + max(0, end - first), max(reached, end)
        return count
