"""What the forward pass of one micro batch keeps on one rank for its backward pass, in bytes, tensor by tensor.

Two implementations of the same layer keep different tensors:

on_gpu=False  megatron-core's local layer with training.modules, as CPU ranks run it. tests/training/test_activations.py finds
              the storages that autograd holds equal to these tables, to the byte.
on_gpu=True   transformer-engine's layer. Derived from the sources of transformer-engine 2.11 and megatron-core 0.16.1, NOT yet
              measured on a GPU. In bf16 it is Korthikanti et al. 2022 (arXiv 2205.05198), 34 s b h bytes a layer of GPT-3's
              shape, and the statistics of norms and softmax; a dropout of 0 keeps no mask.

Whole storages are counted: a view keeps all of what it looks into. Left out: parameters and their copies in FP8, token ids and
labels, the rotary table that all layers share, random-number states, buffers of collectives, and gradients in flight.

Kinds: "residual and norms", "attention", "mlp", "embedding", "logits and loss", and "transient": there only for a moment at
the turn from forward to backward, so it counts at the peak, not in what waits for its turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.config.schema import Layout, ModelConfig, Precision

NORMS, ATTENTION, MLP, EMBEDDING = "residual and norms", "attention", "mlp", "embedding"
LOGITS, TRANSIENT = "logits and loss", "transient"
# Bytes of an element of a linear layer's input. Blockwise: an fp32 scale for each 128 elements.
FP8_INPUT = {"delayed": 1.0, "tensorwise": 1.0, "blockwise": 1 + 4 / 128}


@dataclass(frozen=True)
class Saved:
    """One tensor (or a few alike) that the forward pass keeps for the backward pass."""

    kind: str
    name: str
    num_bytes: float


@dataclass(frozen=True)
class _Rank:
    """One micro batch on one rank. Sizes are in elements."""

    model: ModelConfig
    layout: Layout
    precision: Precision
    seq_length: int
    on_gpu: bool
    fp8: str | None = None

    @property
    def width(self) -> int:
        """Bytes of an element in the compute type."""
        return 2 if self.precision.params_dtype == "bf16" else 4

    @property
    def linear_input(self) -> float:
        """Bytes of an element of what a linear layer keeps of its input."""
        return FP8_INPUT[self.fp8] if self.fp8 else self.width

    @property
    def tokens(self) -> float:
        return self.layout.micro_batch_size * self.seq_length / self.layout.cp

    @property
    def rows(self) -> float:
        """Tokens of the residual stream, which sequence parallelism splits."""
        return self.tokens / (self.layout.tp if self.layout.sequence_parallel else 1)

    @property
    def residual(self) -> float:
        return self.rows * self.model.hidden_size

    @property
    def heads(self) -> float:
        return self.model.num_attention_heads / self.layout.tp

    @property
    def query(self) -> float:
        """Of the attention's output too."""
        return self.tokens * self.heads * self.model.kv_channels

    @property
    def key(self) -> float:
        """Of the values too. With fewer groups than ranks, each rank has a whole one."""
        return self.tokens * max(self.model.num_query_groups / self.layout.tp, 1) * self.model.kv_channels

    @property
    def mixed_qkv(self) -> float:
        """The output of the QKV layer, which is gathered whole where there are fewer groups than ranks."""
        ranks = self.layout.tp if self.model.num_query_groups >= self.layout.tp else 1
        return self.tokens * (self.model.num_attention_heads + 2 * self.model.num_query_groups) / ranks * self.model.kv_channels

    @property
    def table(self) -> float:
        """Cosines, or sines, of the positions."""
        return self.seq_length / self.layout.cp * self.model.kv_channels

    @property
    def ffn(self) -> float:
        return self.tokens * self.model.ffn_hidden_size / self.layout.tp

    @property
    def logits(self) -> float:
        return self.tokens * self.model.padded_vocab_size / self.layout.tp


