"""phidias calibrate [run ...] [rows=TABLE.csv] out=FOLDER [name=site]: fits a device's efficiency to runs that were measured.

Rows are the stages of runs (tokens/s of their newest launch, the first steps left out) and of a table (its columns:
launcher/plan/measurements.py). Into FOLDER, which --config-dir takes, go efficiency/<name>.yaml and
hardware/<device>_<name>.yaml:

    phidias calibrate phi4 rows=ours.csv out=my_configs
    phidias plan --config-dir my_configs run=phi4 cluster.gpu=h100_sxm_site
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from launcher.config.errors import ConfigError, Problem
from launcher.config.hardware import Efficiency
from launcher.plan.calibrate import Error, Measurement, errors, fit
from launcher.plan.measurements import read_table
from launcher.report.history import LAUNCH, read_history
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records, write_atomic
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, find_run

# Rows of a launch before its speed is steady, and that must remain.
WARM_ROWS, MIN_ROWS = 10, 10


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("rows", "out", "name", "runs_dir"))
    folder = refuse_missing(options.get("out"))
    measured = [row for name in names for row in rows_of_run(find_run(name, runs_dir=options.get("runs_dir", RUNS_DIR)))]
    if table := options.get("rows"):
        measured += read_table(Path(table), folders=[folder])
    start = common_efficiency(measured)
    name, devices = options.get("name", "site"), sorted({row.hardware.name for row in measured})
    refuse_taken([path_of_efficiency(folder, name), *(path_of_device(folder, name, device) for device in devices)], name=name)
    fitted = fit(measured, start=start)
    before, after = errors(measured, efficiency=start), errors(measured, efficiency=fitted)
    print_errors(before, after=after, start=start, fitted=fitted)
    source = f"phidias calibrate, {date.today().isoformat()}, {len(measured)} rows, from {start.name}"
    values = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in asdict(fitted).items()}
    write_yaml(path_of_efficiency(folder, name), {**values, "name": name, "source": source})
    for device in devices:
        tree = {"defaults": [device, "_self_"], "name": f"{device}_{name}", "efficiency": name}
        write_yaml(path_of_device(folder, name, device), tree)
    return ExitClass.DONE


def refuse_missing(out: str | None) -> Path:
    if not out:
        rule = "the fitted constants are written there, for --config-dir"
        raise ConfigError(Problem("out", "nothing", rule, "out=my_configs"))
    return Path(out)


def rows_of_run(run_dir: RunDir) -> Iterator[Measurement]:
    """A row a stage that ran long enough on GPUs; as its newest launch ran it, with the layout that is frozen now."""
    config = read_config(run_dir)
    if config.hardware is None:
        found, rule = f"run {config.run.name} on CPU ranks", "a device's constants are fitted to runs on that device"
        raise ConfigError(Problem("run", found, rule, "leave it out"))
    launches = [row["time"] for row in read_records(run_dir.events) if row.get("kind") == LAUNCH]
    for stage in read_history(run_dir).stages:
        train = stage.train
        since = train["time"] >= max(launches, default=0.0)
        speeds = sorted(train["tokens_per_s"][since][WARM_ROWS:].tolist())
        if len(speeds) >= MIN_ROWS:
            speed = speeds[len(speeds) // 2] / config.cluster.world_size
            name = f"{config.run.name} {stage.name}"
            yield Measurement(name, config.stage(stage.name), config.model, config.cluster, config.hardware, speed)


def common_efficiency(measured: Sequence[Measurement]) -> Efficiency:
    """The constants that the devices of all rows share: where the fit starts."""
    if not measured:
        rule = f"a stage counts with {WARM_ROWS + MIN_ROWS} logged steps or more after its newest launch"
        raise ConfigError(Problem("rows", "no measured run", rule, "name runs that trained longer, or rows=TABLE.csv"))
    efficiencies = {row.hardware.efficiency.name for row in measured}
    if len(efficiencies) > 1:
        rule = "one set of constants is fitted at a time"
        raise ConfigError(Problem("rows", f"devices of {', '.join(sorted(efficiencies))}", rule, "rows of one of them"))
    return measured[0].hardware.efficiency


def path_of_efficiency(folder: Path, name: str) -> Path:
    return folder / "efficiency" / f"{name}.yaml"


def path_of_device(folder: Path, name: str, device: str) -> Path:
    return folder / "hardware" / f"{device}_{name}.yaml"


def refuse_taken(paths: Sequence[Path], *, name: str) -> None:
    """A calibration that others plan with stays what it was."""
    taken = [str(path) for path in paths if path.exists()]
    if taken:
        raise ConfigError(
            Problem("name", name, f"{' and '.join(taken)} must not be overwritten", "another name=, or remove them")
        )


def write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, yaml.safe_dump(dict(tree), sort_keys=False))
    print(f"written: {path}")


def print_errors(before: Sequence[Error], *, after: Sequence[Error], start: Efficiency, fitted: Efficiency) -> None:
    console, rows = Console(highlight=False), Table(box=None, pad_edge=False)
    for name in ("run", "tokens/s/GPU", "predicted before", "error", "fitted", "error"):
        rows.add_column(name, justify="left" if name == "run" else "right", header_style="bold cyan")
    for old, new in zip(before, after, strict=True):
        figures = (old.measured, old.predicted, new.predicted)
        measured, was, now = (f"{figure:,.0f}" for figure in figures)
        rows.add_row(old.name, measured, was, f"{old.error:+.1%}", now, f"{new.error:+.1%}")
    console.print(rows)
    for name, value in asdict(fitted).items():
        if isinstance(value, float):
            console.print(f"  {name:<12} {getattr(start, name):.4g} -> {value:.4g}")
