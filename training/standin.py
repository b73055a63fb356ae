"""Process groups of a world in which nobody else is there: what one rank of many holds and computes, on one device.

A rank's collectives end at once. What would come from others stands in for it and is finite: of a sum or a maximum the rank's
own value, of a gather its own part in each place, of a scatter its own slice, of a receive numbers drawn at random (as real
ones would be: a GPU clocks higher on zeros). So nothing here is what training computes; shapes, kernels and memory are.

Copying and drawing cost a device what communication would not: a `Meter` says how long, so that it can be taken off.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.autograd.profiler import record_function
from torch.futures import Future

from training.clocks import Clock

BACKEND = "standin"
PHASES = ("forward", "backward", "other")


class Meter:
    """Seconds that standing in has taken, by what the rank was doing (`phase`)."""

    def __init__(self, device: torch.device):
        self.phase = "other"
        self.clocks = {name: Clock(device) for name in PHASES}

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around one collective. Not while a CUDA graph is captured: what is in it is not told apart when it is replayed."""
        if is_capturing():
            yield
            return
        clock = self.clocks[self.phase]
        clock.start()
        with record_function(BACKEND):
            yield
        clock.stop()

    def take(self) -> dict[str, float]:
        """Since it was called last; waits for the device."""
        return {name: clock.take() for name, clock in self.clocks.items()}


class PhaseClock(Clock):
    """One of Megatron's timers that tells the meter where the rank is."""

    def __init__(self, device: torch.device, *, meter: Meter, phase: str):
        super().__init__(device)
        self.meter, self.phase = meter, phase

    def start(self, barrier: bool = False) -> None:
        self.meter.phase = self.phase
        super().start(barrier)

    def stop(self) -> None:
        super().stop()
        self.meter.phase = "other"


class StandIns:
    """What all groups of a pretended world share. `shape_SBH`: what a pipeline stage is told of the next activation's shape,
    where Megatron sends it ahead."""

    def __init__(self, device: torch.device, *, seed: int, shape_SBH: tuple[int, int, int]):
        self.meter, self.shape_SBH = Meter(device), shape_SBH
        self.generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def receive(self, tensor: torch.Tensor) -> None:
        """Normal with deviation 1; whole numbers are a shape or, in FP8, zeros."""
        if tensor.dtype is torch.int64 and tensor.numel() == len(self.shape_SBH):
            tensor.copy_(torch.tensor(self.shape_SBH))
        elif tensor.is_floating_point() and tensor.element_size() > 1 and not is_capturing():
            tensor.normal_(generator=self.generator if tensor.device.type == self.generator.device.type else None)
        else:
            tensor.zero_()


