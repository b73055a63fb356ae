"""One launcher at a time works on a run. flock, so that a crash leaves nothing to clean up."""

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.rundir.exits import RunStateError
from launcher.rundir.paths import RunDir


@contextmanager
def lock_run(run: RunDir) -> Iterator[int]:
    """Holds the run's lock; yields its file descriptor, which child processes may inherit to keep the run locked while they
    live. RunStateError where another process holds it."""
    descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunStateError(describe_holder(run)) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n".encode(), 0)
        yield descriptor
    finally:
        # Not unlocked by hand: a child that inherited the descriptor keeps the run locked until it ends.
        os.close(descriptor)


def describe_holder(run: RunDir) -> str:
    holder = run.lock.read_text().strip() or "an unknown process"
    if launcher_died(holder):
        found = f"run {run.name} is live ({holder}): its launcher died, its ranks still train"
        return f"{found}; one launcher works on a run at a time. Fix: `touch {run.stop_flag}` makes them save and end"
    found = f"run {run.name} is live ({holder}); one launcher works on a run at a time"
    return f"{found}. Fix: wait for it, `touch {run.stop_flag}` to have its ranks save and end, or use another run.name"


def launcher_died(holder: str) -> bool:
    """Whether the process that wrote the lock is gone: then ranks that inherited the lock hold it. Processes of another host
    cannot be seen from here."""
    written = re.match(r"pid (\d+) on (\S+) since", holder)
    if written is None or written[2] != socket.gethostname():
        return False
    try:
        os.kill(int(written[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, as another user's
        return False
    return False


def is_live(run: RunDir) -> bool:
    """Whether a process holds the run now."""
    if not run.lock.exists():
        return False
    with run.lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