def layer_activations(
    model: ModelConfig, *, layout: Layout, precision: Precision, seq_length: int, on_gpu: bool, in_bf16: bool = False
) -> tuple[Saved, ...]:
    """One transformer layer. `in_bf16`: a layer that the FP8 recipe leaves in bf16."""
    rank = _Rank(model, layout, precision, seq_length, on_gpu, None if in_bf16 else precision.fp8)
    if layout.recompute == "full":
        return (Saved(NORMS, "layer input", rank.width * rank.residual),)
    return tuple(_layer(rank, layout.recompute_modules if layout.recompute == "selective" else ()))


def recomputed_activations(
    model: ModelConfig, *, layout: Layout, precision: Precision, seq_length: int, on_gpu: bool, in_bf16: bool = False
) -> tuple[Saved, ...]:
    """What is alive in addition to all layers' saved tensors while one layer is being recomputed: all that the layer would keep
    without recomputation and does not keep with it. Of several modules recomputed one at a time, the sum is given: a bound."""
    kept = layer_activations(model, layout=layout, precision=precision, seq_length=seq_length, on_gpu=on_gpu, in_bf16=in_bf16)
    names = {saved.name for saved in kept}
    rank = _Rank(model, layout, precision, seq_length, on_gpu, None if in_bf16 else precision.fp8)
    return tuple(saved for saved in _layer(rank, ()) if saved.name not in names)


def embedding_activations(
    model: ModelConfig, *, layout: Layout, precision: Precision, seq_length: int, on_gpu: bool
) -> tuple[Saved, ...]:
    """What the first pipeline stage keeps besides its layers. The embeddings themselves are the first layer's input."""
    rank = _Rank(model, layout, precision, seq_length, on_gpu)
    rows = [Saved(EMBEDDING, "token ids of this part of the vocabulary (int64), mask of the others", (8 + 1) * rank.tokens)]
    return (*(rows if layout.tp > 1 else []), *_dropout(rank, "embedding dropout mask", kind=EMBEDDING))


def head_activations(
    model: ModelConfig, *, layout: Layout, precision: Precision, seq_length: int, on_gpu: bool
) -> tuple[Saved, ...]:
    """What the last pipeline stage keeps besides its layers: final norm, output matrix, cross-entropy.

    Megatron's cross-entropy turns an fp32 copy of the logits into the softmax, in place, and later into the gradient. Where
    logits are bf16, they are alive beside that copy until the loss is there; so is, as large, the gradient's copy in bf16 at
    the start of the backward pass: the "transient" row is either. transformer-engine's turns the logits themselves into their
    gradient, and keeps no copy."""
    rank = _Rank(model, layout, precision, seq_length, on_gpu)
    head = (*_norm(rank, "final norm"), Saved(LOGITS, "input of the output matrix", rank.width * rank.residual))  # never in FP8
    if on_gpu and layout.cross_entropy_fusion_impl == "te":
        statistics = Saved(TRANSIENT, "maximum and sum of each token (fp32), of all ranks", 12 * rank.tokens * layout.tp)
        return (*head, Saved(LOGITS, "logits, then their gradient", rank.width * rank.logits), statistics)
    beside = Saved(TRANSIENT, "logits in bf16, then their gradient in bf16", 2 * rank.logits)
    return (
        *head,
        Saved(LOGITS, "softmax in fp32", 4 * rank.logits),
        Saved(LOGITS, "labels of this part of the vocabulary (int64), mask of the others", (8 + 1) * rank.tokens),
        *([beside] if precision.params_dtype == "bf16" else []),
    )


def _layer(rank: _Rank, recomputed: tuple[str, ...]) -> Iterator[Saved]:
    """A layer without the modules that are recomputed."""
    attention, mlp = (_attention_on_gpu, _mlp_on_gpu) if rank.on_gpu else (_attention_on_cpu, _mlp_on_cpu)
    yield from attention(rank, is_recomputed="core_attn" in recomputed)
    yield from _dropout(rank, "attention output dropout mask")
    yield from mlp(rank, is_recomputed="mlp" in recomputed)
    yield from _dropout(rank, "mlp output dropout mask")