class StandInGroup(dist.ProcessGroup):
    """One group. Each collective is torch's method of that name; the two names of some are those of torch before 2.12 and of
    today. What is not here raises: it has no backend."""

    def __init__(self, rank: int, size: int, *, world: StandIns):
        super().__init__(rank, size)
        self.own_rank, self.num_ranks, self.world = rank, size, world
        self.ended = ended_work(None)

    def size(self) -> int:
        return self.num_ranks

    def rank(self) -> int:
        return self.own_rank

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    def done(self, tensors: Sequence[torch.Tensor]) -> dist.Work:
        """Who waits for it, on whichever stream of the device, goes on after what this stream has been given so far."""
        on_gpu = len(tensors) > 0 and tensors[0].is_cuda and not is_capturing()
        return ended_work(tensors[0].device) if on_gpu else self.ended

    # Nothing moves: the rank's own value stays.

    def allreduce(self, tensors: Sequence[torch.Tensor], *_: Any) -> dist.Work:
        return self.done(tensors)

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        return self.ended

    allreduce_coalesced = reduce = send = allreduce

    def broadcast(self, tensors: Sequence[torch.Tensor], options: Any = None) -> dist.Work:
        """Weights stay as they are. A count that another rank has found (Megatron's label tokens, of the last pipeline stage)
        is one, not none: gradients are divided by it, where there is any."""
        for tensor in tensors:
            if options.rootRank != self.own_rank and tensor.dim() == 0 and tensor.dtype is torch.int32:
                tensor.fill_(1)
        return self.done(tensors)

    def _start_coalescing(self, device: torch.device) -> None: ...

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        return self.done([torch.empty(0, device=device)])

    # The own part stands for everyone's.

    def allgather(self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], *_: Any) -> dist.Work:
        with torch.no_grad(), self.world.meter.around():
            for parts, own in zip(outputs, inputs, strict=True):
                for part in parts:
                    part.copy_(own)
        return self.done([part for parts in outputs for part in parts])

    def all_gather_single(self, output: torch.Tensor, own: torch.Tensor, *_: Any) -> dist.Work:
        """In place (the distributed optimizer's gather of weights), others' parts stay as they are."""
        if not shares_memory(output, own):
            with torch.no_grad(), self.world.meter.around():
                output.view(self.num_ranks, -1).copy_(own.reshape(1, -1))
        return self.done([output])

    def all_gather_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], *_: Any
    ) -> dist.Work:
        for output, own in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, own)
        return self.done(outputs)

    def gather(self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], *_: Any) -> dist.Work:
        return self.allgather(outputs, inputs) if outputs else self.done(inputs)

    def reduce_scatter(self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], *_: Any) -> dist.Work:
        with torch.no_grad(), self.world.meter.around():
            for output, parts in zip(outputs, inputs, strict=True):
                output.copy_(parts[self.own_rank])
        return self.done(outputs)

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, *_: Any) -> dist.Work:
        if not shares_memory(whole, output):
            with torch.no_grad(), self.world.meter.around():
                output.view(-1).copy_(whole.view(self.num_ranks, -1)[self.own_rank])
        return self.done([output])

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], *_: Any
    ) -> dist.Work:
        for output, whole in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, whole)
        return self.done(outputs)

    def scatter(self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], *_: Any) -> dist.Work:
        """Who is no source receives."""
        return self.reduce_scatter(outputs, inputs) if inputs else self.recv(outputs)

    def all_to_all_single(self, output: torch.Tensor, whole: torch.Tensor, *_: Any) -> dist.Work:
        """Parts of equal size: what the rank would send away is what it gets."""
        if output.numel() != whole.numel():
            raise NotImplementedError("an all-to-all of unequal parts has no stand-in")
        with torch.no_grad(), self.world.meter.around():
            output.view(-1).copy_(whole.reshape(-1))
        return self.done([output])

    def alltoall(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], *_: Any) -> dist.Work:
        with torch.no_grad(), self.world.meter.around():
            for output, own in zip(outputs, inputs, strict=True):
                output.copy_(own)
        return self.done(outputs)

    def recv(self, tensors: Sequence[torch.Tensor], *_: Any) -> dist.Work:
        with self.world.meter.around():
            for tensor in tensors:
                self.world.receive(tensor)
        return self.done(tensors)

    recv_anysource = recv
    _allgather_base, _reduce_scatter_base, alltoall_base = all_gather_single, reduce_scatter_single, all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def ended_work(device: torch.device | None) -> dist.Work:
    """A collective that has ended or, on a GPU, ends when its current stream is done with what it has been given."""
    future: Future[Any] = Future(devices=[device] if device else None)
    future.set_result(torch.empty(0, device=device) if device else None)  # nothing that it would keep in memory
    return _create_work_from_future(future)


def shares_memory(whole: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether a part lies within a whole."""
    return whole.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def join_pretended_world(rank: int, *, world_size: int, world: StandIns) -> None:
    """This process becomes one rank of a world of stand-ins: in the place of training.parallel.join_world."""
    dist.Backend.register_backend(
        BACKEND, lambda store, rank, size, timeout: StandInGroup(rank, size, world=world), devices=["cpu", "cuda"]
    )
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
