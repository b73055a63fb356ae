"""Ranks of the real job, each rehearsed by `phidias rehearse` in a process of its own, beside the planner's prediction.

python -m benchmarks.gpu_ranks FOLDER [CASE ...]    some of them with a table of their kernels; CASE: pretrain,bf16,phi4,0
python -m benchmarks.gpu_ranks FOLDER --rehearse    the same on the CPU
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_configs import GPU, best_words
from benchmarks.gpu_device import Figures, Keep
from benchmarks.gpu_processes import run_apart

MEMORY_GOAL, TIME_GOAL = 0.03, 0.05  # of the prediction
# Of the 14B by stage and kind of precision: tokens/s were all of it computed so, and TFLOP/s (causal) of the rank.
SPEED_GOALS: dict[tuple[str, str], tuple[str, float]] = {
    ("pretrain", "fp8"): ("tokens_per_s", 9500.0),
    ("pretrain", "bf16"): ("tflops", 600.0),
    ("midtrain", "fp8"): ("tokens_per_s", 8000.0),
}
CASE_S = 75  # one case takes some 45 s: imports, weights, then nine steps


@dataclass(frozen=True)
class Case:
    """`layout`: `phi4`, of run=phi4, or `best`, the planner's."""

    stage: str
    precision: str
    layout: str
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.stage}, {self.precision}, {self.layout}, rank {self.rank}"


# By value: what is behind is left out where time is short. Rank 960 is of the last pipeline stage, with the head.
CASES = (
    Case("pretrain", "fp8_tensorwise", "best"),
    Case("pretrain", "bf16", "best"),
    Case("midtrain", "fp8_tensorwise", "phi4"),
    Case("pretrain", "bf16", "phi4"),
    Case("midtrain", "bf16", "phi4"),
    Case("pretrain", "fp8_delayed", "phi4"),
    Case("pretrain", "fp8_blockwise", "phi4"),
    Case("midtrain", "fp8_tensorwise", "best"),
    Case("pretrain", "fp8_tensorwise", "phi4"),
    Case("pretrain", "fp8_tensorwise", "phi4", rank=960),
)
TINY = (Case("demo_pretrain", "fp32", "phi4"), Case("demo_pretrain", "bf16", "phi4", rank=1))


def measure_ranks(keep: Keep, *, tiny: bool, folder: Path, until: float) -> None:
    """`until`: on time.monotonic's clock; cases that would end behind it are told as left out."""
    for case in TINY if tiny else CASES:
        left_s = until - time.monotonic()
        if left_s < (10 if tiny else CASE_S * 0.6):
            keep(case.name, {"skipped": f"{left_s:.0f} s were left of the part's time"})
            continue
        keep(case.name, rehearsed(case, tiny=tiny, folder=folder, limit_s=left_s))


def rehearsed(case: Case, *, tiny: bool, folder: Path, limit_s: float, more: Sequence[str] = ()) -> Figures:
    words = ["-m", "launcher", "rehearse", *words_of(case, tiny=tiny), f"run.runs_dir={folder}", *more]
    began = time.monotonic()
    done = run_apart(words, limit_s=limit_s)
    if done.code != 0:
        return {"failed": done.why}
    document = json.loads(done.out)[0]
    return {"took, s": round(time.monotonic() - began, 1), **figures_of(document), **dict(goals(case, document=document))}


def words_of(case: Case, *, tiny: bool) -> list[str]:
    """Overrides of `phidias rehearse`."""
    words = [f"stage={case.stage}", f"precision={case.precision}", f"rank={case.rank}", "steps=5", "out=json"]
    if tiny:
        return ["run=demo", "model.num_layers=2", *words]
    layout = best_words(stage=case.stage, precision=case.precision) if case.layout == "best" else []
    return ["run=phi4", *GPU, *words, *layout]


def figures_of(document: dict[str, Any]) -> Figures:
    """Of a rehearsal's document: what it was, its speed, and every quantity as measured and predicted."""
    layout, speed = document["layout"], document["speed"]
    rows = {(row["name"], row["unit"]): row for row in document["compared"]}
    judged = {"microbatch": "ms", "step": "ms", "peak": "GiB"}
    return {
        "layout": {name: layout[name] for name in ("tp", "pp", "vpp", "cp", "micro_batch_size", "recompute")},
        "tokens_per_s": round(speed["tokens_per_s"]),
        "tflops": round(speed["tflops"]["causal"], 3),
        "mfu": speed["mfu"],
        "spread": round(document["times"]["spread"], 4),
        "problems": document["measured"]["problems"],
        "measured, planned": {f"{name}, {unit}": pair(row) for (name, unit), row in rows.items()},
        "off": {name: off_by(rows.get((name, unit))) for name, unit in judged.items()},
    }


def pair(row: dict[str, Any]) -> list[float | None]:
    """Measured, predicted."""
    return [None if row[key] is None else round(row[key], 3) for key in ("measured", "predicted")]


def off_by(row: dict[str, Any] | None) -> float | None:
    """How far from the prediction, as a fraction of it."""
    return None if row is None or row["difference"] is None else round(row["difference"], 4)


def goals(case: Case, *, document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What was to be reached, and whether it was; none where nothing is predicted (CPU ranks)."""
    off = figures_of(document)["off"]
    verdicts = {}
    for name, key, goal in (("memory", "peak", MEMORY_GOAL), ("time", "step", TIME_GOAL)):
        if off[key] is not None:
            verdicts[f"{name} within {goal:.0%} of the plan"] = abs(off[key]) <= goal
    wanted = SPEED_GOALS.get((case.stage, case.precision[:3] if case.precision.startswith("fp8") else case.precision))
    if wanted:
        name, least = wanted
        found = document["speed"]["tokens_per_s"] if name == "tokens_per_s" else document["speed"]["tflops"]["causal"]
        verdicts[f"{name} at least {least:g}"] = found >= least
    yield "goals", verdicts


# Where a rank's time goes


PROFILED = ("pretrain,fp8_tensorwise,best,0", "midtrain,fp8_tensorwise,phi4,0", "pretrain,bf16,best,0")
PROFILE_S = 120


def main() -> int:
    folder, *words = sys.argv[1:]
    tiny = "--rehearse" in words
    cases = [read_case(word) for word in words if word != "--rehearse"] or (TINY[:1] if tiny else map(read_case, PROFILED))
    codes = [profile(case, tiny=tiny, folder=Path(folder)) for case in cases]
    return max(codes)


def read_case(word: str) -> Case:
    stage, precision, layout, rank = word.split(",")
    return Case(stage, precision, layout, int(rank))


def profile(case: Case, *, tiny: bool, folder: Path) -> int:
    """Its figures are printed; its kernels lie in the folder, and the measurement beside them."""
    runs = folder / "runs" / case.name.replace(", ", "-").replace(" ", "")
    found = rehearsed(case, tiny=tiny, folder=runs, limit_s=PROFILE_S, more=["profile=true"])
    print(f"{case.name}: {json.dumps(found)}", flush=True)
    for path in runs.rglob("*.kernels.txt"):
        shutil.copyfile(path, folder / f"{runs.name}.kernels.txt")
        print("\n".join(path.read_text().splitlines()[:24]), flush=True)
    return int("failed" in found)


if __name__ == "__main__":
    sys.exit(main())
