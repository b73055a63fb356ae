"""W&B's service, as its own client would find it: where it is, with which key, whether it answers. wandb is not imported."""

import configparser
import importlib.util
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from launcher.config.errors import ConfigError, Problem
from launcher.rundir.permissions import KEY, read_key

PUBLIC_URL = "https://api.wandb.ai"
PROBE_S = 15.0
# Of a training job's environment; here they would keep wandb from its work, or name another run.
NOT_OURS = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_PROJECT", "WANDB_ENTITY")


def service_url() -> str:
    """Where wandb uploads to: as its environment says, its settings (`wandb login --host`), or the public service. ConfigError
    where it is not installed."""
    if importlib.util.find_spec("wandb") is None:
        fix = "pip install 'phidias[train]', here or in the environment that trains"
        raise ConfigError(Problem("wandb", "no such package", "W&B's own client uploads", fix))
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, configparser.Error):
        folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
        settings.read_string((Path(folder).expanduser() / "settings").read_text())
    kept = settings.get("default", "base_url", fallback=PUBLIC_URL)
    return (os.environ.get("WANDB_BASE_URL") or kept).rstrip("/")


def service_environment(key_file: str | None, *, url: str) -> dict[str, str]:
    """With the key, from where training would have it or wandb keeps it. ConfigError where there is none."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    if not environment.get(KEY) and key_file:
        environment[KEY] = read_key(key_file)
    if not environment.get(KEY) and not environment.get("WANDB_IDENTITY_TOKEN_FILE") and not in_netrc(url, os.environ):
        rule = "W&B takes data from those it knows alone"
        fix = f"export {KEY}=..., `wandb login`, or monitor.wandb.key_file when the run is launched"
        raise ConfigError(Problem(KEY, f"no key for {url} in the environment, the config or netrc", rule, fix))
    return environment


def in_netrc(url: str, environment: Mapping[str, str]) -> bool:
    """Where `wandb login` leaves keys."""
    path = Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def unreachable(url: str) -> str | None:
    """Why the service cannot be reached; None where it answers, whatever it says. wandb itself would try for days."""
    try:
        urllib.request.urlopen(url, timeout=PROBE_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None
