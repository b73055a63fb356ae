"""No secrets in a config: it is frozen in the run directory and copied to W&B, and the words it comes from are recorded. Keys
come from the environment or from a file. Messages say where a secret stands, never what it is."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.config.validate import dump_run, merge_over_stages

MASK = "***"
RULE = "a config holds no secrets: it is frozen in the run directory and logged"
EXPORT = "before submitting: a job has the environment it was submitted from"

# HF_TOKEN and awsSecretKey have one of these as a word; TOKENIZERS_PARALLELISM, NCCL_IB_PKEY and MONKEY have none.
SECRET_WORDS = {"key", "token", "secret", "password", "credential", "keys", "secrets", "passwords", "credentials"}
SECRET_WORDS |= {"passwd", "passphrase", "signature", "sig", "pat", "auth"}
SECRET_ENDINGS = ("password", "passwd", "secret", "apikey", "accesskey", "secretkey")  # PGPASSWORD
PLACES = {"file", "path", "dir", "index", "prefix"}  # HF_TOKEN_PATH says where a secret lies
SWITCHES = {"", "0", "1", "true", "false", "null"}  # of HF_HUB_DISABLE_IMPLICIT_TOKEN
VARIABLE = re.compile(r"(?:cluster\.env|hydra\.job\.env_set)\.(.+)")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

# scheme://user:password@host, but not docker://image:tag@sha256:digest; and what the query of an address passes along.
USER = re.compile(r"(\w[\w+.-]*://)([^/?#\s]+)@(?!sha\d+:)")
QUERY = re.compile(r"([?&#;])([\w.-]+)=([^&#;\s]+)")

# On a shell line; NAME=$OTHER and NAME="$(cat file)" hold nothing. The value is only looked at: it may hold another assignment.
VALUE = r"(?=[\"']?([^\s\"'$`;&|,)]+))"
ASSIGNED = re.compile(rf"(?<![\w.-])((?:--)?[A-Za-z_][\w-]*)(=){VALUE}")
OPTION = re.compile(rf"(?<![\w-])(--[A-Za-z][\w-]*)(\s+)(?!-){VALUE}")
LOGIN = re.compile(rf"\b(wandb\s+login|Bearer)(\s+)(?!-){VALUE}")
ENTRY = re.compile(rf"(?<![\w.-])([A-Za-z_][\w-]*)(\s*:\s*){VALUE}")  # of a dictionary on the command line


def refuse_secrets(config: RunConfig) -> None:
    """ConfigError with all secrets in the config and nothing else: other rules repeat the values they are about."""
    if found := list(check_secrets(config)):
        raise ConfigError(*merge_over_stages(found, names=config.stage_names))


def check_secrets(config: RunConfig) -> Iterator[tuple[str | None, Problem]]:
    """Each secret, with the stage it stands in; None where it is the run's. What of data_dir is repeated in other paths is told
    once."""
    tree, folder = dump_run(config), config.run.data_dir
    repeated = folder if any(credentials_of_addresses(folder)) else ""
    stages = {row["stage"]["name"]: row for row in tree.pop("stages")}
    for stage, part in [(None, tree), *stages.items()]:
        for path, text in texts(part):
            own = text if path == "run.data_dir" else text.removeprefix(repeated)
            yield from ((stage, problem) for problem in check_text(path, text=own))


def refuse_secret_words(words: Sequence[str]) -> None:
    """ConfigError with the secrets in words of a command line, before Hydra repeats or writes one of them."""
    problems: list[Problem] = []
    for word in words:
        path, _, text = word.lstrip("+~").partition("=")
        problems += check_text(path, text=text)
        if path in ("cluster", "cluster.env"):
            problems += [in_environment(entry[1]) for entry in ENTRY.finditer(text) if is_secret(entry[1], value=entry[3])]
    if problems:
        raise ConfigError(*problems)


def texts(tree: Any, *, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a plain tree with its dotted path."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from texts(item, path=f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from texts(item, path=f"{path}.{index}")
    elif isinstance(tree, str):
        yield path, tree


def check_text(path: str, *, text: str) -> Iterator[Problem]:
    """The secrets of one value. `path` as an override would be written."""
    variable = VARIABLE.match(path)
    if variable and is_secret(variable[1], value=text):
        yield in_environment(variable[1], path=path)
    for said in credentials_of_addresses(text):
        fix = "the address without it; what reads it finds credentials in the environment, or in files of its own"
        yield Problem(path, f"{said} in an address", RULE, fix)
    if path.startswith("cluster"):
        fix = f"export it {EXPORT}; or read it on the line itself, NAME=$(cat FILE)"
        yield from (Problem(path, said, RULE, fix) for said in secrets_on_line(text))


def in_environment(name: str, *, path: str = "") -> Problem:
    fix = f"export {name} {EXPORT}" + ("; or monitor.wandb.key_file=FILE" if name.startswith("WANDB") else "")
    return Problem(path or f"cluster.env.{name}", f"{MASK}, by its name a secret", RULE, fix)


def is_secret(name: str, *, value: str) -> bool:
    """Whether what goes by the name is a secret, not the place of one or a switch."""
    words = [word.lower() for word in WORD.findall(name)]
    named = any(word in SECRET_WORDS or word.endswith(SECRET_ENDINGS) for word in words)
    return named and words[-1] not in PLACES and value.strip("\"'").lower() not in SWITCHES


def credentials_of_addresses(text: str) -> Iterator[str]:
    """`s3://***@` for a user and password, `sig=***` for a part of a query. A user's name alone is none, but for http, where it
    is a token."""
    if "://" not in text:
        return
    for user in USER.finditer(text):
        if ":" in user[2] or user[1].startswith("http"):
            yield f"{user[1]}{MASK}@"
    for part in QUERY.finditer(text):
        if is_secret(part[2], value=part[3]):
            yield f"{part[2]}={MASK}"


def secrets_on_line(text: str) -> Iterator[str]:
    """`NAME=***` for each secret that a shell line assigns or passes."""
    for pattern in (ASSIGNED, OPTION, LOGIN):
        for found in pattern.finditer(text):
            if pattern is LOGIN or is_secret(found[1], value=found[3]):
                yield f"{found[1]}{found[2]}{MASK}"
