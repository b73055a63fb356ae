"""The plainest way to train the tiny model: Hugging Face's Phi3, torch's AdamW, batches cut out of the shards with numpy. It
shares no code with what it is compared with; only which windows a batch has is taken from the run's trace."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from tests.training.tiny import MODEL, OPTIM, STAGE

Window = tuple[str, int, int]  # source, epoch, offset of its first token


def train(initial: Mapping[str, Tensor], *, batches: Sequence[Sequence[Window]], data_dir: Path) -> list[dict[str, float]]:
    """Loss and gradient norm (before clipping) of each step, from Megatron's initial weights."""
    model = phi3(initial)
    whole = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": whole, "weight_decay": OPTIM["weight_decay"]}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(OPTIM["betas"]), eps=OPTIM["eps"])
    rows = []
    for step, windows in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps=len(batches))
        tokens = torch.tensor(np.stack([read(data_dir, *window) for window in windows]))
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["clip_grad"])
        optimizer.step()
        rows.append({"loss": float(loss), "grad_norm": float(norm)})
    return rows


def learning_rate(step: int, *, num_steps: int) -> float:
    """Up in a line to the step that ends the warm-up, down in a line to the minimum at the last."""
    highest, lowest = OPTIM["lr"], OPTIM["min_lr"]
    warmup = OPTIM["warmup_tokens"] / STAGE["seq_length"] / STAGE["global_batch_size"]
    if step <= warmup:
        return highest * step / warmup
    return lowest + (highest - lowest) * (num_steps - step) / (num_steps - warmup)


def read(data_dir: Path, source: str, epoch: int, offset: int) -> np.ndarray[Any, Any]:
    """A window's tokens and the one that follows."""
    tokens = np.fromfile(data_dir / source / "shard_00000.bin", dtype=np.uint16)
    return tokens[offset : offset + STAGE["seq_length"] + 1].astype(np.int64)


def phi3(initial: Mapping[str, Tensor]) -> Phi3ForCausalLM:
    config = Phi3Config(
        vocab_size=MODEL["padded_vocab_size"],
        hidden_size=MODEL["hidden_size"],
        intermediate_size=MODEL["ffn_hidden_size"],
        num_hidden_layers=MODEL["num_layers"],
        num_attention_heads=MODEL["num_attention_heads"],
        num_key_value_heads=MODEL["num_query_groups"],
        rms_norm_eps=MODEL["layernorm_epsilon"],
        rope_theta=float(STAGE["rotary_base"]),
        max_position_embeddings=STAGE["seq_length"],
        original_max_position_embeddings=STAGE["seq_length"],
        resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, sliding_window=None,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,  # a padding row of the embedding would not learn
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    model.load_state_dict(dict(renamed(initial)))
    return model.train()


def renamed(initial: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Megatron's names to Phi3's. Its rows of Q, K and V lie group by group: the group's queries, its key, its value."""
    names = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    of_layer = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.gate_up_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "self_attention.linear_qkv.weight": "self_attn.qkv_proj.weight",
    }
    for name, tensor in initial.items():
        if name in names:
            yield names[name], tensor
            continue
        _, _, index, inside = name.split(".", 3)
        yield f"model.layers.{index}.{of_layer[inside]}", ungrouped(tensor) if "qkv" in inside else tensor


def ungrouped(qkv: Tensor) -> Tensor:
    size, groups = MODEL["kv_channels"], MODEL["num_query_groups"]
    heads = MODEL["num_attention_heads"] // groups
    rows = qkv.split(size)  # of one head each
    queries = [rows[group * (heads + 2) + head] for group in range(groups) for head in range(heads)]
    keys = [rows[group * (heads + 2) + heads] for group in range(groups)]
    values = [rows[group * (heads + 2) + heads + 1] for group in range(groups)]
    return torch.cat([*queries, *keys, *values])
