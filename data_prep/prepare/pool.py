"""The worker processes of one call, and what they tell their parent.

Each has a pipe of its own: one that is killed in the middle of a message takes no lock with it.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from data_prep.errors import DataError
from data_prep.manifest import read_manifest
from data_prep.prepare.finish import MANIFEST
from data_prep.prepare.job import Job, Tick
from data_prep.prepare.open import Order, reopen_job
from data_prep.prepare.progress import Board
from data_prep.prepare.workers import work
from data_prep.storage import open_folder

POLL_S = 0.1
STOP_S = 10.0  # what workers get to put their tasks down

Errors = dict[str, DataError]


def run_workers(order: Order, *, jobs: Mapping[str, Job], board: Board) -> Errors:
    """Works on all jobs until each is whole or has failed; what failed, by source."""
    if not jobs:
        return {}
    tasks = sum(len(stage.parts) for job in jobs.values() for stage in job.plan.stages)
    workers = min(order.settings.num_workers, tasks)

    def over(name: str) -> None:
        with contextlib.suppress(DataError):  # it failed: the caller says so
            board.finish(read_manifest(open_folder(order.data_dir, name)))

    if workers == 1:
        for job in jobs.values():
            job.on_tick = board.tick
        return work(list(jobs.values()), token=order.token, on_over=over)
    return _Pool(order, jobs=jobs, board=board, over=over).run(workers)


class _Pool:
    def __init__(self, order: Order, *, jobs: Mapping[str, Job], board: Board, over: Callable[[str], None]):
        self._order, self._jobs, self._board, self._over = order, jobs, board, over
        self._context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of the tokenizers
        self._errors: Errors = {}
        self._finished = set[str]()

    def run(self, workers: int) -> Errors:
        processes = dict(self._start(number) for number in range(workers))
        try:
            pipes = set(processes)
            while pipes:
                for pipe in wait(list(pipes), timeout=POLL_S):
                    if isinstance(pipe, Connection) and not self._listen(pipe):
                        pipes.discard(pipe)
                        processes[pipe].join()  # until then the system takes it for alive, and so do its claims
        except BaseException:
            _stop(processes)
            raise
        for process in processes.values():
            process.join()
        return self._errors | self._unfinished([process.exitcode for process in processes.values()])

    def _start(self, number: int) -> tuple[Connection, BaseProcess]:
        mine, theirs = self._context.Pipe(duplex=False)
        words = (theirs, self._order, list(self._jobs))
        process = self._context.Process(target=_work, args=words, name=f"worker {number}")
        with _without_interrupts():
            process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return mine, process

    def _listen(self, pipe: Connection) -> bool:
        """Takes one message; False where there will be no more."""
        try:
            message = pipe.recv()
        except (EOFError, OSError):  # it ended, perhaps in the middle of a message
            return False
        if isinstance(message, Tick):
            self._board.tick(message)
        elif isinstance(message, str):
            if message not in self._finished:
                self._finished.add(message)
                self._over(message)
        else:
            self._errors.update({name: error for name, error in message.items() if name not in self._errors})
        return True

    def _unfinished(self, exits: list[int | None]) -> Errors:
        """Sources that are not whole though nobody said why: a worker died, and the others ended before they took its task."""
        died = [code for code in exits if code]
        if not died:
            return {}
        killed = died[0] == -signal.SIGKILL
        how = "was killed, often for memory; lower data.num_workers" if killed else f"ended ({died[0]}), see above;"
        return {
            name: DataError(f"source '{name}' is unfinished: a worker process {how} and start again; nothing finished is lost")
            for name, job in self._jobs.items()
            if name not in self._errors and job.place.read(MANIFEST) is None
        }


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that starts meanwhile is deaf to Ctrl-C until it says otherwise: during its imports it would print them."""
    if threading.current_thread() is not threading.main_thread():  # others cannot, and get no Ctrl-C
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(processes: Mapping[Connection, BaseProcess]) -> None:
    """Ctrl-C reached the workers too, if it was pressed; a caller's own error did not. Nobody listens to them any more."""
    for pipe, process in processes.items():
        pipe.close()
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGINT)
    for process in processes.values():
        process.join(STOP_S)
        if process.is_alive():
            process.kill()
            process.join()


def _work(pipe: Connection, order: Order, names: list[str]) -> None:
    """What a worker process does. Ctrl-C, scancel and preemption reach it once or twice: they raise a flag, at which it puts
    its task down between two batches; an interrupt in the middle of putting down would leave claims behind."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    stop = threading.Event()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: stop.set())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            jobs = [reopen_job(order, name) for name in names]
        except DataError as error:
            pipe.send(dict.fromkeys(names, error))
            return
        for job in jobs:
            job.on_tick, job.stop = pipe.send, stop
        pipe.send(work(jobs, token=order.token, on_over=pipe.send, stop=stop))
        return
    os._exit(130)


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(130)
