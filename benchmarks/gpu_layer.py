"""Layers of the 14B as Phidias builds them, forward and backward, in bf16 and the FP8 recipes; beside the least that their
products and their attention take by the ceilings.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from benchmarks.gpu_configs import APART, compose, single_words
from benchmarks.gpu_device import Figures, Keep, Timer, device_state
from launcher.config.schema import ModelConfig, RunConfig, StageConfig
from training.model import build_model
from training.rehearse import pretended_rank

PRECISIONS = ("bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise")
LAYERS = 2
SHAPES = ((4096, 2), (16384, 1))  # S, B


def measure_layers(keep: Keep, *, tiny: bool, ceilings: Figures) -> None:
    """One case after the other: what fails in one is told, and the next goes on."""
    for length, batch in ((32, 2),) if tiny else SHAPES:
        for precision in ("fp32", "bf16") if tiny else PRECISIONS:
            name = f"{precision}, {length} x {batch}"
            try:
                found = measure_case(precision, length=length, batch=batch, tiny=tiny)
            except Exception as error:
                keep(name, {"failed": f"{type(error).__name__}: {error}"[:500]})
                continue
            floor = floor_ms(ceilings, precision=precision, length=length, batch=batch)
            keep(name, found | of_floor(found, floor=floor))


def measure_case(precision: str, *, length: int, batch: int, tiny: bool) -> Figures:
    """Milliseconds and TFLOP/s (causal) of one layer: of LAYERS, divided by their number."""
    # Communication that overlaps is begun in the passes and ended by an optimizer's step, which is not taken here.
    config = compose([*single_words(tiny=tiny, precision=precision, length=length, layers=LAYERS), *APART])
    with built_decoder(config, stage=all_in(config.stages[0])) as (decoder, rope, weight):
        hidden_SBH = torch.randn(length, batch, config.model.hidden_size, dtype=weight.dtype, device=weight.device)
        hidden_SBH.requires_grad_()
        run = lambda: decoder(hidden_states=hidden_SBH, attention_mask=None, rotary_pos_emb=rope)  # noqa: E731
        forward, backward = Timer().passes(run, leaves=(hidden_SBH,))
        kind = type(decoder.layers[0].mlp.linear_fc1).__name__
        state = device_state()
    flops = layer_flops(config.model, length=length) * length * batch
    both = (forward.median + backward.median) / LAYERS
    return {
        "forward, ms": round(forward.median / LAYERS, 3),
        "backward, ms": round(backward.median / LAYERS, 3),
        "spread": round((forward.slowest + backward.slowest - forward.fastest - backward.fastest) / LAYERS / both, 3),
        "tflops": round(flops / both / 1e9, 1 if flops > 1e9 else 6),
        "layer": kind,
        **state,
    }


def all_in(stage: StageConfig) -> StageConfig:
    """Every layer in the recipe, also where it keeps the ends in bf16: there are none here."""
    return replace(stage, precision=replace(stage.precision, num_layers_at_start_in_bf16=0, num_layers_at_end_in_bf16=0))


@contextmanager
def built_decoder(config: RunConfig, *, stage: StageConfig) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """The transformer layers of a model, their rotary angles and one of their weights."""
    try:
        with pretended_rank(config, stage=stage, rank=0):
            chunks = build_model(stage, model=config.model, seed=config.run.seed, hardware=config.hardware, quick=True)
            model = unwrap_model(chunks)[0]
            yield model.decoder, model.rotary_pos_emb(stage.stage.seq_length), model.decoder.layers[0].mlp.linear_fc1.weight
    finally:
        forget_engine()


def forget_engine() -> None:
    """What a recipe leaves in transformer-engine, and the memory of what was built."""
    gc.collect()
    if torch.cuda.is_available():
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
        torch.cuda.empty_cache()


def layer_flops(model: ModelConfig, *, length: int) -> float:
    """Of one layer for one token, forward and backward: 6 a weight of its matrices, and causal attention."""
    width = model.num_attention_heads * model.kv_channels
    matrices = model.hidden_size * (model.qkv_size + width + 3 * model.ffn_hidden_size)
    return 6.0 * matrices + 6.0 * length * width


def floor_ms(ceilings: Figures, *, precision: str, length: int, batch: int) -> float | None:
    """Of one layer: its products and its attention alone, as the ceilings were measured."""
    products = ceilings.get(f"gemm {'bf16' if precision == 'bf16' else 'fp8'} {length * batch}")
    attention = ceilings.get(f"attention {length}")
    if not products or not attention:
        return None
    matrices = sum(row["ms"] for name, passes in products.items() if name != "head" for row in passes.values())
    return float(matrices + batch * sum(row["ms"] for row in attention.values()))


def of_floor(found: Figures, *, floor: float | None) -> Figures:
    if floor is None:
        return {}
    part = floor / (found["forward, ms"] + found["backward, ms"])
    return {"products and attention alone, ms": round(floor, 3), "part of it that they are": round(part, 3)}
