"""Measured speed in the plan's terms."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import compose_run
from launcher.plan.document import plan_document
from launcher.plan.parameters import flops_per_token
from launcher.rundir.speed import mfu_of, read_plan, speed_fields

CONFIG = compose_run(["run=phi4", "stage=pretrain"])
(PLAN,) = plan_document(CONFIG)
GIB = 1 << 30


def test_what_runs_as_planned_has_the_figures_of_the_plan() -> None:
    found = speed_fields(PLAN, tokens_per_s=PLAN["tokens_per_s"], memory_bytes=PLAN["memory_gib"]["peak"] * GIB)
    assert found == pytest.approx(
        {
            "tokens_per_s_per_gpu": PLAN["tokens_per_s_per_gpu"],
            "tflops_per_gpu": PLAN["model_tflops_per_gpu"]["causal"],
            "mfu": PLAN["mfu"],
            "speed_vs_plan": 1.0,
            "memory_vs_plan": 1.0,
        },
        rel=1e-5,
    )


def test_half_the_speed_is_half_of_everything() -> None:
    found = speed_fields(PLAN, tokens_per_s=PLAN["tokens_per_s"] / 2, memory_bytes=0.0)
    assert found["mfu"] == pytest.approx(PLAN["mfu"] / 2, rel=1e-5) and found["speed_vs_plan"] == 0.5
    flops = flops_per_token(CONFIG.model, seq_length=CONFIG.stages[0].stage.seq_length)["causal"]
    by_hand = flops * PLAN["tokens_per_s"] / 2 / CONFIG.cluster.world_size / 1e12
    assert found["tflops_per_gpu"] == pytest.approx(by_hand, rel=1e-5)


def test_cpu_ranks_have_no_peak_and_no_prediction() -> None:
    (plan,) = plan_document(compose_run(["run=demo", "stage=demo_pretrain"]))
    assert set(speed_fields(plan, tokens_per_s=100.0, memory_bytes=1.0)) == {"tokens_per_s_per_gpu", "tflops_per_gpu"}
    assert mfu_of(plan, tokens_per_s=100.0) is None


@pytest.mark.parametrize("speed", [None, "fast", float("nan"), True])
def test_what_is_no_speed_has_no_mfu(speed: Any) -> None:
    assert mfu_of(PLAN, tokens_per_s=speed) is None


def test_a_run_without_a_plan_says_nothing_of_it(tmp_path: Path) -> None:
    assert read_plan(tmp_path / "plan.json") == {}
    (tmp_path / "plan.json").write_text("[{")
    assert read_plan(tmp_path / "plan.json") == {}
    assert speed_fields({}, tokens_per_s=100.0, memory_bytes=1.0) == {}
    (tmp_path / "plan.json").write_text(json.dumps([PLAN]))
    assert list(read_plan(tmp_path / "plan.json")) == ["pretrain"]
