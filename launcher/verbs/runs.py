"""Finding run directories by name."""

from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.validate import nearest
from launcher.rundir.exits import RunStateError
from launcher.rundir.paths import RunDir

RUNS_DIR = "runs"  # where runs_dir= says nothing; the run files say the same


def list_runs(runs_dir: str) -> list[RunDir]:
    """Every run below runs_dir, oldest first by the time its config was written."""
    root = Path(runs_dir)
    found = [RunDir(path.parent) for path in root.glob("*/config.yaml")] if root.is_dir() else []
    return sorted(found, key=lambda run: run.config.stat().st_mtime)


def find_run(name: str, *, runs_dir: str) -> RunDir:
    """The run of that name, or at that path. RunStateError with the nearest name where there is none."""
    for root in (Path(runs_dir) / name, Path(name)):
        if (root / "config.yaml").exists():
            return RunDir(root)
    names = [run.name for run in list_runs(runs_dir)]
    close = nearest(name, known=names)
    known = f"did you mean {' or '.join(close)}?" if close else f"it holds {', '.join(names) or 'no run'}."
    raise RunStateError(f"no run {name!r} in {runs_dir}: {known} Fix: a name `phidias status` lists, or runs_dir=<path>")


def one_or_more(names: list[str]) -> list[str]:
    if not names:
        raise ConfigError(
            Problem("run", "nothing", "this verb needs the name of a run", "name one; `phidias status` lists them")
        )
    return names
