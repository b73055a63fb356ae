"""The first check of a GPU: the tiny model through training.model with transformer-engine, in bf16 and three FP8 recipes, and
with documents apart (packed rows, transformer-engine's thd attention).

    benchmarks/gpu_smoke.sh                  all of it, on a machine with one Hopper GPU
    python -m tests.gpu.test_smoke           these checks without pytest
    python -m tests.gpu.test_smoke --cpu     the same code in bf16 on CPU ranks: a rehearsal of this file, not of the GPU

NOT YET RUN ON A GPU (as of 2026-11-21): none could be had. Until then only the rehearsal has passed, and every tolerance below
that concerns FP8 is an expectation.

Each case trains in a process of its own, so that one recipe's state, or its crash, does not reach the next.
"""

import functools
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import pytest
except ModuleNotFoundError:  # a bare GPU machine: see the runner at the end
    pytest = None  # type: ignore[assignment]

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 20
TIMEOUT_S = 180  # a case takes some 15 s, of which most are imports
# Every dimension of a linear layer, and the tokens of a micro batch, are multiples of 128: blockwise FP8 needs that. The wide
# initial weights move the first loss well away from ln(vocabulary), so that it says something about them.
MODEL = dict(
    hidden_size=256, num_attention_heads=4, num_query_groups=2, kv_channels=64, ffn_hidden_size=512, num_layers=4,
    init_method_std=0.1,
)  # fmt: skip
SEQ_LENGTH, MICRO_BATCH = 128, 2
# As in model_configs/precision.
BF16 = dict(name="bf16", params_dtype="bf16")
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": BF16,
    "fp8_delayed": dict(BF16, fp8="delayed", fp8_format="hybrid", fp8_amax_history_len=1024),
    "fp8_tensorwise": dict(
        BF16, fp8="tensorwise", fp8_format="hybrid", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1
    ),
    "fp8_blockwise": dict(BF16, fp8="blockwise", fp8_format="e4m3"),
    # Documents apart: on a GPU packed rows, on the CPU a mask. (Context parallelism needs more GPUs than one.)
    "fp32_documents": {},
    "bf16_documents": BF16,
}
EOD = 249


