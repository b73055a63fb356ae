"""The plan as plain data: one object a stage. `phidias plan out=json` prints it, plan.json of a run directory holds it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_prep.mixing import PhaseRow, mean_shares
from data_prep.order import SLOTS
from launcher.config.reading import Sizes, Tables, assumed_sizes, plan_tables
from launcher.config.schema import Layout, RunConfig, StageConfig
from launcher.plan.exposure import plan_exposure
from launcher.plan.parameters import count_by_stage, count_parameters, flops_per_token
from launcher.plan.predict import predict_stage
from launcher.plan.stage import bubble_fraction, plan_stage


def plan_document(config: RunConfig, *, sizes: Sizes | None = None, tables: Tables | None = None) -> list[dict[str, Any]]:
    """What each selected stage comes to, predictions among it; null where the cluster has no GPUs. `refusals` says why a stage
    should not be started: it does not fit its GPUs. What breaks a rule of the config is refused before it gets here.

    `sizes`: what manifests say; `tables`: the phases a run has recorded. AmountError where epochs have no size yet."""
    known = {**assumed_sizes(config), **(sizes or {})}
    rows = {**plan_tables(config, sizes=known), **(tables or {})}
    read = [asdict(row) for row in plan_exposure(config, sizes=known, tables=rows)]
    return [_stage_document(stage, config=config, rows=rows[stage.stage.name], exposure=read) for stage in config.stages]


def _stage_document(
    stage: StageConfig, *, config: RunConfig, rows: Sequence[PhaseRow], exposure: list[dict[str, Any]]
) -> dict[str, Any]:
    plan, layout = plan_stage(stage, cluster=config.cluster), stage.layout
    dp = plan.data_parallel_size
    prediction = predict_stage(stage, config=config, plan=plan)
    return {
        "run": config.run.name,
        "stage": stage.stage.name,
        "model": config.model.name,
        "num_params": count_parameters(config.model).total,
        "params_by_pipeline_stage": [count.total for count in count_by_stage(config.model, layout=layout)],
        "flops_per_token": flops_per_token(config.model, seq_length=stage.stage.seq_length),
        "cluster": config.cluster.name,
        "world_size": config.cluster.world_size,
        "layout": {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "dp": dp, **rest_of_layout(layout)},
        "precision": stage.precision.name,
        "seq_length": stage.stage.seq_length,
        "rotary_base": stage.stage.rotary_base,
        "global_batch_size": stage.stage.global_batch_size,
        "micro_batch_size": layout.micro_batch_size,
        "tokens": stage.stage.tokens,
        **{key: value for key, value in asdict(plan).items() if key != "data_parallel_size"},
        "bubble_fraction": bubble_fraction(layout, num_microbatches=plan.num_microbatches),
        "sources": mean_shares(rows, num_samples=plan.num_samples),
        # Over all stages planned, of the sources that this one reads.
        "exposure": [row for row in exposure if row["source"] in stage.mixture.sources],
        "phases": [_phase_document(row, seq_length=stage.stage.seq_length) for row in rows],
        **prediction,
    }


def rest_of_layout(layout: Layout) -> dict[str, Any]:
    return {name: value for name, value in asdict(layout).items() if name not in ("tp", "pp", "vpp", "cp")}


def _phase_document(row: PhaseRow, *, seq_length: int) -> dict[str, Any]:
    shares = {name: slots / SLOTS for name, slots in row.slots.items()}
    return {"start_tokens": row.start_sample * seq_length, "shares": shares}
