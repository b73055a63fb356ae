"""How long one step takes: the pipeline of layers, its bubble, and what lies outside it. Seconds.

The busiest pipeline stage sets the pace; its work is told apart by kind. Gradients are reduced while the last microbatch still
runs backward and weights gathered while the next step's first one runs forward, bucket by bucket on the first stage and whole
on the others (megatron-core's DistributedDataParallel), which end earlier; what does not fit beside is exposed.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property

from launcher.config.hardware import Hardware
from launcher.config.schema import Cluster, ModelConfig, StageConfig
from launcher.plan.device import Device
from launcher.plan.layer import LayerCost, Parts
from launcher.plan.network import NETWORK_HOP_S, NVLINK_HOP_S, Fabric, Link
from launcher.plan.parameters import count_by_stage, layer_matrices, layer_parameters, layers_by_chunk, layers_in_bf16
from launcher.plan.schedule import pipeline_time

# Parameters in a bucket of megatron-core's gradient reduction: this, or a million for each data-parallel rank.
BUCKET_PARAMETERS, BUCKET_PARAMETERS_A_RANK = 40e6, 1e6


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by component; they add up to `total`."""

    gemm: float
    attention: float
    memory: float
    host: float
    tp: float
    cp: float
    pp: float
    contention: float
    bubble: float
    dp: float
    optimizer: float
    other: float
    slowest_gpu: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Pipeline:
    """Seconds of one microbatch through each chunk, [stage][chunk], and of one send between stages."""

    forward_s: tuple[tuple[float, ...], ...]
    backward_s: tuple[tuple[float, ...], ...]
    send_s: float


@dataclass(frozen=True)
class Held:
    """Parameters of one rank, and how many of them an FP8 recipe takes: the layers' matrices."""

    parameters: float
    fp8_matrices: float


