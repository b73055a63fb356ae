"""phidias submit: the stages of a run as jobs of a Slurm cluster, each after the one before it. Everything is checked first;
dry=true prints the sbatch lines. A second submit of a run that is queued says so; of one that failed, it goes on with the
stages that are not done."""

import shlex
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.jobs.graph import stage_line
from launcher.jobs.local import refuse_headless
from launcher.jobs.queue import queued, stages_left, submit_stages
from launcher.plan.planner import check_fits
from launcher.plan.preflight import check_data_ready
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import open_run, refuse_foreign
from launcher.rundir.paths import RunDir
from launcher.verbs.request import Request

OPTIONS = {"dry": ("true", "false")}


def act(request: Request) -> int:
    config, dry = request.config, request.options.get("dry") == "true"
    run = RunDir(Path(config.run.runs_dir) / config.run.name)
    refuse_local(config)
    check_fits(config)
    prepared = check_data_ready(config)
    refuse_headless(run, config)
    refuse_foreign(run)
    jobs, left = queued(run), stages_left(run, config)
    if jobs and not dry:
        print(f"{run.name} is queued already: {', '.join(f'{job} ({state})' for job, state in jobs.items())}")
    elif not left:
        print(f"{run.name}: every stage is done")
    elif dry:
        show_lines(config, stages=left)
    else:
        submit_stages(open_run(config, prepared=prepared, on_change=print), config, stages=left)
    return ExitClass.DONE


def show_lines(config: RunConfig, *, stages: list[str]) -> None:
    after = None
    for stage in stages:
        print(shlex.join(stage_line(config, stage=stage, after=after)))
        after = f"<job of {stage}>"


def refuse_local(config: RunConfig) -> None:
    if config.cluster.kind != "slurm":
        rule = "submit queues jobs on a Slurm cluster"
        raise ConfigError(Problem("cluster.kind", config.cluster.kind, rule, "cluster=slurm_h100, or `phidias train`"))
