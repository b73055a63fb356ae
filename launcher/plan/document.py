"""The plan as plain data: one object a stage. `phidias plan out=json` prints it, plan.json of a run directory holds it."""

from dataclasses import asdict
from typing import Any

from launcher.config.schema import RunConfig, StageConfig
from launcher.plan.parameters import count_by_stage, count_parameters, flops_per_token
from launcher.plan.stage import bubble_fraction, plan_stage


def plan_document(config: RunConfig) -> list[dict[str, Any]]:
    """What each selected stage comes to. `refusals` is empty: a config that does not fit is refused before it gets here."""
    return [_stage_document(stage, config=config) for stage in config.stages]


def _stage_document(stage: StageConfig, *, config: RunConfig) -> dict[str, Any]:
    plan, layout = plan_stage(stage, cluster=config.cluster), stage.layout
    dp = plan.data_parallel_size
    return {
        "run": config.run.name,
        "stage": stage.stage.name,
        "model": config.model.name,
        "num_params": count_parameters(config.model).total,
        "params_by_pipeline_stage": [count.total for count in count_by_stage(config.model, layout=layout)],
        "flops_per_token": flops_per_token(config.model, seq_length=stage.stage.seq_length),
        "cluster": config.cluster.name,
        "world_size": config.cluster.world_size,
        "layout": {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "dp": dp},
        "precision": stage.precision.name,
        "seq_length": stage.stage.seq_length,
        "rotary_base": stage.stage.rotary_base,
        "global_batch_size": stage.stage.global_batch_size,
        "micro_batch_size": layout.micro_batch_size,
        "tokens": stage.stage.tokens,
        **{key: value for key, value in asdict(plan).items() if key != "data_parallel_size"},
        "bubble_fraction": bubble_fraction(layout, num_microbatches=plan.num_microbatches),
        "sources": {name: source.share for name, source in stage.mixture.sources.items()},
        "refusals": [],
    }
