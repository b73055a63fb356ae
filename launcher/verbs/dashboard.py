"""Makes a W&B workspace and a report of a run, or of a project, with the panels an engineer on call looks at first on top; of a
run it replaces the ones it made before. out=json prints the same as data, without a network.

Keys: project=<of the run>  entity=<of the run>  stages=<of the run, or of the project's runs>  out=json  runs_dir=runs"""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.report.dashboard import Dashboard, plan_dashboard
from launcher.rundir.exits import ExitClass, RunStateError
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import parse_status, write_json
from launcher.verbs.guard import refuse
from launcher.verbs.request import read_run_words, take_options
from launcher.verbs.runs import RUNS_DIR, find_run, list_runs
from launcher.verbs.wandb_service import service_environment, service_url, unreachable

MADE = "phidias_dashboard.json"  # what was made of a run, so that it is replaced the next time


@dataclass(frozen=True)
class Wanted:
    """What panels are made of; `run`: None for all of a project."""

    run: RunDir | None
    configs: tuple[RunConfig, ...]
    project: str
    entity: str | None
    stages: tuple[str, ...]

    def plan(self) -> Dashboard:
        gpus = max((config.cluster.gpus_per_node for config in self.configs if config.cluster.gpu), default=0)
        name = self.run.name if self.run else None
        return plan_dashboard(project=self.project, entity=self.entity, run=name, stages=self.stages, gpus_per_node=gpus)

    @property
    def key_file(self) -> str | None:
        return next((file for config in self.configs if (file := config.monitor.wandb.key_file)), None)


def run(words: Sequence[str]) -> int:
    words, flags = take_options(words, allowed={"out": ("json",)})
    names, options = read_run_words(words, keys=("project", "entity", "stages", "runs_dir"))
    wanted = of_run(names[0], options) if len(names) == 1 else of_project(names, options)
    if flags:
        print(json.dumps(wanted.plan().document(), indent=1))
        return ExitClass.DONE
    return make(wanted)


def of_run(name: str, options: Mapping[str, str]) -> Wanted:
    """The stage in hand stands first."""
    found = find_run(name, runs_dir=options.get("runs_dir", RUNS_DIR))
    config = read_config(found)
    status = parse_status(found.status.read_text(errors="replace")) if found.status.exists() else {}
    stages = named_stages(options) or config.stage_names
    stages = tuple(sorted(stages, key=lambda stage: stage != status.get("stage")))
    settings = config.monitor.wandb
    project, entity = options.get("project", settings.project), options.get("entity", settings.entity)
    return Wanted(found, (config,), project=project, entity=entity, stages=stages)


def of_project(names: Sequence[str], options: Mapping[str, str]) -> Wanted:
    """Stages are those of the runs here that log to it, unless they are named."""
    if names or not options.get("project"):
        found = f"{' '.join(names) or 'nothing'} and no project=" if not names else " ".join(names)
        rule = "a dashboard is of one run, or of all runs of a project"
        raise ConfigError(Problem("run", found, rule, "name one run, or project=NAME"))
    project, runs_dir = options["project"], options.get("runs_dir", RUNS_DIR)
    configs = tuple(config for config in readable_configs(runs_dir) if config.monitor.wandb.project == project)
    stages = named_stages(options) or tuple(dict.fromkeys(name for config in configs for name in config.stage_names))
    if not stages:
        rule = "panels are made for the stages of the project's runs"
        raise ConfigError(
            Problem("project", f"no run in {runs_dir} that logs to {project!r}", rule, "stages=pretrain,midtrain")
        )
    entity = options.get("entity") or next((config.monitor.wandb.entity for config in configs), None)
    return Wanted(None, configs, project=project, entity=entity, stages=stages)


def readable_configs(runs_dir: str) -> list[RunConfig]:
    """Of the runs that this code can read."""
    found = []
    for one in list_runs(runs_dir):
        with suppress(RunStateError, OSError):
            found.append(read_config(one))
    return found


def named_stages(options: Mapping[str, str]) -> tuple[str, ...]:
    """ConfigError where a name is empty, or no name of a stage."""
    text = options.get("stages")
    names = tuple(text.split(",")) if text is not None else ()
    if not all(name.replace("_", "").replace("-", "").replace(".", "").isalnum() for name in names):
        raise ConfigError(Problem("stages", repr(text), "names of stages, a comma between two", "stages=pretrain,midtrain"))
    return names


def make(wanted: Wanted) -> ExitClass:
    """Saves both with W&B. Nothing is begun without a key and a network."""
    if wanted.run and wanted.configs[0].monitor.wandb.mode == "disabled":
        fix = "train with monitor.wandb.mode=online, or out=json to see what it would be"
        raise ConfigError(Problem("monitor.wandb.mode", "disabled", f"run {wanted.run.name} logs nothing to W&B", fix))
    if importlib.util.find_spec("wandb_workspaces") is None:
        fix = "pip install 'phidias[dashboard]', or out=json to see what it would be"
        raise ConfigError(Problem("wandb-workspaces", "no such package", "dashboards are made with it", fix))
    url = service_url()
    os.environ.update(service_environment(wanted.key_file, url=url))
    if problem := unreachable(url):
        refuse(f"{url} does not answer: {problem}. Nothing was made; out=json needs no network", code=ExitClass.RETRYABLE)
        return ExitClass.RETRYABLE
    made = save(wanted)
    print(f"workspace: {made['workspace']}\nreport: {made['report']}")
    return ExitClass.DONE


def save(wanted: Wanted) -> dict[str, str]:
    """ConfigError where W&B does not have the project yet, or refuses the key."""
    import wandb

    from launcher.report import workspace

    path: Path | None = wanted.run.wandb / MADE if wanted.run else None
    known: dict[str, Any] = parse_status(path.read_text()) if path and path.exists() else {}
    try:
        made = workspace.save(wanted.plan(), known=known)
    except ValueError as error:
        if "not found" not in str(error):
            raise
        fix = "train with monitor.wandb.mode=online, or `phidias sync` a run, then call again; or another project= or entity="
        raise ConfigError(Problem("project", f"{wanted.project!r} ({error})", "the first run makes a project", fix)) from error
    except wandb.Error as error:
        rule = "W&B takes it with a key that may write there alone"
        raise ConfigError(Problem("entity", f"{wanted.entity!r} ({error})", rule, "another key, or entity=")) from error
    if path:
        path.parent.mkdir(exist_ok=True)
        write_json(path, made)
    return made
