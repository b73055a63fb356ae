"""Every refusal becomes one message on standard error and an exit code."""

import os
import sys
import traceback
from collections.abc import Callable

from data_prep.errors import DataError
from launcher.config.errors import ConfigError
from launcher.rundir.checkpoints import CheckpointError
from launcher.rundir.exits import ExitClass, RunStateError

CODES: dict[type[BaseException], ExitClass] = {
    ConfigError: ExitClass.REFUSED,
    DataError: ExitClass.REFUSED,
    RunStateError: ExitClass.STATE,
    CheckpointError: ExitClass.STATE,
    OSError: ExitClass.NEEDS_PERSON,  # a full disk, a folder that may not be written
    KeyboardInterrupt: ExitClass.INTERRUPTED,
}


def guard(action: Callable[[], int]) -> int:
    """Runs a verb. What it refuses becomes one message; only a bug ends in a trace (PHIDIAS_DEBUG=1 shows all of them)."""
    try:
        return action()
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitClass.DONE
    except tuple(CODES) as error:
        if debugging():
            traceback.print_exc()
        code = next(code for kind, code in CODES.items() if isinstance(error, kind))
        return refuse(str(error) or "interrupted", code=code)


def debugging() -> bool:
    return os.environ.get("PHIDIAS_DEBUG") == "1"


def refuse(message: str, *, code: ExitClass) -> int:
    sys.stdout.flush()
    print(f"phidias: {message}", file=sys.stderr)
    return code
