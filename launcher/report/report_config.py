"""What a run's config changes in its base: the run file that it was launched with, composed anew without any other override."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from launcher.config.auto import Free, take_free
from launcher.config.compose import COMPOSITION_ERRORS, compose_tree, hardware_of, hydra_session, override_key
from launcher.config.errors import ConfigError
from launcher.config.schema import RunConfig
from launcher.config.validate import shown, validate_run
from launcher.report.history import LAUNCH, History
from launcher.report.tables import table
from launcher.rundir.amend import ABSENT, by_stage_name, differences

PRESENT = "present"
AUTO = "auto"
# Flags that name a folder of more YAML, and overrides that do.
FOLDER_FLAGS = ("--config-dir", "-cd")
SEARCH_PATH = "hydra.searchpath"


class NoBaseError(Exception):
    """Why there is nothing to compare with."""


@dataclass(frozen=True)
class Base:
    """`words` compose it: `run=demo`, and where more YAML lies."""

    words: tuple[str, ...]
    config_dir: str | None

    def __str__(self) -> str:
        return " ".join(self.words) or "the config without overrides"


def base_of(history: History) -> Base:
    """From the newest launch whose command says what it trained; NoBaseError where none does."""
    for event in reversed(history.events):
        command = event.get("command")
        if event["kind"] != LAUNCH or not isinstance(command, list) or not command:
            continue
        words = [str(word) for word in command]
        keys = {override_key(word) for word in words[1:] if "=" in word}
        if keys or words[0].endswith(" train"):
            return Base(tuple(word for word in words[1:] if override_key(word) in ("run", SEARCH_PATH)), _folder(words))
    raise NoBaseError("no launch of it says with what it was launched")


def _folder(words: Sequence[str]) -> str | None:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag in FOLDER_FLAGS:
            return value or after
    return None


def compose_base(base: Base) -> tuple[RunConfig, dict[str, Free]]:
    """Its config, not checked for more than types, and what of each stage it leaves to the planner. NoBaseError where it cannot
    be composed any more."""
    if base.config_dir is not None and not Path(base.config_dir).is_dir():
        raise NoBaseError(f"{base.config_dir}, where its YAML lay, is not there any more")
    try:
        with hydra_session(base.config_dir) as searchpath:
            words = [*searchpath, *base.words]
            tree, _ = compose_tree(words)
            tree["hardware"] = hardware_of(tree, words=words)
        free = {}
        for index, stage in enumerate(tree["stages"]):
            tree["stages"][index], free[stage["stage"]["name"]] = take_free(stage)
        return validate_run(tree), free
    except (*COMPOSITION_ERRORS, ConfigError, OSError) as error:
        raise NoBaseError(f"{base} cannot be composed any more: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def differing(config: RunConfig, *, base: RunConfig, free: dict[str, Free]) -> list[tuple[str, Any, Any]]:
    """Dotted path, base value and the run's. Stages of the base that the run does not have are left out; of a section that one
    of them does not have, the section alone."""
    before, after = by_stage_name(base), by_stage_name(config)
    for name, left in free.items():
        for section, fields in (("layout", left.layout), ("precision", left.precision)):
            before["stages"][name][section] |= dict.fromkeys(fields, AUTO)
    before["stages"] = {name: row for name, row in before["stages"].items() if name in after["stages"]}
    return [(path, _leaf(old), _leaf(new)) for path, old, new in differences(before, after=after)]


def _leaf(value: Any) -> Any:
    return PRESENT if isinstance(value, dict) else value


def config_section(config: RunConfig, *, history: History) -> str:
    """The table, or in a sentence why there is none, as HTML."""
    try:
        base = base_of(history)
        rows = differing(config, **_composed(base))
    except NoBaseError as error:
        return f'<p class="empty">This config cannot be compared with its base: {escape(str(error))}.</p>'
    if not rows:
        return f'<p class="empty">It is that of {escape(str(base))}, without a change.</p>'
    cells = [(f"<code>{_breakable(path)}</code>", _value(old), f"<strong>{_value(new)}</strong>") for path, old, new in rows]
    columns = ("name", "base", "this run")
    lead = f'<p class="lead">Against {escape(str(base))} as it is composed today, without any other override.</p>'
    return lead + f'<div class="differences">{table(columns, rows=cells, empty="")}</div>'


def _composed(base: Base) -> dict[str, Any]:
    config, free = compose_base(base)
    return {"base": config, "free": free}


def _breakable(path: str) -> str:
    """A narrow column breaks a path at its dots."""
    return escape(path).replace(".", ".<wbr>")


def _value(value: Any) -> str:
    return escape(value if value in (ABSENT, PRESENT, AUTO) else shown(value).strip("'"))
