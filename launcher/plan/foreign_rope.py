"""The rotary embedding of a Hugging Face folder beside that of the stage which is to start from it, by config.json alone."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.config.errors import Problem
from launcher.config.schema import RopeScaling, StageSettings

START, ANOTHER = "stage.init_from", "another folder"
# What decides the angles, by kind; of position interpolation the original length does not.
DECIDING = {
    "linear": ("rope_type", "factor"),
    "yarn": ("rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
}
SCALING = "stage.rope_scaling"


def rotary_of(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 has one object for all that is rotary; before, the base stood alone and `rope_scaling` beside it."""
    found = said.get("rope_parameters") or said.get("rope_scaling") or {}
    return found if isinstance(found, dict) else {"rope_type": str(found)}


def check_rotary(said: Mapping[str, Any], *, path: str, settings: StageSettings) -> Iterator[Problem]:
    """A position means what it meant to the folder's model, but for a base that is raised, or angles that are scaled, where
    sequences outgrow that."""
    known = said.get("max_position_embeddings")
    is_longer = isinstance(known, int) and settings.seq_length > known
    yield from check_scaling(said, path=path, settings=settings, is_longer=is_longer)
    base = rotary_of(said).get("rope_theta", said.get("rope_theta", 10000.0))
    if base != settings.rotary_base and not (is_longer and base < settings.rotary_base):
        fix = f"stage.rotary_base={int(base)}" if isinstance(base, float | int) and base == int(base) else ANOTHER
        rule = f"{path} has rope_theta {base}; it may be raised where sequences outgrow max_position_embeddings"
        yield Problem("stage.rotary_base", str(settings.rotary_base), rule, fix)
    window = said.get("sliding_window") if said.get("use_sliding_window", True) else None
    if isinstance(window, int) and window < settings.seq_length:
        rule = f"{path} attends to sliding_window={window} tokens, Phidias to all"
        yield Problem("stage.seq_length", str(settings.seq_length), rule, f"stage.seq_length={window} or less, or {ANOTHER}")


def check_scaling(said: Mapping[str, Any], *, path: str, settings: StageSettings, is_longer: bool) -> Iterator[Problem]:
    rotary, ours, known = rotary_of(said), settings.rope_scaling, said.get("max_position_embeddings")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    theirs = scaling_of(said, kind=kind) if kind in DECIDING else None
    if kind not in ("default", *DECIDING) or (theirs and (kind := unusual(rotary))):
        rule = f"known are default, {' and '.join(DECIDING)} as their papers have them: positions would mean other angles"
        yield Problem(START, f"{path} with rope_scaling {kind!r}", rule, ANOTHER)
    elif theirs == deciding(ours):
        return
    elif theirs is not None:
        rule = f"{path} has {shown(theirs)}: positions would mean other angles"
        yield Problem(SCALING, shown(deciding(ours)), rule, f"the same, or {ANOTHER}")
    elif not is_longer:
        rule = f"{path} has none; angles may be scaled where sequences outgrow max_position_embeddings ({known})"
        yield Problem(SCALING, shown(deciding(ours)), rule, f"{SCALING}=null")
    elif ours and ours.original_max_position_embeddings != known:
        field, rule = f"{SCALING}.original_max_position_embeddings", f"{path} has max_position_embeddings {known}"
        yield Problem(field, str(ours.original_max_position_embeddings), rule, f"{field}={known}")


def scaling_of(said: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
    """The folder's. transformers takes an original length beside the object over that inside, and the paper's betas where none
    are given."""
    rotary = rotary_of(said)
    inside = rotary.get("original_max_position_embeddings", said.get("max_position_embeddings"))
    original = said.get("original_max_position_embeddings", inside)
    betas = {"beta_fast": rotary.get("beta_fast") or 32, "beta_slow": rotary.get("beta_slow") or 1}
    found = {"rope_type": kind, "factor": rotary.get("factor"), "original_max_position_embeddings": original, **betas}
    return {key: found[key] for key in DECIDING[kind]}


def deciding(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The stage's."""
    return {key: getattr(scaling, key) for key in DECIDING[scaling.rope_type]} if scaling else None


def unusual(rotary: Mapping[str, Any]) -> str | None:
    """What of YaRN a stage has no word for, where it is not what follows from the factor."""
    factor, attention = rotary.get("factor"), rotary.get("attention_factor")
    usual = 0.1 * math.log(factor) + 1.0 if isinstance(factor, int | float) and factor > 0 else math.nan
    if attention is not None and not (isinstance(attention, float) and math.isclose(attention, usual, rel_tol=1e-6)):
        return f"attention_factor={attention}"
    if rotary.get("mscale") and rotary.get("mscale_all_dim"):
        return f"mscale={rotary['mscale']}"
    return None if rotary.get("truncate", True) else "truncate=false"


def shown(scaling: Mapping[str, Any] | None) -> str:
    return json.dumps(scaling) if scaling else "null"
