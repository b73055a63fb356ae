"""The stop flag: a file in the run directory that asks the ranks to finish their step, save and end. Its content says who
raised it and how to save."""

from contextlib import suppress

from launcher.rundir.lock import lock_run
from launcher.rundir.paths import RunDir
from launcher.rundir.records import write_atomic

# What a launcher that was sent a signal writes into it. A person leaves it empty, or asks for a checkpoint of any layout.
BY_SIGNAL = "signal"
ANY_LAYOUT = "any"


def raise_flag(run: RunDir) -> None:
    """By a launcher; not over a person's."""
    with suppress(FileExistsError), run.stop_flag.open("x") as file:
        file.write(BY_SIGNAL)


def ask_to_stop(run: RunDir, *, any_layout: bool = False) -> None:
    """By a person, over a launcher's own."""
    write_atomic(run.stop_flag, ANY_LAYOUT if any_layout else "")


def lower_flag(run: RunDir) -> None:
    """Someone wants the run to go on. RunStateError where it is live: the flag is for its ranks."""
    with lock_run(run):
        run.stop_flag.unlink(missing_ok=True)


def person_asked(run: RunDir) -> bool:
    """Whether the stop flag is there and no launcher's."""
    return flag_content(run) not in (None, BY_SIGNAL)


def wants_any_layout(run: RunDir) -> bool:
    """Whether what the ranks save before they end is to be read by any layout."""
    return flag_content(run) == ANY_LAYOUT


def flag_content(run: RunDir) -> str | None:
    """None where the flag is not raised."""
    try:
        return run.stop_flag.read_text().strip()
    except FileNotFoundError:
        return None
