"""The end of what a run has said: its newest job, where it is one of Slurm's, and the ranks of its newest stage.

Keys: stage=<the newest>  lines=40  runs_dir=runs"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.rundir.exits import ExitClass
from launcher.rundir.paths import RunDir
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, find_runs, one_or_more

LINES = 40


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("stage", "lines", "runs_dir"))
    lines = options.get("lines", str(LINES))
    if not lines.isdigit() or not int(lines):
        raise ConfigError(Problem("lines", repr(lines), "it is a whole number above 0", f"lines={LINES}"))
    for found in find_runs(one_or_more(names), runs_dir=options.get("runs_dir", RUNS_DIR)):
        for path in newest_logs(found, stage=options.get("stage")):
            print(f"== {path}")
            with path.open(errors="replace") as file:
                print("".join(deque(file, maxlen=int(lines))), end="")
    return ExitClass.DONE


def newest_logs(run: RunDir, *, stage: str | None) -> list[Path]:
    """Of the newest job, and of the stage that is named or wrote last. ConfigError where there is none of them."""
    paths = sorted(run.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    jobs = [path for path in paths if path.stem.startswith("job_")]
    stages = [path for path in paths if path not in jobs and stage in (None, path.stem)]
    if not stages and (stage or not jobs):
        known = ", ".join(path.stem for path in paths if path not in jobs) or "nothing"
        raise ConfigError(Problem("stage", repr(stage or "none"), f"run {run.name} has logs of {known}", "one of them"))
    return [*jobs[-1:], *stages[-1:]]
