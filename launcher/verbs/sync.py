"""Uploads what a run logged to W&B without a network (monitor.wandb.mode=offline, or a service that did not answer), once there
is one: all of it, in order, into the one W&B run that the run directory names. What was uploaded is marked; a second call
uploads what is new. What a live run is writing is left for later.

Keys: runs_dir=runs"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.report.standing import SILENT_S
from launcher.rundir.code import child_environment
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import read_config
from launcher.rundir.lock import is_live
from launcher.rundir.paths import RunDir
from launcher.rundir.records import parse_status
from launcher.rundir.wandb_log import cut_torn_end, is_offline, is_waiting, parts
from launcher.verbs.guard import refuse
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, find_runs, one_or_more
from launcher.verbs.wandb_service import service_environment, service_url, unreachable


@dataclass(frozen=True)
class Logs:
    """Of a run, oldest first: one for each start of a stage that was offline, or did not upload all it had."""

    run: RunDir
    config: RunConfig
    logs: tuple[Path, ...]

    @property
    def waiting(self) -> list[Path]:
        """Not uploaded yet."""
        return [path for path in self.logs if is_waiting(path)]

    @property
    def id(self) -> str:
        """Of the W&B run, as training has chosen it; of a run directory that lost it, as its logs have it."""
        path = self.run.wandb / "phidias_run_id"
        return path.read_text().strip() if path.exists() else self.logs[0].stem.removeprefix("run-")


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("runs_dir",))
    found = [offline_logs(run) for run in find_runs(one_or_more(names), runs_dir=options.get("runs_dir", RUNS_DIR))]
    if not any(one.logs for one in found):
        raise ConfigError(*(nothing_logged(one) for one in found))
    todo = []
    for one in found:
        ready, left = divide(one)
        empty = [path for path in ready if is_offline(path) and not cut_torn_end(path)]
        ready = [path for path in ready if path not in empty]
        for path in empty:
            print(f"{one.run.name}: {path.parent.name} holds nothing: it ended before it began")
        if left:
            print(f"{one.run.name}: {left.parent.name} is still being written; call again when the run has ended")
        if not one.waiting:
            print(f"{one.run.name}: {f'all {len(one.logs)} parts are uploaded' if one.logs else 'has no offline data'}")
        todo += [(one, ready)] if ready else []
    return upload(todo) if todo else ExitClass.DONE


def offline_logs(run: RunDir) -> Logs:
    return Logs(run, read_config(run), tuple(log for log in parts(run.wandb) if is_offline(log) or is_waiting(log)))


def nothing_logged(one: Logs) -> Problem:
    mode, name = one.config.monitor.wandb.mode, one.run.name
    fix = {"online": "nothing: W&B has had it all along", "offline": "call again once it has trained"}.get(
        mode, "train with monitor.wandb.mode=offline"
    )
    return Problem(name, f"no offline data, and monitor.wandb.mode={mode}", "sync uploads what mode=offline has written", fix)


def divide(one: Logs) -> tuple[list[Path], Path | None]:
    """What can be uploaded, and the newest log where ranks still write it."""
    waiting = one.waiting
    if waiting and waiting[-1] == one.logs[-1] and is_written(one):
        return waiting[:-1], waiting[-1]
    return waiting, None


def is_written(one: Logs) -> bool:
    """Whether the newest log may still grow. The lock of another machine's run need not be visible here: its log is."""
    status = parse_status(one.run.status.read_text(errors="replace")) if one.run.status.exists() else {}
    grows = time.time() - one.logs[-1].stat().st_mtime < SILENT_S and status.get("state") in ("starting", "running")
    return grows or is_live(one.run)


def upload(todo: Sequence[tuple[Logs, list[Path]]]) -> ExitClass:
    """A run after another, oldest parts first. Nothing is begun without a key and a network."""
    url = service_url()
    environments = [service_environment(one.config.monitor.wandb.key_file, url=url) for one, _ in todo]
    if problem := unreachable(url):
        refuse(f"{url} does not answer: {problem}. Nothing was uploaded; call again with a network", code=ExitClass.RETRYABLE)
        return ExitClass.RETRYABLE
    ended = ExitClass.DONE
    for (one, logs), environment in zip(todo, environments, strict=True):
        own = environment | {"PYTHONPATH": child_environment()["PYTHONPATH"]}
        own["WANDB_DIR"] = str(one.run.root.resolve())  # its own log stands beside the run's, not here
        for command in commands(one, logs=logs):
            code = subprocess.run(command, env=own, check=False).returncode
            if code:
                break
        left = [path for path in logs if path in one.waiting]
        print(f"{one.run.name}: {len(logs) - len(left)} of {len(logs)} parts uploaded to run {one.id}", flush=True)
        if left:
            told = f"wandb left {left[0].parent.name} behind (exit {code}); what it said stands above. Call again"
            refuse(f"{one.run.name}: {told}", code=ExitClass.RETRYABLE)
            ended = ExitClass.RETRYABLE
    return ended


def commands(one: Logs, *, logs: Sequence[Path]) -> Iterator[list[str]]:
    """Of an online part W&B has the beginning, so that the log cannot be appended: training's own sink sends the rest."""
    for offline, some in groupby(logs, key=is_offline):
        if offline:
            yield sync_command(one, logs=list(some))
        else:
            yield from ([sys.executable, "-m", "training.wandb_sink", str(one.run.root), f"--part={log}"] for log in some)


def sync_command(one: Logs, *, logs: Sequence[Path]) -> list[str]:
    """All logs at once: wandb uploads those of one run one after another, by their start. Into the project of the config, also
    where a log was begun under another."""
    settings = one.config.monitor.wandb
    entity = ["--entity", settings.entity] if settings.entity else []
    words = ["sync", "--id", one.id, "--project", settings.project, *entity, "-n", "1"]
    return [sys.executable, "-m", "wandb", *words, *map(str, logs)]
