"""phidias exposure: how often each source is read over the stages of a run, and by now where the run has begun.

Counts of prepared sources come from manifests. A cap that is broken ends it with 2, as it ends a launch.
"""

import json
from dataclasses import asdict
from pathlib import Path

from data_prep.mixing import PhaseRow
from launcher.config.check_mixture import check_amounts, check_caps
from launcher.config.errors import ConfigError
from launcher.config.reading import assumed_sizes
from launcher.config.schema import RunConfig
from launcher.config.validate import merge_over_stages
from launcher.plan.exposure import plan_exposure
from launcher.plan.prepared import known_sizes
from launcher.rundir.order import recorded_tables, samples_read
from launcher.rundir.paths import RunDir
from launcher.rundir.records import parse_status
from launcher.verbs.request import Request

OPTIONS = {"out": ("json",)}


def act(request: Request) -> int:
    config = request.config
    sizes = {**assumed_sizes(config), **known_sizes(config)}
    read, tables = where_it_stands(config)
    if found := list(check_amounts(config, sizes=sizes, prepared=True)):
        raise ConfigError(*merge_over_stages(found, names=config.stage_names))
    rows = plan_exposure(config, sizes=sizes, tables=tables, samples_read=read)
    if request.wants_json:
        print(json.dumps([asdict(row) for row in rows], indent=None if request.in_sweep else 1))
    else:
        from launcher.plan.page import print_exposure

        print_exposure(config, rows=rows)
    if found := list(check_caps(config, sizes=sizes, tables=tables)):  # shown all the same: the table says why
        raise ConfigError(*merge_over_stages(found, names=config.stage_names))
    return 0


def where_it_stands(config: RunConfig) -> tuple[dict[str, int], dict[str, list[PhaseRow]]]:
    """Samples each stage has read by now, and the phases that the run has recorded where it has begun."""
    run = RunDir(Path(config.run.runs_dir) / config.run.name)
    read = {name: max(samples_read(run, name), samples_shown(run, name, config=config)) for name in config.stage_names}
    recorded = recorded_tables(run) if any(read.values()) else {}
    return read, {name: recorded[name] for name in config.stage_names if name in recorded}


def samples_shown(run: RunDir, stage: str, *, config: RunConfig) -> int:
    """Where status.json says that a stage stands: past its newest checkpoint, while it trains."""
    status = parse_status(run.status.read_text()) if run.status.exists() else {}
    tokens = status.get("tokens") if status.get("stage") == stage else 0
    return int(tokens) // config.stage(stage).stage.seq_length if isinstance(tokens, int | float) else 0
