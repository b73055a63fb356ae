"""Goes on with runs as they are frozen: the stages that are not done, as jobs of their cluster or on this machine. To change
something on the way, use `phidias submit` or `phidias train` with overrides.

Keys: runs_dir=runs"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.jobs import local
from launcher.jobs.queue import queued, stages_left, submit_stages
from launcher.plan.planner import check_fits
from launcher.plan.preflight import check_data_ready
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import open_run, read_config
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, find_run, one_or_more


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("runs_dir",))
    return max(resume(name, runs_dir=options.get("runs_dir", RUNS_DIR)) for name in one_or_more(names))


def resume(name: str, *, runs_dir: str) -> int:
    found = find_run(name, runs_dir=runs_dir)
    config, jobs = read_config(found), queued(found)
    left = stages_left(found, config)
    if jobs:
        print(f"{found.name} is queued already: {', '.join(f'{job} ({state})' for job, state in jobs.items())}")
        return ExitClass.DONE
    if not left:
        print(f"{found.name}: every stage is done")
        return ExitClass.DONE
    check_fits(config)
    prepared = check_data_ready(config)
    root = found.root.resolve().parent
    if root != Path(config.run.runs_dir).resolve():  # called from elsewhere, or moved
        config = replace(config, run=replace(config.run, runs_dir=str(root)))
    opened = open_run(config, prepared=prepared, on_change=print)
    if config.cluster.kind == "slurm":
        submit_stages(opened, config, stages=left)
        return ExitClass.DONE
    return local.train(opened, config)