def _norm(rank: _Rank, name: str, *, source: str | None = None) -> Iterator[Saved]:
    """What a norm keeps, its output apart. `source` names its input where a layer or a checkpoint knows it by another name."""
    source = source or f"{name}: input"
    if rank.model.normalization == "layernorm":
        # torch keeps the statistics in the type of its input, transformer-engine in fp32.
        yield Saved(NORMS, source, rank.width * rank.residual)
        yield Saved(NORMS, f"{name}: mean and 1/deviation", 2 * (4 if rank.on_gpu else rank.width) * rank.rows)
        return
    if rank.on_gpu or rank.width == 4:
        yield Saved(NORMS, source, rank.width * rank.residual)
    else:
        yield Saved(NORMS, f"{name}: input in fp32", 4 * rank.residual)
    yield Saved(NORMS, f"{name}: 1/rms in fp32", 4 * rank.rows)
    if not rank.on_gpu:
        yield Saved(NORMS, f"{name}: normalised input in fp32", 4 * rank.residual)


def _dropout(rank: _Rank, name: str, *, kind: str = NORMS) -> Iterator[Saved]:
    """torch keeps a mask of bytes on GPUs, and one in the compute type on CPUs; none of a dropout of 0."""
    if rank.model.hidden_dropout:
        yield Saved(kind, name, (1 if rank.on_gpu else rank.width) * rank.residual)


def _attention_on_cpu(rank: _Rank, *, is_recomputed: bool) -> Iterator[Saved]:
    """torch's flash attention for CPUs. Under context parallelism it sees the keys of the whole sequence and a mask."""
    gathers = rank.layout.cp > 1
    yield from _norm(rank, "attention norm", source="layer input")
    yield Saved(ATTENTION, "QKV input", rank.width * rank.residual)
    yield Saved(ATTENTION, "cosines and sines for q and for k", 4 * rank.width * rank.table)
    if is_recomputed or not (gathers or rank.model.attention_dropout):
        yield Saved(ATTENTION, "k", rank.width * rank.key)
        yield Saved(ATTENTION, "q, k and v in one, for the sake of v", rank.width * rank.mixed_qkv)
    if is_recomputed:
        yield Saved(ATTENTION, "number of the mask type (int32)", 4)
    if is_recomputed or not rank.model.attention_dropout:
        yield Saved(ATTENTION, "q", rank.width * rank.query)
    if not is_recomputed:
        yield from _quadratic_on_cpu(rank) if rank.model.attention_dropout else _flash_on_cpu(rank)
    # Flash attention keeps its output: recomputed, it is there twice, the new one and the one that the projection has kept.
    is_kept_once = is_recomputed or rank.model.attention_dropout
    yield Saved(ATTENTION, "input of the projection" if is_kept_once else "attention output", rank.width * rank.query)


def _flash_on_cpu(rank: _Rank) -> Iterator[Saved]:
    yield Saved(ATTENTION, "log of the softmax's sums in fp32", 4 * rank.tokens * rank.heads)
    if rank.layout.cp > 1:
        scores = rank.seq_length / rank.layout.cp * rank.seq_length
        yield Saved(ATTENTION, "k and v of the whole sequence", 2 * rank.width * rank.key * rank.layout.cp)
        yield Saved(ATTENTION, "mask", rank.width * scores)


def _quadratic_on_cpu(rank: _Rank) -> Iterator[Saved]:
    """With dropout on attention, torch computes in fp32 and keeps the scores; k and v are repeated for every head."""
    scores = rank.tokens * rank.seq_length * rank.heads
    yield Saved(ATTENTION, "q, k and v for every head in fp32", 4 * rank.query * (1 + 2 * rank.layout.cp))
    yield Saved(ATTENTION, "softmax, dropout mask and their product in fp32", 3 * 4 * scores)


