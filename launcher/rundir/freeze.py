"""The frozen config of a run directory: written once, read by every rank and later stage, changed by recorded amendments."""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from data_prep.mixing import AmountError
from launcher.config.check import check_run
from launcher.config.errors import ConfigError, Problem
from launcher.config.hardware import read_hardware
from launcher.config.schema import SCHEMA_VERSION, RunConfig, StageConfig
from launcher.config.validate import dump_run, shown, validate_run
from launcher.plan.document import plan_document
from launcher.plan.prepared import Prepared
from launcher.plan.rehearsed import FOLDER
from launcher.rundir.amend import Changes, compare, describe_refusal
from launcher.rundir.checkpoints import newest_checkpoint, undo_replacing
from launcher.rundir.code import code_version
from launcher.rundir.exits import RunStateError
from launcher.rundir.lock import describe_holder, is_live, lock_run
from launcher.rundir.order import record_order, recorded_tables
from launcher.rundir.paths import RunDir
from launcher.rundir.permissions import refuse_world_writable
from launcher.rundir.records import append_record, read_json, write_atomic, write_json
from launcher.rundir.reshard import refuse_resharding

# From each older schema_version to the next, so that new code resumes old runs.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda tree: add_reading(tree),
    2: lambda tree: add_preparing(tree),
    3: lambda tree: add_planning(tree),
    4: lambda tree: add_launching(tree),
    5: lambda tree: add_health(tree),
    6: lambda tree: add_kernels(tree),
}
STAGE_TOKENS = re.compile(r"stages\.[^.]+\.stage\.tokens$")
HEADER = "# Frozen by phidias {version}. Ranks read this file; change it by overrides to `phidias train`, not by hand.\n"


def open_run(config: RunConfig, *, prepared: Prepared | None, on_change: Callable[[str], None] = lambda line: None) -> RunDir:
    """The run's directory, created or opened again, with `config` and the order of its data frozen in it. `prepared: None`: its
    data is still to be made; the order is recorded by the next call that has it.

    Stages that it does not hold yet are added; what may change (layout, cluster, batch, tokens, mixture, ...) is amended and
    recorded, and `on_change` is told each change.
    RunStateError where the directory is another run's, is live, may be written by everybody, or differs in what a run is;
    ConfigError where the stages together break a rule that each one keeps."""
    run = RunDir(Path(config.run.runs_dir) / config.run.name)
    refuse_foreign(run)
    refuse_world_writable(run)
    make_folder(run, runs_dir=config.run.runs_dir)
    refuse_world_writable(run)  # what a umask of 0 has just made
    with lock_run(run):
        if run.config.exists():
            _reopen(run, config=config, prepared=prepared, on_change=on_change)
        else:
            run.order.unlink(missing_ok=True)  # of a launch that ended before it wrote the config
            if prepared is not None:
                record_order(run, config, frozen=None, prepared=prepared, on_change=on_change)
            _write(run, config=config, prepared=prepared)
            append_record(run.events, "created", stages=list(config.stage_names))
        _record_code(run)
    return run


def refuse_unopenable(run: RunDir, config: RunConfig) -> None:
    """RunStateError where `open_run` would refuse the directory as it is now. Writes nothing."""
    refuse_foreign(run)
    refuse_world_writable(run)
    if run.config.exists():
        allowed_changes(run, read_config(run), config=config)
    if is_live(run):
        raise RunStateError(describe_holder(run))


def read_config(run: RunDir) -> RunConfig:
    """The frozen config, brought up to this code's schema. RunStateError where there is none that this code can read."""
    try:
        tree = yaml.safe_load(run.config.read_text())
        version = tree["schema_version"]
    except FileNotFoundError:
        raise RunStateError(f"no run at {run.root}: {run.config} is missing. Fix: check runs_dir and the run's name") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise RunStateError(
            f"{run.config} is not a frozen config: {error}. Fix: restore the file; it is not edited by hand"
        ) from error
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        found = f"{run.config} has schema_version {version}; this code reads up to {SCHEMA_VERSION}"
        raise RunStateError(f"{found}. Fix: use the phidias that wrote it (see code.json), or a newer one")
    try:
        return validate_run(upgrade(tree))
    except ConfigError as error:
        raise RunStateError(f"{run.config} was changed by hand: {error}. Fix: restore the file") from error


