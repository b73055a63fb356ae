"""Names and shapes of the Hugging Face families Phidias exports to: one entry a family.

Megatron fuses Q, K and V by query group, [G, (N/G + 2), D, H]: the group's query heads, its key, its value. Its first MLP layer
is [gate; up] for SwiGLU. Rotary embeddings rotate halves on both sides.
Shapes: L layers, N query heads, G query groups, D head size, H hidden, F FFN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.config.schema import ModelConfig, StageSettings


@dataclass(frozen=True)
class TokenIds:
    """Ids the exported config names."""

    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class Family:
    """`layer` maps a layer's Megatron tensors, by their names inside the layer, to Hugging Face's names inside the layer."""

    architecture: str
    model_type: str
    layer: Callable[[dict[str, Tensor], ModelConfig], dict[str, Tensor]]


def split_qkv(qkv: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's fused rows to all query rows [N*D, H], key rows [G*D, H] and value rows [G*D, H]; also for biases."""
    groups, per_group = model.num_query_groups, model.num_attention_heads // model.num_query_groups
    grouped = qkv.reshape(groups, per_group + 2, model.kv_channels, *qkv.shape[1:])
    query, key, value = grouped.split([per_group, 1, 1], dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)


def common_layer(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Llama and its descendants name alike."""
    return {
        "input_layernorm.weight": layer["self_attention.linear_qkv.layer_norm_weight"],
        "self_attn.o_proj.weight": layer["self_attention.linear_proj.weight"],
        "post_attention_layernorm.weight": layer["mlp.linear_fc1.layer_norm_weight"],
        "mlp.down_proj.weight": layer["mlp.linear_fc2.weight"],
    }


def phi3_layer(layer: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    return common_layer(layer) | {
        "self_attn.qkv_proj.weight": torch.cat(split_qkv(layer["self_attention.linear_qkv.weight"], model)),
        "mlp.gate_up_proj.weight": layer["mlp.linear_fc1.weight"],
    }


def llama_layer(layer: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    query, key, value = split_qkv(layer["self_attention.linear_qkv.weight"], model)
    gate, up = layer["mlp.linear_fc1.weight"].chunk(2)
    return common_layer(layer) | {
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
    }


FAMILIES = {
    "phi3": Family("Phi3ForCausalLM", "phi3", phi3_layer),
    "llama": Family("LlamaForCausalLM", "llama", llama_layer),
}


def hf_config(model: ModelConfig, *, stage: StageSettings, ids: TokenIds, dtype: str) -> dict[str, Any]:
    """config.json. `vocab_size` is the padded one: the weights hold that many rows."""
    family = FAMILIES[model.family]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": model.layernorm_epsilon,
        "max_position_embeddings": stage.seq_length,
        "original_max_position_embeddings": stage.seq_length,
        "rope_theta": float(stage.rotary_base),
        "rope_scaling": None,
        "initializer_range": model.init_method_std,
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tied_embeddings,
        "sliding_window": None,
        "use_cache": True,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "torch_dtype": dtype,
    }
