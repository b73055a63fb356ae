"""A run as Slurm jobs, each after the one before it: lines for sbatch, as values. Nothing is run here."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster, RunConfig
from launcher.jobs.allocation import job_comment
from launcher.jobs.slurm import duration_s, site_flags
from launcher.plan.parameters import count_parameters
from launcher.plan.predict import predict_stage
from launcher.plan.stage import plan_stage
from launcher.rundir.code import SOURCE_ROOT
from launcher.rundir.paths import RunDir

LINES = "\n"
DATA, EXPORT, EVAL = "data", "export", "eval"
# Seconds before the time limit at which ranks are asked to save: at least the one, else what two steps and checkpoints take.
LEAST_WARNING_S, SLACK_S = 300, 120
# Of an export: the weights twice, and what Python, torch and the file system want.
BYTES_PER_PARAMETER, SPARE_GIB = 8, 16


@dataclass(frozen=True)
class Planned:
    """A job to be: what it does, and its sbatch line but for the job it waits for. `environment`: NAME=value words. `needs`:
    what must have ended well before, of what is queued with it, by its title; None: the job before it. `behind`: the stage that
    it exports or evaluates, None of data and stages."""

    what: str
    environment: tuple[str, ...]
    options: tuple[str, ...]
    script: Path
    words: tuple[str, ...] = ()
    needs: tuple[str, ...] | None = None
    behind: str | None = None

    @property
    def title(self) -> str:
        """`pretrain`, or `pretrain.export`."""
        return self.what if self.behind is None else f"{self.behind}.{self.what}"

    def line(self, *, after: str | None, behind: str | None = None) -> list[str]:
        """`after`: the job that must have ended well; where it does not, this one is cancelled. `behind`: one that must have
        ended in any way, for a run is at work on one stage at a time."""
        kinds = {"afterok": after, "afterany": behind}
        waits = ",".join(f"{kind}:{job}" for kind, job in kinds.items() if job)
        waiting = [f"--dependency={waits}", "--kill-on-invalid-dep=yes"] if waits else []
        return ["env", *self.environment, "sbatch", "--parsable", *self.options, *waiting, str(self.script), *self.words]


def data_job(config: RunConfig, *, words: Sequence[str], run: RunDir | None = None, code: Path = SOURCE_ROOT) -> Planned:
    """The array that prepares the data of a run: `data.num_machines` elements of `data.num_workers` cores. It works where it is
    submitted, as relative paths of the words do. `run`: that it is a part of; its log goes there."""
    size = (f"--array=0-{config.data.num_machines - 1}", f"--cpus-per-task={config.data.num_workers}")
    about = (f"--job-name={config.run.name}.{DATA}", output(run, name="data_%A_%a")) if run else ()
    options = (*size, *about, *site_flags(config.cluster, on_cpus=True), "--export=ALL")
    return Planned(
        DATA, environment(config.cluster, code=code, ranks=False), options, code / "slurm/data_prep.sh", tuple(words)
    )


def stage_job(config: RunConfig, *, run: RunDir, stage: str, code: Path) -> Planned:
    """One stage of a run that is frozen: the comment says which."""
    comment = f"--comment={job_comment(run, what=(stage,), code=code)}"
    about = (f"--job-name={config.run.name}.{stage}", output(run, name="job_%j"), comment)
    options = (
        *about,
        *resources(config.cluster),
        warning(config, stages=(stage,)),
        *site_flags(config.cluster),
        "--export=ALL",
    )
    parent = config.stage(stage).stage.parent
    needs = (DATA, parent) if parent else (DATA,)
    return Planned(stage, environment(config.cluster, code=code, ranks=True), options, code / "slurm/pretrain.sh", needs=needs)


def waits_of(jobs: Sequence[Planned], *, number: int, after: str | None, ids: Sequence[str]) -> tuple[str | None, str | None]:
    """For which jobs one of them waits: that it must end well, and the one it is queued behind. `ids`: of those before it;
    `after`: what the first waits for. A branch of a run so goes on where another branch has failed, and no stage waits for an
    export or evaluation."""
    job, before = jobs[number], {job.title: job_id for job, job_id in zip(jobs, ids, strict=False)}
    if job.behind is not None:
        needed = [before[title] for title in job.needs or () if title in before]
        return (needed[-1] if needed else after), None
    chain = [job_id for one, job_id in zip(jobs, ids, strict=False) if one.behind is None]
    if not chain:
        return after, None
    if job.needs is None:
        return chain[-1], None
    needed = [before[what] for what in job.needs if what in before] or ([after] if after else [])
    return ":".join(needed) or None, chain[-1] if chain[-1] not in needed else None


def sweep_job(configs: Sequence[RunConfig], *, runs: Path, code: Path, concurrency: int) -> Planned:
    """An array of which each element trains all stages of one run; at most `concurrency` of them at a time. `runs`: the file
    that lists them."""
    config = max(configs, key=lambda config: config.cluster.num_nodes)
    comment = f"--comment={runs.resolve()}:elements:{code.name}"
    about = (f"--job-name={runs.stem}", f"--output={escaped(runs.parent)}/job_%A_%a.log", comment)
    warn = max(
        (warning(config, stages=config.stage_names) for config in configs), key=lambda word: int(word.rpartition("@")[2])
    )
    array = f"--array=0-{len(configs) - 1}%{concurrency}"
    options = (array, *about, *resources(config.cluster), warn, *site_flags(config.cluster), "--export=ALL")
    return Planned("sweep", environment(config.cluster, code=code, ranks=True), options, code / "slurm/pretrain.sh")


def after_job(config: RunConfig, *, run: RunDir, what: str, stage: str, code: Path) -> Planned:
    """`phidias export` or `phidias eval` of a stage of the run; that measures tasks, also of the checkpoints that were kept."""
    gib = ceil(count_parameters(config.model).total * BYTES_PER_PARAMETER / 2**30) + SPARE_GIB
    gpu = ("--gpus-per-node=1",) if what == EVAL and config.cluster.gpu else ()
    name = f"{stage}.{what}" if config.run.after_stages else what
    about = (f"--job-name={config.run.name}.{name}", output(run, name=f"{name}_%j"))
    options = (*about, "--nodes=1", "--ntasks=1", f"--mem={gib}G", *gpu, *site_flags(config.cluster, on_cpus=not gpu))
    every = ("steps=all",) if what == EVAL and has_curve(config, stage=stage) else ()
    words = (what, run.root.name, f"runs_dir={run.root.resolve().parent}", f"stage={stage}", *every)
    place = environment(config.cluster, code=code, ranks=False)
    needs = (stage, f"{stage}.{EXPORT}")[: 1 if what == EXPORT else 2]
    return Planned(what, place, (*options, "--export=ALL"), code / "slurm/phidias.sh", words, needs=needs, behind=stage)


def has_curve(config: RunConfig, *, stage: str) -> bool:
    """Whether tasks are measured of all checkpoints of a stage that are still there at its end: where some are kept for it."""
    return bool(config.run.evaluation.tasks) and config.stage(stage).stage.checkpoint.keep_every_tokens is not None


def environment(cluster: Cluster, *, code: Path, ranks: bool) -> tuple[str, ...]:
    """What the scripts look for. Ranks get the cluster's own variables and setup lines from the launcher, node by node, other
    jobs from here."""
    setup = (f"PHIDIAS_SETUP={LINES.join(cluster.setup)}",) if cluster.setup and not ranks else ()
    theirs = () if ranks else tuple(f"{name}={value}" for name, value in cluster.env.items())
    return (f"PHIDIAS_PYTHON={sys.executable}", f"PHIDIAS_CODE={code.resolve()}", *setup, *theirs)


def output(run: RunDir, *, name: str) -> str:
    return f"--output={escaped(run.logs)}/{name}.log"


def escaped(path: Path) -> str:
    """For --output, where % begins a pattern."""
    return str(path.resolve()).replace("%", "%%")


def resources(cluster: Cluster) -> tuple[str, ...]:
    """Whole nodes, a task a rank, and nodes to spare: then the job outlives one that dies."""
    nodes = (f"--nodes={cluster.num_nodes + cluster.spare_nodes}", f"--ntasks-per-node={cluster.gpus_per_node}")
    gpus = (f"--gpus-per-node={cluster.gpus_per_node}", "--exclusive", "--mem=0") if cluster.gpu else ()
    return (*nodes, *gpus, *(("--no-kill",) if cluster.spare_nodes else ()))


def warning(config: RunConfig, *, stages: Sequence[str]) -> str:
    """How long before the time limit the ranks are asked to save. ConfigError where hardly any time is left before that."""
    needed = max(map(ceil, (saving_s(config, stage=stage) for stage in stages)))
    limit = duration_s(config.cluster.time_limit or "")
    if limit is not None and limit < 2 * needed:
        rule = f"a job keeps {needed} s to save, and must train for as long"
        raise ConfigError(
            Problem("cluster.time_limit", str(config.cluster.time_limit), rule, f"at least {ceil(2 * needed / 60)} minutes")
        )
    return f"--signal=B:USR1@{needed}"


def saving_s(config: RunConfig, *, stage: str) -> float:
    row = config.stage(stage)
    found = predict_stage(row, config=config, plan=plan_stage(row, cluster=config.cluster))
    step_s, goodput = found["step_time_s"] or 0.0, found["goodput"]
    checkpoint_s = goodput["checkpoint_s"] if goodput else 0.0
    return max(LEAST_WARNING_S, 2 * (step_s + checkpoint_s) + SLACK_S)
