"""What a verb is asked to do: its own options, apart from Hydra's overrides and run names."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.plan.search import Found


@dataclass(frozen=True)
class Request:
    """One call of a config verb. `overrides` are the words the config was composed from; `in_sweep`: one job of -m; `found`:
    what the planner weighed for layout=auto, by stage; `search_path`: the words that make another call find the same YAML."""

    config: RunConfig
    overrides: tuple[str, ...]
    options: Mapping[str, str]
    in_sweep: bool
    found: Mapping[str, Found] = field(default_factory=dict)
    search_path: tuple[str, ...] = ()

    @property
    def wants_json(self) -> bool:
        return self.options.get("out") == "json"


def take_options(words: Sequence[str], *, allowed: Mapping[str, Sequence[str]]) -> tuple[list[str], dict[str, str]]:
    """Splits the verb's own key=value options from the other words. `allowed`: the values each option may have, none: any."""
    rest, options = [], {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in allowed:
            rest.append(word)
            continue
        if allowed[key] and value not in allowed[key]:
            raise ConfigError(Problem(key, repr(value), f"it is one of {', '.join(allowed[key])}", f"{key}={allowed[key][0]}"))
        options[key] = value
    return rest, options


def read_run_words(words: Sequence[str], *, keys: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Run names, then key=value, of a run verb. ConfigError for a key it does not know."""
    names = [word for word in words if "=" not in word]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    flags = [name for name in names if name.startswith("-")]
    unknown = [key for key in options if key not in keys] + flags
    if unknown:
        raise ConfigError(
            *(Problem(key, "an option this verb does not have", _rule(keys), _hint(key, keys=keys)) for key in unknown)
        )
    return names, options


def _rule(keys: Sequence[str]) -> str:
    return f"it takes run names and {', '.join(f'{key}=' for key in keys)}"


def _hint(key: str, *, keys: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1)
    return f"did you mean {close[0]}=?" if close else "leave it out; overrides belong to plan, exposure, data and train"
