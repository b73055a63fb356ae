"""Runs of one config are one group: they differ in their seed, in names, and in where and how they ran. Between groups, what
differs is what is compared."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.report.compare_runs import Curve
from launcher.rundir.amend import by_stage_name

# What does not change what is learned, beyond rounding: names, seed, places, machines, watching, saving.
IGNORED = re.compile(
    r"run\.(name|seed|runs_dir|data_dir|after|after_stages|evaluation.*|stages)$|tokenizer\.(ranks_file|file)$|cluster$|hardware$|schema_version$"
    r"|monitor\.(log_interval|console|tensorboard|hang|wandb)$|model\.name$"
    r"|data\.(num_workers|num_machines|reader|cache_dir|cache_gib|prefetch_batches|trace|oracle_fraction|dropped_samples)$"
    r"|stages\.[^.]+\.(layout|precision\.name|mixture\.name|stage\.checkpoint|stage\.validation)$"
)
AMOUNTS = ("share", "epochs", "tokens", "max_epochs", "unique_tokens")
ABSENT = "absent"
PRESENT = "present"


@dataclass(frozen=True)
class Group:
    """Runs of one config, by seed. `tree` is what of it counts; `shares` what the stage has read up to where the runs are
    compared, None where that is not known."""

    label: str
    curves: tuple[Curve, ...]
    tree: dict[str, Any]
    shares: dict[str, float] | None


def group_runs(curves: Sequence[Curve], *, tokens: float) -> list[Group]:
    """Groups in the order of their first runs; `tokens`: where shares are read."""
    found: dict[str, tuple[dict[str, Any], list[Curve]]] = {}
    shares = {curve.run.root: curve.shares_at(tokens) for curve in curves}
    for curve in curves:
        tree = counted(elsewhere(by_stage_name(curve.config), data_dir=curve.config.run.data_dir))
        read = {name: round(share, 4) for name, share in (shares[curve.run.root] or {}).items()}
        tree["read"] = {name: share for name, share in read.items() if _was_amended(curve, share, name=name)}
        found.setdefault(json.dumps(tree, sort_keys=True), (tree, []))[1].append(curve)
    labels = labels_of([rows for _, rows in found.values()], trees=[tree for tree, _ in found.values()])
    return [
        Group(label, tuple(sorted(rows, key=lambda curve: curve.seed)), tree, shares[rows[0].run.root])
        for label, (tree, rows) in zip(labels, found.values(), strict=True)
    ]


def _was_amended(curve: Curve, share: float, *, name: str) -> bool:
    """Whether the share that was read is another than the config's: the mixture changed on the way."""
    source = curve.config.stage(curve.stage).mixture.sources.get(name)
    return source is None or (source.share is not None and abs(source.share - share) > 1e-3)


def elsewhere(tree: Any, *, data_dir: str) -> Any:
    """The tree with paths below the data folder written as a config has them: where that lies makes no difference."""
    if isinstance(tree, dict):
        return {key: elsewhere(value, data_dir=data_dir) for key, value in tree.items()}
    if isinstance(tree, list):
        return [elsewhere(value, data_dir=data_dir) for value in tree]
    prefix = f"{data_dir.rstrip('/')}/"
    return "${run.data_dir}/" + tree.removeprefix(prefix) if isinstance(tree, str) and tree.startswith(prefix) else tree


def counted(tree: Any, *, path: str = "") -> Any:
    """The tree without what is ignored."""
    if not isinstance(tree, dict):
        return tree
    paths = {key: f"{path}.{key}" if path else str(key) for key in tree}
    return {key: counted(value, path=paths[key]) for key, value in tree.items() if not IGNORED.match(paths[key])}


def differing(trees: Sequence[Any], *, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Paths whose values differ, with the value in each tree; of a section that some do not have, the section alone."""
    if all(isinstance(tree, dict) for tree in trees):
        for key in dict.fromkeys(key for tree in trees for key in tree):
            yield from differing([tree.get(key, ABSENT) for tree in trees], path=(*path, str(key)))
    elif any(tree != trees[0] for tree in trees):
        yield path, [PRESENT if isinstance(tree, dict) else tree for tree in trees]


def labels_of(groups: Sequence[Sequence[Curve]], *, trees: Sequence[dict[str, Any]]) -> list[str]:
    """Names of mixtures where groups differ in those and each has a name of its own, else of the first runs."""
    mixtures = [rows[0].config.stage(rows[0].stage).mixture.name for rows in groups]
    only_mixtures = all(path[:3] == ("stages", groups[0][0].stage, "mixture") for path, _ in differing(trees))
    if only_mixtures and len(set(mixtures)) == len(groups):
        return mixtures
    names = [rows[0].name for rows in groups]
    return names if len(set(names)) == len(names) else [str(rows[0].run.root) for rows in groups]


def is_amount(path: tuple[str, ...], *, stage: str) -> bool:
    """Whether a path says how much the compared stage reads of a source, or that it has one."""
    if path[:3] != ("stages", stage, "mixture"):
        return path[:1] == ("read",)
    return path[3] == "phases" or (path[3] == "sources" and (len(path) == 5 or path[5] in AMOUNTS))


def differences_of(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """By dotted path, the value in each group."""
    labels = [group.label for group in groups]
    rows = differing([group.tree for group in groups])
    return {".".join(path): dict(zip(labels, values, strict=True)) for path, values in rows}
