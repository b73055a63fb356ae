"""Has a run save and end: its ranks finish their step and write a checkpoint; jobs of it that wait are cancelled. now=true ends
them at once; what lies behind the last checkpoint is computed again.

Keys: now=true  runs_dir=runs"""

import subprocess
from collections.abc import Sequence

from launcher.jobs.allocation import slurm_says
from launcher.rundir.exits import ExitClass
from launcher.rundir.lock import is_live
from launcher.rundir.records import read_records
from launcher.verbs.request import read_run_words, take_options
from launcher.verbs.runs import RUNS_DIR, find_run, one_or_more


def run(words: Sequence[str]) -> int:
    words, flags = take_options(words, allowed={"now": ("true", "false")})
    names, options = read_run_words(words, keys=("runs_dir",))
    for name in one_or_more(names):
        found = find_run(name, runs_dir=options.get("runs_dir", RUNS_DIR))
        jobs = sorted({str(row["job"]) for row in read_records(found.events) if row.get("job")})
        waiting = queued(jobs, states="PENDING,REQUEUED,SUSPENDED")
        if waiting:
            slurm_says("scancel", *waiting)
            print(f"{found.name}: cancelled {', '.join(waiting)}")
        if flags.get("now") == "true" and (running := queued(jobs, states="RUNNING,COMPLETING")):
            slurm_says("scancel", *running)
            print(f"{found.name}: ended {', '.join(running)}")
        elif is_live(found) or queued(jobs, states="RUNNING"):
            found.stop_flag.touch()
            print(f"{found.name}: its ranks save after this step and end")
        elif not waiting:
            print(f"{found.name}: nothing of it is running")
    return ExitClass.DONE


def queued(jobs: Sequence[str], *, states: str) -> list[str]:
    """Those of the jobs that Slurm still has in one of the states; none where Slurm is not here."""
    if not jobs:
        return []
    command = ["squeue", "--noheader", f"--jobs={','.join(jobs)}", f"--states={states}", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return done.stdout.split()
