"""What a stage begins with: its first weights, and where its sources go on. From nothing, the end of an earlier stage, a
checkpoint of another run, or a Hugging Face folder."""

from typing import TYPE_CHECKING, Any

from launcher.config.check import unlike_optimizers
from launcher.config.reading import replay_sample
from launcher.config.schema import StageConfig
from launcher.rundir.ancestor import Ancestor, LedgerRows, refuse_ancestor, take_over
from launcher.rundir.checkpoints import CheckpointError, Saved
from launcher.rundir.order import recorded_tables
from training.data import StageData, ledger_from_json, ledger_to_json
from training.interop.importing import sound_folder
from training.resuming import find_other_run, find_parent, is_readable, on_rank_0

if TYPE_CHECKING:
    from training.trainer import Trainer


def begin_stage(trainer: "Trainer") -> None:
    """Opens the data and fills the weights. The event `stage_start` says what with."""
    settings, note = trainer.stage.stage, trainer.metrics.event
    if settings.folder:
        other = find_other_run(settings.folder, checkpointer=trainer.checkpointer, note=note)
        begin_from_run(trainer, other) if other else begin_from_folder(trainer)
    elif settings.parent:
        parent = find_parent(trainer.run, trainer.config, stage=trainer.stage, checkpointer=trainer.checkpointer)
        trainer.open_data(start=recalled(trainer, parent))
        taken = take_weights(trainer, parent, before=trainer.config.stage(settings.parent))
        note("stage_start", init_from=settings.parent, path=parent.path.name, **taken)
    else:
        trainer.open_data(start={})
        note("stage_start", init_from=None)


def begin_from_folder(trainer: "Trainer") -> None:
    trainer.open_data(start={})
    folder = on_rank_0(lambda: sound_folder(trainer.stage, config=trainer.config))
    trainer.checkpointer.import_folder(folder, model=trainer.config.model)
    trainer.metrics.event("stage_start", init_from=trainer.stage.stage.folder, imported=folder.origin())


def begin_from_run(trainer: "Trainer", other: Ancestor) -> None:
    """Sources that both runs read from the same shards in the same order go on; an event names the others."""
    on_rank_0(lambda: refuse_ancestor(trainer.stage, config=trainer.config))
    ledger, anew = on_rank_0(lambda: take_over(other, config=trainer.config))
    trainer.open_data(start=ledger)
    taken, origin = take_weights(trainer, other.saved, before=other.stage), on_rank_0(other.origin)
    note = trainer.metrics.event
    note("stage_start", init_from=trainer.stage.stage.folder, parent=origin, goes_on=sorted(ledger), **taken)
    if anew:
        note("ledger_anew", sources=anew)


def recalled(trainer: "Trainer", parent: Saved) -> LedgerRows:
    """What the stage takes over as read: all that was or, in a replay, what was by a stated token of the parent."""
    sample = replay_sample(trainer.stage, config=trainer.config)
    if sample is None:
        return parent.meta.ledger
    before, start = trainer.config.stage(parent.meta.stage), ledger_from_json(parent.meta.start_ledger)
    phases = recorded_tables(trainer.run).get(parent.meta.stage)
    return ledger_to_json(StageData(trainer.config, before, ledger=start, phases=phases).ledger(sample))


def take_weights(trainer: "Trainer", saved: Saved, *, before: StageConfig) -> dict[str, Any]:
    """The fp32 weights of a checkpoint of stage `before` where this layout can read its optimizer, else those of its
    computation; and its moments where they are to be kept. Returns what events say of it."""
    has_fp32 = is_readable(saved, key=trainer.key) and not unlike_optimizers(before, after=trainer.stage)
    kept = trainer.stage.optim.keep_moments
    if kept and not has_fp32:
        raise CheckpointError(
            f"{saved.path} is {saved.meta.sharding}, or of another kind of optimizer: its moments cannot be read here. "
            "Fix: optim.keep_moments=false, or `phidias checkpoint` with action=convert first"
        )
    if has_fp32:
        trainer.checkpointer.start_from(saved, trainer.stage.optim)
    else:
        trainer.checkpointer.load_weights(saved)
    return {"weights": "fp32" if has_fp32 else before.precision.params_dtype, "moments": "kept" if kept else "new"}
