"""How long one kernel runs on one GPU. Seconds, FLOPs (a multiply-add as two) and bytes; no measurement, no torch.

A matrix product takes the longer of its arithmetic and its traffic (the roofline). Arithmetic runs at the peak times the part
of it that a large product attains, less two losses that depend on the shape: the last wave of tiles fills the GPU by half on
average, and every tile first fills its pipeline along K.
"""

from dataclasses import dataclass
from typing import Literal

from launcher.config.hardware import Hardware

Compute = Literal["fp32", "bf16", "fp8"]

# Output tile of one thread block, cuBLAS's and CUTLASS's usual choice on Hopper for large products.
TILE_M, TILE_N = 128, 256
# Bytes along K over which a tile's pipeline of loads fills and drains, and the epilogue hides: chosen among 128 to 1,024 by the
# error over the published runs (benchmarks/planner.py).
FILL_BYTES = 1024
# Sequence length at which causal attention attains half of what it does on an endless one, for heads of 128 channels.
# FlashAttention-3's figures (Shah et al. 2024, figure 5) ask for 1,100, training's for 2,000; the latter is taken.
ATTENTION_HALF_LENGTH = 2000
# Backward computes five products to the forward's two, and attains less of the peak (the same paper's figure 6).
ATTENTION_BACKWARD_FLOPS, ATTENTION_BACKWARD_RATE = 2.5, 0.8
# Smaller heads fill the tensor cores less: the same figures at 64 channels lie at about three quarters of those at 128.
ATTENTION_CHANNELS, ATTENTION_CHANNELS_POWER = 128, 0.4
BYTES: dict[Compute, float] = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0}


@dataclass(frozen=True)
class Gemm:
    """One matrix product [m, k] x [k, n] as it ran: for tables of shapes."""

    name: str
    m: int
    n: int
    k: int
    compute: Compute
    seconds: float

    @property
    def tflops(self) -> float:
        return 2e-12 * self.m * self.n * self.k / self.seconds


class Device:
    """A GPU's kernels. Rates are worked out once: a search asks for thousands of times."""

    def __init__(self, hardware: Hardware):
        efficiency = hardware.efficiency
        self.hardware, self.num_sms = hardware, hardware.num_sms
        self.memory_bytes_per_s = hardware.memory_gb_per_s * 1e9 * efficiency.memory
        self.bf16_flops = hardware.peak_bf16_tflops * 1e12
        self.gemm_flops: dict[Compute, float] = {
            "fp32": hardware.peak_fp32_tflops * 1e12 * efficiency.gemm_bf16,
            "bf16": self.bf16_flops * efficiency.gemm_bf16,
            "fp8": (hardware.peak_fp8_tflops or 0.0) * 1e12 * efficiency.gemm_fp8,
        }
        self._gemms: dict[tuple[int, int, int, Compute, float], float] = {}

    def peak_tflops(self, compute: Compute) -> float:
        """The device's dense peak, for MFU. ValueError where it does not compute in it."""
        hardware = self.hardware
        peaks: dict[Compute, float | None] = {
            "fp32": hardware.peak_fp32_tflops,
            "bf16": hardware.peak_bf16_tflops,
            "fp8": hardware.peak_fp8_tflops,
        }
        peak = peaks[compute]
        if peak is None:
            raise ValueError(f"{hardware.name} does not compute in {compute}")
        return peak

    def gemm_s(self, m: int, n: int, k: int, *, compute: Compute, output_bytes: float = 2.0) -> float:
        """Seconds of [m, k] x [k, n]; `output_bytes` of each element of the result, 8 where it is added to an fp32 sum."""
        key = (m, n, k, compute, output_bytes)
        if key not in self._gemms:
            tiles = -(-m // TILE_M) * -(-n // TILE_N)
            waves = (tiles + self.num_sms / 2) / tiles
            fill = 1 + FILL_BYTES / (BYTES[compute] * k)
            # A tile at the border is computed whole.
            arithmetic = 2.0 * tiles * TILE_M * TILE_N * k / self.gemm_flops[compute] * waves * fill
            traffic = (BYTES[compute] * k * (m + n) + output_bytes * m * n) / self.memory_bytes_per_s
            self._gemms[key] = max(arithmetic, traffic)
        return self._gemms[key]

    def attention_s(self, flops: float, *, seq_length: int, channels: int) -> float:
        """Forward seconds of `flops` of causal attention (what the mask keeps) by a fused kernel."""
        rate = self.bf16_flops * self.hardware.efficiency.attention * seq_length / (seq_length + ATTENTION_HALF_LENGTH)
        full = float(min(1.0, channels / ATTENTION_CHANNELS) ** ATTENTION_CHANNELS_POWER)
        return flops / (rate * full)

    def traffic_s(self, num_bytes: float) -> float:
        """Seconds of a memory-bound kernel that reads and writes so many bytes."""
        return num_bytes / self.memory_bytes_per_s
