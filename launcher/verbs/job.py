"""What slurm/pretrain.sh runs inside a job: checks and freezes the config at the first start, goes on from the run directory at
every other. Not meant to be called by hand."""

import os
from collections.abc import Sequence
from pathlib import Path

from launcher.config.check import check_run
from launcher.jobs.allocation import fitted_to, read_allocation, remember, remembered, work
from launcher.jobs.local import refuse_headless
from launcher.plan.planner import check_fits
from launcher.plan.preflight import check_data_ready
from launcher.rundir.freeze import open_run
from launcher.rundir.paths import RunDir
from launcher.verbs.request import Request

OPTIONS: dict[str, tuple[str, ...]] = {}


def run(words: Sequence[str]) -> int:
    from launcher.verbs.app import run_config_verb

    allocation = read_allocation(os.environ)
    known = remembered(allocation)
    if known is None:
        return run_config_verb("job", words=words)
    run_dir, config = known
    return work(run_dir, fitted_to(config, allocation, overrides=()), allocation=allocation)


def act(request: Request) -> int:
    allocation = read_allocation(os.environ)
    config = fitted_to(request.config, allocation, overrides=request.overrides)
    check_run(config)
    check_fits(config)
    prepared = check_data_ready(config)
    refuse_headless(RunDir(Path(config.run.runs_dir) / config.run.name), config)
    run_dir = open_run(config, prepared=prepared, on_change=print)
    remember(run_dir, config, allocation=allocation)
    return work(run_dir, config, allocation=allocation)
