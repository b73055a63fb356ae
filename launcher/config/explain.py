"""Hydra's and OmegaConf's own errors, said in one line each with the nearest names that exist."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from launcher.config.compose import PER_STAGE, SHARED, override_key, stage_not_in_run
from launcher.config.errors import ConfigError, Problem
from launcher.config.validate import did_you_mean, fields_at

GROUPS = {*SHARED, *PER_STAGE} - {"data"}


def explain(error: Exception, *, overrides: Sequence[str]) -> ConfigError:
    """The refusal that says what `error` means. Needs a Hydra session (launcher.config.compose.hydra_session)."""
    if isinstance(error, OverrideParseException):
        rule = "an override is key=value; a value with special characters stands in quotes"
        word = error.override or "an override"
        return ConfigError(
            Problem(override_key(word), f"{word!r} ({_first_line(error)})", rule, "write key=value, see docs/configuration.md")
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return ConfigError(_missing_file(error, overrides=overrides))
    if isinstance(error, HydraException) and "Could not override" in str(error):
        return ConfigError(*(_unknown_keys(overrides) or [_other(error)]))
    if isinstance(error, InterpolationToMissingValueError):
        path = str(error).split("value: ")[-1].split()[0]
        return ConfigError(
            Problem(path, "nothing", "it has no default and must be set", f"{path}=<value>, or in its YAML file")
        )
    if isinstance(error, InterpolationKeyError):
        return ConfigError(_missing_interpolation(error, overrides=overrides))
    return ConfigError(_other(error))


def dotted_keys(value: Any, *, prefix: str = "") -> Iterator[str]:
    """Every path in a plain tree, sections too."""
    if isinstance(value, dict):
        for key, item in value.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path
            yield from dotted_keys(item, prefix=path)


def _missing_file(error: MissingConfigException, *, overrides: Sequence[str]) -> Problem:
    group, _, name = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
    if f"stage={name}" in overrides:
        return stage_not_in_run(name, base=_known_tree([word for word in overrides if override_key(word) != "stage"]))
    options = list(error.options or ())
    hint = did_you_mean(name, known=options, otherwise="choose one of them, or add a YAML file")
    rule = f"{group or 'the config folder'} has {', '.join(options) or 'no such file'}"
    return Problem(group or "config", repr(name), rule, hint)


def _unknown_keys(overrides: Sequence[str]) -> list[Problem]:
    """Every override of a key that does not exist, not only the first one that Hydra stumbled over."""
    known = _known_tree(overrides)
    paths = [*GROUPS, *dotted_keys(OmegaConf.to_container(known, resolve=False))]
    unknown = [word for word in overrides if not word.startswith(("+", "~", "hydra")) and override_key(word) not in paths]
    return [_unknown_key(word, paths=paths) for word in unknown]


def _unknown_key(word: str, *, paths: Sequence[str]) -> Problem:
    key, rule = override_key(word), "an override must name a key that exists"
    *parents, leaf = key.split(".")
    if ".".join(parents) in paths and leaf in fields_at(parents):
        return Problem(key, "an optional key that is not set here", f"{rule}; + adds one", f"+{word}")
    hint = did_you_mean(key, known=paths, otherwise="phidias plan --cfg job shows every key")
    return Problem(key, "a key that the config does not have", rule, hint)


def _known_tree(overrides: Sequence[str]) -> DictConfig:
    """What the run would be without the overrides of single keys."""
    choices = [word for word in overrides if override_key(word) in GROUPS or word.startswith("hydra.searchpath")]
    try:
        return compose("config", choices)
    except HydraException:
        return compose("config", [])


def _missing_interpolation(error: InterpolationKeyError, *, overrides: Sequence[str]) -> Problem:
    wanted = re.search(r"'([^']*)'", str(error))
    name = wanted.group(1) if wanted else "?"
    keys = list(dotted_keys(OmegaConf.to_container(_known_tree(overrides), resolve=False)))
    hint = did_you_mean(name, known=keys, otherwise="phidias plan --cfg job shows every key")
    return Problem(str(error.full_key), f"${{{name}}}", "an interpolation must name a key that exists", hint)


def _other(error: Exception) -> Problem:
    path = str(error.full_key) if isinstance(error, OmegaConfBaseException) and error.full_key else "config"
    rule = "YAML must parse" if isinstance(error, YAMLError) else "Hydra must be able to compose it"
    text = " ".join(str(error).split("\nConfig search path")[0].split()) if isinstance(error, YAMLError) else _first_line(error)
    return Problem(path, text, rule, "see docs/configuration.md; HYDRA_FULL_ERROR=1 shows the whole trace")


def _first_line(error: Exception) -> str:
    lines = [
        line.strip()
        for line in str(error).splitlines()
        if line.strip() and "hydra.cc" not in line and not line.startswith("Error parsing")
    ]
    return "; ".join(lines[:2])
