"""Which exit class each fault of a rank ends in. Shell, Slurm and the requeue policy act on it."""

import errno

import pytest

from data_prep.errors import DataError
from launcher.rundir.checkpoints import CheckpointError, DiskFullError, UnwrittenError
from launcher.rundir.exits import ExitClass, RunStateError
from training.errors import (
    CorruptionError,
    NodeError,
    NonFiniteError,
    NothingBeforeError,
    PrecisionError,
    UnhealthyError,
    exit_class,
    is_disk_full,
)


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def raised_during(error: BaseException, context: BaseException) -> BaseException:
    try:
        try:
            raise context
        except BaseException:
            raise error  # noqa: B904  (without `from` on purpose)
    except BaseException as caught:
        return caught


FULL = OSError(errno.ENOSPC, "No space left on device")
TABLE = [
    (DataError("no data"), ExitClass.REFUSED),
    (PrecisionError("no FP8 here"), ExitClass.REFUSED),
    (CheckpointError("torn"), ExitClass.STATE),
    (UnwrittenError("a rank died"), ExitClass.RETRYABLE),
    (NodeError("no CUDA device"), ExitClass.BAD_NODE),
    (RunStateError("another run's directory"), ExitClass.STATE),
    (NonFiniteError("loss is nan"), ExitClass.NEEDS_PERSON),
    (UnhealthyError("a budget is spent"), ExitClass.NEEDS_PERSON),
    (CorruptionError("a step came to something else"), ExitClass.RETRYABLE),
    (NothingBeforeError("no checkpoint to rewind to"), ExitClass.RETRYABLE),
    (DiskFullError("checkpoint"), ExitClass.NEEDS_PERSON),
    (FULL, ExitClass.NEEDS_PERSON),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), ExitClass.NEEDS_PERSON),
    (OSError(errno.EFBIG, "File too large"), ExitClass.NEEDS_PERSON),
    # Whatever it was wrapped in, a full disk waits for a person.
    (raised_from(CheckpointError("could not be written"), FULL), ExitClass.NEEDS_PERSON),
    (raised_from(DataError("manifest"), FULL), ExitClass.NEEDS_PERSON),
    (raised_during(RuntimeError("writer failed"), FULL), ExitClass.NEEDS_PERSON),
    (raised_from(RuntimeError("outer"), raised_from(ValueError("inner"), FULL)), ExitClass.NEEDS_PERSON),
    (RuntimeError("Worker failure: OSError: [Errno 28] No space left on device"), ExitClass.NEEDS_PERSON),
    (RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"), ExitClass.NEEDS_PERSON),
    # What is unknown may be tried again.
    (OSError(errno.EIO, "Input/output error"), ExitClass.RETRYABLE),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), ExitClass.RETRYABLE),
    (RuntimeError("NCCL error"), ExitClass.RETRYABLE),
    (MemoryError(), ExitClass.RETRYABLE),
    (AssertionError(), ExitClass.RETRYABLE),
    (raised_from(RuntimeError("outer"), DataError("inner")), ExitClass.RETRYABLE),
]


@pytest.mark.parametrize(("error", "expected"), TABLE, ids=[f"{type(e).__name__}: {str(e)[:40]}" for e, _ in TABLE])
def test_exit_class(error: BaseException, expected: ExitClass) -> None:
    assert exit_class(error) is expected


def test_every_error_of_ours_is_in_the_table() -> None:
    from launcher.rundir import checkpoints, exits
    from training import errors

    ours = {
        value
        for module in (checkpoints, exits, errors)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert ours == {
        DataError,
        PrecisionError,
        CheckpointError,
        RunStateError,
        NonFiniteError,
        DiskFullError,
        UnwrittenError,
        NodeError,
        UnhealthyError,
        CorruptionError,
        NothingBeforeError,
    }
    assert ours <= {type(error) for error, _ in TABLE}


def test_no_error_is_no_full_disk() -> None:
    assert not is_disk_full(None)
    assert not is_disk_full(RuntimeError("error 28"))
