"""Where the seconds of a step go on one rank: forward, backward, the optimizer, the wait for data, and the rest, in which it
waits for other ranks.

Megatron's schedules and optimizers start and stop timers by name where they are given some; these are such timers. On a GPU
they are events in its stream, read once a row, and stop nothing: Megatron's own wait for the GPU at each start and stop.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Megatron's names of what is measured; what it tells of others is passed over.
FORWARD, BACKWARD, GATHER = "forward-compute", "backward-compute", "params-all-gather"
OPTIMIZER = "optimizer"  # ours, around all of the update


class Clock:
    """Adds up what lies between `start` and `stop`. On a GPU these are events in its stream, which cost the host microseconds
    and are read when `take` is called, after the step has ended."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.seconds, self.began = 0.0, 0.0
        self.events: list[torch.cuda.Event] = []  # start, stop, start, stop, ...
        self.free: list[torch.cuda.Event] = []

    def start(self, barrier: bool = False) -> None:
        """Begins; what was not stopped, for an error, is forgotten. `barrier` is Megatron's word, and not heeded."""
        if self.on_gpu:
            del self.events[len(self.events) // 2 * 2 :]
            self._mark()
        else:
            self.began = time.perf_counter()

    def stop(self) -> None:
        if self.on_gpu:
            self._mark()
        else:
            self.seconds += time.perf_counter() - self.began

    def take(self) -> float:
        """The seconds since it was called last; waits for the GPU where it is not done with them."""
        if self.events:
            self.events[-1].synchronize()
            pairs = zip(self.events[::2], self.events[1::2], strict=False)
            self.seconds += sum(first.elapsed_time(last) for first, last in pairs) / 1e3
            self.free += self.events
            self.events = []
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _mark(self) -> None:
        event = self.free.pop() if self.free else torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)


class Unmeasured:
    """A clock that nobody reads."""

    def start(self, barrier: bool = False) -> None: ...

    def stop(self) -> None: ...


class Clocks:
    """What Megatron calls its timers."""

    def __init__(self, device: torch.device):
        self.clocks = {name: Clock(device) for name in (FORWARD, BACKWARD, GATHER, OPTIMIZER)}
        self.unmeasured = Unmeasured()

    def __call__(self, name: str, log_level: int | None = None) -> Clock | Unmeasured:
        return self.clocks.get(name, self.unmeasured)

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        self(name).start()
        yield
        self(name).stop()

    @contextmanager
    def standing(self) -> Iterator[None]:
        """What runs inside, such as a validation, is not of the steps."""
        before = {name: clock.take() for name, clock in self.clocks.items()}
        yield
        for name, clock in self.clocks.items():
            clock.take()
            clock.seconds = before[name]

    def take(self) -> "Spent":
        """Since it was called last. Parameters that are gathered within the update are communication, not the optimizer."""
        seconds = {name: clock.take() for name, clock in self.clocks.items()}
        return Spent(seconds[FORWARD], seconds[BACKWARD], max(0.0, seconds[OPTIMIZER] - seconds[GATHER]))


@dataclass(frozen=True)
class Spent:
    """Seconds of computation."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    optimizer_s: float = 0.0

    def __truediv__(self, steps: int) -> "Spent":
        return Spent(self.forward_s / steps, self.backward_s / steps, self.optimizer_s / steps)


@dataclass
class StepTimes:
    """The steps since the last row. What lies between steps, validations and checkpoints, is not in their seconds."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    stalled_s: float = 0.0

    def add(self, *, tokens: int, seconds: float, waited_s: float) -> None:
        """One step; `waited_s` of its seconds went by until its batch was there."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.waited_s += waited_s

    def stall(self, seconds: float) -> None:
        """Training stood still for a checkpoint."""
        self.stalled_s += seconds

    def means(self) -> dict[str, float]:
        """What a row says of them."""
        return {
            "tokens_per_s": round(self.tokens / self.seconds, 1),
            "step_time_s": round(self.seconds / self.steps, 4),
            "data_wait_s": round(self.waited_s / self.steps, 4),
            "checkpoint_s": round(self.stalled_s / self.steps, 4),
        }
