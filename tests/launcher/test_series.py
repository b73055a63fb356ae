"""The series of sizes: each keeps the rules that its YAML states, and the planner finds it a layout."""

import math
from itertools import pairwise

import pytest

from launcher.config.compose import compose_run
from launcher.plan.document import plan_document
from launcher.plan.parameters import count_parameters
from launcher.plan.planner import Planner

# Parameters in all, and nodes.
SIZES = {
    "series_100m": (99e6, 1), "series_200m": (200e6, 1), "series_400m": (403e6, 2), "series": (1.28e9, 2),
    "series_3b": (3.24e9, 4), "series_7b": (7.2e9, 15), "series_14b": (14.66e9, 32),
}  # fmt: skip


@pytest.mark.parametrize("run", SIZES)
def test_a_size_keeps_the_rules_of_the_series(run: str) -> None:
    config = compose_run([f"run={run}"], planner=Planner())
    (stage,), model, (parameters, nodes) = config.stages, config.model, SIZES[run]
    count, settings = count_parameters(model).total, stage.stage
    assert count == pytest.approx(parameters, rel=0.01) and config.cluster.num_nodes == nodes
    assert settings.tokens == pytest.approx(20 * count, rel=0.03)
    flops = 6 * count * settings.tokens
    assert stage.optim.lr == pytest.approx(0.3118 * flops**-0.125, rel=0.03)
    batch = settings.global_batch_size * settings.seq_length
    assert batch == pytest.approx(0.2920 * flops**0.3271, rel=0.11)
    assert stage.optim.warmup_tokens == pytest.approx(settings.tokens / 100, rel=0.02)
    assert model.num_attention_heads * model.kv_channels == model.hidden_size
    assert model.num_attention_heads == 4 * model.num_query_groups
    assert model.ffn_hidden_size / model.hidden_size == pytest.approx(3.5, rel=0.12)
    (plan,) = plan_document(config)
    assert plan["refusals"] == [] and 7_000 < plan["num_steps"] < 50_000
    assert plan["validation_samples"] == pytest.approx(plan["num_samples"] / 20, rel=0.01)


def test_larger_models_take_more_of_everything_and_smaller_steps() -> None:
    stages = [compose_run([f"run={run}", "layout=dp"]).stages[0] for run in SIZES]
    for before, after in pairwise(stages):
        assert before.stage.tokens < after.stage.tokens and before.stage.global_batch_size < after.stage.global_batch_size
        assert before.optim.lr > after.optim.lr
    assert math.isclose(stages[-1].optim.lr / stages[0].optim.lr, (14.66e9**2 / 99e6**2) ** -0.125, rel_tol=0.03)
