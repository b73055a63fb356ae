"""YAML files of model_configs read by name, outside Hydra: what is looked up while a config is being made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

import model_configs
from launcher.config.errors import ConfigError, Problem

PACKAGED = Path(model_configs.__file__).parent


def read_file(group: str, name: str, *, folders: Sequence[Path] = (), path: str) -> dict[str, Any]:
    """The plain tree of <group>/<name>.yaml, from the first folder that has it, its defaults in the same group first.

    `path`: what names the file, for the ConfigError where there is none, or no mapping in it."""
    for folder in [*folders, PACKAGED]:
        file = folder / group / f"{name}.yaml"
        if file.is_file():
            tree = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            if not isinstance(tree, dict):
                fix = f"correct the file; {group}/ of model_configs has examples"
                raise ConfigError(Problem(path, repr(name), f"{file} is a mapping of names to values", fix))
            inherited = [entry for entry in tree.pop("defaults", []) if entry != "_self_"]
            for parent in inherited:
                tree = {**read_file(group, parent, folders=folders, path=path), **tree}
            return tree
    known = known_files(group, folders=folders)
    rule = f"it names a YAML file in {group}/: {', '.join(known)}"
    raise ConfigError(Problem(path, repr(name), rule, f"one of them, or {group}/{name}.yaml in the folder of --config-dir"))


def known_files(group: str, *, folders: Sequence[Path] = ()) -> list[str]:
    return sorted({file.stem for folder in [*folders, PACKAGED] for file in (folder / group).glob("*.yaml")})
