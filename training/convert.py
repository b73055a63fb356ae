"""Rewrites the newest checkpoint of a stage so that any layout can load it."""

from dataclasses import replace
from functools import partial

import torch

from launcher.config.schema import RunConfig
from launcher.rundir.checkpoints import CheckpointError, newest_checkpoint
from launcher.rundir.exits import ExitClass
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record
from training.checkpoint import Checkpointer
from training.model import build_model
from training.optimizer import build_optimizer
from training.parallel import initialize_parallel
from training.resuming import find_sound, on_rank_0


def convert_stage(run: RunDir, config: RunConfig, *, stage_name: str, device: torch.device) -> ExitClass:
    """On tp * pp ranks: what data and context parallelism share is loaded whole. CheckpointError where there is none."""
    frozen = config.stage(stage_name)
    stage = replace(frozen, layout=replace(frozen.layout, cp=1))
    initialize_parallel(stage.layout, seed=config.run.seed, device=device, timeout_s=config.cluster.timeout_s)
    newest, _ = on_rank_0(lambda: newest_checkpoint(run, stage_name))
    # As the buckets were when it was written.
    bucket_size = newest.meta.reshard.get("bucket_size") if newest else None
    chunks = build_model(stage, model=config.model, seed=config.run.seed, hardware=config.hardware, bucket_size=bucket_size)
    optimizer = build_optimizer(stage, chunks=chunks)
    checkpointer = Checkpointer(run, stage=stage_name, layout=stage.layout, chunks=chunks, optimizer=optimizer)
    checkpointer.writer.kind = "converted"
    saved = find_sound(run, stage_name, checkpointer=checkpointer, note=partial(append_record, run.events, stage=stage_name))
    if saved is None:
        raise CheckpointError(f"{run.name} has no checkpoint of stage {stage_name}")
    checkpointer.load(saved, frozen.optim)
    checkpointer.save(saved.meta, policy=frozen.stage.checkpoint, any_layout=True, wait=True)
    return ExitClass.DONE