def upgrade(tree: dict[str, Any]) -> dict[str, Any]:
    while tree["schema_version"] < SCHEMA_VERSION:
        tree = {**UPGRADES[tree["schema_version"]](tree), "schema_version": tree["schema_version"] + 1}
    return tree


def refuse_foreign(run: RunDir) -> None:
    """A folder with files of someone else must not become a run. What a rehearsal measured for it is not someone else's."""
    if run.config.exists() or not run.root.exists():
        return
    if not run.root.is_dir():
        raise RunStateError(f"{run.root} is a file; a run is a directory. Fix: another run.name or run.runs_dir")
    # A crash before the config was written leaves the lock, the order or a temporary file behind.
    names = sorted(path.name for path in run.root.iterdir())
    ours = (run.lock.name, run.order.name, FOLDER)
    foreign = [name for name in names if name not in ours and not name.startswith((".config.yaml", ".order.json"))]
    if foreign:
        found = f"{run.root} holds {', '.join(foreign[:3])}{' ...' if len(foreign) > 3 else ''} and no config.yaml"
        raise RunStateError(f"{found}: it is not a run. Fix: another run.name, or move these files away")


def make_folder(run: RunDir, *, runs_dir: str) -> None:
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        run.lock.touch()  # a folder that is there and read-only is found out too
    except OSError as error:
        found, rule = f"{runs_dir} ({error.strerror})", f"the run's directory {run.root} is made and written there"
        raise ConfigError(Problem("run.runs_dir", found, rule, "a folder that you may write to")) from error


def _reopen(run: RunDir, *, config: RunConfig, prepared: Prepared | None, on_change: Callable[[str], None]) -> None:
    frozen = read_config(run)
    undo_replacing(run)
    changes = allowed_changes(run, frozen, config=config)
    merged, ordered = merge(frozen, config=config), run.order.exists()
    if merged != frozen:
        check_run(merged)
    if prepared is not None:
        record_order(run, merged, frozen=frozen, prepared=prepared, on_change=on_change)
    if merged != frozen or not ordered:
        _write(run, config=merged, prepared=prepared)
    if merged != frozen:
        _record(run, changes=changes)
        for path, old, new in changes.amended:
            on_change(f"amended: {path} {shown(old)} -> {shown(new)}")


def allowed_changes(run: RunDir, frozen: RunConfig, *, config: RunConfig) -> Changes:
    """What `config` amends in a run that exists. RunStateError where it would make another one of it."""
    changes = compare(frozen, config=config)
    if changes.refused:
        raise RunStateError(describe_refusal(run, refused=changes.refused))
    refuse_moved_end(run, frozen=frozen, changes=changes)
    refuse_unreading(run, config=config)
    refuse_resharding(run, config)
    return changes


def merge(frozen: RunConfig, *, config: RunConfig) -> RunConfig:
    """`config`, together with the frozen stages that it does not select, in the order of run.stages."""
    rows: dict[str, StageConfig] = {stage.stage.name: stage for stage in (*frozen.stages, *config.stages)}
    return replace(config, stages=tuple(rows[name] for name in config.run.stages if name in rows))


def refuse_moved_end(run: RunDir, *, frozen: RunConfig, changes: Changes) -> None:
    """A stage that another one started from has ended: going on with it would read what its successor reads, and never reach
    the successor's weights."""
    moved = {path.split(".")[1]: (old, new) for path, old, new in changes.amended if STAGE_TOKENS.match(path)}
    for child in frozen.stages:
        parent, begun = child.stage.parent, (run.checkpoints(child.stage.name) / "index.jsonl").exists()
        if parent in moved and begun:
            old, new = moved[parent]
            found = f"{run.root}: stages.{parent}.stage.tokens is {old:g}, asked for {new:g}"
            rule = f"stage {child.stage.name} has started from its end"
            raise RunStateError(f"{found}; {rule}. Fix: leave stages.{parent}.stage.tokens, or use another run.name")


