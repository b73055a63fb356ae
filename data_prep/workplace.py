"""A folder that one process writes under another name, and renames when it is whole: how window tables are made."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import DataError
from data_prep.indexed import naming_full_disk


@contextlib.contextmanager
def workplace(directory: Path) -> Iterator[Path]:
    """`<directory>.partial`, locked against other processes and emptied after an error."""
    work = directory.with_name(f"{directory.name}.partial")
    with naming_full_disk(work):
        work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        _lock(descriptor, work=work)
        try:
            yield work
        except BaseException:
            remove_contents(work)
            raise
        finally:
            with contextlib.suppress(OSError):  # it was renamed
                work.rmdir()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, work: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"another process is writing {work}; a table has one writer at a time; wait for it or stop it"
        ) from error
    except OSError:  # a file system without locks
        return


def remove_contents(work: Path) -> None:
    """Empties the folder."""
    for path in list(work.iterdir()) if work.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
