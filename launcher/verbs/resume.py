"""Goes on with runs as they are frozen: what is not done, as jobs of their cluster or on this machine. To change something
on the way, use `phidias submit` or `phidias train` with overrides.

Keys: runs_dir=runs"""

from collections.abc import Sequence

from launcher.config.schema import RunConfig
from launcher.jobs import local
from launcher.jobs.stages import refuse_headless, stage_is_done
from launcher.jobs.submission import at_home, check_submission, submit
from launcher.plan.planner import check_fits
from launcher.plan.preflight import check_data_ready
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import open_run, read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.permissions import check_key_file
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, find_runs, one_or_more


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("runs_dir",))
    found = find_runs(one_or_more(names), runs_dir=options.get("runs_dir", RUNS_DIR))
    configs = [at_home(read_config(run), run=run) for run in found]
    on_cluster = [config for config in configs if config.cluster.kind == "slurm"]
    submit([check_submission(config, data_words=None) for config in on_cluster], concurrency=None, dry=False)
    codes = [resume_here(run, config=config) for run, config in zip(found, configs, strict=True) if config not in on_cluster]
    return max(codes, default=ExitClass.DONE)


def resume_here(run: RunDir, *, config: RunConfig) -> ExitClass:
    if all(stage_is_done(run, config, stage) for stage in config.stage_names):
        print(f"{run.name}: every stage is done")
        return ExitClass.DONE
    check_fits(config)
    check_key_file(config)
    refuse_headless(run, config)
    prepared = check_data_ready(config)
    return local.train(open_run(config, prepared=prepared, on_change=print), config)
