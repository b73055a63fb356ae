"""Hugging Face's families beside Megatron's model, both ways. What a family calls its tensors is one entry of
launcher/plan/foreign.py, which reads without torch; how Megatron fuses them is here.

Megatron fuses Q, K and V by query group, [G, (N/G + 2), D, H]: the group's query heads, its key, its value. Its first MLP layer
is [gate; up] for SwiGLU. Rotary embeddings rotate halves on both sides.
Shapes: L layers, N query heads, G query groups, D head size, H hidden, F FFN.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.config.schema import ModelConfig, StageSettings
from launcher.plan.foreign import FAMILY_NAMES, FamilyNames, bias_of, split_rows
from training.interop.rope import rope_parameters

QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1.weight"
# Megatron's names and those that Llama and its descendants share.
WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
# Checkpoints, and models on transformer-engine, name a norm by the product it comes before; models on the CPU have it apart.
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# What config.json says of biases: Qwen2 has those of Q, K and V without a word.
UNBIASED: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
QKV_BIASED: dict[str, Any] = {"use_sliding_window": False}


@dataclass(frozen=True)
class TokenIds:
    """Ids the exported config names."""

    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class Family:
    """A layer's Megatron tensors, by their names inside the layer, as Hugging Face's: `layer` takes them apart, `rows` says
    where they come from."""

    names: FamilyNames

    def layer(self, layer: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
        """All tensors of a layer under Hugging Face's names inside it."""
        found = {theirs: layer[ours] for ours, theirs in LAYER.items()}
        found |= self.apart(self.names.qkv, torch.cat(split_qkv(layer[f"{QKV}.weight"], model)), model=model)
        if self.names.qkv_bias:
            biases = tuple(bias_of(name) for name in self.names.qkv)
            found |= self.apart(biases, torch.cat(split_qkv(layer[f"{QKV}.bias"], model)), model=model)
        return found | dict(zip(self.names.gate_up, layer[FC1].chunk(len(self.names.gate_up)), strict=True))

    def apart(self, names: tuple[str, ...], rows: Tensor, *, model: ModelConfig) -> dict[str, Tensor]:
        size = model.kv_channels
        sizes = [n * size for n in (model.num_attention_heads, model.num_query_groups, model.num_query_groups)]
        return dict(zip(names, rows.split(split_rows(tuple(sizes), parts=len(names))), strict=True))

    def rows(self, name: str, *, num_rows: int, model: ModelConfig) -> tuple[tuple[str, ...], Tensor]:
        """Where a parameter comes from, by its name in the whole model: Hugging Face's tensors, and for each of its rows the
        row of them laid end to end. The inverse of `layer`, by what that makes of the numbers of rows."""
        rows = torch.arange(num_rows)
        if name in WHOLE:
            return (WHOLE[name],), rows
        _, _, index, inner = name.split(".", 3)
        inner = NORMS.get(inner, inner)
        if inner.startswith(f"{QKV}.") and inner not in LAYER:
            names = self.names.qkv if inner.endswith("weight") else tuple(bias_of(weight) for weight in self.names.qkv)
            rows = torch.cat(split_qkv(rows, model)).argsort()
        else:
            names = self.names.gate_up if inner == FC1 else (LAYER[inner],)
        return tuple(f"model.layers.{index}.{name}" for name in names), rows


def split_qkv(qkv: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's fused rows to all query rows [N*D, H], key rows [G*D, H] and value rows [G*D, H]; also for biases."""
    groups, per_group = model.num_query_groups, model.num_attention_heads // model.num_query_groups
    grouped = qkv.reshape(groups, per_group + 2, model.kv_channels, *qkv.shape[1:])
    query, key, value = grouped.split([per_group, 1, 1], dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)


FAMILIES = {name: Family(names) for name, names in FAMILY_NAMES.items()}


def hf_config(model: ModelConfig, *, stage: StageSettings, ids: TokenIds, dtype: str) -> dict[str, Any]:
    """config.json. `vocab_size` is the padded one: the weights hold that many rows."""
    family = FAMILIES[model.family].names
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
        **rope_parameters(stage),
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tied_embeddings,
        "sliding_window": None,
        **(QKV_BIASED if family.qkv_bias else UNBIASED),
        "use_cache": True,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "torch_dtype": dtype,
    }
