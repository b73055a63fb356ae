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
    """A config that cannot be run; holds every problem found."""

    def __init__(self, *problems: Problem):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"config refused, {count}:", *(f"  {problem}" for problem in problems)]))


class LayoutError(ConfigError):
    """A layout that does not divide the model, the batch or the cluster."""
