"""phidias train: trains the stages of a run on this machine. Checks everything first; goes on where an earlier call stopped."""

from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.plan.planner import check_fits
from launcher.plan.preflight import check_data_ready
from launcher.plan.search import describe
from launcher.rundir.freeze import open_run
from launcher.rundir.paths import RunDir
from launcher.rundir.permissions import check_key_file
from launcher.verbs.request import Request

OPTIONS: dict[str, tuple[str, ...]] = {}


def act(request: Request) -> int:
    from launcher.jobs.local import train
    from launcher.jobs.stages import refuse_headless

    config = request.config
    refuse_slurm(config)
    check_fits(config)
    check_key_file(config)
    say_chosen(request)
    prepared = check_data_ready(config)
    refuse_headless(RunDir(Path(config.run.runs_dir) / config.run.name), config)
    return train(open_run(config, prepared=prepared, on_change=print), config)


def say_chosen(request: Request) -> None:
    """What layout=auto came to: it is frozen in the run, where overrides that name it change nothing."""
    for stage, found in request.found.items():
        print(f"layout=auto, stage {stage}: {describe(found.best[0].layout)} precision={found.best[0].precision.name}")


def refuse_slurm(config: RunConfig) -> None:
    if config.cluster.kind == "slurm":
        rule = "`phidias train` runs on this machine"
        fix = "`phidias submit` with the same words, or cluster=local with a layout for its ranks"
        raise ConfigError(Problem("cluster.kind", "slurm", rule, fix))
