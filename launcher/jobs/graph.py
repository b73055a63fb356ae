"""The stages of a run as Slurm jobs, each after the one before it: lines for sbatch, as values. Nothing is run here."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.config.schema import Cluster, RunConfig
from launcher.jobs.slurm import site_flags
from launcher.rundir.code import SOURCE_ROOT
from launcher.rundir.paths import RunDir

TRAIN_SCRIPT = SOURCE_ROOT / "slurm" / "pretrain.sh"


def stage_line(config: RunConfig, *, stage: str, after: str | None) -> list[str]:
    """The sbatch line of one stage of a run whose config is frozen: the comment says which. `after`: the job that must have
    ended well; where it does not, this one is cancelled."""
    run = RunDir(Path(config.run.runs_dir) / config.run.name)
    name = f"--job-name={job_name(config, stage=stage)}"
    output = f"--output={run.root / 'logs' / 'job_%j.log'}"
    waiting = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    export = f"--export=ALL,PHIDIAS_PYTHON={sys.executable}"
    comment = f"--comment={job_comment(run, stages=(stage,))}"
    options = [name, output, comment, *resources(config.cluster), *site_flags(config.cluster), *waiting, export]
    return ["sbatch", "--parsable", *options, str(TRAIN_SCRIPT)]


def job_comment(run: RunDir, *, stages: Sequence[str]) -> str:
    """What a job carries through requeues: its run directory and its stages."""
    return f"{run.root.resolve()}:{','.join(stages)}"


def job_name(config: RunConfig, *, stage: str) -> str:
    return f"{config.run.name}.{stage}"


def resources(cluster: Cluster) -> list[str]:
    """Whole nodes, a task a rank."""
    nodes = [f"--nodes={cluster.num_nodes}", f"--ntasks-per-node={cluster.gpus_per_node}"]
    gpus = [f"--gpus-per-node={cluster.gpus_per_node}", "--exclusive"] if cluster.gpu else []
    return [*nodes, *gpus]
