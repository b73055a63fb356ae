"""The same workers under datatrove's executors: on this machine, or on a Ray cluster that is there.

An executor starts the workers and no more: which tasks there are, and what is done, stays in the source's folder, so that what
one engine began another ends, with the same bytes.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data_prep.errors import DataError
from data_prep.prepare.finish import MANIFEST
from data_prep.prepare.job import Job
from data_prep.prepare.open import Order, reopen_job
from data_prep.prepare.place import FAILED
from data_prep.prepare.workers import work


class Work(PipelineStep):  # type: ignore[misc]
    """A datatrove step that takes no documents: one of its tasks is one of our workers."""

    type, name = "Phidias", "tasks"

    def __init__(self, order: Order, names: list[str]):
        super().__init__()
        self.order, self.names = order, names

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        jobs = [reopen_job(self.order, name) for name in self.names]
        with self.track_time():
            work(jobs, token=self.order.token)
        yield from data or ()  # what failed is read from the sources' folders


def run_executor(order: Order, *, engine: str, jobs: Mapping[str, Job]) -> dict[str, DataError]:
    """Works on all jobs until each is whole or has failed; what failed, by source. With `data.num_workers` workers, on Ray
    times `data.num_machines`."""
    with tempfile.TemporaryDirectory(prefix="phidias-datatrove-") as logs:
        _executor(order, engine=engine, names=list(jobs), logs=logs).run()
    return {name: error for name, job in jobs.items() if (error := _error_of(job, token=order.token))}


def _executor(order: Order, *, engine: str, names: list[str], logs: str) -> Any:
    settings, pipeline = order.settings, [Work(order, names)]
    if engine == "datatrove":
        from datatrove.executor.local import LocalPipelineExecutor

        workers = settings.num_workers
        return LocalPipelineExecutor(pipeline, tasks=workers, workers=workers, logging_dir=logs, start_method="spawn")
    try:
        import ray
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError as error:
        raise DataError(
            f"engine=ray needs Ray ({error}); the other engines do without; `pip install ray`, or engine=local"
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    workers = settings.num_workers * settings.num_machines
    return RayPipelineExecutor(pipeline, tasks=workers, workers=workers, logging_dir=logs)


def _error_of(job: Job, *, token: str) -> DataError | None:
    if job.place.read(MANIFEST) is not None:
        return None
    with contextlib.suppress(UnicodeDecodeError):
        if (said := job.place.read(f"{FAILED}/{token}")) is not None:
            return DataError(said.decode())
    return DataError(
        f"source '{job.name}' is unfinished: the executor's workers ended before it was whole; nothing finished is lost; read "
        "what they said above, and start again"
    )
