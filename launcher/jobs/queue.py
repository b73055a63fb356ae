"""The jobs of a run in Slurm's queue: which there are, and putting its jobs there."""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.jobs.graph import DATA, EVAL, EXPORT, Planned, waits_of
from launcher.jobs.slurm import run_sbatch, slurm_says, try_sbatch
from launcher.jobs.stages import stage_is_done
from launcher.rundir.checkpoints import newest_checkpoint
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_json, read_records

# squeue's words of a job that ended longer ago than MinJobAge.
FORGOTTEN = "Invalid job id"


class Work(NamedTuple):
    """The data, a stage, or an export or evaluation `behind` one."""

    what: str
    behind: str | None = None


def known_jobs(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Ids of all jobs that were submitted for a run or worked on it, oldest first."""
    return list(dict.fromkeys(str(event["job"]) for event in events if event.get("job")))


def queued(run: RunDir, *, states: Sequence[str] = ()) -> dict[str, str]:
    """State of each of its jobs that Slurm still has, by id; of those in `states` where some are named. Empty where no job is
    known, or Slurm has forgotten them, or is not here. ConfigError where it does not answer: a run may be live then."""
    jobs = known_jobs(read_records(run.events))
    if not jobs:
        return {}
    chosen = [f"--states={','.join(states)}"] if states else []
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", *chosen, "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return {}
    if done.returncode and FORGOTTEN not in done.stderr:
        found = f"squeue said: {done.stderr.strip()}"
        raise ConfigError(Problem("cluster", found, "what runs must be known", "try again where squeue answers"))
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())


def work_left(run: RunDir, config: RunConfig, *, data_ready: bool) -> list[Work]:
    """What of the run is still to be done, in order: its data, stages, and behind each what follows it."""
    stages = [stage for stage in config.stage_names if not stage_is_done(run, config, stage)]
    found = [Work(DATA)] if stages and not data_ready else []
    for stage in config.stage_names:
        to_do = stage in stages
        found += [Work(stage)] if to_do else []
        if stage in followed(config):
            behind = [what for what in (EXPORT, EVAL) if what in config.run.after]
            tasks = config.run.evaluation.tasks
            found += [
                Work(what, stage) for what in behind if to_do or not after_is_done(run, what=what, stage=stage, tasks=tasks)
            ]
    return found


def followed(config: RunConfig) -> tuple[str, ...]:
    """The stages that run.after follows."""
    return config.run.after_stages or config.run.stages[-1:]


def after_is_done(run: RunDir, *, what: str, stage: str, tasks: Sequence[str] = ()) -> bool:
    """Whether the newest checkpoint of the stage is exported, or what was exported of it is evaluated, by these tasks too."""
    said = {EXPORT: run.export(stage) / "phidias.json", EVAL: run.eval(stage)}[what]
    saved, _ = newest_checkpoint(run, stage)
    if not said.exists() or saved is None:
        return False
    found = read_json(said)
    asked = (found.get("tasks") or {}).get("asked", ())
    lacks = what == EVAL and any(task not in asked for task in tasks)
    return found.get("step") == saved.meta.step and found.get("held_out", {}).get("agrees") is not False and not lacks


def try_jobs(run: RunDir, jobs: Sequence[Planned]) -> None:
    """Asks Slurm whether it would take each, and says when it would start. ConfigError where it refuses one: none is queued."""
    for job in jobs:
        print(f"{run.name}.{job.title}: {try_sbatch(job.line(after=None)).removeprefix('sbatch: ')}")


def submit_jobs(run: RunDir, jobs: Sequence[Planned], *, after: str | None = None) -> list[str]:
    """Queues them, each after the one that it waits for, and says so. The ids."""
    run.logs.mkdir(exist_ok=True)
    ids: list[str] = []
    for number, job in enumerate(jobs):
        waits, behind = waits_of(jobs, number=number, after=after, ids=ids)
        try:
            ids.append(run_sbatch(job.line(after=waits, behind=behind)))
        except ConfigError:
            if ids:  # or the next submit would find the run queued, and never queue the rest
                slurm_says("scancel", *ids)
                print(f"{run.name}: cancelled {', '.join(ids)}: what was to come after them was refused")
            raise
        append_record(run.events, "submitted", stage=job.what, job=ids[-1], **({"of": job.behind} if job.behind else {}))
        told = ", ".join(filter(None, (waits, behind)))
        print(f"{run.name}.{job.title}: job {ids[-1]}" + (f", after job {told}" if told else ""))
    return ids
