"""One rank of a job, rehearsed on this machine: what is refused before its device is taken, and the process that measures."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig, StageConfig
from launcher.jobs.inspect_node import SmiError, read_gpus
from launcher.jobs.local import rank_environment
from launcher.rundir.code import installed
from launcher.rundir.freeze import write_config
from launcher.rundir.paths import RunDir

STDERR = 2  # its number: what the process says is not what out=json prints
# Of training.rehearse, which writes them.
MEASURED, PROFILE = "rehearsal.json", "profile.txt"
# Of model_configs/hardware, by the word that the device's own name has in it.
DEVICES = ("gh200", "h100", "h200", "a100", "gb200", "b200", "l40s")


@dataclass(frozen=True)
class Asked:
    """What of a run is rehearsed."""

    rank: int
    steps: int
    real_data: bool
    profile: bool


def read_asked(options: Mapping[str, str], *, config: RunConfig) -> Asked:
    """ConfigError with every option that is none."""
    world = config.cluster.world_size
    rank, steps = number(options.get("rank", "0")), number(options.get("steps", "5"))
    problems = []
    if rank is None or rank >= world:
        rule = f"the ranks of {config.cluster.name} are 0 to {world - 1}"
        problems.append(Problem("rank", options["rank"], rule, "rank=0, the first pipeline stage's first"))
    if not steps:
        problems.append(Problem("steps", options["steps"], "so many steps are timed, at least one", "steps=5"))
    if problems:
        raise ConfigError(*problems)
    assert rank is not None and steps is not None
    return Asked(rank, steps, options.get("data") == "real", "profile" in options)


def number(word: str) -> int | None:
    return int(word) if word.isdecimal() else None


def refuse_unrehearsable(config: RunConfig, *, asked: Asked) -> None:
    """ConfigError with everything that this machine lacks for it."""
    problems = [*lacks_packages(config), *lacks_device(config)]
    if asked.real_data:
        problems += [problem for stage in config.stages for problem in lacks_shapes(stage, config=config)]
    if problems:
        raise ConfigError(*problems)


def lacks_packages(config: RunConfig) -> Iterator[Problem]:
    for package, extra in (("torch", "train"), ("megatron-core", "train"), ("transformer-engine", "gpu")):
        if installed(package) is None and (extra == "train" or config.cluster.gpu):
            yield Problem(package, "not installed", "a rehearsal runs the code that trains", f"pip install 'phidias[{extra}]'")


def lacks_device(config: RunConfig) -> Iterator[Problem]:
    """A rank of a GPU is rehearsed on one of its kind: a measurement of another would stand beside the plan as if it were."""
    wanted = config.cluster.gpu
    if wanted is None:
        return
    fix = "rehearse it on a machine that has one; `cluster=local` with a layout for its ranks rehearses a rank on the CPU"
    try:
        names = [str(gpu["name"]) for gpu in read_gpus()]
    except SmiError as error:
        yield Problem("cluster.gpu", f"{wanted}, and no GPU here ({error})", "a rank of a GPU is rehearsed on one", fix)
        return
    if not names:
        yield Problem("cluster.gpu", f"{wanted}, and no GPU here", "a rank of a GPU is rehearsed on one", fix)
    elif (kind := kind_of(wanted)) and kind_of(names[0]) not in (kind, None):
        yield Problem(
            "cluster.gpu", wanted, f"this machine has {names[0]}", f"cluster.gpu={kind_of(names[0])}_..., or such a machine"
        )


def kind_of(name: str) -> str | None:
    """Of a device by whoever names it; null of one that is not known here."""
    return next((kind for kind in DEVICES if kind in name.lower()), None)


def lacks_shapes(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """Rows of real documents are padded under context parallelism, each to a length that only the stage before knows."""
    layout = stage.layout
    if config.cluster.gpu and stage.stage.reset_attention_mask and layout.cp > 1 and layout.pp > 1:
        found = f"real, with cp={layout.cp}, pp={layout.pp} and stage.reset_attention_mask"
        rule = "a stand-in for the pipeline stage before does not know how long its rows are"
        yield Problem(f"data (stage {stage.stage.name})", found, rule, "data=random")


@dataclass(frozen=True)
class Ended:
    """The process's exit code, and what it measured where it came to that."""

    code: int
    measured: dict[str, Any] | None
    profile: str | None


def run_rehearsal(config: RunConfig, *, stage: str, asked: Asked) -> Ended:
    """Measures in a process of its own, which Ctrl-C ends too. What it says goes to standard error."""
    with TemporaryDirectory(prefix="phidias-rehearsal-") as folder:
        write_config(RunDir(Path(folder)), config)
        words = [f"--stage={stage}", f"--rank={asked.rank}", f"--steps={asked.steps}"]
        words += ["--real-data"] * asked.real_data + ["--profile"] * asked.profile
        command = [sys.executable, "-m", "training.rehearse", folder, *words]
        environment = {**rank_environment(config.cluster), "LOCAL_RANK": "0"}
        process = subprocess.Popen(command, env=environment, stdout=STDERR)
        try:
            code = process.wait()
        finally:
            end(process)
        return Ended(code, *(read(Path(folder, MEASURED)), read_text(Path(folder, PROFILE))))


def end(process: subprocess.Popen[bytes]) -> None:
    """After Ctrl-C, which it got too: it is given time to go."""
    if process.poll() is not None:
        return
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read(path: Path) -> dict[str, Any] | None:
    text = read_text(path)
    found: dict[str, Any] | None = None if text is None else json.loads(text)
    return found


def read_text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
