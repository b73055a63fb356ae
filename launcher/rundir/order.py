"""order.json: which mixture holds from which sample of each stage on, and the shards and held-out text as of the launch.

A mixture changed on resume is a new phase "from here on": what the run has read is never moved. Ranks read this file.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from data_prep.errors import DataError
from data_prep.manifest import digest_of
from data_prep.mixing import (
    AmountError,
    PhaseRow,
    amend_phases,
    mean_shares,
    plan_phases,
    rows_from_json,
    rows_to_json,
)
from data_prep.order import SLOTS
from data_prep.storage import FileState
from launcher.config.check_mixture import check_caps, problem_of
from launcher.config.errors import ConfigError
from launcher.config.reading import Sizes, assumed_sizes, extent_of, plan_tables
from launcher.config.schema import RunConfig, StageConfig
from launcher.config.validate import merge_over_stages
from launcher.plan.prepared import Prepared, known_sizes
from launcher.rundir.checkpoints import newest_checkpoint
from launcher.rundir.exits import RunStateError
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_json, read_records, write_json

FORMAT_VERSION = 1
Rows = list[PhaseRow]


def record_order(
    run: RunDir, config: RunConfig, *, frozen: RunConfig | None, prepared: Prepared, on_change: Callable[[str], None]
) -> None:
    """Writes the phases of the stages, amended where the mixture or the horizon changed, and the state of every shard.
    `frozen`: the config before, of a run that exists.

    ConfigError: an amount that cannot be met, a cap that is broken. RunStateError: a phase in the past was changed, or a shard
    replaced since the launch."""
    sizes = {**known_sizes(config), **prepared.sizes}
    before = tables_before(run, frozen, sizes=sizes)
    tables = {stage.stage.name: _table(run, stage, config, before.get(stage.stage.name), sizes) for stage in config.stages}
    if found := list(check_caps(config, sizes=sizes, tables=tables)):
        raise ConfigError(*merge_over_stages(found, names=config.stage_names))
    refuse_replaced_shards(run, prepared=prepared)
    _write(run, tables={**before, **tables}, prepared=prepared)
    for name, rows in tables.items():
        for row in rows:
            if name in before and row not in before[name]:
                _tell(run, name, row, config=config, on_change=on_change)


def tables_before(run: RunDir, frozen: RunConfig | None, *, sizes: Sizes) -> dict[str, Rows]:
    """The phases as recorded. A run from before order.json had one phase a stage: that of its frozen mixture."""
    recorded = recorded_tables(run)
    for stage in frozen.stages if frozen else ():
        if stage.stage.name not in recorded and samples_read(run, stage.stage.name):
            recorded[stage.stage.name] = plan_phases(stage.mixture, extent=extent_of(stage, sizes=sizes))
    return recorded


def _table(run: RunDir, stage: StageConfig, config: RunConfig, recorded: Rows | None, sizes: Sizes) -> Rows:
    extent = extent_of(stage, sizes=sizes)
    read = samples_read(run, stage.stage.name)
    if not recorded or not read:
        try:
            return plan_phases(stage.mixture, extent=extent)
        except AmountError as error:
            raise ConfigError(problem_of(error)) from error
    refuse_lost_sources(run, stage, recorded=[row for row in recorded if row.start_sample < read])
    try:
        return amend_phases(recorded, stage.mixture, extent=extent, samples_read=read, seed=config.run.seed)
    except AmountError as error:
        raise RunStateError(f"{run.root}: stage {stage.stage.name}: {problem_of(error)}") from error


def refuse_lost_sources(run: RunDir, stage: StageConfig, *, recorded: Rows) -> None:
    """A source that was read stays described: its ledger, its exposure and its windows go by that."""
    lost = sorted({name for row in recorded for name in row.slots} - set(stage.mixture.sources))
    if lost:
        found = f"{run.root}: stage {stage.stage.name} reads {', '.join(lost)}, which the mixture no longer describes"
        fix = f"mixture.sources.{lost[0]}.share=0 ends reading it"
        raise RunStateError(f"{found}; a source that a run has read stays in its mixture. Fix: {fix}")


def refuse_replaced_shards(run: RunDir, *, prepared: Prepared) -> None:
    """Sizes and times against those at launch; checksums are read by `phidias data action=verify` alone."""
    recorded = recorded_shards(run)
    for name, stream in prepared.streams.items():
        try:
            stream.refuse_replaced(recorded.get(name, {}))
        except DataError as error:
            raise RunStateError(f"{run.root}: {error}") from error


def samples_read(run: RunDir, stage: str) -> int:
    """Samples of a stage up to its newest checkpoint, where a resume goes on."""
    saved, _ = newest_checkpoint(run, stage)
    return saved.meta.samples if saved else 0


def recorded_tables(run: RunDir) -> dict[str, Rows]:
    """The phases of each stage, as recorded; empty before the launch. RunStateError: written by newer code."""
    if not run.order.exists():
        return {}
    tree = read_json(run.order)
    if tree.get("format_version") != FORMAT_VERSION:
        found = f"{run.order} has format_version {tree.get('format_version')}; this code reads {FORMAT_VERSION}"
        raise RunStateError(f"{found}. Fix: use the phidias that wrote it (see code.json), or a newer one")
    return {name: rows_from_json(rows) for name, rows in tree["stages"].items()}


def recorded_shards(run: RunDir) -> Mapping[str, Mapping[str, FileState]]:
    """Size and version of each shard at launch, by source."""
    tree: dict[str, dict[str, Any]] = read_json(run.order)["shards"] if run.order.exists() else {}
    return {name: {file: FileState(*state) for file, state in files.items()} for name, files in tree.items()}


def recorded_held_out(run: RunDir) -> dict[str, str]:
    """What tells the held-out text of each source from any other; empty for a run from before it was recorded."""
    tree: dict[str, Any] = read_json(run.order) if run.order.exists() else {}
    return dict(tree.get("held_out", {}))


def recorded_skips(run: RunDir, stage: str) -> list[tuple[int, int]]:
    """Samples [first, end) of a stage that are left out for good, in the order in which that was decided."""
    rows = [row for row in read_records(run.events) if row.get("kind") == "skip" and row.get("stage") == stage]
    return [(row["first_sample"], row["first_sample"] + row["num_samples"]) for row in rows]


def stage_shares(run: RunDir, config: RunConfig) -> dict[str, dict[str, float]]:
    """The mean share of each source in each stage, as recorded, or as it is planned where nothing is; stages of
    which it is not known are left out."""
    tables: dict[str, Rows] = {}
    with contextlib.suppress(AmountError):  # epochs of a source that is not prepared here
        tables |= plan_tables(config, sizes={**assumed_sizes(config), **known_sizes(config)})
    tables |= recorded_tables(run)
    return {
        stage.stage.name: mean_shares(tables[stage.stage.name], num_samples=stage.stage.num_samples)
        for stage in config.stages
        if stage.stage.name in tables
    }


def _write(run: RunDir, *, tables: Mapping[str, Rows], prepared: Prepared) -> None:
    stages = {name: rows_to_json(rows) for name, rows in tables.items()}
    files = {**recorded_shards(run), **{name: stream.states for name, stream in prepared.streams.items()}}
    shards = {name: {file: [state.size, state.version] for file, state in row.items()} for name, row in files.items()}
    texts = {name: digest_of(stream.manifest.held_out.shards) for name, stream in prepared.streams.items()}
    held_out = {**recorded_held_out(run), **texts}
    write_json(run.order, {"format_version": FORMAT_VERSION, "stages": stages, "shards": shards, "held_out": held_out})


def _tell(run: RunDir, stage: str, row: PhaseRow, *, config: RunConfig, on_change: Callable[[str], None]) -> None:
    tokens = row.start_sample * config.stage(stage).stage.seq_length
    shares = {name: slots / SLOTS for name, slots in row.slots.items()}
    append_record(run.events, "phase", stage=stage, start_sample=row.start_sample, start_tokens=tokens, shares=shares)
    said = ", ".join(f"{name} {share:.4g}" for name, share in shares.items())
    on_change(f"phase: stage {stage} from {tokens:,} tokens on: {said}")
