"""One stage of training on a cluster: its time and its memory, and what may be shared between many layouts of it."""

from dataclasses import dataclass, field, replace

from launcher.config.hardware import Hardware
from launcher.config.schema import Cluster, Layout, ModelConfig, Precision, StageConfig
from launcher.plan.device import Device
from launcher.plan.layer import LayerCost
from launcher.plan.memory import ActivationBytes, Memory
from launcher.plan.network import Fabric
from launcher.plan.timing import Timing

Key = tuple[object, ...]


@dataclass
class Estimator:
    """Estimates layouts of one stage. Layers and activations are worked out once for what determines them."""

    stage: StageConfig
    model: ModelConfig
    cluster: Cluster
    hardware: Hardware
    _layers: dict[Key, LayerCost] = field(default_factory=dict)
    _seconds: dict[Key, float] = field(default_factory=dict)
    _activations: dict[Key, ActivationBytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device, self.fabric = Device(self.hardware), Fabric(self.cluster, hardware=self.hardware)

    def with_layout(self, layout: Layout, precision: Precision) -> StageConfig:
        return replace(self.stage, layout=layout, precision=precision)

    def layer(self, layout: Layout, precision: Precision) -> LayerCost:
        key = layer_key(layout, precision)
        if key not in self._layers:
            self._layers[key] = LayerCost(
                self.model, stage=self.with_layout(layout, precision), device=self.device, fabric=self.fabric
            )
        return self._layers[key]

    def layer_s(self, layout: Layout, precision: Precision) -> float:
        """Seconds of one layer, forward and backward: of the faster kind, where FP8 leaves some in bf16."""
        key = layer_key(layout, precision)
        if key not in self._seconds:
            layer = self.layer(layout, precision)
            kinds = layer.layer(), layer.layer(in_bf16=True)
            self._seconds[key] = min(passes.forward.total + passes.backward.total for passes in kinds)
        return self._seconds[key]

    def timing(self, layout: Layout, precision: Precision) -> Timing:
        return self.timing_of(self.with_layout(layout, precision))

    def timing_of(self, stage: StageConfig) -> Timing:
        """Of the same stage with another layout, precision or batch."""
        layer = self.layer(stage.layout, stage.precision)
        return Timing(stage, model=self.model, cluster=self.cluster, hardware=self.hardware, layer=layer, fabric=self.fabric)

    def memory(self, layout: Layout, precision: Precision) -> Memory:
        stage, key = self.with_layout(layout, precision), layer_key(layout, precision)
        if key not in self._activations:
            self._activations[key] = ActivationBytes(stage, model=self.model, on_gpu=self.cluster.gpu is not None)
        activations = self._activations[key]
        return Memory(stage, model=self.model, cluster=self.cluster, hardware=self.hardware, activations=activations)


def layer_key(layout: Layout, precision: Precision) -> Key:
    """What a layer's time and memory depend on, of a layout and a precision."""
    return (
        layout.tp,
        layout.cp,
        layout.cp_comm_type,
        layout.sequence_parallel,
        layout.micro_batch_size,
        layout.recompute,
        layout.recompute_modules,
        layout.tp_comm_overlap,
        precision.params_dtype,
        precision.fp8,
        precision.grad_reduce_in_fp32,
    )
