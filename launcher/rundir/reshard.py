"""What two layouts must have in common for one to read the other's `dp_reshardable` checkpoint, and what is refused for it.

Such a checkpoint holds the optimizer's buckets as they lie in memory: the same parameters in the same buckets on the same
model-parallel ranks, in the same precision."""

from typing import Any

from launcher.config.schema import Cluster, Layout, Precision, RunConfig, StageConfig
from launcher.config.validate import shown
from launcher.rundir.checkpoints import DP_RESHARDABLE, Meta, newest_checkpoint
from launcher.rundir.exits import RunStateError
from launcher.rundir.paths import RunDir

SPLIT = (
    "tp",
    "pp",
    "vpp",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "distributed_optimizer",
)


def reshard_key(stage: StageConfig, *, cluster: Cluster) -> dict[str, Any]:
    """What must be equal, as meta.json holds it. But for `bucket_size`: whoever loads one gives DistributedDataParallelConfig
    that of the checkpoint."""
    layout, precision = stage.layout, stage.precision
    split = {name: getattr(layout, name) for name in SPLIT}
    return {**split, **dtypes(precision), "bucket_size": bucket_size(layout, cluster=cluster)}


def dtypes(precision: Precision) -> dict[str, Any]:
    """Buckets hold parameters of one type. `fp8_params`: the layers at both ends that are not in FP8; null: none is."""
    grads = "fp32" if precision.grad_reduce_in_fp32 else precision.params_dtype
    ends = [precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16]
    fp8 = ends if precision.fp8 and precision.fp8_param_gather else None
    return {"params_dtype": precision.params_dtype, "grad_dtype": grads, "fp8_params": fp8}


def bucket_size(layout: Layout, *, cluster: Cluster) -> int | None:
    """Elements, megatron-core's default; None: one bucket. Its data-parallel size is that without context parallelism."""
    data_parallel_size = cluster.world_size // layout.model_parallel_size
    return max(40_000_000, 1_000_000 * data_parallel_size) if layout.overlap_grad_reduce else None


def describe_key(key: dict[str, Any]) -> str:
    """`tp2 pp4 vpp2`: what of it a person knows a layout by."""
    return " ".join(f"{name}{key[name]}" for name in ("tp", "pp", "vpp") if name != "vpp" or key.get(name, 1) > 1)


def unlike(meta: Meta, key: dict[str, Any]) -> dict[str, list[Any]]:
    """What keeps a layout of that key from reading the checkpoint: [in the checkpoint, in the layout] by name. Empty where any
    layout may."""
    if meta.sharding != DP_RESHARDABLE:
        return {}
    before, now = by_buckets(meta.reshard), by_buckets(key)
    return {name: [before[name], now[name]] for name in sorted(before.keys() & now.keys()) if before[name] != now[name]}


def by_buckets(key: dict[str, Any]) -> dict[str, Any]:
    """With whether there are several buckets in place of their size: Megatron has one where nothing is overlapped, whatever it
    is given."""
    others = {name: value for name, value in key.items() if name != "bucket_size"}
    return others | ({"overlap_grad_reduce": key["bucket_size"] is not None} if "bucket_size" in key else {})


def refuse_resharding(run: RunDir, config: RunConfig) -> None:
    """RunStateError where a stage would go on in a layout that cannot read its newest checkpoint, before GPUs are taken."""
    for stage in config.stages:
        name = stage.stage.name
        saved, _ = newest_checkpoint(run, name)
        differing = unlike(saved.meta, reshard_key(stage, cluster=config.cluster)) if saved else {}
        if saved and differing:
            told = ", ".join(f"{path} {shown(old)} -> {shown(new)}" for path, (old, new) in differing.items())
            raise RunStateError(
                f"{run.root}: {saved.path.name} of stage {name} was saved in another layout: {told}; it is {DP_RESHARDABLE}, "
                f"the form that is written fast, and only the data-parallel size may differ where it is read. "
                f"Fix: `phidias checkpoint {run.name} action=convert stage={name}` first; or, where the run can still train in "
                f"the layout it has, start it in that and `phidias stop {run.name} layout=any`"
            )