def missing() -> str | None:
    """Why the checks cannot run here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine is not installed (pip install 'phidias[gpu]', or source the GPU kit's env.sh)"
    if torch.cuda.get_device_capability() < (9, 0):
        return "FP8 needs a Hopper GPU"
    return None


if pytest is not None:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


# The child: one case


def train_case(name: str, *, on_cpu: bool) -> dict[str, Any]:
    """Trains STEPS steps on one batch, saves, goes on, loads, goes on again."""
    if on_cpu:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # megatron then takes its local layers
        from training import cpu

        cpu.install()
    from pydantic import TypeAdapter

    from launcher.config.schema import ModelConfig, StageConfig
    from launcher.plan.stage import plan_stage
    from tests.training import tiny
    from training.model import build_model
    from training.optimizer import build_optimizer, build_schedule, set_schedule
    from training.parallel import initialize_parallel, join_world, leave_world
    from training.step import Stepper

    stage = TypeAdapter(StageConfig).validate_python(stage_dict(name))
    model = TypeAdapter(ModelConfig).validate_python({**tiny.MODEL, **MODEL})
    device = join_world(timeout_s=120)
    rank = initialize_parallel(stage.layout, seed=7, device=device, timeout_s=120)
    chunks = build_model(stage, model=model, seed=7)
    optimizer = build_optimizer(stage, chunks=chunks)
    plan = plan_stage(stage, cluster=tiny.run_config(Path("unused")).cluster)
    schedule = build_schedule(stage, plan=plan, optimizer=optimizer)
    stepper, batches = Stepper(stage, chunks=chunks, optimizer=optimizer, rank=rank), repeated_batches(stage, device=device)

    def step(index: int) -> tuple[float, float, float]:
        began = time.perf_counter()
        set_schedule(schedule, samples=(index + 1) * MICRO_BATCH)
        sums, norm = stepper.train(batches, num_microbatches=len(batches))
        return sums.loss, norm, time.perf_counter() - began

    losses, norms, seconds = zip(*(step(index) for index in range(STEPS)), strict=True)
    result = dict(
        losses=losses,
        norms=norms,
        step_ms=round(1e3 * sorted(seconds)[STEPS // 2], 2),
        layer=type(chunks[0].module.module.decoder.layers[0].mlp.linear_fc1).__name__ if "fp32" not in name else None,
        packed=batches[0].packed is not None,
        device=str(chunks[0].buffers[0].grad_data.device),
    )
    with tempfile.TemporaryDirectory() as folder:
        result |= check_checkpoint(Path(folder), stage=stage, chunks=chunks, optimizer=optimizer, step=step)
    leave_world()
    return result


def stage_dict(name: str) -> dict[str, Any]:
    from tests.training import tiny

    masked = name.endswith("documents")
    return tiny.stage_config(
        precision=PRECISIONS[name],
        layout=dict(micro_batch_size=1 if masked else MICRO_BATCH),
        stage=dict(
            seq_length=SEQ_LENGTH, global_batch_size=MICRO_BATCH, tokens=2.0 * STEPS * SEQ_LENGTH * MICRO_BATCH,
            reset_attention_mask=masked, reset_position_ids=masked,
        ),
        optim=dict(lr=2e-4, min_lr=1e-4, warmup_tokens=0.0),
    )  # fmt: skip


def repeated_batches(stage: Any, *, device: torch.device) -> list[Any]:
    """Two rows, each a micro batch where documents are apart. They also end at a row's beginning and at its end."""
    from training.batch import micro_batches, stream_rows

    tokens = torch.randint(EOD, (MICRO_BATCH, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(3)).int().numpy()
    tokens[0, [20, 21, 45, 70, 100]] = tokens[1, [0, 33, 66, 99, SEQ_LENGTH - 1]] = EOD
    # Every label counts in all cases: what the masks change is what attention sees.
    masks = dict(reset_attention_mask=stage.stage.reset_attention_mask, eod_mask_loss=False)
    rows = stream_rows(tokens, source=np.arange(MICRO_BATCH, dtype=np.int32), eod_id=EOD, **masks)
    return micro_batches(rows, stage=stage, device=device)


def check_checkpoint(folder: Path, *, stage: Any, chunks: Any, optimizer: Any, step: Any) -> dict[str, Any]:
    """Save, two steps, load in place: every weight and moment as at the save, and the next loss the same again."""
    from launcher.rundir.checkpoints import FORMAT_VERSION, Meta, newest_checkpoint
    from launcher.rundir.paths import RunDir
    from training.checkpoint import Checkpointer, layout_key

    run = RunDir(folder / "run")
    checkpointer = Checkpointer(run, stage="pretrain", layout=stage.layout, chunks=chunks, optimizer=optimizer)
    meta = Meta(
        format_version=FORMAT_VERSION, stage="pretrain", step=STEPS, samples=STEPS * MICRO_BATCH, tokens=0, finished=False,
        layout=layout_key(stage.layout), ledger={}, start_ledger={}, tokens_by_source={}, files={},
    )  # fmt: skip
    saved_state = snapshot(chunks, optimizer=optimizer)
    checkpointer.save(meta, policy=stage.stage.checkpoint)
    first = [step(STEPS + index)[0] for index in range(2)]
    moved_state = snapshot(chunks, optimizer=optimizer)
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved is not None, refused
    checkpointer.load(saved, stage.optim)
    loaded_state = snapshot(chunks, optimizer=optimizer)
    second = [step(STEPS + index)[0] for index in range(2)]
    return dict(
        tensors=len(saved_state),
        moved=sum(not torch.equal(saved_state[key], moved_state[key]) for key in saved_state),
        differing=[key for key in saved_state if not torch.equal(saved_state[key], loaded_state[key])],
        after_save=first,
        after_load=second,
    )


def snapshot(chunks: Any, *, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights as they are computed with, the fp32 master weights and the moments; copies."""
    found = {f"weight {i} {name}": p for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    for i, inner in enumerate(optimizer.chained_optimizers):
        for j, group in enumerate(inner.optimizer.param_groups):
            for k, parameter in enumerate(group["params"]):
                found[f"master {i} {j} {k}"] = parameter
                for key, value in inner.optimizer.state[parameter].items():
                    if isinstance(value, torch.Tensor):
                        found[f"{key} {i} {j} {k}"] = value
    return {key: value.detach().float().cpu().clone() for key, value in found.items()}


# The parent: what must hold


@functools.cache
def case(name: str, *, on_cpu: bool = False) -> dict[str, Any]:
    """The results of a case, from a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.test_smoke", "--case", name, *(["--cpu"] if on_cpu else [])]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    world = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PYTHONPATH=path)
    hidden = dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1") if on_cpu else {}
    environment = {**os.environ, **world, **hidden}
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        os.killpg(child.pid, signal.SIGKILL)  # the writers of its checkpoints too
        raise AssertionError(f"{name}: no result after {TIMEOUT_S} s: {(error.stderr or b'')[-3000:]!r}") from None
    assert child.returncode == 0, f"{name}: {err[-6000:]}"
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    losses = " ".join(f"{loss:.3f}" for loss in result["losses"][::5])
    print(f"{name}: {result['device']}, {result['layer']}, {result['step_ms']} ms a step, loss {losses}", flush=True)
    return result


def reference(name: str) -> dict[str, Any]:
    """What the case computes in fp32 on the CPU."""
    return case("fp32_documents" if name.endswith("documents") else "fp32", on_cpu=True)


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def check_learns(found: dict[str, Any], *, name: str) -> None:
    losses = found["losses"]
    assert len(losses) == STEPS
    assert all(math.isfinite(value) for value in (*losses, *found["norms"])), f"{name}: {losses} {found['norms']}"
    assert losses[-1] < 0.5 * losses[0], f"{name}: {losses}"


def check_same_model(found: dict[str, Any], *, name: str, loss: float, norm: float) -> None:
    """Its first step is that of fp32 on the CPU, within the relative tolerances: the same weights, the same arithmetic."""
    expected = reference(name)
    assert abs(expected["losses"][0] - math.log(256)) > 0.3, "the reference's loss says nothing about its weights"
    for key, tolerance in (("losses", loss), ("norms", norm)):
        error = relative(found[key][0], expected[key][0])
        assert error < tolerance, f"{name}: first of {key} is {found[key][0]}, fp32 on the CPU has {expected[key][0]}"


def check_checkpoint_result(found: dict[str, Any], *, name: str) -> None:
    assert found["moved"] > found["tensors"] / 2, f"{name}: two steps changed {found['moved']} of {found['tensors']} tensors"
    assert found["differing"] == [], f"{name}: not restored bit for bit: {found['differing'][:10]}"
    error = relative(found["after_load"][0], found["after_save"][0])
    assert error < 1e-4, f"{name}: after the load {found['after_load']}, before it {found['after_save']}"


def check_on_gpu(name: str, *, loss: float, norm: float) -> None:
    found = case(name)
    assert found["device"].startswith("cuda"), found["device"]
    assert found["layer"] == "TELayerNormColumnParallelLinear", found["layer"]
    check_learns(found, name=name)
    check_same_model(found, name=name, loss=loss, norm=norm)
    check_checkpoint_result(found, name=name)


def check_fp8(name: str) -> None:
    check_on_gpu(name, loss=0.05, norm=0.25)
    # megatron-core falls back to bf16 in silence; FP8 rounds differently.
    assert case(name)["losses"][0] != case("bf16")["losses"][0], f"{name} computed what bf16 computes"


def test_bf16() -> None:
    check_on_gpu("bf16", loss=0.02, norm=0.05)


def test_documents() -> None:
    """Packed rows through transformer-engine are what the CPU's mask makes of them."""
    check_on_gpu("bf16_documents", loss=0.02, norm=0.05)
    assert case("bf16_documents")["packed"]
    check_documents(case("bf16_documents"))


def check_documents(found: dict[str, Any]) -> None:
    """Fresh weights hardly attend; after five steps they do, and what attention sees shows in the loss."""
    whole, apart = (case(name, on_cpu=True)["losses"][5] for name in ("fp32", "fp32_documents"))
    assert relative(apart, whole) > 0.1, f"masks that change little prove little: {apart}, without them {whole}"
    assert relative(found["losses"][5], apart) < 0.05, f"sixth loss is {found['losses'][5]}, fp32 on the CPU has {apart}"


def test_fp8_delayed() -> None:
    check_fp8("fp8_delayed")


def test_fp8_tensorwise() -> None:
    check_fp8("fp8_tensorwise")


def test_fp8_blockwise() -> None:
    check_fp8("fp8_blockwise")


def rehearse() -> None:
    """What can be checked of this file without a GPU."""
    found = case("bf16", on_cpu=True)
    check_learns(reference("bf16"), name="fp32")
    check_learns(found, name="bf16")
    check_same_model(found, name="bf16", loss=0.02, norm=0.05)
    for name, result in (("fp32", reference("bf16")), ("bf16", found)):
        check_checkpoint_result(result, name=name)
    check_same_model(case("bf16_documents", on_cpu=True), name="bf16_documents", loss=0.02, norm=0.05)
    check_documents(case("bf16_documents", on_cpu=True))


GPU_CHECKS = (test_bf16, test_documents, test_fp8_delayed, test_fp8_tensorwise, test_fp8_blockwise)


def main() -> int:
    """Runs the checks one after the other without pytest; 1 where one fails or none can run."""
    if "--case" in sys.argv:
        print(json.dumps(train_case(sys.argv[sys.argv.index("--case") + 1], on_cpu="--cpu" in sys.argv)))
        return 0
    if "--cpu" not in sys.argv and missing():
        print(f"cannot run: {missing()}")
        return 1
    failed = 0
    for check in [rehearse] if "--cpu" in sys.argv else GPU_CHECKS:
        try:
            check()
            print(f"passed  {check.__name__}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"FAILED  {check.__name__}: {error}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
