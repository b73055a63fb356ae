"""What watches the health of a GPU rank, on a GPU: NVML, the clock of forward passes, the digest of weights.

    benchmarks/gpu_session.sh checks

NOT YET RUN ON A GPU (as of 2026-11-22): none could be had.
"""

import importlib.util
import time

import pytest
import torch

from launcher.config.monitoring import DeviceError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed")
def test_a_sound_gpu_tells_of_nothing() -> None:
    from training.devices import DeviceWatch

    watch = DeviceWatch(DeviceError(interval_s=1e-3, action="note", budget=0), 0)
    assert watch.why_not is None
    for _ in range(3):
        assert watch.poll() is None
        assert watch.why_not is None
        time.sleep(0.01)


def test_the_clock_measures_the_gpu_and_not_the_host() -> None:
    """Kernels are queued in no time; a clock of the host would see nothing of them."""
    from training.clocks import Clock

    clock, matrix = Clock(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    for count in (0, 1, 2):  # the first warms up, the second is the measure of one step, the third of two
        for _ in range(count):
            clock.start()
            for _ in range(20):
                matrix = torch.nn.functional.normalize(matrix @ matrix)
            clock.stop()
        torch.cuda.synchronize()
        began = time.perf_counter()
        seconds = clock.take()
        assert time.perf_counter() - began < 0.1
        assert (seconds > 1e-3) == bool(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_digest_is_that_of_the_cpu_and_needs_no_memory(dtype: torch.dtype) -> None:
    from training.replicas import CHUNK_BYTES, digest

    tensor = torch.randn(2**26 + 3, device="cuda").to(dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = digest([tensor])
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 20 * CHUNK_BYTES
    assert found.item() == digest([tensor.cpu()]).item()


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed")
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_scales_are_read_where_transformer_engine_keeps_them(recipe: str) -> None:
    """Values that grow a hundredfold are cut off by a scale that knows of them only afterwards."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    from training.fp8 import scaled_tensors, summarise

    layer = te.Linear(256, 256).cuda()
    used = DelayedScaling(amax_history_len=16) if recipe == "delayed" else Float8CurrentScaling()
    overflows = []
    for size in (1.0, 1.0, 1.0, 100.0):
        with te.fp8_autocast(enabled=True, fp8_recipe=used):
            layer(size * torch.randn(256, 256, device="cuda")).sum().backward()
        least, most, cut_off, count = summarise(scaled_tensors([layer]))
        assert count > 0 and 0 < least < float("inf") and most >= size
        overflows.append(cut_off)
    assert (overflows[-1] >= 1) == (recipe == "delayed")
