"""Config verbs as Hydra apps: every Hydra flag works, and what comes out is one checked RunConfig a job."""

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from launcher.config.compose import COMPOSITION_ERRORS, CONFIG_DIR, compose_run, hydra_session
from launcher.config.errors import ConfigError
from launcher.config.schema import RunConfig
from launcher.verbs.guard import guard
from launcher.verbs.request import Request, take_options

HASH_CHARACTERS = 6


def run_config_verb(verb: str, *, words: Sequence[str]) -> int:
    """Runs the verb on the config the words describe, or on each config of a sweep; the highest exit code of all."""
    module = importlib.import_module(f"launcher.verbs.{verb}")
    words, options = take_options(words, allowed=module.OPTIONS)
    codes: list[int] = []

    def task(base: DictConfig) -> None:
        codes.append(guard(lambda: module.act(compose_request(base, options=options))))

    try:
        call_hydra(task, verb=verb, words=words)
    except COMPOSITION_ERRORS as error:
        raise explained(error, words=words) from error
    return max(codes, default=0)


def call_hydra(task: Any, *, verb: str, words: Sequence[str]) -> None:
    """Hydra reads sys.argv, ends the process on --help and the like, and would end it with 1 on an error: HYDRA_FULL_ERROR
    makes it raise instead."""
    before = os.environ.get("HYDRA_FULL_ERROR"), sys.argv
    os.environ |= {"PHIDIAS_VERB": verb, "HYDRA_FULL_ERROR": "1"}
    sys.argv = [f"phidias {verb}", *words]
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(task)()
    finally:
        os.environ["HYDRA_FULL_ERROR"], sys.argv = before[0] or "0", before[1]


def compose_request(base: DictConfig, *, options: dict[str, str]) -> Request:
    settings = HydraConfig.get()
    overrides, in_sweep = tuple(settings.overrides.task), settings.mode == RunMode.MULTIRUN
    config = compose_run(overrides, base=base)
    gc.enable()  # launcher.cli switched it off for the start
    return Request(named_in_sweep(config, overrides=overrides) if in_sweep else config, overrides, options, in_sweep)


def named_in_sweep(config: RunConfig, *, overrides: Sequence[str]) -> RunConfig:
    """Each job of a sweep is a run of its own: its name ends in a hash of its overrides."""
    digest = blake2b("\n".join(sorted(overrides)).encode()).hexdigest()[:HASH_CHARACTERS]
    return replace(config, run=replace(config.run, name=f"{config.run.name}-{digest}"))


def explained(error: Exception, *, words: Sequence[str]) -> ConfigError:
    """Hydra's own refusal in our words. Its session is gone by now, so it gets another one to look names up in."""
    from launcher.config.explain import explain

    arguments = get_args_parser().parse_args(list(words))
    with hydra_session(arguments.config_dir) as searchpath:
        return explain(error, overrides=[*searchpath, *arguments.overrides])
