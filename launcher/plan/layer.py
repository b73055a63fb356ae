"""What one transformer layer, the embedding and the LM head cost one rank for one micro batch: seconds by component.

Formulas follow the layer as transformer-engine runs it in megatron-core, with fused norms, activation and rotary embedding.
Sizes are of one rank: tokens after context parallelism, weights after tensor parallelism.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

from launcher.config.schema import ModelConfig, StageConfig
from launcher.plan.device import ATTENTION_BACKWARD_FLOPS, ATTENTION_BACKWARD_RATE, BYTES, Compute, Device, Gemm
from launcher.plan.network import Fabric
from launcher.plan.overlap import overlaps_tensor_parallel

# A layer of transformer-engine that is no CUDA graph keeps the host busy for so long, each way: below it the GPU waits. Chosen.
HOST_LAYER_S = 3e-4
# Bytes a logit through the fused cross-entropy: bf16 read, fp32 passes for maximum, sum and softmax; then the gradient.
LOSS_FORWARD_BYTES, LOSS_BACKWARD_BYTES = 16, 8
# Bytes an element that a step of the context-parallel ring moves besides attention: outputs are scaled and added in fp32, and
# gradients added, each by kernels of its own.
RING_FORWARD_BYTES, RING_BACKWARD_BYTES = 28, 16
# Scales of 1x128 and 128x128 blocks cost the GEMM's inner loop. Chosen; refuted or confirmed by a rehearsal.
BLOCKWISE_SLOWDOWN = 1.12


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds. `gemm` to `host`: this rank computes. `tp` and `cp`: it waits for its neighbours; `contention`: it computes more
    slowly while communication that is hidden runs beside it."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    host: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    contention: float = 0.0

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.memory + self.host + self.tp + self.cp + self.contention

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, name) + getattr(other, name) for name in PARTS))

    def times(self, factor: float) -> "Parts":
        return Parts(*(getattr(self, name) * factor for name in PARTS))


PARTS = tuple(field.name for field in fields(Parts))


@dataclass(frozen=True)
class Passes:
    """Forward and backward of the same work."""

    forward: Parts
    backward: Parts


class LayerCost:
    """Costs for one model, layout, precision and sequence length. What of the layout matters here: tp, cp, sequence_parallel,
    micro_batch_size, tp_comm_overlap and what is recomputed."""

    def __init__(self, model: ModelConfig, *, stage: StageConfig, device: Device, fabric: Fabric):
        layout, precision, seq_length = stage.layout, stage.precision, stage.stage.seq_length
        self.model, self.layout, self.precision, self.seq_length = model, layout, precision, seq_length
        self.device, self.fabric = device, fabric
        tp, channels = layout.tp, model.kv_channels
        self.tokens = layout.micro_batch_size * seq_length // layout.cp
        # Of the regions that sequence parallelism splits: norms and residuals.
        self.sharded_tokens = self.tokens / (tp if layout.sequence_parallel else 1)
        self.qkv = model.qkv_size // tp
        self.query = model.num_attention_heads // tp * channels
        self.key_value = max(1, model.num_query_groups // tp) * channels
        self.ffn = model.ffn_hidden_size // tp
        self.fc1 = self.ffn * (2 if model.activation == "swiglu" else 1)
        self.plain: Compute = "fp32" if precision.params_dtype == "fp32" else "bf16"
        self.width = BYTES[self.plain]
        self.overlaps = overlaps_tensor_parallel(stage, hardware=device.hardware)

    def layer(self, *, in_bf16: bool = False) -> Passes:
        """One layer. `in_bf16`: one that the FP8 recipe leaves out."""
        return self._plain_layer if in_bf16 or not self.precision.fp8 else self._fp8_layer

    @cached_property
    def _plain_layer(self) -> Passes:
        return self._layer(compute=self.plain)

    @cached_property
    def _fp8_layer(self) -> Passes:
        return self._layer(compute="fp8")

    def _layer(self, *, compute: Compute) -> Passes:
        attention, mlp = self._attention_block(compute), self._mlp_block(compute)
        core = self._core_attention()
        forward = attention.forward + core.forward + mlp.forward
        backward = attention.backward + core.backward + mlp.backward
        modules = self.layout.recompute_modules if self.layout.recompute == "selective" else ()
        if self.layout.recompute == "full":
            backward += forward
        if "core_attn" in modules:
            backward += core.forward
        if "mlp" in modules:
            backward += mlp.forward
        if self.layout.cuda_graph_impl != "none":  # a layer is one launch
            return Passes(forward, backward)
        return Passes(waiting_for_host(forward), waiting_for_host(backward))

    def gemms(self, *, compute: Compute) -> Iterator[tuple[str, Gemm]]:
        """("forward" or "backward", product) of a layer's matrices: fprop, dgrad and wgrad of each."""
        hidden = self.model.hidden_size
        yield from self._linear("qkv", hidden, self.qkv, compute)
        yield from self._linear("proj", self.query, hidden, compute)
        yield from self._linear("fc1", hidden, self.fc1, compute)
        yield from self._linear("fc2", self.ffn, hidden, compute)

    def head_gemms(self) -> Iterator[tuple[str, Gemm]]:
        """The output matrix, which no FP8 recipe takes."""
        yield from self._linear("logits", self.model.hidden_size, self.model.padded_vocab_size // self.layout.tp, self.plain)

    def _linear(self, name: str, inputs: int, outputs: int, compute: Compute) -> Iterator[tuple[str, Gemm]]:
        # The weight's gradient is added to an fp32 (or bf16) sum: read and written.
        summed = 8.0 if self.precision.grad_reduce_in_fp32 else 4.0
        yield "forward", self._gemm(name, self.tokens, outputs, inputs, compute, self.width)
        yield "backward", self._gemm(f"{name} dgrad", self.tokens, inputs, outputs, compute, self.width)
        yield "backward", self._gemm(f"{name} wgrad", outputs, inputs, self.tokens, compute, summed)

    def _gemm(self, name: str, m: int, n: int, k: int, compute: Compute, output_bytes: float) -> Gemm:
        seconds = self.device.gemm_s(m, n, k, compute=compute, output_bytes=output_bytes)
        if compute == "fp8" and self.precision.fp8 == "blockwise":
            seconds *= BLOCKWISE_SLOWDOWN
        return Gemm(name, m, n, k, compute, seconds)

    def _attention_block(self, compute: Compute) -> Passes:
        """Norm, query-key-value product, rotary embedding, projection, residual; the core apart."""
        hidden, width = self.model.hidden_size, self.width
        rotary = 2 * width * (self.query + self.key_value) * self.tokens
        residual = 3 * width * hidden * self.sharded_tokens
        casts = self._cast(self.query * self.tokens, compute)
        gradient_casts = self._cast(self.qkv * self.tokens + hidden * self.sharded_tokens, compute)
        forward = self._memory(rotary + residual + casts) + self._norm(compute)
        backward = self._memory(rotary + gradient_casts) + self._norm_backward()
        return self._with_products("qkv", "proj", forward, backward, compute)

    def _mlp_block(self, compute: Compute) -> Passes:
        """Norm, first product, activation, second product, residual."""
        hidden, width = self.model.hidden_size, self.width
        activation = width * (self.fc1 + self.ffn) * self.tokens
        residual = 3 * width * hidden * self.sharded_tokens
        casts = self._cast(self.ffn * self.tokens, compute)
        gradient_casts = self._cast(self.fc1 * self.tokens + hidden * self.sharded_tokens, compute)
        forward = self._memory(activation + residual + casts) + self._norm(compute)
        backward = self._memory(width * (2 * self.fc1 + self.ffn) * self.tokens + gradient_casts) + self._norm_backward()
        return self._with_products("fc1", "fc2", forward, backward, compute)

    def _with_products(self, first: str, second: str, forward: Parts, backward: Parts, compute: Compute) -> Passes:
        """Adds the two products and the communication around them: gathered before the first, scattered after the second."""
        passes = {"forward": forward, "backward": backward}
        for direction, gemm in self.gemms(compute=compute):
            if gemm.name.split()[0] in (first, second):
                passes[direction] += Parts(gemm=gemm.seconds)
        # Backward gathers the input of the first product again, behind another product in every implementation.
        regather = self._collective_s() if self.layout.sequence_parallel else 0.0
        return Passes(
            passes["forward"] + self._tensor_parallel(),
            passes["backward"] + self._tensor_parallel() + Parts(contention=regather * self._contention),
        )

    def _core_attention(self) -> Passes:
        """The fused kernel, and context parallelism around it."""
        model, layout = self.model, self.layout
        # Scores and weighted values, each a multiply-add a channel, over the half that the causal mask keeps.
        flops = 2.0 * self.tokens * self.query * self.seq_length
        # The ring computes on one rank's keys at a time: kernels of shorter sequences, whose results it then corrects and adds.
        rings = layout.cp > 1 and layout.cp_comm_type == "p2p"
        length = self.seq_length // (layout.cp if rings else 1)
        seconds = self.device.attention_s(flops, seq_length=length, channels=model.kv_channels)
        backward_s = seconds * ATTENTION_BACKWARD_FLOPS / ATTENTION_BACKWARD_RATE
        steps = (layout.cp - 1) * self.tokens if rings else 0
        corrections = self._memory(RING_FORWARD_BYTES * self.query * steps)
        additions = self._memory(RING_BACKWARD_BYTES * (self.query + 2 * self.key_value) * steps)
        return Passes(
            Parts(attention=seconds) + self._context_parallel(1, compute_s=seconds) + corrections,
            Parts(attention=backward_s) + self._context_parallel(2, compute_s=backward_s) + additions,
        )

    def _context_parallel(self, times: int, *, compute_s: float) -> Parts:
        """Keys and values go round the ring (backward their gradients too) while attention is computed on those at hand;
        all-to-all moves queries and outputs as well, and hides nothing."""
        layout = self.layout
        if layout.cp == 1:
            return Parts()
        link = self.fabric.link(layout.cp, stride=layout.tp)
        held = self.width * 2 * self.key_value * self.tokens
        if layout.cp_comm_type == "p2p":
            ring = times * (layout.cp - 1) * self.fabric.send_s(held, link=link)
            exposed = max(0.0, ring - compute_s * (layout.cp - 1) / layout.cp)
            return Parts(cp=exposed, contention=(ring - exposed) * self._contention)
        if layout.cp_comm_type == "all_gather":
            return Parts(cp=times * self.fabric.ring_s(held * layout.cp, size=layout.cp, link=link))
        moved = self.width * 2 * (self.query + self.key_value) * self.tokens
        bandwidth = link.bytes_per_s if not link.crosses_nodes else min(link.bytes_per_s, self.fabric.port)
        return Parts(cp=times * (moved * (layout.cp - 1) / layout.cp / bandwidth + 4 * link.hop_s))

    def _tensor_parallel(self) -> Parts:
        """Two collectives around a pair of products: a gather and a scatter or, without sequence parallelism, an all-reduce,
        which is both."""
        seconds = 2 * self._collective_s()
        exposed = self.device.hardware.efficiency.tp_exposed if self.overlaps else 1.0
        return Parts(tp=seconds * exposed, contention=seconds * (1 - exposed) * self._contention)

    def _collective_s(self) -> float:
        size = self.layout.tp
        if size == 1:
            return 0.0
        link = self.fabric.link(size, stride=1)
        return self.fabric.ring_s(self.width * self.model.hidden_size * self.tokens, size=size, link=link)

    @property
    def _contention(self) -> float:
        return self.device.hardware.efficiency.contention

    def _norm(self, compute: Compute) -> Parts:
        written = 2.0 if compute == "fp8" else self.width  # in FP8 by rows and by columns
        return self._memory((self.width + written) * self.model.hidden_size * self.sharded_tokens)

    def _norm_backward(self) -> Parts:
        """Reads the gradient, the input and the residual's gradient, writes their sum."""
        return self._memory(4 * self.width * self.model.hidden_size * self.sharded_tokens)

    def _cast(self, elements: float, compute: Compute) -> float:
        """Bytes of making FP8 tensors by rows and by columns. Where the scale is the tensor's own, finding it reads what the
        kernel before has just written, mostly from the cache: not counted."""
        return elements * (self.width + 2) if compute == "fp8" else 0.0

    def _memory(self, num_bytes: float) -> Parts:
        return Parts(memory=self.device.traffic_s(num_bytes))

    @cached_property
    def embedding(self) -> Passes:
        """The look-up of a rank's part of the table, summed over the tensor-parallel ranks."""
        hidden = self.width * self.model.hidden_size
        forward = self._memory(2 * hidden * self.sharded_tokens) + Parts(tp=self._collective_s())
        return Passes(
            forward, self._memory((hidden + 8.0 * self.model.hidden_size) * self.tokens) + Parts(tp=self._collective_s())
        )

    @cached_property
    def head(self) -> Passes:
        """Last norm, logits and their loss. Its communication is not overlapped."""
        logits = self.model.padded_vocab_size / self.layout.tp * self.tokens
        passes = {
            "forward": self._norm(self.plain) + self._memory(LOSS_FORWARD_BYTES * logits),
            "backward": self._norm_backward() + self._memory(LOSS_BACKWARD_BYTES * logits),
        }
        for direction, gemm in self.head_gemms():
            passes[direction] += Parts(gemm=gemm.seconds, tp=self._collective_s() / (1 if direction == "forward" else 2))
        return Passes(passes["forward"], passes["backward"])


def waiting_for_host(parts: Parts) -> Parts:
    """With the time the GPU waits where its work is shorter than the host's."""
    return parts + Parts(host=max(0.0, HOST_LAYER_S - parts.total))
