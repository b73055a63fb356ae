"""Small runs on the test cluster: two nodes of one rank each, over gloo, submitted as a user does."""

import json
import os
import re
import time

from tests.endtoend.workspace import REPOSITORY, Workspace

SCRIPT = "slurm/pretrain.sh"
CLUSTER = """defaults:
  - local
  - _self_

name: lab
kind: slurm
restarts: 2
num_nodes: 2
gpus_per_node: 1
"""
TASKS = ["--ntasks-per-node=1", "--cpus-per-task=2"]
STARTED_S = 120.0


def workspace_of_slurm(root):
    """Text, tokenizer and YAML; its data is not made yet."""
    made = Workspace(root)
    (root / "yaml" / "cluster").mkdir()
    (root / "yaml" / "cluster" / "lab.yaml").write_text(CLUSTER)
    return made


def words(workspace, *more, stage="small"):
    return [*workspace.words(), f"stage={stage}", "cluster=lab", *more]


def submit(slurm, workspace, *more, stage="small", nodes=2, options=()):
    """By hand, from the root of the repository."""
    options = [f"--nodes={nodes}", *TASKS, f"--output={workspace.root}/%x_%j.log", *options]
    return slurm.submit(["sbatch", *options, SCRIPT, *words(workspace, *more, stage=stage)], cwd=REPOSITORY)


def phidias(slurm, workspace, *words, code=0):
    """As a user on a login node of the cluster."""
    path = f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}"
    return slurm.run("env", path, "phidias", *words, cwd=workspace.root, code=code)


def status(slurm, workspace):
    said = phidias(slurm, workspace, "status", workspace.run, f"runs_dir={workspace.root / 'runs'}", "out=json")
    return json.loads(said)[0]


def until(true, *, what):
    deadline = time.monotonic() + STARTED_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def until_step(workspace, step, *, stage="small"):
    """Until the run has taken so many steps."""
    until(lambda: any(r["step"] >= step and r["stage"] == stage for r in train_rows(workspace)), what=f"step {step}")


def train_rows(workspace):
    return [row for row in workspace.rows("metrics.jsonl") if row["kind"] == "train"]


def losses(workspace):
    """By samples: a step that was taken again counts as it was taken last."""
    return {(row["stage"], row["samples"]): row["loss"] for row in train_rows(workspace)}


def job_ids(said):
    """Of the jobs that submit and resume say they have queued."""
    return re.findall(r"^\S+: job (\d+)", said, flags=re.MULTILINE)
