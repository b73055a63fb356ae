"""From override words to the frozen config: Hydra composes one tree a stage, here they become one RunConfig.

Hydra holds one `stage` at a time. A run has several, so each stage of `run.stages` is composed with the same overrides, and
what stages may differ in (layout, precision, optim, mixture) is kept apart.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

import model_configs
from launcher.config.auto import Free, take_free
from launcher.config.check import check_run
from launcher.config.errors import ConfigError, Problem
from launcher.config.hardware import read_hardware
from launcher.config.schema import SCHEMA_VERSION, RunConfig
from launcher.config.validate import validate_run

CONFIG_DIR = Path(model_configs.__file__).parent
SHARED = ("run", "model", "tokenizer", "cluster", "monitor", "data")
PER_STAGE = ("stage", "layout", "precision", "optim", "mixture")
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)

# Said without a stage, these would give every stage the first one's batch, learning rate or text. `layout=file` is let through:
# a layout that does not fit a stage is refused by its own checks.
BELONGS_TO_A_STAGE = re.compile(r"layout\.|optim(\.|$)|mixture(\.|$)")
FOLDER = re.compile(r"file://([^,\]'\"]+)")

Tree = dict[str, Any]


class Plans(Protocol):
    """What composing asks of the planner, which stands above this package (launcher/plan/planner.py)."""

    def choose(self, config: RunConfig, free: Mapping[str, Free]) -> RunConfig:
        """The run with what layout=auto leaves free, by stage, settled."""

    def nearest(self, config: RunConfig) -> list[str]:
        """Of a config that is refused, the nearest layouts that would not be, as overrides, a line a stage."""


def compose_run(
    overrides: Sequence[str],
    *,
    config_dir: str | None = None,
    base: DictConfig | None = None,
    planner: Plans | None = None,
) -> RunConfig:
    """The checked config of the run the overrides describe, with the stages they select.

    `config_dir` is a folder of more YAML (Hydra's --config-dir). Inside a Hydra app the app's own search path is used, and
    `base` is the tree Hydra has already composed from the same overrides. `planner` settles layout=auto and knows layouts near
    a refused one. Raises ConfigError with all problems."""
    from launcher.config.explain import explain

    with hydra_session(config_dir) as searchpath:
        words = [*searchpath, *overrides]
        try:
            tree, bare = compose_tree(words, base=base)
        except COMPOSITION_ERRORS as error:
            raise explain(error, overrides=words) from error
        tree["hardware"] = hardware_of(tree, words=words)
    free = {}
    for index, stage in enumerate(tree["stages"]):
        tree["stages"][index], left = take_free(stage)
        if left:
            free[stage["stage"]["name"]] = left
    config = validate_with(tree, bare=bare)
    if free:
        config = chosen(config, free=free, planner=planner)
    try:
        check_run(config)
    except ConfigError as error:
        error.nearest = tuple(planner.nearest(config)) if planner else ()
        raise
    return config


def chosen(config: RunConfig, *, free: Mapping[str, Free], planner: Plans | None) -> RunConfig:
    if planner is None:
        raise ConfigError(
            Problem("layout", "fields without a value", "the planner chooses them, and is not asked here", "name a layout")
        )
    return planner.choose(config, free)


def hardware_of(tree: Tree, *, words: Sequence[str]) -> Tree | None:
    """The device that cluster.gpu names, from the folders on Hydra's search path, of overrides too."""
    cluster = tree.get("cluster")
    name = cluster.get("gpu") if isinstance(cluster, dict) else None
    if not isinstance(name, str):
        return None
    paths = GlobalHydra.instance().config_loader().get_search_path().get_path()
    named = [folder for word in words if override_key(word) == "hydra.searchpath" for folder in FOLDER.findall(word)]
    if HydraConfig.initialized():
        named += [str(entry).removeprefix("file://") for entry in HydraConfig.get().searchpath]
    folders = [*named, *(entry.path.removeprefix("file://") for entry in paths if entry.path.startswith("file://"))]
    return read_hardware(name, folders=[Path(folder) for folder in folders])


def validate_with(tree: Tree, *, bare: Sequence[Problem]) -> RunConfig:
    """The typed config; ConfigError with the problems of `bare` overrides and those of types together."""
    try:
        config = validate_run(tree)
    except ConfigError as error:
        raise ConfigError(*bare, *error.problems) from None
    if bare:
        raise ConfigError(*bare)
    return config


@contextmanager
def hydra_session(config_dir: str | None) -> Iterator[list[str]]:
    """Makes `compose` work; yields the overrides that put config_dir on its search path."""
    if GlobalHydra.instance().is_initialized():
        yield []
        return
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        yield [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]


def compose_tree(overrides: Sequence[str], *, base: DictConfig | None = None) -> tuple[Tree, list[Problem]]:
    """The plain, resolved tree of the selected stages, not validated yet, and a problem for each bare override."""
    base = compose("config", list(overrides)) if base is None else base
    selected = select_stages(overrides, base=base)
    bare = bare_overrides(overrides) if len(selected) > 1 else []
    # The other stages are composed without the bare ones: their mixture may not hold the source that one names.
    common = [word for word in overrides if override_key(word) != "stage" and word not in bare]
    trees = {}
    for name in selected:
        composed = base if OmegaConf.select(base, "stage.name") == name else compose("config", [*common, f"stage={name}"])
        trees[name] = resolve(composed)
    return merge_stages(trees), [bare_problem(word, selected=selected) for word in bare]


def override_key(word: str) -> str:
    """`++layout.tp=2` -> `layout.tp`."""
    return word.partition("=")[0].lstrip("+~")


def select_stages(overrides: Sequence[str], *, base: DictConfig) -> list[str]:
    """The stages to deal with: all of run.stages, or the one that `stage=` names."""
    known = stages_of_run(base)
    chosen = [word.partition("=")[2] for word in overrides if override_key(word) == "stage"][-1:]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ConfigError(stage_not_in_run(unknown[0], base=base))
    return chosen or known


def stages_of_run(base: DictConfig) -> list[str]:
    known = OmegaConf.select(base, "run.stages")
    return [str(name) for name in known] if OmegaConf.is_list(known) and len(known) else [base.stage.name]


def stage_not_in_run(name: str, *, base: DictConfig) -> Problem:
    known = stages_of_run(base)
    rule = f"run {base.run.name!r} has the stages {', '.join(known)}"
    return Problem("stage", repr(name), rule, f"{' or '.join(f'stage={name}' for name in known)}, or name it in run.stages")


def bare_overrides(overrides: Sequence[str]) -> list[str]:
    """Words that would give several stages one layout field, optimizer or mixture that was meant for one."""
    return [word for word in overrides if BELONGS_TO_A_STAGE.match(override_key(word))]


def bare_problem(word: str, *, selected: Sequence[str]) -> Problem:
    names = " or ".join(f"stage={name}" for name in selected)
    rule = f"it belongs to one stage and {len(selected)} are selected"
    return Problem(override_key(word), f"the override {word!r}", rule, f"add {names}")


def resolve(tree: DictConfig) -> Tree:
    plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=False)
    return {key: value for key, value in plain.items() if key != "hydra"} if isinstance(plain, dict) else {}  # type: ignore[misc]


def merge_stages(trees: dict[str, Tree]) -> Tree:
    """One tree of the run from one tree a stage. What all stages share must not differ between them."""
    first = next(iter(trees.values()))
    differing = [key for key in SHARED if any(tree.get(key) != first.get(key) for tree in trees.values())]
    if differing:
        rule = "a stage file may set stage, layout, precision, optim and mixture only; the rest is the run's"
        found = f"another value in each of {', '.join(trees)}"
        raise ConfigError(*(Problem(key, found, rule, f"set {key} in the run file") for key in differing))
    shared = {key: value for key, value in first.items() if key not in PER_STAGE}
    stages = [{key: tree[key] for key in PER_STAGE if key in tree} for tree in trees.values()]
    return {"schema_version": SCHEMA_VERSION, **shared, "stages": stages}
