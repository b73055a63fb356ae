"""Goes on with runs as they are frozen: the stages that are not done, as jobs of their cluster or on this machine. To change
something on the way, use `phidias submit` or `phidias train` with overrides.

Keys: runs_dir=runs"""

from collections.abc import Sequence

from launcher.jobs.local import train
from launcher.jobs.queue import queued, stages_left, submit_stages
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import read_config
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
    elif not left:
        print(f"{found.name}: every stage is done")
    elif config.cluster.kind == "slurm":
        submit_stages(found, config, stages=left)
    else:
        return train(found, config)
    return ExitClass.DONE
