"""The jobs of a run in Slurm's queue: which there are, and putting its stages there."""

import subprocess
from collections.abc import Sequence

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.jobs.graph import stage_line
from launcher.jobs.local import stage_is_done
from launcher.jobs.slurm import run_sbatch
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records

# squeue's words of a job that ended longer ago than MinJobAge.
FORGOTTEN = "Invalid job id"


def known_jobs(run: RunDir) -> list[str]:
    """Ids of all jobs that were submitted for the run or worked on it, oldest first."""
    return list(dict.fromkeys(str(row["job"]) for row in read_records(run.events) if row.get("job")))


def queued(run: RunDir, *, states: Sequence[str] = ()) -> dict[str, str]:
    """State of each of its jobs that Slurm still has, by id; of those in `states` where some are named. Empty where no job is
    known, or Slurm has forgotten them, or is not here. ConfigError where it does not answer: a run may be live then."""
    jobs = known_jobs(run)
    if not jobs:
        return {}
    chosen = [f"--states={','.join(states)}"] if states else []
    command = ["squeue", "--noheader", f"--jobs={','.join(jobs)}", *chosen, "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return {}
    if done.returncode and FORGOTTEN not in done.stderr:
        found = f"squeue said: {done.stderr.strip()}"
        raise ConfigError(Problem("cluster", found, "what runs must be known", "try again where squeue answers"))
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())


def stages_left(run: RunDir, config: RunConfig) -> list[str]:
    return [stage for stage in config.stage_names if not stage_is_done(run, config, stage)]


def submit_stages(run: RunDir, config: RunConfig, *, stages: Sequence[str]) -> None:
    """Queues the stages of a run whose config is frozen, each after the one before it, and says so."""
    run.logs.mkdir(exist_ok=True)
    after = None
    for stage in stages:
        job = run_sbatch(stage_line(config, stage=stage, after=after))
        append_record(run.events, "submitted", stage=stage, job=job)
        waits = f", after job {after}" if after else ""
        print(f"{stage}: job {job}{waits}; log: {run.logs / f'job_{job}.log'}")
        after = job
