"""What one GPU of each pipeline stage holds at its fullest, by component. Bytes of one rank.

Weights, gradients and optimizer states are counted, activations are tables of what autograd keeps (activations.py) times the
microbatches in flight (schedule.py). What libraries hold is an assumption until a rehearsal has measured it, and is named so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.config.hardware import Hardware
from launcher.config.schema import Cluster, ModelConfig, StageConfig
from launcher.plan.activations import (
    TRANSIENT,
    Saved,
    embedding_activations,
    head_activations,
    layer_activations,
    recomputed_activations,
)
from launcher.plan.overlap import overlaps_tensor_parallel
from launcher.plan.parameters import count_by_stage, layer_matrices, layers_by_chunk, layers_in_bf16
from launcher.plan.schedule import chunks_in_flight_by_chunk

GIB = 2**30
# Assumed: the CUDA context, cuBLAS's and cuDNN's workspaces and transformer-engine's.
CONTEXT_BYTES = 1.2 * GIB
# Assumed: NCCL's channels of one communicator.
COMMUNICATOR_BYTES = 0.2 * GIB
# Assumed: what the caching allocator holds and nobody uses, of all that comes and goes, with expandable segments.
SLACK = 0.06
# Of the device, kept free by whoever chooses a layout: formulas err, and a job that runs out of memory has taken its GPUs.
SAFETY_MARGIN = 0.05

Bytes = Mapping[str, float]


@dataclass(frozen=True)
class StageMemory:
    """One pipeline stage: bytes by component."""

    stage: int
    by_component: Bytes

    @property
    def total(self) -> float:
        return sum(self.by_component.values())


class ActivationBytes:
    """Of one micro batch, by kind: what layouts with the same tp, cp, sequence_parallel, micro batch and recomputation
    share."""

    def __init__(self, stage: StageConfig, *, model: ModelConfig, on_gpu: bool):
        self.arguments: dict[str, Any] = dict(
            layout=stage.layout, precision=stage.precision, seq_length=stage.stage.seq_length, on_gpu=on_gpu
        )
        self.model, self.stage = model, stage

    @cached_property
    def layer(self) -> Bytes:
        return by_kind(layer_activations(self.model, **self.arguments))

    @cached_property
    def plain_layer(self) -> Bytes:
        """One that the FP8 recipe leaves in bf16."""
        return by_kind(layer_activations(self.model, **self.arguments, in_bf16=True))

    @cached_property
    def recomputed(self) -> float:
        return sum(saved.num_bytes for saved in recomputed_activations(self.model, **self.arguments))

    @cached_property
    def embedding(self) -> Bytes:
        return by_kind(embedding_activations(self.model, **self.arguments))

    @cached_property
    def head(self) -> Bytes:
        return by_kind(head_activations(self.model, **self.arguments))


def by_kind(rows: Sequence[Saved]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        found[row.kind] = found.get(row.kind, 0.0) + row.num_bytes
    return found


class Memory:
    """Of one stage of training on a cluster. `activations` may be shared between layouts."""

    def __init__(
        self,
        stage: StageConfig,
        *,
        model: ModelConfig,
        cluster: Cluster,
        hardware: Hardware | None,
        activations: ActivationBytes | None = None,
    ):
        self.stage, self.model, self.layout, self.precision = stage, model, stage.layout, stage.precision
        self.on_gpu, self.overlaps = hardware is not None, overlaps_tensor_parallel(stage, hardware=hardware)
        self.dp = cluster.world_size // self.layout.model_parallel_size
        self.num_microbatches = stage.stage.global_batch_size // (self.layout.micro_batch_size * self.dp)
        self.activations = activations or ActivationBytes(stage, model=model, on_gpu=self.on_gpu)

    @cached_property
    def stages(self) -> list[StageMemory]:
        return [StageMemory(index, self._components(index)) for index in range(self.layout.pp)]

    @property
    def peak(self) -> StageMemory:
        """The fullest pipeline stage."""
        return max(self.stages, key=lambda memory: memory.total)

    @property
    def peak_gib(self) -> float:
        """Of the fullest stage. Only the first and the last two can be: those between hold less in flight than the first."""
        indices = {0, self.layout.pp - 1, max(0, self.layout.pp - 2), min(1, self.layout.pp - 1)}
        return max(sum(self._components(index).values()) for index in indices) / GIB

    def _components(self, index: int) -> dict[str, float]:
        activations = self._activations(index)
        held = self._states(index) | activations
        if self.on_gpu:
            held["communication buffers"] = self._communication()
            held["CUDA context"] = CONTEXT_BYTES
            held["allocator slack"] = SLACK * sum(activations.values())
            if self.precision.moments_dtype == "bf16":
                # At the update all moments of the rank are there in fp32 too; activations are gone by then.
                held["moments in fp32"] = max(0.0, 2 * held["optimizer states"] - sum(activations.values()))
        return {name: size for name, size in held.items() if size}

    def _states(self, index: int) -> dict[str, float]:
        """Weights in the compute type, and in FP8 by rows and by columns; gradients summed over microbatches; and, sharded over
        the replicas, fp32 weights and both moments."""
        precision, count = self.precision, self._counts[index]
        width = 4.0 if precision.params_dtype == "fp32" else 2.0
        shards = self.dp * self.layout.cp if self.layout.distributed_optimizer else 1
        layers = sum(self._chunks[index]) - sum(self._plain_layers[index])
        matrices = layers * layer_matrices(self.model) / self.layout.tp if precision.fp8 else 0.0
        held_in_bf16 = count - (matrices if precision.fp8_param_gather else 0.0)
        return {
            "weights": width * held_in_bf16,
            "FP8 weights": 2.0 * matrices,
            "gradients": (4.0 if precision.grad_reduce_in_fp32 else width) * count,
            "main weights": 4.0 * count / shards if width < 4 else 0.0,
            "optimizer states": (8.0 if precision.moments_dtype == "fp32" else 4.0) * count / shards,
        }

    @cached_property
    def _chunks(self) -> list[list[int]]:
        return layers_by_chunk(self.model.num_layers, layout=self.layout)

    @cached_property
    def _plain_layers(self) -> list[list[int]]:
        return layers_in_bf16(self._chunks, precision=self.precision)

    @cached_property
    def _counts(self) -> list[int]:
        return [count.total for count in count_by_stage(self.model, layout=self.layout)]

    def _activations(self, index: int) -> dict[str, float]:
        """At the moment when most is held, and what the turn from forward to backward or a recomputation adds."""
        chunks = [self._chunk(index, chunk) for chunk in range(self.layout.vpp)]
        moments = chunks_in_flight_by_chunk(
            pp=self.layout.pp, vpp=self.layout.vpp, num_microbatches=self.num_microbatches, stage=index
        )
        totals = [sum(chunk.values()) for chunk in chunks]
        fullest = max(moments, key=lambda held: sum(n * total for n, total in zip(held, totals, strict=True)))
        found: dict[str, float] = {}
        for count, chunk in zip(fullest, chunks, strict=True):
            for kind, size in chunk.items():
                name = kind if kind == "logits and loss" else f"activations: {kind}"
                found[name] = found.get(name, 0.0) + count * size
        if index == self.layout.pp - 1:
            found["logits and loss"] = found.get("logits and loss", 0.0) + self.activations.head.get(TRANSIENT, 0.0)
        if self.layout.recompute != "none":
            found["activations: recomputed"] = self.activations.recomputed
        return found

    def _chunk(self, index: int, chunk: int) -> dict[str, float]:
        """What one microbatch leaves in one chunk."""
        layout = self.layout
        # Of the layers whose activations are on the host two are on the device: one that leaves, and one that comes back.
        away = max(0, layout.cpu_offloading_num_layers - 2)
        count, plain = self._chunks[index][chunk] - away, self._plain_layers[index][chunk]
        is_first, is_last = (index, chunk) == (0, 0), (index, chunk) == (layout.pp - 1, layout.vpp - 1)
        found = scaled(self.activations.layer, count - plain)
        parts: list[Bytes] = [scaled(self.activations.plain_layer, plain)] if plain else []
        parts += [self.activations.embedding] if is_first else []
        parts += [self.activations.head] if is_last else []
        for part in parts:
            for kind, size in part.items():
                if kind != TRANSIENT:
                    found[kind] = found.get(kind, 0.0) + size
        if self.on_gpu and layout.vpp > 1 and not is_last:
            # The interleaved schedule keeps a chunk's output until its backward (training/model.py says why).
            found["pipeline outputs"] = self._residual_bytes
        return found

    @property
    def _residual_bytes(self) -> float:
        """One activation between layers, this rank's part."""
        layout = self.layout
        tokens = layout.micro_batch_size * self.stage.stage.seq_length / layout.cp
        width = 4.0 if self.precision.params_dtype == "fp32" else 2.0
        return width * self.model.hidden_size * tokens / (layout.tp if layout.sequence_parallel else 1)

    def _communication(self) -> float:
        """NCCL's, one a group that this rank speaks in; what tensor-parallel neighbours gather into, or user buffers: twelve,
        for the three products of each of the four matrices, of which FP8 keeps the eight that are gathered as bytes."""
        layout, precision = self.layout, self.precision
        groups = sum(size > 1 for size in (layout.tp, layout.cp, layout.pp, self.dp * layout.cp)) + 1
        gathered = self._residual_bytes * layout.tp if layout.sequence_parallel else 0.0
        buffers = 2.0
        if self.overlaps:
            buffers = 12.0 if not precision.fp8 else 8 / 2 + 4 + (12 if any(map(any, self._plain_layers)) else 0)
        return groups * COMMUNICATOR_BYTES + buffers * gathered


def scaled(sizes: Bytes, count: float) -> dict[str, float]:
    return {kind: size * count for kind, size in sizes.items()}
