"""Rotary angles for sequences longer than those a model was pretrained on: position interpolation and YaRN, as transformers
computes them (modeling_rope_utils.py of 5.23), so that an export is the function that was trained.

Megatron's own YaRN is not used. Its concentration factor is lost in transformer-engine's fused kernel for packed documents
(rope_utils.py:266 of megatron-core 0.16.1 passes none on), and turns the other fused kernel off. It multiplies the cosines and
sines of queries and keys alike, so that a score is multiplied by its square: here that is the scale of the softmax, and every
kernel stays as it is.

Shapes: D head size.
"""

import math

import torch
from torch import Tensor

from launcher.config.schema import RopeScaling, StageSettings


def inverse_frequencies(stage: StageSettings, *, kv_channels: int) -> Tensor:
    """Radians a position turns each pair of a head by: [D / 2], fp32, on the CPU."""
    wavelengths = stage.rotary_base ** (torch.arange(0, kv_channels, 2, device="cpu").float() / kv_channels)
    scaling = stage.rope_scaling
    if scaling is None:
        return 1.0 / wavelengths
    if scaling.rope_type == "linear":
        return 1.0 / wavelengths / scaling.factor
    kept = kept_shares(scaling, rotary_base=stage.rotary_base, kv_channels=kv_channels)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def kept_shares(scaling: RopeScaling, *, rotary_base: int, kv_channels: int) -> Tensor:
    """What part of each frequency stays as it was, [D / 2]: 1 above `beta_fast` turns over the original length, 0 below
    `beta_slow`, on a line between them (Peng et al. 2023, section 3.2)."""
    assert scaling.beta_fast is not None and scaling.beta_slow is not None  # launcher/config/check.py

    def pair_of(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return kv_channels * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rotary_base))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), kv_channels - 1)
    pair = torch.arange(kv_channels // 2, dtype=torch.float32, device="cpu")
    return 1 - ((pair - low) / ((high - low) or 0.001)).clamp(0, 1)


def softmax_scale(stage: StageSettings, *, kv_channels: int) -> float | None:
    """What scores are multiplied by under YaRN, 1 / sqrt(D) included; None: by that alone. Section 3.3: sharper by
    0.1 ln(factor) + 1, for queries and for keys."""
    scaling = stage.rope_scaling
    if scaling is None or scaling.rope_type == "linear":
        return None
    return float((0.1 * math.log(scaling.factor) + 1.0) ** 2 / math.sqrt(kv_channels))
