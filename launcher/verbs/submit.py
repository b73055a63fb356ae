"""phidias submit: the stages of a run as jobs of a Slurm cluster, each after the one before it. Everything is checked first;
dry=true prints the sbatch lines. A second submit of a run that is queued says so; of one that failed, it goes on with the
stages that are not done."""

import shlex
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.jobs.allocation import slurm_says
from launcher.jobs.graph import job_name, stage_line
from launcher.jobs.local import refuse_headless, stage_is_done
from launcher.jobs.slurm import run_sbatch
from launcher.plan.planner import check_fits
from launcher.plan.preflight import check_data_ready
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import open_run, refuse_foreign
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record
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
    if not dry and (queued := queued_jobs(config)):
        print(f"{config.run.name} is queued already: {', '.join(queued)}")
        return ExitClass.DONE
    left = [stage for stage in config.stage_names if not stage_is_done(run, config, stage)]
    if not left:
        print(f"{config.run.name}: every stage is done")
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


def submit_stages(run: RunDir, config: RunConfig, *, stages: list[str]) -> None:
    run.logs.mkdir(exist_ok=True)
    after = None
    for stage in stages:
        job = run_sbatch(stage_line(config, stage=stage, after=after))
        append_record(run.events, "submitted", stage=stage, job=job)
        waits = f", after job {after}" if after else ""
        print(f"{stage}: job {job}{waits}; log: {run.logs / f'job_{job}.log'}")
        after = job


def refuse_local(config: RunConfig) -> None:
    if config.cluster.kind != "slurm":
        rule = "submit queues jobs on a Slurm cluster"
        raise ConfigError(Problem("cluster.kind", config.cluster.kind, rule, "cluster=slurm_h100, or `phidias train`"))


def queued_jobs(config: RunConfig) -> list[str]:
    """ "<id> (<state>)" of the run's jobs that wait or run."""
    names = ",".join(job_name(config, stage=stage) for stage in config.run.stages)
    said = slurm_says("squeue", "--noheader", "--me", f"--name={names}", "--format=%i (%T)")
    return said.splitlines()
