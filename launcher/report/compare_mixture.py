"""The proposed mixture as a file of the config group `mixture`, whole: its sources as the best run had them frozen."""

import re
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from data_prep.spec import Source
from launcher.config.errors import ConfigError, Problem
from launcher.config.files import PACKAGED
from launcher.report.compare import Comparison
from launcher.report.compare_document import describe_fit
from launcher.report.compare_groups import elsewhere
from launcher.report.mixture_fit import MixtureFit, Proposal
from launcher.rundir.amend import by_stage_name
from launcher.rundir.records import write_atomic

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
AMOUNTS = ("share", "epochs", "tokens")
WIDTH = 120


def path_of_mixture(name: str, *, folder: str | None) -> Path:
    """Where it will be written. ConfigError: no folder, a name that is no name, or one that is taken."""
    if not folder:
        raise ConfigError(
            Problem("config_dir", "nothing", "the mixture is written there, for --config-dir", "config_dir=my_configs")
        )
    if not NAME.fullmatch(name):
        rule = "a mixture is named by letters, digits, '_' and '-'"
        raise ConfigError(Problem("write_mixture", repr(name), rule, "write_mixture=proposed"))
    path = Path(folder) / "mixture" / f"{name}.yaml"
    for taken in (path, PACKAGED / "mixture" / f"{name}.yaml"):
        if taken.exists():
            raise ConfigError(Problem("write_mixture", name, f"{taken} exists; nothing is overwritten", "another name"))
    return path


def write_mixture(path: Path, comparison: Comparison) -> None:
    """ConfigError where nothing is proposed."""
    fit = comparison.fit
    if isinstance(fit, str) or fit.proposal is None:
        raise ConfigError(Problem("write_mixture", path.stem, describe_fit(fit), "write_mixture= with more mixtures compared"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render_mixture(path.stem, comparison, fit, fit.proposal))


def render_mixture(name: str, comparison: Comparison, fit: MixtureFit, proposal: Proposal) -> str:
    today, sources = time.strftime("%Y-%m-%d", time.gmtime()), ", ".join(comparison.sources)
    header = [
        f"Proposed by phidias compare, {today}, from {len(fit.observed)} mixtures at {comparison.tokens:.4g} tokens.",
        f"Predicted mean held-out loss of {sources}: {proposal.predicted:.4f} +- {fit.error:.4f},",
        f"the leave-one-out error of the {fit.model}.",
        "max_epochs holds for the horizon it is planned with: `phidias exposure` counts.",
    ]
    tree = {"name": name, **mixture_tree(comparison, proposal=proposal)}
    text: str = yaml.safe_dump(tree, sort_keys=False, width=WIDTH)
    return "".join(f"# {line}\n" for line in header) + text


def mixture_tree(comparison: Comparison, *, proposal: Proposal) -> dict[str, Any]:
    """The best group's mixture with the proposed shares in place of its amounts, and with sources that only others have. One
    phase: what was fitted are shares over the stage."""
    sources: dict[str, Any] = {}
    for each in comparison.groups:
        config = each.group.curves[0].config
        tree = elsewhere(by_stage_name(config), data_dir=config.run.data_dir)["stages"][comparison.stage]["mixture"]
        for source, spec in tree["sources"].items():
            sources.setdefault(source, stated(spec))
    for source, share in proposal.shares.items():
        sources[source]["share"] = share
    windows = comparison.groups[0].group.curves[0].config.stage(comparison.stage).mixture.windows
    return {**({} if windows == "stream" else {"windows": windows}), "sources": sources}


def stated(source: dict[str, Any]) -> dict[str, Any]:
    """What a frozen source states, without its amount."""
    defaults = {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default for field in fields(Source)
    }
    return {key: value for key, value in source.items() if value != defaults[key] and key not in AMOUNTS}
