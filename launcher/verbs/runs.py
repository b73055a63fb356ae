"""Finding run directories by name."""

from fnmatch import fnmatch
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.config.validate import nearest
from launcher.rundir.exits import RunStateError
from launcher.rundir.freeze import read_config
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


def find_runs(names: list[str], *, runs_dir: str) -> list[RunDir]:
    """The runs of those names; one with a * stands for all that it matches. RunStateError where one finds none."""
    found: dict[Path, RunDir] = {}
    for name in names:
        matching = [run for run in list_runs(runs_dir) if fnmatch(run.name, name)] if "*" in name else []
        for run in matching or [find_run(name, runs_dir=runs_dir)]:
            found[run.root] = run
    return list(found.values())


def one_or_more(names: list[str]) -> list[str]:
    if not names:
        raise ConfigError(
            Problem("run", "nothing", "this verb needs the name of a run", "name one; `phidias status` lists them")
        )
    return names


def whole_number(key: str, said: str | None, *, example: str) -> int | None:
    """An option that is a whole number, 0 or more; None where it is not given. ConfigError: it is another thing."""
    if said is None or said.isdecimal():
        return None if said is None else int(said)
    raise ConfigError(Problem(key, repr(said), "it is a whole number", example))


def exportable(names: list[str], *, stage: str | None, runs_dir: str, hint: str) -> tuple[RunDir, RunConfig, str]:
    """The one run that is named, and the stage, its last one by default. ConfigError: several runs (`hint` says what was
    meant), a stage it does not have, or a shape that no class of Hugging Face's has."""
    if len(one_or_more(names)) > 1:
        raise ConfigError(Problem("run", " ".join(names), "this verb takes one run", hint))
    run = find_run(names[0], runs_dir=runs_dir)
    config = read_config(run)
    if config.model.family is None:
        fix = "train it with model.family=phi3, llama or qwen2, where the shape allows"
        raise ConfigError(Problem("model.family", "null", "a model without a family has no Hugging Face class", fix))
    stages = config.stage_names
    if stage is not None and stage not in stages:
        raise ConfigError(Problem("stage", repr(stage), f"run {run.name} has {', '.join(stages)}", f"stage={stages[-1]}"))
    return run, config, stage or stages[-1]
