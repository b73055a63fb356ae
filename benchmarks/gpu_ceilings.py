"""What the device can do at most at the 14B's shapes, on random data: products in bf16 and FP8, attention, copies.

Shapes: T tokens, O outputs, I inputs of a linear layer; S sequence, B batch, N heads, G key/value groups, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_device import Figures, Keep, Spread, Timer, device, device_state

# Of the whole 14B: (O, I). On a rank of tensor parallelism they are narrower.
LAYERS = {"qkv": (7680, 5120), "proj": (5120, 5120), "fc1": (35840, 5120), "fc2": (5120, 17920), "head": (100352, 5120)}
TOKENS = (4096, 8192, 16384)
HEADS, GROUPS, CHANNELS = 40, 10, 128
LENGTHS = (4096, 16384)
COPY_BYTES, HOST_BYTES = 1 << 32, 1 << 30
TINY: dict[str, Any] = dict(
    layers={"qkv": (96, 64), "proj": (64, 64), "fc1": (256, 64), "fc2": (64, 128), "head": (512, 64)},
    tokens=(64,), lengths=(64,), heads=(4, 2, 16), copy_bytes=1 << 20,
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    layers: dict[str, tuple[int, int]]
    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: tuple[int, int, int]
    copy_bytes: int

    @classmethod
    def of(cls, *, tiny: bool) -> "Sizes":
        return cls(**TINY) if tiny else cls(LAYERS, TOKENS, LENGTHS, (HEADS, GROUPS, CHANNELS), COPY_BYTES)


def measure_ceilings(keep: Keep, *, tiny: bool) -> None:
    sizes, timer = Sizes.of(tiny=tiny), Timer()
    keep("state before", device_state())
    copies(keep, sizes=sizes, timer=timer)
    for dtype in ("bf16", "fp8"):
        if dtype == "fp8" and device().type != "cuda":
            keep("gemm fp8", {"skipped": "no CUDA device"})
            continue
        for tokens in sizes.tokens:
            found = {name: products(shape, tokens=tokens, dtype=dtype, timer=timer) for name, shape in sizes.layers.items()}
            keep(f"gemm {dtype} {tokens}", found)
    keep("state after products", device_state())
    for length in sizes.lengths:
        keep(f"attention {length}", attention(length, heads=sizes.heads, timer=timer))
    keep("state after", device_state())


# Products


def products(shape: tuple[int, int], *, tokens: int, dtype: str, timer: Timer) -> Figures:
    """The three products of a linear layer. In FP8 all three are row by column: transformer-engine transposes for it. The
    weight's gradient is in bf16 here, in fp32 in training."""
    outputs, inputs = shape
    make = bf16_products if dtype == "bf16" else fp8_products
    flops = 2.0 * tokens * outputs * inputs
    return {name: timer.ms(act).rates(flops=flops) for name, act in make(tokens, outputs, inputs).items()}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device())


def bf16_products(tokens: int, outputs: int, inputs: int) -> dict[str, Callable[[], torch.Tensor]]:
    x_TI, w_OI, g_TO = random(tokens, inputs), random(outputs, inputs), random(tokens, outputs)
    return {"forward": lambda: x_TI @ w_OI.t(), "dgrad": lambda: g_TO @ w_OI, "wgrad": lambda: g_TO.t() @ x_TI}


def fp8_products(tokens: int, outputs: int, inputs: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Gradients in e5m2, as the hybrid format has them, and without fast accumulation, as transformer-engine computes them."""
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    one = torch.ones((), device=device())

    def product(rows: int, columns: int, inner: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        left, right = random(rows, inner).to(dtype), random(columns, inner).to(e4m3).t()
        fast = dtype is e4m3
        return lambda: torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return {
        "forward": product(tokens, outputs, inputs, e4m3),
        "dgrad": product(tokens, inputs, outputs, e5m2),
        "wgrad": product(outputs, inputs, tokens, e5m2),
    }


# Attention


def attention(length: int, *, heads: tuple[int, int, int], timer: Timer) -> Figures:
    """Causal, one sequence. The backward pass counts as two forwards, as everywhere; flash attention computes more."""
    num_heads, groups, channels = heads
    shape = (length, 1)
    query, key, value = (random(*shape, count, channels).requires_grad_() for count in (num_heads, groups, groups))
    attend = core_attention(num_heads, groups, channels)
    flops = 2.0 * length**2 * num_heads * channels
    forward, backward = timer.passes(lambda: attend(query, key, value), leaves=(query, key, value))
    return {"forward": forward.rates(flops=flops), "backward": backward.rates(flops=2 * flops)}


def core_attention(num_heads: int, groups: int, channels: int) -> Callable[..., torch.Tensor]:
    """transformer-engine's on a GPU, torch's without one; of [S, B, N or G, D], [S, B, N * D]."""
    if device().type == "cuda":
        import transformer_engine.pytorch as te

        options: dict[str, Any] = dict(num_gqa_groups=groups, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal")
        core: torch.nn.Module = te.DotProductAttention(num_heads, channels, **options)
        return core

    def plain(*tensors: torch.Tensor) -> torch.Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in tensors)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    return plain


# Copies


def copies(keep: Keep, *, sizes: Sizes, timer: Timer) -> None:
    """GB/s: on the device of bytes read and written, between it and pinned memory of bytes moved."""
    source = torch.randint(256, (sizes.copy_bytes // 4,), dtype=torch.int32, device=device())
    target = torch.empty_like(source)
    ways: dict[str, Callable[[], object]] = {"copy on the device": lambda: target.copy_(source)}
    part = source[: min(HOST_BYTES, sizes.copy_bytes) // 4]
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=device().type == "cuda")
    num_bytes = part.numel() * part.element_size()
    ways["copy to the host"] = lambda: host.copy_(part, non_blocking=True)
    ways["copy from the host"] = lambda: part.copy_(host, non_blocking=True)
    for name, act in ways.items():
        moved = 2 * sizes.copy_bytes if name == "copy on the device" else num_bytes
        keep(name, rate(timer.ms(act, repeats=5), num_bytes=moved))


def rate(found: Spread, *, num_bytes: int) -> Figures:
    return {**found.figures(), "gb_per_s": round(num_bytes / found.median / 1e6, 1)}