def refuse_unreading(run: RunDir, *, config: RunConfig) -> None:
    """What a stage has read cannot be taken back: reports and exposure would say less than what was trained. Its last batch may
    have run past the horizon."""
    for stage in config.stages:
        saved, _ = newest_checkpoint(run, stage.stage.name)
        batch_tokens = stage.stage.global_batch_size * stage.stage.seq_length
        if saved and saved.meta.tokens >= stage.stage.tokens + batch_tokens:
            found = (
                f"{run.root}: stage {stage.stage.name} has read {saved.meta.tokens} tokens, asked for {stage.stage.tokens:g}"
            )
            raise RunStateError(f"{found}; a stage does not shrink below what it read. Fix: more tokens, or another run.name")


def add_reading(tree: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 to 2: how data was read before it could be said."""
    reading: dict[str, Any] = dict(
        length_buckets=[], reader="mmap", cache_dir=None, cache_gib=100.0, prefetch_batches=2, trace=False
    )
    masks = dict(reset_attention_mask=False, reset_position_ids=False, eod_mask_loss=False)
    stage = dict(rampup_batch_size=None, replay_from_tokens=None, **masks)
    rows = [
        {**row, "stage": {**stage, **row["stage"]}, "layout": {"cp_comm_type": "p2p", **row["layout"]}}
        for row in tree["stages"]
    ]
    return {**tree, "data": {**reading, **tree["data"]}, "stages": rows}


def add_preparing(tree: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 to 3: how shards were made before it could be said."""
    preparing: dict[str, Any] = dict(num_machines=1, max_row_mib=32, shuffle_mib=0, oracle_fraction=0.0, dropped_samples=0)
    return {**tree, "data": {**preparing, **tree["data"]}}


def add_planning(tree: dict[str, Any]) -> dict[str, Any]:
    """Schema 3 to 4: what the planner knows of devices and clusters, and fields of layouts that had one value only."""
    cluster, network = tree["cluster"], tree["cluster"]["network"]
    if network is not None:
        network = {**network, "rail_optimized": True, "nodes_per_pod": 32, "oversubscription": 1.0}
    layout: dict[str, Any] = dict(
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        recompute_modules=["core_attn"],
        tp_comm_overlap=False,
    )
    return {
        **tree,
        "cluster": {**cluster, "network": network, "operations": None},
        "hardware": read_hardware(cluster["gpu"]) if cluster["gpu"] else None,
        "stages": [{**stage, "layout": {**layout, **stage["layout"]}} for stage in tree["stages"]],
    }


def add_launching(tree: dict[str, Any]) -> dict[str, Any]:
    """Schema 4 to 5: how jobs are launched and watched before it could be said. `container` was a name that nothing read."""
    launching: dict[str, Any] = dict(cpu_partition=None, sbatch_options=[], spare_nodes=0, checks=None, container=None)
    wandb = {"key_file": None, **tree["monitor"]["wandb"]}
    stages = [
        {**row, "stage": {**row["stage"], "checkpoint": {"keep_every_tokens": None, **row["stage"]["checkpoint"]}}}
        for row in tree["stages"]
    ]
    hang = {"factor": 20.0, "least_s": 120.0, "start_s": 1800.0, "pause_s": 1800.0}
    return {
        **tree,
        "run": {**tree["run"], "after": []},
        "cluster": {**tree["cluster"], **launching},
        "monitor": {"hang": hang, **tree["monitor"], "wandb": wandb},
        "stages": stages,
    }


def add_health(tree: dict[str, Any]) -> dict[str, Any]:
    """Schema 5 to 6: what is watched, and what is done about it, before it could be said: NaN ended the run."""
    spike: dict[str, Any] = {"z": 10.0, "patience_steps": 1, "action": "note", "budget": 1000}
    health = {
        "window_steps": 128,
        "skip_before_steps": 0,
        "non_finite": {"action": "stop", "budget": 0},
        "loss_spike": spike,
        "grad_norm": spike,
        "straggler": {"factor": 1.5, "rows": 3, "action": "note", "budget": 1000},
        "corruption": {"interval_steps": None, "tolerance": 1e-3, "action": "restart", "budget": 2},
        "data_stall": {"limit_s": 60.0, "action": "note"},
        "checkpoint": {"action": "restart", "budget": 3},
        "disk_low": {"free_gib": 0.0, "action": "note"},
        "device_error": {"interval_s": 60.0, "action": "note", "budget": 1000},
    }
    checkpoint = {"keep_best": 0, "asynchronous": True}
    stages = [
        {**row, "stage": {"deterministic": False, **row["stage"], "checkpoint": {**checkpoint, **row["stage"]["checkpoint"]}}}
        for row in tree["stages"]
    ]
    restarts = 2 if tree["cluster"]["kind"] == "slurm" else 0
    return {
        **tree,
        "cluster": {"restarts": restarts, **tree["cluster"]},
        "monitor": {"health": health, **tree["monitor"]},
        "stages": stages,
    }


def add_kernels(tree: dict[str, Any]) -> dict[str, Any]:
    """Schema 6 to 7: kernels, moments, RoPE scaling and tasks before there was a choice."""
    evaluation: dict[str, Any] = dict(tasks=[], task_dir=None, num_fewshot=None, limit=None)
    kernels: dict[str, Any] = dict(cuda_graph_impl="none", cpu_offloading_num_layers=0, cross_entropy_fusion_impl="none")
    defaults: dict[str, dict[str, Any]] = dict(
        stage=dict(rope_scaling=None), layout=kernels, precision=dict(moments_dtype="fp32"), optim=dict(keep_moments=False)
    )
    stages = [{**row, **{name: {**added, **row[name]} for name, added in defaults.items()}} for row in tree["stages"]]
    return {**tree, "run": {"after_stages": [], "evaluation": evaluation, **tree["run"]}, "stages": stages}


def write_config(run: RunDir, config: RunConfig) -> None:
    """The config as ranks read it, and nothing of a run around it."""
    text = yaml.safe_dump(dump_run(config), sort_keys=False, width=128, allow_unicode=True)
    write_atomic(run.config, HEADER.format(version=code_version()["version"]) + text)


def _write(run: RunDir, *, config: RunConfig, prepared: Prepared | None) -> None:
    write_config(run, config)
    tables = {name: rows for name, rows in recorded_tables(run).items() if name in config.stage_names}
    with suppress(AmountError):  # epochs of a source whose size is not known before its data is made
        write_json(run.plan, plan_document(config, sizes=prepared.sizes if prepared else {}, tables=tables))


def _record(run: RunDir, *, changes: Changes) -> None:
    for name in changes.added_stages:
        append_record(run.events, "stage_added", stage=name)
    if changes.amended:
        append_record(run.events, "amended", changes={path: [old, new] for path, old, new in changes.amended})


def _record_code(run: RunDir) -> None:
    """code.json says what code works on the run now; events say when that changed."""
    code = code_version()
    before = read_json(run.code) if run.code.exists() else None
    if before == code:
        return
    write_json(run.code, code)
    if before is not None:
        append_record(run.events, "code_changed", changes=dict(_differing(before, after=code)))


def _differing(before: dict[str, Any], *, after: dict[str, Any]) -> Iterable[tuple[str, list[Any]]]:
    for key in before.keys() | after.keys():
        if before.get(key) != after.get(key):
            yield key, [before.get(key), after.get(key)]
