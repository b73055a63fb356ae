"""What may change in a run that exists, and what makes it another run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.config.schema import RunConfig
from launcher.config.validate import dump_run, shown
from launcher.rundir.paths import RunDir

Change = tuple[str, Any, Any]  # dotted path, frozen value, new value
ABSENT = "absent"

# A run is its model, its tokenizer and its text. Paths may move, the manifests' fingerprints tell whether the text is the same.
# Amounts and phases of a mixture may change: what was read stays, the change is a phase of its own (rundir/order.py).
FIXED = re.compile(
    r"model\.(?!family$)|run\.seed$|tokenizer\.(kind|eod)$|data\.(chunk_tokens|group_tokens|held_out_fraction|length_buckets)$"
    r"|stages\.[^.]+\.stage\.(seq_length|rotary_base|rope_scaling.*|init_from|replay_from_tokens)$"
    r"|stages\.[^.]+\.stage\.(reset_attention_mask|reset_position_ids|eod_mask_loss)$"
    r"|stages\.[^.]+\.(layout\.distributed_optimizer|precision\.moments_dtype)$"  # its form in checkpoints
    r"|stages\.[^/]+\.mixture\.windows$"
    r"|stages\.[^/]+\.mixture\.sources\..*\.(format|text_field|parent|min_document_tokens|windows)$"
)


@dataclass(frozen=True)
class Changes:
    refused: list[Change]
    amended: list[Change]
    added_stages: list[str]


def compare(frozen: RunConfig, *, config: RunConfig) -> Changes:
    """What `config` changes in the frozen one. Stages it does not select stay as they are."""
    added = [name for name in config.stage_names if name not in frozen.stage_names]
    before, after = by_stage_name(frozen), by_stage_name(config)
    common = {name: row for name, row in before["stages"].items() if name in after["stages"]}
    after["stages"] = {name: row for name, row in after["stages"].items() if name in common}
    changes = list(differences({**before, "stages": common}, after=after))
    lost = [name for name in frozen.stage_names if name not in config.run.stages]
    refused = [change for change in changes if FIXED.match(change[0]) or (change[0] == "run.stages" and lost)]
    return Changes(refused, [change for change in changes if change not in refused], added)


def by_stage_name(config: RunConfig) -> dict[str, Any]:
    """The plain tree with stages by name, so that a path says which one."""
    tree = dump_run(config)
    return {**tree, "stages": {row["stage"]["name"]: row for row in tree["stages"]}}


def differences(before: Any, *, after: Any, path: str = "") -> Iterator[Change]:
    """Leaves that differ, by dotted path; a list is a leaf."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key, ABSENT), after=after.get(key, ABSENT), path=inner)
    elif before != after:
        yield path, before, after


def describe_refusal(run: RunDir, *, refused: list[Change]) -> str:
    lines = [f"  {path}: the run has {shown(old)}, asked for {shown(new)}" for path, old, new in refused]
    return "\n".join(
        [
            f"{run.root} is another run: it differs in what cannot change once a run exists:",
            *lines,
            "Fix: another run.name for the changed config, or the frozen values for this run",
        ]
    )
