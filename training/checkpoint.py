"""Writing and reading checkpoints: Megatron's torch_dist format, written aside, renamed, then named in the index.

Model and optimizer are saved `fully_reshardable`: any tensor, pipeline, context or data parallel size can load them. A failure
while writing leaves the earlier checkpoints and the index as they were.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from launcher.config.schema import CheckpointPolicy, Layout, Optim
from launcher.rundir.checkpoints import (
    CheckpointError,
    DiskFullError,
    Meta,
    Saved,
    UnwrittenError,
    damages,
    file_digest,
    prune,
)
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, replace_folder, write_json
from training.errors import is_disk_full
from training.processes import own_results_queue


def content_metadata() -> dict[str, Any]:
    """How tensors are laid out in the files. A new one each time: Megatron adds this process's groups to it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
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
        self.run, self.stage, self.layout = run, stage, layout
        self.chunks, self.optimizer = list(chunks), optimizer
        self.directory = run.checkpoints(stage)
        own_results_queue()

    def save(self, meta: Meta, *, policy: CheckpointPolicy) -> Path:
        """Writes and publishes a checkpoint, then removes those that the policy does not keep.

        Raises CheckpointError where it cannot be written; what was there before stays valid."""
        began, final = time.monotonic(), self.directory / f"step_{meta.step:08d}"
        partial = final.with_name(final.name + ".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        try:
            self._write(partial)
            digests = self._digests(partial)
        except (Exception, CheckpointException) as error:  # the latter, torch's, is no Exception
            raise self._unwritten(final, error) from error
        if dist.get_rank() == 0:
            meta = replace(meta, digests=digests)
            self._publish(partial, final, meta, seconds=time.monotonic() - began, policy=policy)
        dist.barrier()
        return final

    def damages(self, saved: Saved) -> list[str]:
        """What is wrong with the contents of a checkpoint, on every rank; each reads a part of the files. Before torch
        unpickles any of them."""
        names = sorted(saved.meta.digests)
        parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, damages(saved, names=names[dist.get_rank() :: dist.get_world_size()]))
        return [line for part in parts for line in part]

    def load(self, saved: Saved, optim: Optim) -> None:
        """Restores weights, optimizer and, in the layout it was saved in, the random number generators."""
        same_layout = saved.meta.layout == layout_key(self.layout)
        state = self._state(loading=True)
        if same_layout:
            state["rng"] = self._rng_state()
        loaded = self._read(state, saved.path)
        self._load_weights(loaded)
        self.optimizer.load_state_dict(loaded["optimizer"])
        restore_settings(self.optimizer, optim)
        if same_layout:
            set_rng(loaded["rng"][0])

    def load_weights(self, saved: Saved) -> None:
        """Starts a stage from another's weights: the optimizer's moments begin anew."""
        self._load_weights(self._read(self._model_state(), saved.path))
        self.optimizer.reload_model_params()

    def _read(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), group)
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(path), strategy, strict="raise_unexpected")
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"{path} could not be read into this model and layout: {type(error).__name__}: {error}"
            ) from error
        return loaded

    def _load_weights(self, loaded: dict[str, Any]) -> None:
        for name, chunk in self._named_chunks():
            chunk.load_state_dict(loaded[name], strict=True)

    def _write(self, path: Path) -> None:
        # With overlapped gathering a rank may still hold old values of parameters it does not own.
        overlapped = [chunk for chunk in self.chunks if chunk.ddp_config.overlap_param_gather]
        for chunk in overlapped:
            chunk.disable_forward_pre_hook(param_sync=True)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("torch_dist"), group)
        state = self._state(loading=False) | {"rng": self._rng_state()}
        dist_checkpointing.save(state, str(path), strategy, content_metadata=content_metadata())
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()

    def _digests(self, partial: Path) -> dict[str, str]:
        """Of all files, on every rank. A rank reads what it wrote itself, the first one what belongs to all: a shared file
        system may not show it the others' yet."""
        rank, size = dist.get_rank(), dist.get_world_size()
        own = [
            path for path in partial.iterdir() if path.name.startswith(f"__{rank}_") or (rank == 0 and path.name[:2] != "__")
        ]
        parts: list[dict[str, str]] = [{} for _ in range(size)]
        dist.all_gather_object(parts, {path.name: file_digest(path) for path in own})
        return {name: digest for part in parts for name, digest in part.items()}

    def _publish(self, partial: Path, final: Path, meta: Meta, *, seconds: float, policy: CheckpointPolicy) -> None:
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        write_json(partial / "meta.json", vars(meta) | {"files": files})
        replace_folder(partial, final)  # a step that a run came to again after it was rewound
        row = {name: getattr(meta, name) for name in ("stage", "step", "samples", "tokens", "finished")} | {"path": final.name}
        append_record(self.directory / "index.jsonl", "checkpoint", **row, meta=file_digest(final / "meta.json"))
        append_record(self.run.events, "checkpoint", **row, seconds=round(seconds, 3), bytes=sum(files.values()))
        prune(self.directory, keep_last=policy.keep_last, keep_every_tokens=policy.keep_every_tokens)

    def _unwritten(self, final: Path, error: BaseException) -> CheckpointError:
        shutil.rmtree(final.with_name(final.name + ".partial"), ignore_errors=True)
        kept = f"{final} could not be written; earlier checkpoints are untouched and the run resumes from the newest"
        if is_disk_full(error):
            return DiskFullError(f"the disk is full: {kept}. Fix: free space there, or lower stage.checkpoint.keep_last")
        return UnwrittenError(f"{type(error).__name__}: {kept}. Fix: see the trace in the log of this stage")

    def _named_chunks(self) -> list[tuple[str, torch.nn.Module]]:
        chunks = unwrap_model(self.chunks)
        return [("model" if len(chunks) == 1 else f"model{index}", chunk) for index, chunk in enumerate(chunks)]

    def _model_state(self) -> dict[str, Any]:
        return {name: chunk.sharded_state_dict(metadata=content_metadata()) for name, chunk in self._named_chunks()}

    def _state(self, *, loading: bool) -> dict[str, Any]:
        state = self._model_state()
        optimizer = self.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=content_metadata())
        return state | {"optimizer": optimizer}

    def _rng_state(self) -> ShardedObject:
        pp, tp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return ShardedObject("rng", [get_rng()], (self.layout.pp, self.layout.tp), (pp, tp), replica_id=replica)


def layout_key(layout: Layout) -> dict[str, int]:
    """The sizes that random number generators are saved by."""
    return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp}


def get_rng() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states())}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def restore_settings(optimizer: MegatronOptimizer, optim: Optim) -> None:
    """Takes the optimizer's settings from the config again: a checkpoint brings those it was saved with."""
    for group in optimizer.param_groups:
        group.update(max_lr=optim.lr, min_lr=optim.min_lr, betas=tuple(optim.betas), eps=optim.eps)
        if "start_wd" in group:
            group.update(start_wd=optim.weight_decay, end_wd=optim.weight_decay)
