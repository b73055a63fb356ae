"""The checkpoint to go on from: the first rank looks, all ranks read a part of its files, all come to the same answer."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from data_prep.errors import DataError
from launcher.config.schema import RunConfig, StageConfig
from launcher.plan.stage import plan_stage
from launcher.rundir.ancestor import Ancestor, find_ancestor, place_of
from launcher.rundir.checkpoints import (
    FULLY_RESHARDABLE,
    CheckpointError,
    Saved,
    indexed,
    newest_checkpoint,
    read_checkpoint,
    set_torn_aside,
    stage_end,
)
from launcher.rundir.exits import RunStateError
from launcher.rundir.paths import RunDir
from launcher.rundir.reshard import unlike
from training.checkpoint import Checkpointer

Note = Callable[..., None]
Found = TypeVar("Found")


def find_sound(run: RunDir, stage: str, *, checkpointer: Checkpointer, note: Note) -> Saved | None:
    """The newest checkpoint of the stage whose files are what was written. CheckpointError where there are some and none is
    valid: a run must not begin anew for that. `note` is told of those that were passed over, as events."""
    damaged: dict[str, str] = {}
    while True:
        saved = on_rank_0(lambda: newest_valid(run, stage, damaged=damaged))
        found = checkpointer.damages(saved) if saved else []
        if saved is None:
            return None
        if not found:
            on_rank_0(lambda: set_aside(run, stage, damaged=damaged, note=note))
            return saved
        damaged[saved.path.name] = "; ".join(found[:3])


def newest_valid(run: RunDir, stage: str, *, damaged: Mapping[str, str]) -> Saved | None:
    """By meta.json and sizes."""
    saved, torn = newest_checkpoint(run, stage, passing=damaged)
    refused = [*damaged.values(), *torn]
    if saved is None and refused:
        raise CheckpointError("no checkpoint of this stage is valid: " + "; ".join(refused))
    return saved


def set_aside(run: RunDir, stage: str, *, damaged: Mapping[str, str], note: Note) -> None:
    """What was passed over for a sound checkpoint; events say why."""
    _, torn = newest_checkpoint(run, stage, passing=damaged)
    for reason in [*damaged.values(), *torn]:
        note("checkpoint_refused", reason=reason)
    if damaged or torn:
        set_torn_aside(run, stage, damaged=damaged)


def is_readable(saved: Saved, *, key: Mapping[str, Any]) -> bool:
    """Whether the layout of `key` (rundir/reshard.py) can load it."""
    if saved.meta.sharding == FULLY_RESHARDABLE:
        return True
    return not unlike(saved.meta, dict(key)) and saved.meta.reshard.get("bucket_size") == key["bucket_size"]


def is_before(run: RunDir, stage: str, *, samples: int, key: Mapping[str, Any]) -> bool | None:
    """Whether there is a checkpoint of at most so many samples to rewind to; None where the stage has none at all."""
    found = []
    for path, digest in indexed(run, stage):
        with suppress(CheckpointError):
            found.append(read_checkpoint(path, digest=digest))
    if not found:
        return None
    return any(saved.meta.samples <= samples and is_readable(saved, key=key) for saved in found)


def find_parent(run: RunDir, config: RunConfig, *, stage: StageConfig, checkpointer: Checkpointer) -> Saved:
    """The end of the stage this one starts from. CheckpointError where it is not there, or damaged."""
    name = str(stage.stage.init_from)
    parent = on_rank_0(lambda: end_of(run, config, name=name, child=stage.stage.name))
    if found := checkpointer.damages(parent):
        raise CheckpointError(f"{'; '.join(found[:3])}. Fix: restore it, or train stage {name} again")
    return parent


def end_of(run: RunDir, config: RunConfig, *, name: str, child: str) -> Saved:
    """At the horizon that the stage has now."""
    num_samples = plan_stage(config.stage(name), cluster=config.cluster).num_samples
    saved = stage_end(run, name, num_samples=num_samples)
    if saved is None:
        raise CheckpointError(
            f"stage {child} starts from stage {name}, which has no finished checkpoint at its {num_samples} samples. "
            f"Fix: train stage={name} to its end first"
        )
    return saved


def find_other_run(path: str, *, checkpointer: Checkpointer, note: Note) -> Ancestor | None:
    """The sound checkpoint of another run that a path names, the newest where it names several; None where what lies there is
    of no run. CheckpointError where none is sound. `note` is told of those that were passed over, as events."""
    if not on_rank_0(lambda: place_of(Path(path)) is not None):
        return None
    damaged: dict[str, str] = {}
    while True:
        found = on_rank_0(lambda: find_ancestor(Path(path), passing=damaged))
        if not (wrong := checkpointer.damages(found.saved)):
            break
        damaged[f"{found.saved.meta.stage}/{found.saved.path.name}"] = "; ".join(wrong[:3])
    for reason in damaged.values():
        note("checkpoint_refused", reason=reason)
    return found


def on_rank_0(find: Callable[[], Found]) -> Found:
    """What rank 0 finds on disk, on every rank: shared file systems show ranks different moments. So does its error."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = find()
        except Exception as error:  # all ranks wait for the answer
            known = isinstance(error, CheckpointError | RunStateError | DataError)
            answer[1] = error if known else RuntimeError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    found: Found = answer[0]
    return found
