"""The first check of a GPU: the tiny model through training.model with transformer-engine, in bf16 and three FP8 recipes, with
documents apart (packed rows, transformer-engine's thd attention), and with every option that GPUs alone have.

    benchmarks/gpu_session.sh checks         all of it, on a machine with one Hopper GPU
    python -m tests.gpu.test_smoke           these checks without pytest
    python -m tests.gpu.test_smoke --cpu     the same code in bf16 on CPU ranks: a rehearsal of this file, not of the GPU

NOT YET RUN ON A GPU (as of 2026-11-22): none could be had. Until then only the rehearsal has passed, and every tolerance below
that concerns FP8 is an expectation.

Each case (tests/gpu/cases.py) trains in a process of its own, so that one recipe's state, or its crash, does not reach the
next.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.gpu.cases import CASES, STEPS
from tests.gpu.cases import PRECISIONS as PRECISIONS

try:
    import pytest
except ModuleNotFoundError:  # a bare GPU machine: see the runner at the end
    pytest = None  # type: ignore[assignment]

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180  # a case takes some 15 s, of which most are imports
AT_ONCE = 4  # cases that the runner without pytest has under way: one alone leaves the GPU idle


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


# The parent: what must hold


def case(name: str, *, on_cpu: bool = False) -> dict[str, Any]:
    """The results of a case. One that has failed fails again at once."""
    found = outcome(name, on_cpu=on_cpu)
    if isinstance(found, AssertionError):
        raise found
    return found


@functools.cache
def outcome(name: str, *, on_cpu: bool) -> dict[str, Any] | AssertionError:
    try:
        return run_case(name, on_cpu=on_cpu)
    except AssertionError as error:
        return error


def run_case(name: str, *, on_cpu: bool) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.cases", name, *(["--cpu"] if on_cpu else [])]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    world = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PYTHONPATH=path)
    world |= dict(CUDA_DEVICE_MAX_CONNECTIONS="1", NCCL_GRAPH_REGISTER="0")  # as launcher/jobs/local.py sets them
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
    return case("fp32_documents" if CASES[name].documents else "fp32", on_cpu=True)


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


# Options of GPUs alone


def check_as_without(name: str, *, plain: str, first: float, last: float) -> dict[str, Any]:
    """Trains as the case without the option does, within relative tolerances of the first loss and of the last; its main
    weights began as drawn, and its checkpoint is whole."""
    found, expected = case(name), case(plain)
    check_learns(found, name=name)
    for index, tolerance in ((0, first), (-1, last)):
        pair = found["losses"][index], expected["losses"][index]
        assert relative(*pair) < tolerance, f"{name}: loss {index} is {pair[0]}, without the option {pair[1]}"
    check_main_weights(found, name=name)
    check_checkpoint_result(found, name=name)
    return found


def check_main_weights(found: dict[str, Any], *, name: str) -> None:
    assert found["main_weights"] > 4 * 4, f"{name}: {found['main_weights']} main weights were found"
    assert found["wrong_main_weights"] == [], f"{name}: {found['wrong_main_weights']} did not begin as drawn"


def test_main_weights() -> None:
    check_main_weights(case("bf16"), name="bf16")


def test_graphs() -> None:
    """A replayed layer computes what a launched one does."""
    found = check_as_without("graphs", plain="bf16", first=1e-3, last=0.02)
    assert found["graphs"] >= 4, f"{found['graphs']} layers were captured"
    assert case("bf16")["graphs"] == 0


def test_graphs_fp8() -> None:
    found = check_as_without("graphs_fp8", plain="fp8_tensorwise", first=0.01, last=0.05)
    assert found["graphs"] >= 4, f"{found['graphs']} layers were captured"


def test_native_loss() -> None:
    check_as_without("native_loss", plain="bf16", first=0.01, last=0.02)


def test_unfused_loss() -> None:
    check_as_without("unfused_loss", plain="bf16", first=0.01, last=0.02)


def test_bf16_moments() -> None:
    check_moments("bf16_moments", plain="bf16")


def test_fp8_bf16_moments() -> None:
    check_moments("fp8_bf16_moments", plain="fp8_delayed")


def check_moments(name: str, *, plain: str) -> None:
    """They change the updates alone, so the first loss not at all, and the main weights stay where they are."""
    found = check_as_without(name, plain=plain, first=1e-3, last=0.1)
    assert found["moments"] == ["torch.bfloat16"], found["moments"]
    assert case(plain)["moments"] == ["torch.float32"], case(plain)["moments"]


def test_tensorwise_gather() -> None:
    check_as_without("tensorwise_gather", plain="fp8_tensorwise", first=0.01, last=0.05)


def test_blockwise_gather() -> None:
    check_as_without("blockwise_gather", plain="fp8_blockwise", first=0.01, last=0.05)


def test_offloading() -> None:
    """Activations of half of the layers wait on the host."""
    check_less_memory("offloading")


def test_recompute_mlp() -> None:
    check_less_memory("recompute_mlp")


def test_recompute_full() -> None:
    check_less_memory("recompute_full")


def check_less_memory(name: str) -> None:
    found = check_as_without(name, plain="long", first=1e-3, last=0.02)
    assert found["step_mib"] < 0.95 * case("long")["step_mib"], f"{name}: {found['step_mib']}, {case('long')['step_mib']} MiB"


def rehearse_first() -> None:
    """What can be checked of this file without a GPU."""
    found = case("bf16", on_cpu=True)
    check_learns(reference("bf16"), name="fp32")
    check_learns(found, name="bf16")
    check_same_model(found, name="bf16", loss=0.02, norm=0.05)
    for name, result in (("fp32", reference("bf16")), ("bf16", found)):
        check_checkpoint_result(result, name=name)


def rehearse_documents() -> None:
    check_same_model(case("bf16_documents", on_cpu=True), name="bf16_documents", loss=0.02, norm=0.05)
    check_documents(case("bf16_documents", on_cpu=True))


def rehearse_options() -> None:
    """Those that CPU ranks have too."""
    check_main_weights(case("bf16", on_cpu=True), name="bf16")
    assert case("bf16", on_cpu=True)["moments"] == ["torch.float32"]
    for name in ("recompute_mlp", "recompute_full"):
        found, plain = case(name, on_cpu=True), case("bf16", on_cpu=True)
        assert relative(found["losses"][-1], plain["losses"][-1]) < 1e-3, f"{name}: {found['losses']}, {plain['losses']}"
        check_checkpoint_result(found, name=name)


REHEARSALS = (rehearse_first, rehearse_documents, rehearse_options)
GPU_CHECKS = (
    test_bf16, test_documents, test_fp8_delayed, test_fp8_tensorwise, test_fp8_blockwise, test_main_weights, test_graphs,
    test_graphs_fp8, test_native_loss, test_unfused_loss, test_bf16_moments, test_fp8_bf16_moments, test_tensorwise_gather,
    test_blockwise_gather, test_offloading, test_recompute_mlp, test_recompute_full,
)  # fmt: skip


def run_ahead() -> None:
    """All cases, some at a time; what fails is told by the check that asks for it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda name: outcome(name, on_cpu=name.startswith("fp32")), CASES))


def main() -> int:
    """Runs the checks one after the other without pytest; 1 where one fails or none can run."""
    on_cpu = "--cpu" in sys.argv
    if not on_cpu and missing():
        print(f"cannot run: {missing()}")
        return 1
    if not on_cpu:
        run_ahead()
    failed = [check for check in (REHEARSALS if on_cpu else GPU_CHECKS) if not passed(check)]
    return min(1, len(failed))


def passed(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception as error:
        print(f"FAILED  {check.__name__}: {type(error).__name__}: {error}", flush=True)
        return False
    print(f"passed  {check.__name__}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
