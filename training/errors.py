"""How a rank may fail, and the exit class each failure ends in."""

import errno

from data_prep.errors import DataError
from launcher.rundir.checkpoints import CheckpointError
from launcher.rundir.exits import ExitClass, RunStateError


class PrecisionError(Exception):
    """A precision this machine would silently not deliver."""


class NonFiniteError(Exception):
    """NaN or Inf in loss or gradients."""


def exit_class(error: BaseException) -> ExitClass:
    """The exit class of a fault. A full disk and a diverged loss wait for a person; what is unknown may be tried again."""
    if isinstance(error, (DataError, PrecisionError)):
        return ExitClass.REFUSED
    if isinstance(error, (CheckpointError, RunStateError)):
        return ExitClass.STATE
    if isinstance(error, NonFiniteError) or is_disk_full(error):
        return ExitClass.NEEDS_PERSON
    return ExitClass.RETRYABLE


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one it was raised from, is the system saying that no more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False
