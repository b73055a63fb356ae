"""`make chaos`: faults of every kind at random moments, run after run; each run must end by itself as an undisturbed one does.
Prints how many of each kind were survived and the time they cost. Faults of a run that ends otherwise count as not survived.
Seconds lost are those from a fault until the run takes a step that it had not taken before.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.machine import write_result
from tests.chaos.faults import FAULTS
from tests.chaos.nodes import node_storm
from tests.chaos.proof import calm_run, differences
from tests.chaos.storm import NotSurvivedError, Outcome, Storm
from tests.endtoend.workspace import Workspace
from tests.slurm.daemons import missing_programs

FAULTS_PER_RUN, NODE_FAULTS = 20, 4


def chosen(count: int, *, seed: int) -> list[str]:
    """Of every kind as many, in an order that the seed chooses."""
    kinds = [name for number, name in enumerate(list(FAULTS) * (count // len(FAULTS) + 1)) if number < count]
    return Random(seed).sample(kinds, count)


def storm(workspace: Workspace, kinds: list[str], *, seed: int) -> tuple[list[Outcome], list[str]]:
    """What became of the faults, and what is wrong with the run."""
    made = Storm(workspace, seed=seed)
    outcomes: list[Outcome] = []
    try:
        for outcome in made.drive([(FAULTS[kind],) for kind in kinds]):
            show(outcome)
            outcomes.append(outcome)
        if not all(outcome.survived for outcome in outcomes):
            return outcomes, ["a fault was not survived"]
        return outcomes, differences(made.run_dir, calm_run(workspace, words=made.words).run_dir)
    except NotSurvivedError as error:
        return outcomes, [str(error)]


def show(outcome: Outcome) -> None:
    lost = "NOT SURVIVED" if outcome.lost_s is None else f"{outcome.lost_s:>7.2f} s"
    print(f"{outcome.kind:<26} step {outcome.step:>5}  {lost}  {outcome.said}", flush=True)


def counted(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """By kind."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.kind, []).append(outcome)
    return {
        kind: {"survived": sum(row.survived for row in found), "total": len(found), **lost(found)}
        for kind, found in rows.items()
    }


def lost(outcomes: Iterable[Outcome]) -> dict[str, float]:
    seconds = [outcome.lost_s for outcome in outcomes if outcome.lost_s is not None]
    return {"median_s": round(statistics.median(seconds), 2), "max_s": max(seconds)} if seconds else {}


def table(figures: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':<26}{'survived':>10}{'median s':>10}{'max s':>8}"]
    for kind, row in figures.items():
        of = f"{row['survived']}/{row['total']}"
        lines.append(f"{kind:<26}{of:>10}{row.get('median_s', ''):>10}{row.get('max_s', ''):>8}")
    return "\n".join(lines)


@dataclass
class Campaign:
    """Storm after storm."""

    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, made: Callable[[], tuple[list[Outcome], list[str]]]) -> None:
        """One more. Where it ends otherwise than it has to, none of its faults counts as survived."""
        began = time.monotonic()
        found, wrong = made()
        took_s = round(time.monotonic() - began)
        self.outcomes += [replace(outcome, survived=outcome.survived and not wrong) for outcome in found]
        self.runs.append({"faults": len(found), "took_s": took_s, "wrong": wrong})
        print(f"run {len(self.runs)}: {len(found)} faults, {took_s} s: {wrong or 'as undisturbed, bit by bit'}", flush=True)

    def drive(self, root: Path, *, count: int, nodes: int) -> None:
        kinds, local = chosen(count - nodes, seed=self.seed), Workspace(root / "local", run="storm")
        local.config("data")
        for number, first in enumerate(range(0, len(kinds), FAULTS_PER_RUN)):
            part, run = kinds[first : first + FAULTS_PER_RUN], local.named(f"storm{number}")
            self.add(partial(storm, run, part, seed=self.seed + number))
        if nodes:
            self.add(partial(node_storm, root / "nodes", count=nodes, seed=self.seed))

    @property
    def survived(self) -> int:
        return sum(outcome.survived for outcome in self.outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument(
        "--nodes", type=int, default=0 if missing_programs() else NODE_FAULTS, help="of them, nodes under Slurm"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--no-result", action="store_true", help="print the figures only")
    arguments = parser.parse_args()
    load, campaign, folder = round(os.getloadavg()[0], 2), Campaign(arguments.seed), Path(tempfile.mkdtemp(prefix="chaos-"))
    campaign.drive(folder, count=arguments.faults, nodes=arguments.nodes)
    survived, figures = campaign.survived, counted(campaign.outcomes)
    print(f"\nseed {arguments.seed}\n{table(figures)}\nsurvived {survived} of {arguments.faults}")
    if not arguments.no_result:
        about = {"seed": arguments.seed, "load_at_start": load, "survived": survived, "total": arguments.faults}
        faults = [asdict(outcome) for outcome in campaign.outcomes]
        write_result("chaos", {**about, "kinds": figures, "runs": campaign.runs, "faults": faults})
    if survived < arguments.faults:
        print(f"the runs are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
