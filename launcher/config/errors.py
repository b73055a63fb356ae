"""Refusals that happen before anything is touched. A message says what was found, the rule, and the fix."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config. `path` is dotted, as an override would be written."""

    path: str
    found: str
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}; {self.rule}. Fix: {self.fix}"


class ConfigError(Exception):
    """A config that cannot be run; holds every problem found. `nearest`: layouts near it that would work, as overrides."""

    def __init__(self, *problems: Problem):
        self.problems, self.nearest = problems, ()
        super().__init__(*problems)

    problems: tuple[Problem, ...]
    nearest: tuple[str, ...]

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = [f"config refused, {count}:", *(f"  {problem}" for problem in self.problems)]
        return "\n".join([*lines, *(f"  nearest layout that works, {line}" for line in self.nearest)])


class LayoutError(ConfigError):
    """A layout that does not divide the model, the batch or the cluster."""
