"""Config verbs as Hydra apps: every Hydra flag works, and what comes out is one checked RunConfig a job."""

import difflib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import hydra
import yaml  # type: ignore[import-untyped]
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from launcher.config.check_secrets import refuse_secret_words
from launcher.config.compose import COMPOSITION_ERRORS, CONFIG_DIR, PER_STAGE, SHARED, compose_run, hydra_session
from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.plan.planner import Planner
from launcher.rundir.exits import ExitClass
from launcher.verbs import VERBS
from launcher.verbs.guard import guard
from launcher.verbs.request import Request, take_options

Act = Callable[[Request], int]
HASH_CHARACTERS = 6
SECTIONS = {*SHARED, *PER_STAGE, "hydra"}
# Written down: importing every verb to ask it would take longer than the verb itself.
OPTION_OWNERS = {
    "out": ("plan", "exposure", "rehearse"),
    "picture": ("plan",),
    "dry": ("data", "submit"),
    "concurrency": ("submit",),
    "action": ("data",),
    "engine": ("data",),
    "rank": ("rehearse",),
    "steps": ("rehearse",),
    "data": ("rehearse",),
    "profile": ("rehearse",),
}


def run_config_verb(verb: str, *, words: Sequence[str], act: Act | None = None) -> int:
    """Runs the verb on the config the words describe, or on each config of a sweep; the highest exit code of all. A verb with
    `act_together` deals with a sweep as one, once every config of it is composed. `act` stands in for the verb's own."""
    module = importlib.import_module(f"launcher.verbs.{verb}")
    refuse_secret_words(words)  # before Hydra writes down what it sweeps over
    words, options = take_options(words, allowed=module.OPTIONS)
    refuse_other_options(words, verb=verb, allowed=module.OPTIONS)
    codes: list[int] = []
    requests: list[Request] = []
    together: Callable[[Sequence[Request]], int] | None = getattr(module, "act_together", None)

    def keep(request: Request) -> int:
        requests.append(request)
        return ExitClass.DONE

    def task(base: DictConfig) -> None:
        do = act or (keep if together else module.act)
        codes.append(guard(lambda: do(compose_request(base, options=options))))

    try:
        call_hydra(task, verb=verb, words=words)
    except COMPOSITION_ERRORS as error:
        raise explained(error, words=words) from error
    if together and requests and not any(codes):
        codes.append(together(requests))
    return max(codes, default=0)


def refuse_other_options(words: Sequence[str], *, verb: str, allowed: Mapping[str, Sequence[str]]) -> None:
    """Refuses options of other verbs and misspelt ones of this verb, of which Hydra would say that the config has no such key.
    Anything else is Hydra's to judge."""
    rule = f"{verb} takes {''.join(f'{key}=, ' for key in allowed)}flags and overrides of keys that the config has"
    problems = []
    for key in [word.partition("=")[0] for word in words if "=" in word]:
        close = difflib.get_close_matches(key, [*SECTIONS, *allowed], n=1)
        if key in OPTION_OWNERS:
            owners = " and ".join(OPTION_OWNERS[key])
            problems.append(Problem(key, f"an option of {owners}", rule, "leave it out"))
        elif "." not in key and close and close[0] in allowed:
            problems.append(Problem(key, "an option this verb does not have", rule, f"did you mean {close[0]}=?"))
    if problems:
        raise ConfigError(*problems)


def call_hydra(task: Any, *, verb: str, words: Sequence[str]) -> None:
    """Hydra reads sys.argv, ends the process on --help and the like, and would end it with 1 on an error: HYDRA_FULL_ERROR
    makes it raise instead."""
    before = os.environ.get("HYDRA_FULL_ERROR"), sys.argv
    usage = f"{verb} {VERBS[verb].usage.removeprefix('[overrides]').strip()}".strip()  # --help adds the overrides to it
    os.environ |= {"PHIDIAS_VERB": usage, "HYDRA_FULL_ERROR": "1"}
    sys.argv = [f"phidias {verb}", *words]
    try:
        with mode_known(words), parsed_in_c():
            hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(task)()
    finally:
        os.environ["HYDRA_FULL_ERROR"], sys.argv = before[0] or "0", before[1]


@contextmanager
def mode_known(words: Sequence[str]) -> Iterator[None]:
    """Hydra composes the whole config once only to look up hydra.mode, a fifth of the verb's time. Where no word sets it, it is
    not set: -m alone decides."""
    look_up = Hydra.get_mode
    if not any("hydra.mode" in word for word in words):
        setattr(Hydra, "get_mode", lambda self, **_: None)  # noqa: B010  (mypy refuses the plain assignment)
    try:
        yield
    finally:
        setattr(Hydra, "get_mode", look_up)  # noqa: B010


@contextmanager
def parsed_in_c() -> Iterator[None]:
    """OmegaConf derives its loader from yaml.SafeLoader whenever it reads a file; libyaml's, where PyYAML was built with it,
    reads the same in a tenth of the time."""
    plain = yaml.SafeLoader
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", plain)
    try:
        yield
    finally:
        yaml.SafeLoader = plain


def compose_request(base: DictConfig, *, options: dict[str, str]) -> Request:
    settings = HydraConfig.get()
    overrides, in_sweep = tuple(settings.overrides.task), settings.mode == RunMode.MULTIRUN
    planner = Planner()
    config = compose_run(overrides, base=base, planner=planner)
    gc.enable()  # launcher.cli switched it off for the start
    named = named_in_sweep(config, overrides=overrides) if in_sweep else config
    return Request(named, overrides, options, in_sweep, planner.found, search_path_words())


def search_path_words() -> tuple[str, ...]:
    """Where this call found YAML of its own: Hydra keeps --config-dir and its own keys apart from the overrides."""
    settings = HydraConfig.get()
    folders = [source.path for source in settings.runtime.config_sources if source.provider == "command-line"]
    added = [word for word in settings.overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")]
    return (*(f"--config-dir={folder}" for folder in folders), *added)


def named_in_sweep(config: RunConfig, *, overrides: Sequence[str]) -> RunConfig:
    """Each job of a sweep is a run of its own: its name ends in a hash of its overrides. In W&B they are one group."""
    digest = blake2b("\n".join(sorted(overrides)).encode()).hexdigest()[:HASH_CHARACTERS]
    name, wandb = config.run.name, config.monitor.wandb
    monitor = replace(config.monitor, wandb=replace(wandb, group=wandb.group or name))
    return replace(config, run=replace(config.run, name=f"{name}-{digest}"), monitor=monitor)


def explained(error: Exception, *, words: Sequence[str]) -> ConfigError:
    """Hydra's own refusal in our words. Its session is gone by now, so it gets another one to look names up in."""
    from launcher.config.explain import explain

    arguments = get_args_parser().parse_args(list(words))
    with hydra_session(arguments.config_dir) as searchpath:
        return explain(error, overrides=[*searchpath, *arguments.overrides])
