"""Workers that share the tasks of many sources: processes here, elements of a Slurm array, machines that were started by hand.

Nobody deals the tasks out. Every worker takes the next task that has no receipt and no live claim, so that workers may come, go
and be killed at any time, and what they leave goes on where it stopped.
"""

import contextlib
import functools
import os
import socket
import threading
import traceback
import zlib
from collections.abc import Callable, Sequence

from data_prep.errors import DataError
from data_prep.prepare.finish import MANIFEST, finish
from data_prep.prepare.job import Job
from data_prep.prepare.place import FAILED
from data_prep.prepare.plan import Stage
from data_prep.prepare.receipt import Receipt, finished_tasks
from data_prep.prepare.tasks import curate, tokenize

POLL_S = 0.2
MOST_POLL_S = 5.0


def work(
    jobs: Sequence[Job],
    *,
    token: str,
    on_over: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> dict[str, DataError]:
    """Works until every source is whole or has failed; what failed, by source. `token` names the call: what failed in it is not
    tried again by its other workers. `on_over` is told of each source that needs no more work. KeyboardInterrupt: `stop`."""
    stop = stop or threading.Event()
    open_jobs, errors, pause = {job.name: job for job in jobs}, dict[str, DataError](), POLL_S
    while open_jobs:
        done_something = False
        for name, job in list(open_jobs.items()):
            try:
                state = _advance(job, token=token)
            except Exception as error:
                errors[name], state = as_data_error(error, name=name), "over"
                with contextlib.suppress(DataError, OSError):  # the disk may be what is full
                    job.place.write(f"{FAILED}/{token}", str(errors[name]).encode("utf-8", "backslashreplace"))
            if state == "over":
                del open_jobs[name]
                if on_over:
                    on_over(name)
            done_something |= state != "waiting"
        pause = POLL_S if done_something else min(MOST_POLL_S, pause * 1.5)
        if stop.wait(pause if open_jobs and not done_something else 0):  # others work on all that is left
            raise KeyboardInterrupt
    return errors


def as_data_error(error: Exception, *, name: str) -> DataError:
    """What nobody foresaw stops its source and no other, and says where it was."""
    if isinstance(error, DataError):
        return error
    trace = "".join(traceback.format_exception(error))
    return DataError(
        f"source '{name}': {type(error).__name__}: {error}; what is done stays done; if the trace does not say what to mend, "
        f"this is a fault of data_prep: report it\n{trace}"
    )


def _advance(job: Job, *, token: str) -> str:
    """Does one task of a source: "worked"; "over": it is whole; "waiting": others do what is left.

    DataError: the task failed, or one did in another process of this call, in whose words every log then has the reason."""
    if job.place.read(MANIFEST) is not None:
        return "over"
    if (why := job.place.read(f"{FAILED}/{token}")) is not None:
        raise DataError(why.decode())
    done = finished_tasks(job.place)
    for stage in job.plan.stages:
        missing = [number for number in range(len(stage.parts)) if stage.task(number) not in done]
        if missing:
            return _do_one(job, stage, missing=missing)
    return _claimed(job, "finish", lambda: finish(job))


def _do_one(job: Job, stage: Stage, *, missing: list[int]) -> str:
    turn = zlib.crc32(f"{socket.gethostname()} {os.getpid()}".encode()) % len(missing)  # or all would ask for the same first
    for number in (*missing[turn:], *missing[:turn]):
        if _claimed(job, stage.task(number), functools.partial(run_task, job, stage, number)) == "worked":
            return "worked"
    return "waiting"


def _claimed(job: Job, task: str, do: Callable[[], object]) -> str:
    claim = job.place.claim(task)
    if claim is None:
        return "waiting"
    with claim:
        # Another may have finished it just before.
        if task not in finished_tasks(job.place) and job.place.read(MANIFEST) is None:
            do()
    return "worked"


def run_task(job: Job, stage: Stage, number: int) -> Receipt:
    """One task, whatever its kind."""
    if stage.kind in ("pairs", "clusters"):
        from data_prep.prepare import dedup

        return getattr(dedup, f"find_{stage.kind}")(job, stage, number=number)  # type: ignore[no-any-return]
    return {"curate": curate, "tokenize": tokenize}[stage.kind](job, stage, number=number)
