"""Shows a run while it trains, from another terminal or machine that sees its directory: a live view on a terminal, plain
lines elsewhere. It reads the run directory only, waits for a run that has not begun, and ends when the run does, with the exit
code of its end; Ctrl-C ends it with 0 and leaves the run alone.

Keys: every=5 (seconds between plain lines)  wait=true (for a run that is not there yet)  show=rich|plain  runs_dir=runs"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError, Problem
from launcher.report.watch import WatchView
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.verbs.request import read_run_words, take_options
from launcher.verbs.runs import RUNS_DIR, find_run, one_or_more

EVERY_S = 5.0
REFRESH_S = 0.5
WAIT_S = 1.0


def run(words: Sequence[str]) -> int:
    words, options = take_options(words, allowed={"show": ("rich", "plain"), "wait": ("true", "false")})
    names, others = read_run_words(words, keys=("every", "runs_dir"))
    name, every_s = one_name(names), read_every(others.get("every", str(EVERY_S)))
    mode: Any = options.get("show", "auto")
    try:
        found = find(name, runs_dir=others.get("runs_dir", RUNS_DIR), waits=options.get("wait") == "true")
        return watch(found, mode=mode, every_s=every_s)
    except (KeyboardInterrupt, SystemExit):  # the latter is rich's, where the reader of a pipe has seen enough
        return ExitClass.DONE


def watch(found: RunDir, *, mode: Any, every_s: float) -> ExitClass:
    """Until the run has ended; how."""
    with WatchView(found, read_config(found), mode, interval_s=every_s) as view:
        while view.ended is None:
            time.sleep(min(REFRESH_S, every_s))
            view.refresh()
    return view.ended


def find(name: str, *, runs_dir: str, waits: bool) -> RunDir:
    """The run of that name; `waits`: until it is there."""
    roots = (Path(runs_dir) / name, Path(name))
    if waits and not any((root / "config.yaml").exists() for root in roots):
        print(f"waiting for {roots[0]}", flush=True)
        while not any((root / "config.yaml").exists() for root in roots):
            time.sleep(WAIT_S)
    return find_run(name, runs_dir=runs_dir)


def one_name(names: list[str]) -> str:
    if len(one_or_more(names)) > 1:
        raise ConfigError(Problem("run", " ".join(names), "one run is watched at a time", "`phidias status` shows many"))
    return names[0]


def read_every(text: str) -> float:
    """Seconds, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(Problem("every", repr(text), "it is a number of seconds above 0", f"every={EVERY_S:.0f}"))
    return value