def _mlp_on_cpu(rank: _Rank, *, is_recomputed: bool) -> Iterator[Saved]:
    """Unfused: every operation of the activation function keeps its own."""
    yield from _norm(rank, "mlp norm")
    yield Saved(MLP, "fc1 input", rank.width * rank.residual)
    if is_recomputed:
        return
    if rank.model.activation == "swiglu":
        yield Saved(MLP, "fc1 output: gate and value", rank.width * 2 * rank.ffn)
        # A copy, since megatron adds glu_linear_offset to it, which is 0 (mlp.py).
        yield Saved(MLP, "silu of the gate, and a copy of the value", rank.width * 2 * rank.ffn)
    else:
        # As large where the square keeps the relu that it is of.
        yield Saved(MLP, "fc1 output", rank.width * rank.ffn)
    yield Saved(MLP, "fc2 input", rank.width * rank.ffn)


def _attention_on_gpu(rank: _Rank, *, is_recomputed: bool) -> Iterator[Saved]:
    """Flash or cuDNN attention, in bf16 whatever the linear layers are in.

    transformer-engine makes a strided v contiguous, so that the mixed QKV can go; a checkpoint around it keeps the view, and so
    the whole: recomputing flash attention costs memory instead of saving it."""
    yield from _norm(rank, "attention norm", source="layer input")
    yield Saved(ATTENTION, "QKV input", rank.linear_input * rank.residual)
    yield Saved(ATTENTION, "q", rank.width * rank.query)
    yield Saved(ATTENTION, "k", rank.width * rank.key)
    if is_recomputed:
        yield Saved(ATTENTION, "q, k and v in one, for the sake of v", rank.width * rank.mixed_qkv)
    else:
        yield Saved(ATTENTION, "v", rank.width * rank.key)
        yield from _softmax_on_gpu(rank)
    yield from _attention_output_on_gpu(rank, is_recomputed=is_recomputed)


def _softmax_on_gpu(rank: _Rank) -> Iterator[Saved]:
    if rank.width == 2:
        yield Saved(ATTENTION, "log of the softmax's sums in fp32", 4 * rank.tokens * rank.heads)
    else:  # No flash attention for fp32: transformer-engine's unfused one keeps the softmax.
        yield Saved(ATTENTION, "softmax", rank.width * rank.tokens * rank.heads * rank.seq_length)


def _attention_output_on_gpu(rank: _Rank, *, is_recomputed: bool) -> Iterator[Saved]:
    """The attention keeps its output, and the projection its input: one tensor, but for the delayed recipe (megatron tells the
    projection of the others to keep the original, attention.py:379) and for context parallelism that exchanges heads or gathers
    keys, which returns a copy of what it keeps."""
    output = rank.width * rank.query
    copies = rank.layout.cp > 1 and rank.layout.cp_comm_type != "p2p"
    if not is_recomputed:
        yield Saved(ATTENTION, "attention output", output)
    if rank.fp8 == "delayed":
        yield Saved(ATTENTION, "input of the projection in FP8", rank.linear_input * rank.query)
    elif copies or is_recomputed:
        yield Saved(ATTENTION, "input of the projection", output)


def _mlp_on_gpu(rank: _Rank, *, is_recomputed: bool) -> Iterator[Saved]:
    """SwiGLU is fused (training.model) and keeps its input alone. The norm is a part of fc1, and so of the MLP."""
    if is_recomputed:
        yield Saved(NORMS, "mlp norm: input", rank.width * rank.residual)
        return
    gated = rank.model.activation == "swiglu"
    yield from _norm(rank, "mlp norm")
    yield Saved(MLP, "fc1 input", rank.linear_input * rank.residual)
    yield Saved(MLP, "fc1 output" + (": gate and value" if gated else ""), rank.width * (2 if gated else 1) * rank.ffn)
    yield Saved(MLP, "fc2 input", rank.linear_input * rank.ffn)
