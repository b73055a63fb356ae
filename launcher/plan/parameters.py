"""Parameter counts and FLOPs per token of a model, exactly.

Conventions for FLOPs of training (forward and backward, a multiply-add as two):
full     every matrix product as computed without a mask: attention over the whole sequence (NeMo 24, Megatron-LM's README)
causal   the half of attention that the causal mask keeps (Megatron-Bridge 25)
sixn     6 times the parameters, attention left out
"""

from collections.abc import Iterable
from dataclasses import dataclass

from launcher.config.schema import Layout, ModelConfig, Precision


@dataclass(frozen=True)
class ParameterCount:
    """Of the whole model, or of what one rank holds."""

    embedding: int
    layers: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.head


def count_parameters(model: ModelConfig) -> ParameterCount:
    """The whole model; the head holds the last norm, and the output matrix where embeddings are not tied."""
    table = model.padded_vocab_size * model.hidden_size
    head = 0 if model.tied_embeddings else table
    return ParameterCount(table, model.num_layers * layer_parameters(model, tp=1), head + norm_parameters(model))


def layer_parameters(model: ModelConfig, *, tp: int) -> int:
    """Parameters of one layer on one of `tp` tensor-parallel ranks. Norms and the biases of row-parallel layers are on each."""
    hidden, channels = model.hidden_size, model.kv_channels
    # With fewer groups than ranks, several ranks compute the same group, but its weights are split all the same.
    qkv = model.qkv_size // tp
    fc1 = (2 if model.activation == "swiglu" else 1) * model.ffn_hidden_size // tp
    weights = hidden * (qkv + model.num_attention_heads * channels // tp + fc1 + model.ffn_hidden_size // tp)
    qkv_bias = qkv if model.attention_bias or model.mlp_bias else 0
    other_bias = fc1 + 2 * hidden if model.mlp_bias else 0
    return weights + qkv_bias + other_bias + 2 * norm_parameters(model)


def norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.normalization == "layernorm" else 1)


def count_by_stage(model: ModelConfig, *, layout: Layout) -> list[ParameterCount]:
    """Parameters on one rank of each pipeline stage, first stage first. A tied table lies on the first and the last one."""
    table = model.padded_vocab_size // layout.tp * model.hidden_size
    layer = layer_parameters(model, tp=layout.tp)
    head = norm_parameters(model) + (0 if model.tied_embeddings and layout.pp == 1 else table)
    layers = layers_by_stage(model.num_layers, layout=layout)
    return [
        ParameterCount(table if i == 0 else 0, count * layer, head if i == layout.pp - 1 else 0)
        for i, count in enumerate(layers)
    ]


def layers_by_chunk(num_layers: int, *, layout: Layout) -> list[list[int]]:
    """Layers of each chunk of each pipeline stage, [stage][chunk], first stage first: equally many, but for a first and a last
    stage that have their own number, and less one where the embedding or the loss counts as a layer (Megatron's
    get_num_layers_to_build). What does not divide is rounded down: launcher.config.check refuses it."""
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    embedding, loss = layout.account_for_embedding_in_pipeline_split, layout.account_for_loss_in_pipeline_split
    between = layout.pp - (first is not None) - (last is not None)
    share = (num_layers + embedding + loss - (first or 0) - (last or 0)) // max(1, between)
    stages = [share if layout.pp > 1 else num_layers + embedding + loss] * layout.pp
    if layout.pp > 1:
        stages[0], stages[-1] = first or share, last or share
    chunks = [[count // layout.vpp] * layout.vpp for count in stages]
    chunks[0][0] -= embedding
    chunks[-1][-1] -= loss
    return chunks


def layers_in_bf16(chunks: list[list[int]], *, precision: Precision) -> list[list[int]]:
    """How many layers of each chunk an FP8 recipe leaves in bf16: the model's first and last ones. Chunk c of stage s follows
    chunk c of the stage before, and all of chunk c - 1."""
    num_layers, before = sum(map(sum, chunks)), 0
    found = [[0] * len(row) for row in chunks]
    if not precision.fp8:
        return found
    start, end = precision.num_layers_at_start_in_bf16, num_layers - precision.num_layers_at_end_in_bf16
    for chunk in range(len(chunks[0])):
        for stage, row in enumerate(chunks):
            after = before + row[chunk]
            found[stage][chunk] = len([layer for layer in range(before, after) if layer < start or layer >= end])
            before = after
    return found


def layers_by_stage(num_layers: int, *, layout: Layout) -> list[int]:
    """Layers of each pipeline stage, first stage first."""
    return [sum(chunks) for chunks in layers_by_chunk(num_layers, layout=layout)]


def flops_per_token(model: ModelConfig, *, seq_length: int) -> dict[str, float]:
    """Training FLOPs per token under each convention."""
    matrices = 6.0 * sum(matrix_parameters(model))
    # Scores and weighted values: 2 products of 2 * heads * channels * seq_length, forward and twice backward.
    attention = 12.0 * model.num_layers * model.num_attention_heads * model.kv_channels * seq_length
    return {
        "full": matrices + attention,
        "causal": matrices + attention / 2,
        "sixn": 6.0 * count_parameters(model).total,
    }


def flops_by_stage(model: ModelConfig, *, layout: Layout, seq_length: int) -> list[dict[str, float]]:
    """Training FLOPs per token of each pipeline stage, all of its tensor-parallel ranks together; those of all stages are the
    model's."""
    whole = flops_per_token(model, seq_length=seq_length)
    count, logits = count_parameters(model), 6.0 * model.padded_vocab_size * model.hidden_size
    ends = {"full": (0.0, logits), "causal": (0.0, logits), "sixn": (6.0 * count.embedding, 6.0 * count.head)}
    rows = []
    for index, layers in enumerate(layers_by_stage(model.num_layers, layout=layout)):
        row = {}
        for name, (first, last) in ends.items():
            held = (whole[name] - first - last) * layers / model.num_layers
            row[name] = held + (first if index == 0 else 0.0) + (last if index == layout.pp - 1 else 0.0)
        rows.append(row)
    return rows


def matrix_parameters(model: ModelConfig) -> Iterable[int]:
    """Weights that a token is multiplied with: the layers' matrices and the output matrix, not the embedding look-up."""
    yield model.num_layers * layer_matrices(model)
    yield model.padded_vocab_size * model.hidden_size


def layer_matrices(model: ModelConfig) -> int:
    """Weights of the four matrices of a layer."""
    ffn = (3 if model.activation == "swiglu" else 2) * model.ffn_hidden_size
    return model.hidden_size * (model.qkv_size + model.num_attention_heads * model.kv_channels + ffn)
