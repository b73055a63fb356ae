"""A start is timed from its process's own start; deterministic kernels are switched on before anything runs."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.plan.stage import plan_stage
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records
from tests.training.tiny import run_config
from tests.training.world import cpu_seams, model, stage
from training.metrics import Metrics
from training.model import transformer_config
from training.startup import Phases, compute_alike, process_age_s


def test_a_process_is_as_old_as_it_is() -> None:
    words = "import time; time.sleep(0.5); from training.startup import process_age_s; print(process_age_s())"
    began = time.monotonic()
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", words], capture_output=True, text=True, check=True).stdout
    assert 0.5 <= float(said) <= time.monotonic() - began + 0.02  # ticks of 10 ms
    assert process_age_s() > 0


def test_phases_add_up_and_are_told_once(tmp_path: Path) -> None:
    config, run = run_config(tmp_path), RunDir(tmp_path)
    plan = plan_stage(config.stages[0], cluster=config.cluster)
    metrics, phases = Metrics(run, config, stage="pretrain", plan=plan, is_writer=True), Phases()
    for name in ("imports_s", "world_s", "imports_s"):
        time.sleep(0.01)
        phases.mark(name)
    phases.end(metrics)
    phases.mark("later_s")
    phases.end(metrics)
    (row,) = read_records(run.events)
    assert list(row["phases"]) == ["imports_s", "world_s", "first_step_s"]
    assert sum(row["phases"].values()) == pytest.approx(row["total_s"], abs=0.01)
    assert row["phases"]["imports_s"] > row["phases"]["world_s"] > 0.009  # the former since the process's start


def test_deterministic_kernels_are_asked_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_ALGO", "Tree")  # a person's own
    try:
        compute_alike()
        assert torch.are_deterministic_algorithms_enabled()
        assert [os.environ[name] for name in names] == [":4096:8", "0", "Tree"]
    finally:
        torch.use_deterministic_algorithms(False)
    fields: dict[str, Any] = {"stage": {"deterministic": True}}
    with cpu_seams():
        assert transformer_config(stage(**fields), model=model()).deterministic_mode
        assert not transformer_config(stage(), model=model()).deterministic_mode
