"""Exit classes: how a process of a run may end. Shell, Slurm and the requeue policy read the number."""

from enum import IntEnum


class ExitClass(IntEnum):
    """`REFUSED`: config, data or layout, nothing was touched. `STATE`: the run directory on disk speaks against it."""

    DONE = 0
    REFUSED = 2
    STATE = 3
    CHECKPOINTED = 10
    RETRYABLE = 11
    BAD_NODE = 12
    NEEDS_PERSON = 13
    INTERRUPTED = 130


class RunStateError(Exception):
    """State on disk speaks against the command (foreign or newer run directory, live lock): exit 3."""
