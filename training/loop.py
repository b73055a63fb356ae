"""Training one stage, on one page."""

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.config.schema import RunConfig
from launcher.plan.stage import plan_stage
from launcher.rundir.exits import ExitClass
from launcher.rundir.paths import RunDir
from training.heartbeat import Heartbeat
from training.parallel import Rank
from training.startup import Phases
from training.trainer import Trainer

COLLECTION_INTERVAL = 100  # steps


def train_stage(
    run: RunDir, config: RunConfig, *, stage_name: str, rank: Rank, heartbeat: Heartbeat, phases: Phases
) -> ExitClass:
    """Trains a stage from its newest checkpoint (or the stage it starts from) to its end, or until asked to stop."""
    stage = config.stage(stage_name)
    plan = plan_stage(stage, cluster=config.cluster)
    trainer = Trainer(run, config, stage=stage, plan=plan, rank=rank, heartbeat=heartbeat, phases=phases)
    with stop_signals() as asked, quiet_garbage_collector():
        trainer.restore()
        if trainer.owes_validation:
            trainer.validate()
        while not trainer.is_finished:
            flags = trainer.train_step(trainer.own_flags(asked))
            if flags.stop and not trainer.is_finished:
                trainer.save(any_layout=flags.any_layout, is_last=True)
                return trainer.finish("stop", ExitClass.INTERRUPTED)
            if trainer.due(plan.validation_samples):
                trainer.validate()
            if trainer.is_to_save():
                trainer.save()
            if trainer.guard.leaving:
                trainer.save(is_last=True)
                raise trainer.guard.leaving
            if trainer.progress.step % COLLECTION_INTERVAL == 0:
                gc.collect(1)
        trainer.validate()
        trainer.save(any_layout=True, is_last=True)
    return trainer.finish("stage_done", ExitClass.DONE)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGUSR1 while the block runs: any of them means save after this step and exit."""
    asked: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.signal(kind, lambda number, _: asked.append(number)) for kind in kinds]
    try:
        yield asked
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


@contextmanager
def quiet_garbage_collector() -> Iterator[None]:
    """Ranks that collect at different moments stall each other: all collect young objects at the same steps instead."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
