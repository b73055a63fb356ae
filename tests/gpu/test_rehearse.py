"""Ranks of a pretended world on one GPU: a small model in bf16 and FP8, in every pipeline stage, and beside the plan.

    python -m tests.gpu.test_rehearse           these checks without pytest, on a machine with one Hopper GPU
    python -m tests.gpu.test_rehearse --cpu     the same code in bf16 on the CPU: a rehearsal of this file, not of the GPU

NOT YET RUN ON A GPU (as of 2026-11-22): none could be had. What is expected of memory and of kernels' names is from reading.

Each case runs in a process of its own, so that one recipe's state, or its crash, does not reach the next.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    import pytest
except ModuleNotFoundError:  # a bare GPU machine: see the runner at the end
    pytest = None  # type: ignore[assignment]

from tests.gpu.test_smoke import PRECISIONS, REPOSITORY, missing

TIMEOUT_S = 300
# Large enough that GEMMs and activations are what a rank's time and memory go into; multiples of 128 on each of two ranks.
MODEL = dict(
    hidden_size=1024, num_attention_heads=8, num_query_groups=2, kv_channels=128, ffn_hidden_size=4096, num_layers=8,
    vocab_size=32000, padded_vocab_size=32000, init_method_std=0.02,
)  # fmt: skip
SEQ_LENGTH = 2048
ON_CPU: dict[str, Any] = dict(hidden_size=128, num_attention_heads=4, kv_channels=32, ffn_hidden_size=256, vocab_size=1000,
                              padded_vocab_size=1024)  # fmt: skip
INTERLEAVED = dict(tp=2, pp=2, vpp=2, sequence_parallel=True, overlap_grad_reduce=True, overlap_param_gather=True)
WORLD = 16
# Name: precision, layout, rank, whether documents are apart.
CASES: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "bf16_first": ("bf16", INTERLEAVED, 0, False),
    "bf16_last": ("bf16", INTERLEAVED, 15, False),
    "fp8_delayed": ("fp8_delayed", INTERLEAVED, 8, False),
    "fp8_tensorwise": ("fp8_tensorwise", INTERLEAVED, 0, False),
    "fp8_blockwise": ("fp8_blockwise", INTERLEAVED, 8, False),
    "ring": ("bf16", dict(cp=2, pp=2), 3, False),
    "ring_documents": ("bf16", dict(cp=2, pp=2), 11, True),
    "alone": ("bf16", {}, 0, False),
}

if pytest is not None:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


# The child: one case


def rehearse_case(name: str, *, on_cpu: bool) -> dict[str, Any]:
    if on_cpu:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # megatron then takes its local layers
        from training import cpu

        cpu.install()
    from training.rehearse import build_rehearsal, measure, pretended_rank, profiled, rehearsed_stage

    config, rank = config_of(name, on_cpu=on_cpu), CASES[name][2]
    stage = rehearsed_stage(config.stages[0])
    with pretended_rank(config, stage=stage, rank=rank) as (placed, world):
        rehearsal = build_rehearsal(config, stage=stage, rank=placed, world=world)
        measured = measure(rehearsal, steps=3)
        table, measured["kernels"] = profiled(rehearsal)
        measured["data"] = "random"
    print(table, file=sys.stderr)
    return measured


def config_of(name: str, *, on_cpu: bool) -> Any:
    """On an H100's or H200's constants; on the CPU without any."""
    from tests.training import tiny

    precision, layout, _, apart = CASES[name]
    world = WORLD if layout else 1
    parts = {"tp": 1, "pp": 1, "cp": 1, **layout}
    dp = world // (parts["tp"] * parts["pp"] * parts["cp"])
    settings = dict(seq_length=256 if on_cpu else SEQ_LENGTH, global_batch_size=4 * dp, reset_attention_mask=apart,
                    reset_position_ids=apart)  # fmt: skip
    stage = tiny.stage_config(layout=layout, stage=settings, precision={} if on_cpu else PRECISIONS[precision])
    model = MODEL | (ON_CPU if on_cpu else {})
    return tiny.run_config(Path(tempfile.gettempdir()), ranks=world, stages=[stage], model=model)


# The checks


def case(name: str, *, on_cpu: bool = False) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.test_rehearse", "--case", name, *(["--cpu"] if on_cpu else [])]
    environment = {**os.environ, "LOCAL_RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": paths()}
    if on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode == 0, f"{name} ended with {ended.returncode}:\n{ended.stderr[-4000:]}"
    print(ended.stderr[-3000:])
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def paths() -> str:
    return os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


def check(name: str, *, on_cpu: bool = False) -> None:
    from launcher.plan.parameters import count_by_stage

    config, found = config_of(name, on_cpu=on_cpu), case(name, on_cpu=on_cpu)
    stage = config.stages[0]
    counts = [count.total for count in count_by_stage(config.model, layout=stage.layout)]
    assert found["num_params"] == counts[found["pipeline_stage"]]
    assert found["problems"] == [], found["problems"]
    for row in found["steps"]:
        assert math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
        assert row["forward_s"] > 0 and row["backward_s"] > 0 and row["optimizer_s"] > 0
        inside = sum(row["stand_in_s"].values())
        assert 0 <= inside < row["step_s"] / 2 and (inside > 0 or name == "alone"), inside
    kernels = found["kernels"]
    assert kernels["gemm"] > 0 and kernels["attention"] > 0, kernels
    check_memory(found, config=config, stage=stage, name=name, on_cpu=on_cpu)


def check_memory(found: dict[str, Any], *, config: Any, stage: Any, name: str, on_cpu: bool) -> None:
    held, width = found["memory_bytes"], 4 if on_cpu else 2
    assert abs(held["weights"] / (width * found["num_params"]) - 1) < 0.02, held
    assert abs(held["gradients"] / (4 * found["num_params"]) - 1) < 0.02, held
    if on_cpu:
        return
    parts = ("weights", "gradients", "optimizer", "held_besides", "activations", "slack", "context")
    assert abs(sum(held[part] for part in parts) / held["peak"] - 1) < 0.02, held
    planned = planned_activations(config, stage=stage, pipeline_stage=found["pipeline_stage"])
    assert 0.7 < held["activations"] / planned < 1.5, f"{name}: activations {held['activations']}, planned {planned}"


def planned_activations(config: Any, *, stage: Any, pipeline_stage: int) -> float:
    from pydantic import TypeAdapter

    from launcher.config.hardware import Hardware, read_hardware
    from launcher.plan.memory import Memory
    from launcher.plan.rehearsal import MEMORY_ROWS

    hardware = TypeAdapter(Hardware).validate_python(read_hardware("h200_sxm"))
    memory = Memory(stage, model=config.model, cluster=config.cluster, hardware=hardware)
    sizes = memory.stages[pipeline_stage].by_component
    return sum(size for key, size in sizes.items() if key.split(":")[0] in MEMORY_ROWS["activations"])


if pytest is not None:

    @pytest.mark.parametrize("name", CASES)
    def test_a_rank_is_rehearsed(name: str) -> None:
        check(name)


def main() -> int:
    """Runs the checks one after the other without pytest; 1 where one fails or none can run."""
    on_cpu = "--cpu" in sys.argv
    if "--case" in sys.argv:
        print(json.dumps(rehearse_case(sys.argv[sys.argv.index("--case") + 1], on_cpu=on_cpu)))
        return 0
    if not on_cpu and missing():
        print(f"cannot run: {missing()}")
        return 1
    failed = 0
    for name in CASES:
        if on_cpu and "fp8" in name:
            continue
        try:
            check(name, on_cpu=on_cpu)
            print(f"passed  {name}", flush=True)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"FAILED  {name}: {error}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
