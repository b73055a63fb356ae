"""How a rank may fail, and the exit class each failure ends in."""

import errno
import re

from data_prep.errors import DataError
from launcher.rundir.checkpoints import CheckpointError, DiskFullError, UnwrittenError
from launcher.rundir.exits import ExitClass, RunStateError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXT = re.compile("|".join([*(rf"\[Errno {number}\]" for number in FULL), r"unexpected pos \d+ vs \d+"]))


class PrecisionError(Exception):
    """A precision this machine would silently not deliver."""


class NodeError(Exception):
    """What a node of a job lacks, and others have. `node`: where it is not this rank's own."""

    def __init__(self, message: str, *, node: str | None = None):
        super().__init__(message)
        self.node = node


class UnhealthyError(Exception):
    """What monitor.health leaves to a person."""


class NonFiniteError(UnhealthyError):
    """NaN or Inf in loss or gradients."""


class CorruptionError(Exception):
    """Hardware that computed wrong, and it is not known whose."""


class NothingBeforeError(Exception):
    """A rewind to before the first checkpoint: the ranks start again."""


def exit_class(error: BaseException) -> ExitClass:
    """The exit class of a fault. A full disk and a diverged loss wait for a person; what is unknown may be tried again."""
    if isinstance(error, (UnhealthyError, DiskFullError)) or is_disk_full(error):
        return ExitClass.NEEDS_PERSON
    if isinstance(error, NodeError):
        return ExitClass.BAD_NODE
    if isinstance(error, (DataError, PrecisionError)):
        return ExitClass.REFUSED
    if isinstance(error, (CheckpointError, RunStateError)) and not isinstance(error, UnwrittenError):
        return ExitClass.STATE
    return ExitClass.RETRYABLE


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one it came from, is the system saying that no more can be written. Megatron's writer processes
    hand their errors on as text alone; torch's zip writer notices a short write as a wrong position."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
