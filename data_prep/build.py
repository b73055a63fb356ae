"""Raw text to shards, for every source: plan, share the tasks out, write the manifests. See data_prep/prepare."""

import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from data_prep.errors import DataError
from data_prep.inputs import InputFile, find_inputs
from data_prep.manifest import Manifest, read_manifest, verify_source
from data_prep.prepare.job import Job
from data_prep.prepare.open import Order, is_imported, open_source
from data_prep.prepare.pool import run_workers
from data_prep.prepare.progress import Board, OnProgress, Progress
from data_prep.prepare.tasks import is_held_out
from data_prep.spec import DataSettings, Source, TokenizerSpec
from data_prep.storage import open_folder

__all__ = ["Progress", "is_held_out", "list_inputs", "prepare_source", "prepare_sources", "verify_source"]

T = TypeVar("T")


def list_inputs(sources: Mapping[str, Source]) -> dict[str, tuple[InputFile, ...]]:
    """The files each source would read. DataError with every source whose inputs are wrong."""
    found, errors = _attempt(sources, lambda name: find_inputs(sources[name], name=name))
    _refuse(errors, of=len(sources))
    return found


def prepare_source(
    name: str,
    source: Source,
    *,
    tokenizer: TokenizerSpec,
    settings: DataSettings,
    seed: int,
    data_dir: str | Path,
    on_progress: OnProgress | None = None,
    token: str | None = None,
    engine: str = "local",
) -> Manifest:
    """Shards and manifest of one source in `data_dir/name`; the manifest that is there, where nothing changed since, or where
    it was imported and there is no text to make it from. See prepare_sources."""
    shared: dict[str, Any] = {"tokenizer": tokenizer, "settings": settings, "seed": seed, "data_dir": data_dir}
    return prepare_sources({name: source}, **shared, on_progress=on_progress, token=token, engine=engine)[name]


def prepare_sources(
    sources: Mapping[str, Source],
    *,
    tokenizer: TokenizerSpec,
    settings: DataSettings,
    seed: int,
    data_dir: str | Path,
    on_progress: OnProgress | None = None,
    token: str | None = None,
    engine: str = "local",
) -> dict[str, Manifest]:
    """Every source, with `settings.num_workers` processes, and with whoever else works on the same folder. A source that fails
    stops no other; DataError names all that failed. Calls with the same `token` give up a source that failed in one of them.
    `engine` says what starts the processes: we (local), or an executor of datatrove's (datatrove, ray).

    What is done stays done: sources already prepared are skipped, and tasks that left a receipt. DataError: inputs or tokenizer
    unusable, a malformed row too many, prepared or begun before with other settings, disk full."""
    # A wrong glob is known now, not after the hours of the sources before it.
    list_inputs({name: source for name, source in sources.items() if not is_imported(data_dir, name)})
    order = Order(sources, tokenizer, settings, seed, str(data_dir), token or uuid.uuid4().hex)
    opened, errors = _attempt(sources, lambda name: open_source(order, name))
    jobs = {name: job for name, job in opened.items() if isinstance(job, Job)}
    board = Board(jobs, on_progress=on_progress)
    manifests = {name: manifest for name, manifest in opened.items() if isinstance(manifest, Manifest)}
    for manifest in manifests.values():
        board.finish(manifest)
    if engine == "local":
        errors |= run_workers(order, jobs=jobs, board=board)
    elif jobs:
        from data_prep.prepare.executors import run_executor  # needs datatrove

        errors |= run_executor(order, engine=engine, jobs=jobs)
    made, unread = _attempt(jobs.keys() - errors.keys(), lambda name: read_manifest(open_folder(data_dir, name)))
    errors |= unread
    _refuse({name: errors[name] for name in sources if name in errors}, of=len(sources))
    return {name: (manifests | made)[name] for name in sources}


def _attempt(names: Iterable[str], task: Callable[[str], T]) -> tuple[dict[str, T], dict[str, DataError]]:
    """What the task gives for each name, and what it refuses."""
    done: dict[str, T] = {}
    errors: dict[str, DataError] = {}
    for name in names:
        try:
            done[name] = task(name)
        except DataError as error:
            errors[name] = error
    return done, errors


def _refuse(errors: Mapping[str, DataError], *, of: int) -> None:
    """One DataError with all that failed."""
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        raise DataError("\n".join([f"{len(errors)} of {of} sources failed:", *map(str, errors.values())]))
