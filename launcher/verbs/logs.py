"""The end of what a run has said: its newest job, where it is one of Slurm's, and the ranks of its newest stage.

Keys: stage=<the newest>  lines=40  runs_dir=runs"""

import re
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.jobs.queue import known_jobs
from launcher.rundir.exits import ExitClass
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, find_runs, one_or_more

LINES = 40
OF_JOB = re.compile(r"(job|data|export|eval)_[0-9_]+")


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("stage", "lines", "runs_dir"))
    lines = options.get("lines", str(LINES))
    if not lines.isdigit() or not int(lines):
        raise ConfigError(Problem("lines", repr(lines), "it is a whole number above 0", f"lines={LINES}"))
    for found in find_runs(one_or_more(names), runs_dir=options.get("runs_dir", RUNS_DIR)):
        paths = newest_logs(found, stage=options.get("stage"))
        if not paths:
            print(f"== {found.name} has no logs yet")
        for path in paths:
            print(f"== {path}")
            with path.open(errors="replace") as file:
                print("".join(deque(file, maxlen=int(lines))), end="")
    return ExitClass.DONE


def newest_logs(run: RunDir, *, stage: str | None) -> list[Path]:
    """Of the newest job, and of the stage that is named or wrote last. ConfigError where a stage is named that has none."""
    paths = list(run.logs.glob("*.log"))
    jobs = [path for path in paths if OF_JOB.fullmatch(path.stem)]
    stages = [path for path in paths if path not in jobs and path.stem != "nodes"]
    if stage and stage not in [path.stem for path in stages]:
        known = ", ".join(sorted(path.stem for path in stages)) or "none"
        raise ConfigError(Problem("stage", repr(stage), f"stages of run {run.name} with a log: {known}", "one of them"))
    elements = [job for job in known_jobs(read_records(run.events)) if "_" in job]
    jobs += [path for job in elements if (path := run.root.parent / ".sweep" / f"job_{job}.log").exists()]
    return [*newest(jobs), *newest(path for path in stages if stage in (None, path.stem))]


def newest(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime)[-1:]
