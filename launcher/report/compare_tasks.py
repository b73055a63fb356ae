"""Scores of tasks beside each other: of the compared stage's exports, as `phidias eval` measured them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from launcher.report.compare import Measured
from launcher.report.report_tasks import read_evaluation, scores


class Score(NamedTuple):
    """Of a group: the mean of its runs that were measured, with its standard error over documents, and at which tokens of the
    stage they were."""

    value: float
    stderr: float | None
    runs: int
    tokens: tuple[int, ...]


Scores = dict[tuple[str, str], dict[str, Score]]  # by score and how it was asked, then by group


def task_scores(groups: Sequence[Measured], *, stage: str) -> Scores:
    """Empty where nothing was measured. Scores that were asked for in another way are rows of their own."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, float | None, int]]]] = {}
    for each in groups:
        for reading in each.readings:
            evaluation = read_evaluation(reading.curve.run, name=stage)
            for name, value, stderr, told in scores(evaluation) if evaluation else ():
                row = (value, stderr, int(evaluation["tokens"]) if evaluation else 0)
                found.setdefault((name, told), {}).setdefault(each.label, []).append(row)
    return {key: {label: mean_score(rows) for label, rows in row.items()} for key, row in found.items()}


def mean_score(rows: Iterable[tuple[float, float | None, int]]) -> Score:
    values, errors, tokens = zip(*rows, strict=True)
    known = [error for error in errors if error is not None]
    stderr = math.sqrt(sum(error**2 for error in known)) / len(values) if len(known) == len(values) else None
    return Score(sum(values) / len(values), stderr, len(values), tuple(sorted(set(tokens))))


def score_document(found: Scores) -> list[dict[str, object]]:
    """For out=json."""
    return [
        {"score": name, "asked": told, "groups": {label: score._asdict() for label, score in row.items()}}
        for (name, told), row in found.items()
    ]


def caution(found: Scores) -> str:
    """That scores are of exports, wherever the losses are compared; empty where all are of the same tokens."""
    tokens = {count for row in found.values() for score in row.values() for count in score.tokens}
    shown = ", ".join(f"{count:,}" for count in sorted(tokens))
    return f"scores are of exports at {shown} tokens of the stage" if len(tokens) > 1 else ""


def cell(row: Mapping[str, Score], label: str) -> str:
    score = row.get(label)
    if score is None:
        return ""
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
