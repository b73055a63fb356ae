"""phidias submit: a run as jobs of a Slurm cluster, each after the one before it: its data where that is still to be made, its
stages, and what run.after names. Everything is checked first, by Slurm too (sbatch --test-only); dry=true prints the lines.

A second submit of a run that is queued says so; of one that failed, it goes on with what is not done. With -m every run of the
sweep is checked before the first is queued; concurrency=N makes them one array of which at most N run at a time."""

from collections.abc import Sequence

from launcher.config.errors import ConfigError, Problem
from launcher.jobs.submission import check_submission, submit
from launcher.rundir.exits import ExitClass
from launcher.verbs.guard import guard
from launcher.verbs.request import Request

OPTIONS: dict[str, tuple[str, ...]] = {"dry": ("true", "false"), "concurrency": ()}


def act_together(requests: Sequence[Request]) -> int:
    return guard(lambda: submit_all(requests))


def submit_all(requests: Sequence[Request]) -> int:
    concurrency = read_concurrency(requests[0])
    checked = [check_submission(row.config, data_words=(*row.search_path, *row.overrides)) for row in requests]
    submit(checked, concurrency=concurrency, dry=requests[0].options.get("dry") == "true")
    return ExitClass.DONE


def read_concurrency(request: Request) -> int | None:
    said = request.options.get("concurrency")
    if said is None:
        return None
    if not said.isdigit() or not int(said):
        raise ConfigError(Problem("concurrency", repr(said), "runs of a sweep at a time", "a whole number above 0"))
    if not request.in_sweep:
        raise ConfigError(Problem("concurrency", said, "one run has none", "-m with a sweep, or leave it out"))
    return int(said)
