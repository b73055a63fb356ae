"""Nodes that go down under a run, on the real Slurm of tests/slurm: the job finds its way back by itself, as on a cluster."""

import itertools
from functools import cached_property
from pathlib import Path

from tests.chaos.proof import calm_run, differences
from tests.chaos.storm import BATCH, SEQ_LENGTH, SETTINGS, STARTED_S, Fault, NotSurvivedError, Outcome, Storm
from tests.endtoend.workspace import Workspace
from tests.slurm.lab import SlurmLab
from tests.slurm.training import submit, workspace_of_slurm

NUM_NODES, STEPS_PER_FAULT = 3, 60
POWER_OFF = "node down"


class NodeStorm(Storm):
    """On two of three nodes, a rank on each. Nobody starts it again: it has `steps` steps from the beginning."""

    def __init__(self, workspace: Workspace, *, seed: int, steps: int, slurm: SlurmLab):
        super().__init__(workspace, seed=seed, steps=steps)
        self.slurm, self.job = slurm, ""

    @cached_property
    def settings(self) -> list[str]:
        return [word for word in (*SETTINGS, f"stage.tokens={self.steps * BATCH * SEQ_LENGTH}") if "stage=" not in word]

    def launch(self) -> None:
        self.job = submit(self.slurm, self.workspace, *self.settings)

    def ended(self) -> int | None:
        """Slurm puts it back into the queue."""
        return None

    def cut_short(self) -> None:
        """It ends where it was to end."""

    def wait_for_end(self) -> None:
        try:
            self.slurm.wait(self.job, "COMPLETED", timeout=STARTED_S + self.steps)
        except AssertionError as error:
            raise NotSurvivedError(str(error)) from None

    def end(self) -> None:
        self.slurm.reset()


def power_off(storm: Storm) -> None:
    """One of the two, also the one that the job's own script runs on. What went down before comes back first."""
    assert isinstance(storm, NodeStorm)
    slurm = storm.slurm
    for name in set(slurm.nodes) - set(slurm._running):
        slurm.start_node(name)
    slurm.kill_node(storm.random.choice(storm.events_of("start")[-1]["nodes"]))


NODE = Fault(POWER_OFF, power_off, ("start", "resume"))


def node_storm(root: Path, *, count: int, seed: int) -> tuple[list[Outcome], list[str]]:
    """What became of so many, and what is wrong with the run."""
    workspace = workspace_of_slurm(root)
    workspace.config("data")
    with SlurmLab(nodes=NUM_NODES) as slurm:
        made = NodeStorm(workspace, seed=seed, steps=STEPS_PER_FAULT * count, slurm=slurm)
        outcomes: list[Outcome] = []
        try:
            outcomes += itertools.chain(made.drive([(NODE,)] * count))
        except NotSurvivedError as error:
            return outcomes, [str(error)]
    if not all(outcome.survived for outcome in outcomes):
        return outcomes, ["a fault was not survived"]
    calm = calm_run(workspace, words=["train", *workspace.words(), "stage=small", "cluster=local", *made.settings])
    return outcomes, differences(made.run_dir, calm.run_dir)
