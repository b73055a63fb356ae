"""Has a run save and end: its ranks finish their step and write a checkpoint; jobs of it that wait are cancelled. layout=any
has them write one that any layout can go on from, which takes longer. now=true ends them at once; what lies behind the last
checkpoint is computed again.

Keys: layout=any  now=true  runs_dir=runs"""

from collections.abc import Mapping, Sequence

from launcher.config.errors import ConfigError, Problem
from launcher.jobs.queue import queued
from launcher.jobs.slurm import slurm_says
from launcher.rundir.exits import ExitClass
from launcher.rundir.lock import is_live
from launcher.rundir.stop import ask_to_stop
from launcher.verbs.request import read_run_words, take_options
from launcher.verbs.runs import RUNS_DIR, find_runs, one_or_more

WAITING, RUNNING = ("PENDING", "REQUEUED", "SUSPENDED"), ("RUNNING", "COMPLETING")


def run(words: Sequence[str]) -> int:
    words, flags = take_options(words, allowed={"now": ("true", "false"), "layout": ("any",)})
    refuse_both(flags)
    names, options = read_run_words(words, keys=("runs_dir",))
    for found in find_runs(one_or_more(names), runs_dir=options.get("runs_dir", RUNS_DIR)):
        waiting, running = queued(found, states=WAITING), queued(found, states=RUNNING)
        if waiting:
            slurm_says("scancel", *waiting)
            print(f"{found.name}: cancelled {', '.join(waiting)}")
        if running and flags.get("now") == "true":
            slurm_says("scancel", *running)
            print(f"{found.name}: ended {', '.join(running)}")
        elif running or is_live(found):
            ask_to_stop(found, any_layout="layout" in flags)
            print(f"{found.name}: its ranks save{' for any layout' if 'layout' in flags else ''} after this step and end")
        elif not waiting:
            print(f"{found.name}: nothing of it is running")
    return ExitClass.DONE


def refuse_both(flags: Mapping[str, str]) -> None:
    if "layout" in flags and flags.get("now") == "true":
        rule = "ranks that are ended at once save nothing"
        raise ConfigError(Problem("layout", "any with now=true", rule, "one of the two"))
