"""The tasks between two stages of curation: keys to pairs of copies, and pairs to the documents that are dropped."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.dedup_groups import duplicate_pairs, kept_and_dropped
from data_prep.errors import DataError
from data_prep.prepare.job import Job
from data_prep.prepare.keys import key_maker, save_array
from data_prep.prepare.plan import Stage
from data_prep.prepare.receipt import Counts, Receipt, read_receipt
from data_prep.prepare.tasks import leave


def find_pairs(job: Job, stage: Stage, *, number: int) -> Receipt:
    """The copies among all documents of a source, in one band and one part of the keys."""
    maker = key_maker(job.source.steps[stage.first_step])
    parts = len(stage.parts) // maker.bands
    band, part = divmod(number, parts)

    def find(key_files: list[Path]) -> NDArray[np.int64]:
        columns = maker.columns_per_band
        return duplicate_pairs(key_files, band=band, part=part, parts=parts, columns_per_band=columns)

    return _from_all(job, stage, number=number, find=find)


def find_clusters(job: Job, stage: Stage, *, number: int) -> Receipt:
    """The documents that are dropped: of each cluster, all but the first."""
    curate = job.plan.stage(str(job.plan.stage(str(stage.takes_from)).takes_from))
    documents = sum(counts_of(job, curate))
    return _from_all(job, stage, number=number, find=lambda files: kept_and_dropped(files, num_documents=documents))


def _from_all(job: Job, stage: Stage, *, number: int, find: Callable[[list[Path]], NDArray[Any]]) -> Receipt:
    """A task that reads what every task of the stage before left."""
    before = job.plan.stage(str(stage.takes_from))
    file = f"{stage.name}/{number:05d}.npy"
    with contextlib.ExitStack() as stack:
        room = stack.enter_context(job.place.workroom())
        files = [f"{before.name}/{task:05d}.npy" for task in range(len(before.parts))]
        (room / file).parent.mkdir(exist_ok=True)
        save_array(room / file, find([stack.enter_context(job.place.local(name)) for name in files]))
        return leave(job, stage, number=number, room=room, counts=Counts(), files=[file])


def counts_of(job: Job, stage: Stage) -> Iterator[int]:
    """The documents that each task of a stage of curation kept."""
    for task in range(len(stage.parts)):
        receipt = read_receipt(job.place, task=stage.task(task), plan=job.plan.digest)
        if receipt is None:
            raise DataError(f"{job.place.path(stage.task(task))} has lost its receipt; run `phidias data` again")
        yield receipt.counts.documents


def _starts(job: Job, stage: Stage) -> NDArray[np.int64]:
    """The number of the first document of each task of a stage that is over, and of one more: read once a process."""
    if stage.name not in job.starts:
        job.starts[stage.name] = np.cumsum([0, *counts_of(job, stage)])
    return job.starts[stage.name]


def dropped_rows(job: Job, stage: Stage, *, number: int) -> dict[int, frozenset[int]]:
    """By task of curation that a task reads: the rows, from 1, that were found to be copies."""
    curate = job.plan.stage(str(stage.takes_from))
    starts = _starts(job, curate)
    with job.place.local(f"{curate.name.replace('curate', 'clusters')}/00000.npy") as path:
        dropped = np.load(path, mmap_mode="r")
        rows = {}
        for task in range(*stage.parts[number]):
            low, high = np.searchsorted(dropped, starts[task : task + 2])
            rows[task] = frozenset((dropped[low:high] - starts[task] + 1).tolist())
    return rows
