"""The state of a stage on its ranks, saved to and loaded from checkpoints.

`dp_reshardable` is the form of every interval: each rank writes its part of the optimizer as it holds it, and only the
data-parallel size may differ when it is loaded. `fully_reshardable` is the form of a stage's end: gathered in host memory
first, loadable in any layout.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import convert_cuda_rng_state, is_graph_safe_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from launcher.config.schema import CheckpointPolicy, Layout, ModelConfig, Optim
from launcher.plan.foreign import Folder
from launcher.rundir.checkpoints import DP_RESHARDABLE, FULLY_RESHARDABLE, CheckpointError, Meta, Saved, damages
from launcher.rundir.paths import RunDir
from training.interop.importing import import_weights
from training.saving import Writer

# What transformer-engine's modules keep beside their weights, of FP8: a checkpoint of CPU ranks has none, and they begin anew.
EXTRA_STATE = "_extra_state"


def content_metadata(sharding: str) -> dict[str, Any]:
    """How tensors are laid out in the files. A new one each time: Megatron adds this process's groups to it."""
    return {
        "distrib_optim_sharding_type": sharding,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


class Checkpointer:
    """Saves and loads the state of one stage on every rank. All methods are collective."""

    def __init__(
        self,
        run: RunDir,
        *,
        stage: str,
        layout: Layout,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ):
        self.layout, self.chunks, self.optimizer = layout, list(chunks), optimizer
        self.writer = Writer(run, stage=stage)

    def save(self, meta: Meta, *, policy: CheckpointPolicy, any_layout: bool = True, wait: bool = True) -> None:
        """Begins a checkpoint, after the one before it; `wait`: until it is published, and those that the policy does not keep
        are removed.

        Raises CheckpointError where one of them cannot be written; what was there before stays valid."""
        self.writer.finish()
        # Without the distributed optimizer there is one form.
        sharding = FULLY_RESHARDABLE if any_layout or not self.layout.distributed_optimizer else DP_RESHARDABLE
        with self.settled_parameters():
            state = self._state(sharding, loading=False) | {"rng": self._rng_state()}
            self.writer.begin(state, replace(meta, sharding=sharding), content=content_metadata(sharding), policy=policy)
        if wait:
            self.writer.finish()

    @contextmanager
    def settled_parameters(self) -> Iterator[None]:
        """With overlapped gathering a rank may still hold old values of parameters it does not own."""
        overlapped = [chunk for chunk in self.chunks if chunk.ddp_config.overlap_param_gather]
        for chunk in overlapped:
            chunk.disable_forward_pre_hook(param_sync=True)
        yield
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()

    def damages(self, saved: Saved) -> list[str]:
        """What is wrong with the contents of a checkpoint, on every rank; each reads a part of the files. Before torch
        unpickles any of them."""
        names = sorted(saved.meta.digests)
        parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, damages(saved, names=names[dist.get_rank() :: dist.get_world_size()]))
        return [line for part in parts for line in part]

    def load(self, saved: Saved, optim: Optim) -> None:
        """Restores weights, optimizer and, where there are as many tensor- and pipeline-parallel ranks, the random number
        generators. Into a model that has trained too."""
        same_ranks = all(saved.meta.layout[name] == getattr(self.layout, name) for name in ("tp", "pp"))
        loaded = self._load(saved, optim, rng={"rng": self._rng_state()} if same_ranks else {})
        if same_ranks:
            set_rng(loaded["rng"][0])

    def start_from(self, saved: Saved, optim: Optim) -> None:
        """Starts a stage from another's optimizer: its fp32 weights, so that nothing is rounded at the border of two stages in
        bf16, and its moments with their step count or, unless `keep_moments`, new ones."""
        self._load(saved, optim, rng={})
        if self.layout.distributed_optimizer:
            with self.settled_parameters():  # in fp32 what each rank owns is better than what bf16 weights made of the rest
                for chunk in self.chunks:
                    chunk.start_param_sync(force_sync=True)
        if not optim.keep_moments:
            forget_moments(self.optimizer)

    def load_weights(self, saved: Saved) -> None:
        """Starts a stage from another's weights in the type they are computed with, where its optimizer is of another form: the
        moments begin anew."""
        loaded = self._read(self._model_state(), saved.path)
        self._load_weights(loaded)
        # The distributed optimizer's main weights come from what was read: the parameters themselves may be rounded to FP8.
        self.optimizer.reload_model_params(loaded if self.layout.distributed_optimizer else None)

    def _load(self, saved: Saved, optim: Optim, *, rng: dict[str, ShardedObject]) -> dict[str, Any]:
        with self.settled_parameters():
            loaded = self._read(self._state(saved.meta.sharding, loading=True) | rng, saved.path)
            self._load_weights(loaded)
            try:
                with torch.no_grad():  # megatron-core's own for one form writes into leaves
                    self.optimizer.load_state_dict(loaded["optimizer"])
            except AssertionError as error:
                raise CheckpointError(f"{saved.path} could not be read into this layout's optimizer: {error}") from error
        restore_settings(self.optimizer, optim)
        return loaded

    def import_folder(self, folder: Folder, *, model: ModelConfig) -> None:
        """Starts a stage from a Hugging Face folder's weights."""
        import_weights(self.chunks, folder, model=model)
        self.take_main_weights()

    def take_main_weights(self) -> None:
        """The optimizer's fp32 weights from those that set_weight has just written: of one in FP8 from the value beside it."""
        named = {name: dict(chunk.named_parameters()) for name, chunk in self._named_chunks()}
        kept = [one for chunk in named.values() for one in chunk.values() if hasattr(one, "_high_precision_init_val")]
        exact = {
            name: {key: getattr(one, "_high_precision_init_val", one) for key, one in chunk.items()}
            for name, chunk in named.items()
        }
        self.optimizer.reload_model_params(exact if kept else None)
        for parameter in kept:
            parameter.clear_high_precision_init_val()  # type: ignore[operator]

    def _read(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), group)
        said = f"{path} could not be read into this model and layout"
        try:
            found = dist_checkpointing.load(state, str(path), strategy, strict="return_unexpected")
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{said}: {type(error).__name__}: {error}") from error
        loaded: dict[str, Any] = found[0]
        if lacking := sorted(name for name in found[2] if not name.endswith(EXTRA_STATE)):
            raise CheckpointError(f"{said}: it has no {', '.join(lacking[:3])}")
        return loaded

    def _load_weights(self, loaded: dict[str, Any]) -> None:
        for name, chunk in self._named_chunks():
            missing, unexpected = chunk.load_state_dict(loaded[name], strict=False)
            if wrong := [*unexpected, *(key for key in missing if not key.endswith(EXTRA_STATE))]:
                raise CheckpointError(f"a checkpoint and the model differ in {', '.join(wrong[:3])}")

    def _named_chunks(self) -> list[tuple[str, torch.nn.Module]]:
        chunks = unwrap_model(self.chunks)
        return [("model" if len(chunks) == 1 else f"model{index}", chunk) for index, chunk in enumerate(chunks)]

    def _model_state(self) -> dict[str, Any]:
        metadata = content_metadata(FULLY_RESHARDABLE)  # weights have one form
        return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in self._named_chunks()}

    def _state(self, sharding: str, *, loading: bool) -> dict[str, Any]:
        state = self._model_state()
        metadata = content_metadata(sharding)
        optimizer = self.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
        return state | {"optimizer": optimizer}

    def _rng_state(self) -> ShardedObject:
        pp, tp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return ShardedObject("rng", [get_rng()], (self.layout.pp, self.layout.tp), (pp, tp), replica_id=replica)


