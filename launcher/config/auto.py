"""layout=auto and precision=auto: fields that are null until the planner chooses them. A field that is set stays as it is.

Types are checked before anything is chosen, so free fields get a placeholder meanwhile.
"""

from dataclasses import dataclass, field
from typing import Any

LAYOUT_PLACEHOLDER: dict[str, Any] = {
    "tp": 1,
    "pp": 1,
    "vpp": 1,
    "cp": 1,
    "cp_comm_type": "p2p",
    "sequence_parallel": False,
    "micro_batch_size": 1,
    "recompute": "none",
    "recompute_modules": ["mlp"],
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "tp_comm_overlap": True,
    "distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
# What of a layout is not searched.
KERNELS: dict[str, Any] = {"cuda_graph_impl": "none", "cpu_offloading_num_layers": 0, "cross_entropy_fusion_impl": "te"}
PRECISION_PLACEHOLDER: dict[str, Any] = {
    "name": "bf16",
    "params_dtype": "bf16",
    "grad_reduce_in_fp32": True,
    "fp8_param_gather": False,
    "fp8_amax_history_len": 1024,
    "num_layers_at_start_in_bf16": 0,
    "num_layers_at_end_in_bf16": 0,
}


@dataclass(frozen=True)
class Free:
    """What a stage leaves to the planner: names of layout fields, and of precision fields (empty: nothing)."""

    layout: frozenset[str] = field(default_factory=frozenset)
    precision: frozenset[str] = field(default_factory=frozenset)

    def __bool__(self) -> bool:
        return bool(self.layout or self.precision)


def take_free(stage: dict[str, Any]) -> tuple[dict[str, Any], Free]:
    """The stage's plain tree with placeholders in its null fields, and which they are."""
    layout, in_layout = _filled(stage.get("layout"), placeholder=LAYOUT_PLACEHOLDER)
    precision, in_precision = _filled(stage.get("precision"), placeholder=PRECISION_PLACEHOLDER)
    found = {key: value for key, value in (("layout", layout), ("precision", precision)) if value is not None}
    return {**stage, **found}, Free(in_layout, in_precision)


def _filled(section: Any, *, placeholder: dict[str, Any]) -> tuple[Any, frozenset[str]]:
    if not isinstance(section, dict):
        return section, frozenset()
    free = frozenset(name for name in placeholder if name in section and section[name] is None)
    return {**section, **{name: placeholder[name] for name in free}}, free