class Timing:
    """The step of one stage of training. What two layouts have in common can be handed over as `layer`."""

    def __init__(
        self,
        stage: StageConfig,
        *,
        model: ModelConfig,
        cluster: Cluster,
        hardware: Hardware,
        layer: LayerCost | None = None,
        fabric: Fabric | None = None,
    ):
        self.stage, self.model, self.cluster, self.layout = stage, model, cluster, stage.layout
        self.fabric = fabric or Fabric(cluster, hardware=hardware)
        self.layer = layer or LayerCost(model, stage=stage, device=Device(hardware), fabric=self.fabric)
        self.device, self.efficiency = self.layer.device, hardware.efficiency
        self.dp = cluster.world_size // self.layout.model_parallel_size
        self.num_microbatches = stage.stage.global_batch_size // (self.layout.micro_batch_size * self.dp)

    @cached_property
    def step(self) -> StepTime:
        work = max(self.work, key=lambda parts: parts.total)
        unsent, piped = self._pipeline_s(0.0), self._pipeline_s(self._send_s)
        dp, optimizer, other = self.exposed_dp_s, self.optimizer_s, self.efficiency.step_s
        hidden = self._hidden_contention_s
        jitter = self.efficiency.jitter * math.sqrt(2 * math.log(max(1, self.cluster.world_size)))
        scaled = work.times(self.num_microbatches)
        return StepTime(
            gemm=scaled.gemm,
            attention=scaled.attention,
            memory=scaled.memory,
            host=scaled.host,
            tp=scaled.tp,
            cp=scaled.cp,
            pp=piped - unsent,
            contention=scaled.contention + hidden,
            bubble=max(0.0, unsent - scaled.total),  # rounding
            dp=dp,
            optimizer=optimizer,
            other=other,
            slowest_gpu=(piped + dp + optimizer + hidden) * jitter,
        )

    @cached_property
    def _layers_by_chunk(self) -> list[list[int]]:
        return layers_by_chunk(self.model.num_layers, layout=self.layout)

    @cached_property
    def _plain_layers(self) -> list[list[int]]:
        """How many of them an FP8 recipe leaves in bf16."""
        return layers_in_bf16(self._layers_by_chunk, precision=self.stage.precision)

    @cached_property
    def chunks(self) -> list[list[tuple[Parts, Parts]]]:
        """Forward and backward of one microbatch, [stage][chunk]."""
        rows = []
        for sizes, plains in zip(self._layers_by_chunk, self._plain_layers, strict=True):
            row = []
            for size, plain in zip(sizes, plains, strict=True):
                forward, backward = self._layers(size - plain, in_bf16=False)
                if plain:
                    extra = self._layers(plain, in_bf16=True)
                    forward, backward = forward + extra[0], backward + extra[1]
                row.append((forward, backward))
            rows.append(row)
        ends = ((0, 0, self.layer.embedding), (-1, -1, self.layer.head))
        for stage, chunk, passes in ends:
            forward, backward = rows[stage][chunk]
            rows[stage][chunk] = forward + passes.forward, backward + passes.backward
        return rows

    def _layers(self, count: int, *, in_bf16: bool) -> tuple[Parts, Parts]:
        passes = self.layer.layer(in_bf16=in_bf16)
        return passes.forward.times(count), passes.backward.times(count)

    @cached_property
    def work(self) -> list[Parts]:
        """Of one microbatch on each pipeline stage, both ways."""
        rows = []
        slowed = self._slowed_by_sends_s
        for chunks in self.chunks:
            total = Parts(contention=2 * self.layout.vpp * slowed)
            for forward, backward in chunks:
                total = total + forward + backward
            rows.append(total)
        return rows

    @cached_property
    def pipeline(self) -> Pipeline:
        slowed = self._slowed_by_sends_s
        forward = tuple(tuple(forward.total + slowed for forward, _ in row) for row in self.chunks)
        backward = tuple(tuple(backward.total + slowed for _, backward in row) for row in self.chunks)
        return Pipeline(forward, backward, self._send_s)

    @property
    def _slowed_by_sends_s(self) -> float:
        """Of each pass through a chunk: an interleaved schedule sends while it computes."""
        return self._send_s * self.efficiency.contention if self.layout.vpp > 1 else 0.0

    def _pipeline_s(self, send_s: float) -> float:
        """From the first forward to the last backward. Without interleaving a rank waits for each send; with it, only while the
        pipeline fills and drains."""
        return pipeline_time(
            num_microbatches=self.num_microbatches,
            forward_s=self.pipeline.forward_s,
            backward_s=self.pipeline.backward_s,
            send_s=send_s,
        )

    @cached_property
    def _send_s(self) -> float:
        """One activation to the next stage: this rank's part of the sequence."""
        layout = self.layout
        if layout.pp == 1:
            return 0.0
        link = self.fabric.link(layout.pp, stride=layout.tp * layout.cp * self.dp)
        return self.fabric.send_s(self.layer.width * self.model.hidden_size * self.layer.sharded_tokens, link=link)

    # Data parallelism: over context-parallel ranks too, which hold the same weights.

    @cached_property
    def _held(self) -> list[Held]:
        """Of each pipeline stage."""
        counts = count_by_stage(self.model, layout=self.layout)
        plain = [sum(row) for row in self._plain_layers]
        return [
            Held(count.total, self._matrices(sum(sizes) - in_bf16))
            for count, sizes, in_bf16 in zip(counts, self._layers_by_chunk, plain, strict=True)
        ]

    @cached_property
    def _first_chunks(self) -> list[Held]:
        """Of the first chunk of each stage; the first stage's holds the embedding."""
        layout, layer = self.layout, layer_parameters(self.model, tp=self.layout.tp)
        table = self.model.padded_vocab_size // layout.tp * self.model.hidden_size
        if layout.vpp == 1:
            return self._held
        return [
            Held(sizes[0] * layer + (table if stage == 0 else 0), self._matrices(sizes[0] - self._plain_layers[stage][0]))
            for stage, sizes in enumerate(self._layers_by_chunk)
        ]

    def _matrices(self, layers: int) -> float:
        """Weights of so many layers that an FP8 recipe takes, on one rank."""
        return layers * layer_matrices(self.model) / self.layout.tp if self.stage.precision.fp8 else 0.0

    @property
    def _replicas(self) -> int:
        return self.dp * self.layout.cp

    @cached_property
    def _dp_link(self) -> Link:
        return self.fabric.link(self._replicas, stride=self.layout.tp)

    def reduce_s(self, held: Held, *, messages: int = 1) -> float:
        """Gradients summed over the replicas: scattered, or on each of them where the optimizer is not sharded."""
        width = 4.0 if self.stage.precision.grad_reduce_in_fp32 else self.layer.width
        times = 1 if self.layout.distributed_optimizer else 2
        return times * self._ring_s(width * held.parameters, messages=messages)

    def gather_s(self, held: Held, *, messages: int = 1) -> float:
        """The updated weights, from the replicas that hold their part of the optimizer; as FP8 where they are kept so."""
        if not self.layout.distributed_optimizer:
            return 0.0
        in_fp8 = held.fp8_matrices if self.stage.precision.fp8_param_gather else 0.0
        return self._ring_s(self.layer.width * (held.parameters - in_fp8) + in_fp8, messages=messages)

    def _ring_s(self, num_bytes: float, *, messages: int) -> float:
        return self.fabric.ring_s(num_bytes, size=self._replicas, link=self._dp_link, messages=messages)

    def _buckets(self, count: float) -> int:
        return max(1, math.ceil(count / max(BUCKET_PARAMETERS, BUCKET_PARAMETERS_A_RANK * self._replicas)))

    @cached_property
    def exposed_dp_s(self) -> float:
        """What the step waits for: of the slowest stage, reduction and gathering."""
        return self._exposed(backward=True) + self._exposed(backward=False) + self._amax_s

    @property
    def _amax_s(self) -> float:
        """Delayed scaling shares the largest values of each pass through a chunk among all that share a tensor: a small
        all-reduce, up and down a tree of nodes."""
        sharing = self._replicas * self.layout.tp
        if self.stage.precision.fp8 != "delayed" or sharing == 1:
            return 0.0
        nodes = max(2, sharing / self.fabric.node_size)
        hop = NETWORK_HOP_S if sharing > self.fabric.node_size else NVLINK_HOP_S
        return 2 * self.num_microbatches * self.layout.vpp * 2 * math.log2(nodes) * hop

    def _exposed(self, *, backward: bool) -> float:
        layout = self.layout
        overlaps = layout.overlap_grad_reduce if backward else layout.overlap_param_gather
        collective = self.reduce_s if backward else self.gather_s
        if not overlaps:
            return max(collective(held) for held in self._held)
        waits = []
        for stage, chunk in enumerate(self._first_chunks):
            # The chunk that ends (backward) or begins (forward) the rank's step has nothing but itself to hide behind.
            passes = self.chunks[stage][0]
            beside = (passes[1] if backward else passes[0]).total
            if stage == 0:
                buckets = self._buckets(chunk.parameters)
                seconds = collective(chunk, messages=buckets)
                waits.append(max(seconds / buckets, seconds - beside))
            else:
                waits.append(collective(chunk) - stage * (beside + self._send_s))
        return max(0.0, *waits)

    @cached_property
    def _hidden_contention_s(self) -> float:
        whole = max(self.reduce_s(held) + self.gather_s(held) for held in self._held)
        return max(0.0, whole - self.exposed_dp_s) * self.efficiency.contention

    @cached_property
    def optimizer_s(self) -> float:
        """Adam over this rank's part, the gradients' norm and zeroing, and casting weights to FP8 once a step: all traffic."""
        precision = self.stage.precision
        held = max(self._held, key=lambda held: held.parameters)
        sharded = held.parameters / (self._replicas if self.layout.distributed_optimizer else 1)
        gradient = 4.0 if precision.grad_reduce_in_fp32 else self.layer.width
        # In bf16 they are cast to fp32, updated and cast back (transformer-engine 2.11, fused_adam.py).
        moments = 16.0 if precision.moments_dtype == "fp32" else 48.0
        # Norm and update read the gradient; master weight and both moments are read and written; the weight is written.
        adam = sharded * (2 * gradient + 8.0 + moments + (self.layer.width if self.layer.plain == "bf16" else 0.0))
        zeroing = gradient * held.parameters
        read = self.layer.width * (2 if precision.fp8 == "tensorwise" else 1)
        casting = held.fp8_matrices * (read + 2.0)
        return self.device.traffic_s(adam + zeroing + casting)
