"""Types: a plain tree becomes a RunConfig, or a ConfigError that names every value that is not what its type allows."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig, StageConfig

MISSING = "???"
# By the first word of pydantic's error type.
FIXES = {
    "int": "set {path} to a whole number",
    "float": "set {path} to a number",
    "bool": "set {path} to true or false",
    "string": "set {path} to text; quote it where it looks like a number: {path}=\"'2024'\"",
    "string_pattern_mismatch": "use letters, digits, '_', '.' and '-', a letter or digit first",
    "literal": "set {path} to one of these",
    "tuple": "set {path} to a list: {path}=[a,b]",
    "dataclass": "{path} is a section: set its keys one by one",
}
ADAPTER = TypeAdapter(RunConfig)


def validate_run(tree: dict[str, Any]) -> RunConfig:
    """The typed config; ConfigError with all type problems at once, each under the path an override would use."""
    try:
        return ADAPTER.validate_python(without_missing(tree))
    except ValidationError as error:
        names = [stage.get("stage", {}).get("name", str(index)) for index, stage in enumerate(tree["stages"])]
        items = [item for item in error.errors(include_url=False) if not _is_echo(item)]
        found = [(_stage_of(item["loc"], names=names), _problem(item)) for item in items]
        raise ConfigError(*merge_over_stages(found, names=names)) from None


def dump_run(config: RunConfig) -> dict[str, Any]:
    """The plain tree again, as JSON and YAML can hold it."""
    tree: dict[str, Any] = ADAPTER.dump_python(config, mode="json")
    return tree


def without_missing(value: Any) -> Any:
    """Drops what is still `???`, so that it is reported as missing."""
    if isinstance(value, dict):
        return {key: without_missing(item) for key, item in value.items() if item != MISSING}
    return [without_missing(item) for item in value] if isinstance(value, list) else value


def merge_over_stages(found: Iterable[tuple[str | None, Problem]], *, names: Sequence[str]) -> Iterator[Problem]:
    """One line for what is wrong in every stage alike; otherwise the path says the stage."""
    stages: dict[Problem, list[str]] = {}
    for stage, problem in found:
        stages.setdefault(problem, []).extend([stage] if stage is not None else names)
    for problem, where in stages.items():
        if set(where) >= set(names):
            yield problem
        else:
            yield Problem(f"{problem.path} (stage {', '.join(where)})", problem.found, problem.rule, problem.fix)


def nearest(path: str, *, known: Iterable[str]) -> list[str]:
    """Up to three existing paths the writer may have meant: first among the siblings of the part that does not exist, then by
    the last part alone (`lr` for `optim.lr`)."""
    paths = list(dict.fromkeys(known))
    parts = path.split(".")
    depth = next((i for i in range(len(parts)) if ".".join(parts[: i + 1]) not in paths), len(parts) - 1)
    parent, rest = "".join(f"{part}." for part in parts[:depth]), parts[depth + 1 :]
    siblings = [known.removeprefix(parent) for known in paths if known.startswith(parent) and "." not in known[len(parent) :]]
    close = [parent + name for name in difflib.get_close_matches(parts[depth], siblings, n=3, cutoff=0.6)]
    if close:
        return [".".join([name, *rest]) for name in close if ".".join([name, *rest]) in paths] or close
    leaves = {known.rpartition(".")[2]: known for known in paths}
    return [leaves[leaf] for leaf in difflib.get_close_matches(parts[-1], leaves, n=3, cutoff=0.8)]


def did_you_mean(name: str, *, known: Iterable[str], otherwise: str) -> str:
    close = nearest(name, known=known)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def _stage_of(location: tuple[int | str, ...], *, names: list[str]) -> str | None:
    return names[location[1]] if len(location) > 1 and location[0] == "stages" and isinstance(location[1], int) else None


def _is_echo(item: Any) -> bool:
    """pydantic counts a stage with an error as absent and then finds too few stages."""
    return item["type"] == "too_short" and item["loc"] == ("stages",) and len(item["input"]) > 0


def _problem(item: Any) -> Problem:
    location = [part for part in item["loc"] if part != "[key]"]
    location = location[2:] if location[0] == "stages" and len(location) > 2 else location
    path = ".".join(str(part) for part in location)
    if item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return Problem(path, "nothing", "it has no default and must be set", f"{path}=<value>, or in its YAML file")
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        parent = ".".join(str(part) for part in location[:-1])
        known = [f"{parent}.{name}".lstrip(".") for name in fields_at(location[:-1])]
        hint = did_you_mean(path, known=known, otherwise=f"{parent or 'the config'} has {', '.join(fields_at(location[:-1]))}")
        return Problem(path, "a key that the config does not have", "unknown keys are refused", hint)
    rule = item["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return Problem(
        path,
        shown(item["input"]),
        rule,
        FIXES.get(item["type"], FIXES.get(item["type"].partition("_")[0], "set {path} as the rule says")).format(path=path),
    )


def shown(value: Any) -> str:
    """A value as YAML and overrides spell it, cut where it is long."""
    text = {None: "null", True: "true", False: "false"}.get(value, repr(value)) if _is_plain(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def fields_at(location: Sequence[object]) -> list[str]:
    """Field names of the dataclass a path leads to; the empty list where it leads to none."""
    kind: Any = StageConfig if location and location[0] in {field.name for field in fields(StageConfig)} else RunConfig
    for part in location:
        kind = _inside(kind, part=str(part))
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []


def _inside(kind: Any, *, part: str) -> Any:
    """The type of one key of a dataclass or dictionary, `None` left out of unions."""
    hint = get_type_hints(kind).get(part) if is_dataclass(kind) else get_args(kind)[1] if get_origin(kind) is dict else None
    return next((inner for inner in get_args(hint) if is_dataclass(inner)), hint) if get_origin(hint) is UnionType else hint
