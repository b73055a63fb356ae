"""Processes that end together: torchrun, its ranks, and the helpers of a rank. Imports no torch, so that it costs nothing."""

import contextlib
import ctypes
import multiprocessing
import queue
import signal
from collections.abc import MutableMapping
from multiprocessing.managers import SyncManager

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Has Linux kill this process when the one that started it dies, however it dies.

    torchrun gives each rank a session of its own, which nobody else can end: a rank that outlived torchrun would write beside
    its successor."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_slurm_rank(environment: MutableMapping[str, str]) -> None:
    """A rank that srun started: what torchrun would have set. MASTER_ADDR and MASTER_PORT come from the job."""
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    environment.update({ours: environment[theirs] for ours, theirs in names.items()})


def own_results_queue() -> None:
    """Gives megatron-core's checkpoint writers a results queue whose process dies with this rank.

    Megatron's own is a Manager process (270 MB) that a rank leaves behind when it is killed or ends without Python's exit
    handlers: a few dozen runs later the machine is out of memory."""
    import psutil  # noqa: F401  (without it megatron-core's writers die and the save waits for them for ever)
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=die_with_parent)
        filesystem_async._results_queue = manager.Queue()


def forget_results() -> None:
    """What writers have said whose write is not wanted any more: the next one must not take it for its own."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with contextlib.suppress(queue.Empty):
        while True:
            filesystem_async._results_queue.get_nowait()
