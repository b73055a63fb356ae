"""Writing a checkpoint while training goes on: aside, in Megatron's torch_dist format, by processes forked off each rank,
which hold the state as it was then. Published when all ranks have written: digests, meta.json, a rename, a row in the index.

A failure leaves the earlier checkpoints and the index as they were.
"""

import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from launcher.config.schema import CheckpointPolicy
from launcher.rundir.checkpoints import (
    CheckpointError,
    DiskFullError,
    Meta,
    UnwrittenError,
    file_digest,
    prune,
    publish,
)
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_json, write_json
from training.errors import is_disk_full
from training.processes import forget_results, own_results_queue

DIGESTS = ".digests_{rank}"  # what a rank's writers leave for it
ROW = ("stage", "step", "samples", "tokens", "finished", "sharding", "validation_loss")


@dataclass
class Write:
    """A checkpoint on its way. Times in seconds; `began` on this process's clock, `stall_s` what training has stood still."""

    meta: Meta
    policy: CheckpointPolicy
    partial: Path
    request: AsyncRequest
    began: float
    stall_s: float

    @property
    def final(self) -> Path:
        return self.partial.with_suffix("")


class Writer:
    """Of one stage, on every rank; one write at a time. `begin` and `finish` are collective."""

    def __init__(self, run: RunDir, *, stage: str):
        self.run, self.directory = run, run.checkpoints(stage)
        self.caller = TemporalAsyncCaller()
        self.write: Write | None = None
        self.last_bytes = 0  # of the last checkpoint, as the first rank knows it
        self.kind = "checkpoint"  # of its event
        self.strategies: dict[str, FullyParallelSaveStrategyWrapper] = {}
        own_results_queue()

    @property
    def is_busy(self) -> bool:
        """Whether this rank's part is still being written."""
        return self.caller.process is not None and self.caller.process.is_alive()

    def begin(self, state: dict[str, Any], meta: Meta, *, content: dict[str, Any], policy: CheckpointPolicy) -> None:
        """Copies the state and has it written; the one before must be finished. CheckpointError where it cannot be begun."""
        began, folder = time.monotonic(), self.directory / f"step_{meta.step:08d}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        is_first = meta.sharding not in self.strategies
        try:
            request = dist_checkpointing.save(
                state,
                str(folder),
                self._strategy(meta.sharding),
                # Who writes what is the same at every save: it is checked, and told around, once.
                validate_access_integrity=is_first,
                async_sharded_save=True,
                content_metadata=content,
            )
            if request.async_fn is not None:
                write = partial(write_and_digest, request.async_fn, folder, dist.get_rank())
                request = request._replace(async_fn=write)
            self.caller.schedule_async_call(request)
        except (Exception, CheckpointException) as error:  # the latter, torch's, is no Exception
            raise unwritten(folder, full=is_disk_full(error), why=describe(error)) from error
        self.write = Write(meta, policy, folder, request, began, time.monotonic() - began)

    def finish(self) -> Path | None:
        """Waits for the write that was begun and publishes it; None where there is none. CheckpointError, the same on all
        ranks, where it could not be written."""
        write, self.write = self.write, None
        if write is None:
            return None
        waited = time.monotonic()
        self.caller.close()
        digests, problem = self._written(write)
        problem = problem or agreed(lambda: self._publish(write, digests=digests, waited=waited))
        if problem:
            full, why = problem
            raise unwritten(write.partial, full=full, why=why)
        return write.final

    def abandon(self) -> None:
        """Ends the write that was begun, unpublished."""
        write, self.write = self.write, None
        if write is not None:
            self.caller.close(abort=True)
            forget_results()
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(write.partial, ignore_errors=True)

    def _strategy(self, sharding: str) -> FullyParallelSaveStrategyWrapper:
        if sharding not in self.strategies:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            base = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
            self.strategies[sharding] = FullyParallelSaveStrategyWrapper(base, group, do_cache_distribution=True)
        return self.strategies[sharding]

    def _written(self, write: Write) -> tuple[dict[str, str], "Problem | None"]:
        """The digests of all files, or why they are not all there; the same on every rank."""
        error: BaseException | None = None
        try:
            for finalize in write.request.finalize_fns:
                finalize()
        except CheckpointException as raised:  # on every rank; what happened is known to the first
            error = raised
        if problem := agreed(lambda: reraise(error)):
            return {}, problem
        parts: list[dict[str, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._own_digests(write))
        if missing := [rank for rank, part in enumerate(parts) if part is None]:
            return {}, (False, f"the writers of rank {missing[0]} ended without a word")
        return {name: digest for part in parts if part for name, digest in part.items()}, None

    def _own_digests(self, write: Write) -> dict[str, str] | None:
        """Of what this rank wrote, and on the first one of what belongs to all: a shared file system may not show it the
        others' yet."""
        rank, folder = dist.get_rank(), write.partial
        left = folder / DIGESTS.format(rank=rank)
        try:
            own: dict[str, str] = read_json(left) if write.request.async_fn is not None else {}
            left.unlink(missing_ok=True)
        except (OSError, ValueError):
            return None
        if rank == 0:
            shared = [path for path in folder.iterdir() if not path.name.startswith(("__", DIGESTS.partition("{")[0]))]
            own |= {path.name: file_digest(path) for path in shared}
        return own

    def _publish(self, write: Write, *, digests: dict[str, str], waited: float) -> None:
        """By the first rank."""
        folder = write.partial
        files = {name: (folder / name).stat().st_size for name in sorted(digests)}
        meta, self.last_bytes = replace(write.meta, digests=digests, files=files), sum(files.values())
        write_json(folder / "meta.json", vars(meta))
        row = {name: getattr(meta, name) for name in ROW} | {"path": write.final.name}
        publish(folder, write.final, row=row)
        now = time.monotonic()
        took = {"seconds": round(now - write.began, 3), "stall_s": round(write.stall_s + now - waited, 3)}
        append_record(self.run.events, self.kind, **row, **took, bytes=self.last_bytes)
        keep = {name: getattr(write.policy, name) for name in ("keep_last", "keep_every_tokens", "keep_best")}
        prune(self.directory, **keep)


Problem = tuple[bool, str]  # whether the disk is full, and what was said


def write_and_digest(write: Any, folder: Path, rank: int, /, *args: Any, **kwargs: Any) -> None:
    """In the process forked off: Megatron's writers, then the digests of what they wrote."""
    write(*args, **kwargs)
    own = {path.name: file_digest(path) for path in sorted(folder.glob(f"__{rank}_*"))}
    write_json(folder / DIGESTS.format(rank=rank), own)


def agreed(act: Any) -> Problem | None:
    """What stood in the way of what the first rank alone does or knows, on all ranks."""
    answer: list[Problem | None] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except (Exception, CheckpointException) as error:
            answer[0] = (is_disk_full(error), describe(error))
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def reraise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def unwritten(folder: Path, *, full: bool, why: str) -> CheckpointError:
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    kept = (
        f"{folder.with_suffix('')} could not be written; earlier checkpoints are untouched and the run resumes from the newest"
    )
    if full:
        return DiskFullError(f"the disk is full: {kept}. Fix: free space there, or lower stage.checkpoint.keep_last")
    return UnwrittenError(f"{kept} ({why}). Fix: see the trace in the log of this stage")
