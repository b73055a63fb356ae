"""Whether tensor-parallel communication hides behind GEMMs: what transformer-engine's user buffers ask for. One rule for the
ranks and for the plan."""

from launcher.config.hardware import Hardware
from launcher.config.schema import StageConfig


def overlaps_tensor_parallel(stage: StageConfig, *, hardware: Hardware | None) -> bool:
    """User buffers are shared over NVLink multicast, have one shape, and hold bf16 or FP8 with a scale a tensor: not blockwise
    scales, nor packed rows under context parallelism, which are as long as their documents make them."""
    layout = stage.layout
    wanted = layout.tp_comm_overlap and layout.sequence_parallel and layout.tp > 1
    has_one_shape = not (stage.stage.reset_attention_mask and layout.cp > 1)
    return bool(wanted and hardware and hardware.multicast and stage.precision.fp8 != "blockwise" and has_one_shape)