def layout_key(layout: Layout) -> dict[str, int]:
    """The sizes a checkpoint was saved with, for a person to read and for random number generators."""
    return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp}


def get_rng() -> dict[str, Any]:
    states = tensor_parallel.get_cuda_rng_tracker().get_states()
    state = {"torch": torch.get_rng_state(), "tracker": {name: convert_cuda_rng_state(one) for name, one in states.items()}}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng(state: dict[str, Any]) -> None:
    """Of another kind of device, its generators stay as they are: begun from the seed."""
    torch.set_rng_state(state["torch"])
    if ("cuda" in state) != torch.cuda.is_available():
        return
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    if is_graph_safe_cuda_rng_tracker(tracker):  # CUDA graphs go on drawing from the generators that they were captured with
        for name, generator in tracker.get_states().items():
            generator.set_state(state["tracker"][name])
    else:
        tracker.set_states(state["tracker"])


def restore_settings(optimizer: MegatronOptimizer, optim: Optim) -> None:
    """Takes the optimizer's settings from the config again: a checkpoint brings those it was saved with."""
    for group in optimizer.param_groups:
        group.update(max_lr=optim.lr, min_lr=optim.min_lr, betas=tuple(optim.betas), eps=optim.eps)
        if "start_wd" in group:
            group.update(start_wd=optim.weight_decay, end_wd=optim.weight_decay)


@torch.no_grad()
def forget_moments(optimizer: MegatronOptimizer) -> None:
    """Leaves Adam as it is before its first step; the weights stay."""
    for group in optimizer.param_groups:
        group.pop("step", None)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
