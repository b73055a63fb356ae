"""YAML files of model_configs read by name, outside Hydra: what is looked up while a config is being made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

import model_configs
from launcher.config.errors import ConfigError, Problem

PACKAGED = Path(model_configs.__file__).parent


def read_file(group: str, name: str, *, folders: Sequence[Path] = (), path: str) -> dict[str, Any]:
    """The plain tree of <group>/<name>.yaml, from the first folder that has it, its defaults in the same group first. A file
    that names itself there inherits from the one of its name in the folders after its own.

    `path`: what names the file, for the ConfigError where there is none, or no mapping in it."""
    return _read(group, name, folders=[*folders, PACKAGED], path=path, seen=())


def _read(group: str, name: str, *, folders: Sequence[Path], path: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    for index, folder in enumerate(folders):
        file = folder / group / f"{name}.yaml"
        if file in seen:
            raise ConfigError(Problem(path, repr(name), f"{file} inherits from itself", "take one of the defaults out"))
        if file.is_file():
            tree = _parse(file, path=path, name=name)
            for parent in [entry for entry in tree.pop("defaults", []) if entry != "_self_"]:
                behind = folders[index + 1 :] if parent == name else folders
                tree = {**_read(group, parent, folders=behind, path=path, seen=(*seen, file)), **tree}
            return tree
    known = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
    rule = f"it names a YAML file in {group}/: {', '.join(known)}"
    raise ConfigError(Problem(path, repr(name), rule, f"one of them, or {group}/{name}.yaml in the folder of --config-dir"))


def _parse(file: Path, *, path: str, name: str) -> dict[str, Any]:
    fix = f"correct the file; {file.parent.name}/ of model_configs has examples"
    try:
        tree = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigError(Problem(path, repr(name), f"{file} is no YAML ({said})", fix)) from error
    if not isinstance(tree, dict):
        raise ConfigError(Problem(path, repr(name), f"{file} is a mapping of names to values", fix))
    return tree
