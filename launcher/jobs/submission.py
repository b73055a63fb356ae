"""Putting runs into Slurm's queue. All that can be refused is refused first, of every run of a sweep; then runs are frozen,
with a copy of the code, and queued."""

import fcntl
import os
import secrets
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError, Problem
from launcher.config.reading import all_sources
from launcher.config.schema import RunConfig
from launcher.jobs.graph import DATA, EVAL, Planned, after_job, data_job, stage_job, sweep_job, waits_of
from launcher.jobs.queue import Work, queued, submit_jobs, try_jobs, work_left
from launcher.jobs.slurm import run_sbatch
from launcher.jobs.stages import refuse_headless
from launcher.plan.planner import check_fits
from launcher.plan.preflight import check_data_ready, sources_to_make
from launcher.plan.prepared import Prepared
from launcher.rundir.code import SOURCE_ROOT, code_digest, installed, snapshot_code
from launcher.rundir.freeze import open_run, refuse_unopenable
from launcher.rundir.paths import RunDir
from launcher.rundir.permissions import check_key_file
from launcher.rundir.records import append_record, write_json
from launcher.rundir.stop import lower_flag


@dataclass(frozen=True)
class Submission:
    """A run that passed every check. `prepared: None`: its data is still to be made, by `phidias data` with `data_words`."""

    run: RunDir
    config: RunConfig
    prepared: Prepared | None
    data_words: tuple[str, ...]

    @property
    def left(self) -> list[Work]:
        return work_left(self.run, self.config, data_ready=self.prepared is not None)

    def jobs(self, *, code: Path) -> list[Planned]:
        return [self.job(work, code=code) for work in self.left]

    def job(self, work: Work, *, code: Path) -> Planned:
        if work.behind is not None:
            return after_job(self.config, run=self.run, what=work.what, stage=work.behind, code=code)
        if work.what == DATA:
            return data_job(self.config, words=self.data_words, run=self.run, code=code)
        return stage_job(self.config, run=self.run, stage=work.what, code=code)

    def freeze(self) -> Path:
        """Makes the run directory what the jobs go by; the copy of the code in it. Whoever queues a run wants it to go on."""
        run = open_run(self.config, prepared=self.prepared, on_change=print)
        lower_flag(run)
        return snapshot_code(run)


def check_submission(config: RunConfig, *, data_words: Sequence[str] | None) -> Submission:
    """Everything that can be known before a job is queued. ConfigError, LayoutError, RunStateError. `data_words: None`: the
    data must be there."""
    run = RunDir(Path(config.run.runs_dir) / config.run.name)
    refuse_local(config)
    refuse_unexportable(config)
    check_fits(config)
    check_key_file(config)
    prepared = ready_data(config, may_be_made=data_words is not None)
    refuse_headless(run, config)
    return Submission(run, config, prepared, tuple(data_words or ()))


def refuse_unexportable(config: RunConfig) -> None:
    if config.run.after and config.model.family is None:
        found = f"[{', '.join(config.run.after)}] with model.family=null"
        rule = "only a model with a family has a Hugging Face class"
        raise ConfigError(Problem("run.after", found, rule, "run.after=[], or a family where the shape allows"))
    tasks, folder = config.run.evaluation.tasks, config.run.evaluation.task_dir
    if EVAL not in config.run.after or not tasks:
        return
    if folder is not None and not Path(folder).is_dir():
        rule = "it is the folder of the YAML files of tasks, as the evaluation's job sees it"
        raise ConfigError(Problem("run.evaluation.task_dir", folder, rule, "an absolute path"))
    if config.cluster.container is None and installed("lm-eval") is None:
        fix = "pip install 'phidias[train,eval]', or run.evaluation.tasks=[]"
        raise ConfigError(Problem("run.evaluation.tasks", ", ".join(tasks), "tasks are measured through lm-eval", fix))


def refuse_local(config: RunConfig) -> None:
    if config.cluster.kind != "slurm":
        rule = "submit queues jobs on a Slurm cluster"
        raise ConfigError(Problem("cluster.kind", config.cluster.kind, rule, "cluster=slurm_h100, or `phidias train`"))


def ready_data(config: RunConfig, *, may_be_made: bool) -> Prepared | None:
    """What is prepared; None where sources are still to be made and can be: their inputs and the tokenizer are there."""
    if not may_be_made or not sources_to_make(config):
        return check_data_ready(config)
    # What reads text takes longer to import than a submission of prepared data to make.
    from data_prep.build import list_inputs
    from data_prep.tokenizers import build_tokenizer

    list_inputs({name: source for name, source in all_sources(config).items() if source.parent is None})
    build_tokenizer(config.tokenizer)
    return None


def submit(submissions: Sequence[Submission], *, concurrency: int | None, dry: bool) -> None:
    """Queues what is left of each run. Those that are live are left alone, and those that are done. `concurrency`: one array
    for all, of which so many run at a time."""
    if dry:
        show(choose(submissions, concurrency=concurrency), concurrency=concurrency)
        return
    with ExitStack() as stack:
        for folder in sorted({row.run.root.parent for row in submissions}):
            stack.enter_context(one_at_a_time(folder))
        queue(choose(submissions, concurrency=concurrency), concurrency=concurrency)


def choose(submissions: Sequence[Submission], *, concurrency: int | None) -> list[Submission]:
    """Those that are to be queued; the others are told of."""
    todo = [row for row in submissions if is_to_do(row)]
    if concurrency:
        refuse_unlike(todo)
    return todo


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Two submissions at once would both find that nothing is queued: the second waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".submit.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def queue(todo: Sequence[Submission], *, concurrency: int | None) -> None:
    for row in todo:
        try_jobs(row.run, row.jobs(code=SOURCE_ROOT))
    made: dict[str, str] = {}  # sources by place, to the job that makes them
    if concurrency and todo:
        submit_array(todo, concurrency=concurrency, made=made)
        return
    codes = [row.freeze() for row in todo]
    for row, code in zip(todo, codes, strict=True):
        after, jobs = data_dependency(row, row.jobs(code=code), made=made)
        ids = submit_jobs(row.run, jobs, after=after)
        note_made(row, jobs, ids=ids, made=made)
        print(f"{row.run.name}: {row.run.root}; `phidias status {row.run.name}`, `phidias logs {row.run.name}`")


def is_to_do(row: Submission) -> bool:
    """RunStateError where the run that is there is another one, or at work outside of Slurm."""
    if jobs := queued(row.run):
        print(f"{row.run.name} is queued already: {', '.join(f'{job} ({state})' for job, state in jobs.items())}")
        return False
    refuse_unopenable(row.run, row.config)
    if not row.left:
        print(f"{row.run.name}: everything is done")
    return bool(row.left)


def refuse_unlike(rows: Sequence[Submission]) -> None:
    """ConfigError where runs that are to be elements of one array would want different jobs."""
    for row in rows[1:]:
        first, other = vars(rows[0].config.cluster), vars(row.config.cluster)
        differing = [name for name in first if first[name] != other[name]]
        if differing:
            found, rule = (
                f"different values in {rows[0].run.name} and {row.run.name}",
                "elements of an array are jobs of one kind",
            )
            fix = "leave concurrency= out: each run is a job then"
            raise ConfigError(*(Problem(f"cluster.{name}", found, rule, fix) for name in differing))


def places(row: Submission) -> list[str]:
    """The folders that its data job fills."""
    return [f"{row.config.run.data_dir}/{name}" for name in sources_to_make(row.config)]


def data_dependency(row: Submission, jobs: Sequence[Planned], *, made: dict[str, str]) -> tuple[str | None, list[Planned]]:
    """The jobs, without that for data where other runs of the sweep have theirs make it: then after those."""
    if row.prepared is not None:
        return None, list(jobs)
    makers = [made.get(place) for place in places(row)]
    if None in makers:
        return None, list(jobs)
    return ":".join(sorted({maker for maker in makers if maker})), [job for job in jobs if job.what != DATA]


def note_made(row: Submission, jobs: Sequence[Planned], *, ids: Sequence[str], made: dict[str, str]) -> None:
    for job, number in zip(jobs, ids, strict=True):
        if job.what == DATA:
            made |= dict.fromkeys(places(row), number)


def submit_array(rows: Sequence[Submission], *, concurrency: int, made: dict[str, str]) -> None:
    """One array; data that is still to be made by jobs before it. What run.after names is not a part of it."""
    codes = [row.freeze() for row in rows]
    waits: list[str] = []
    for row, code in zip(rows, codes, strict=True):
        after, jobs = data_dependency(row, [row.job(Work(DATA), code=code)] if Work(DATA) in row.left else [], made=made)
        ids = submit_jobs(row.run, [job for job in jobs if job.what == DATA])
        note_made(row, jobs, ids=ids, made=made)
        waits += [*ids, *([after] if after else [])]
    listing = listing_of(rows)
    listing.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    write_json(listing, {"runs": [element_of(row) for row in rows]})
    array = sweep_job([row.config for row in rows], runs=listing, code=codes[0], concurrency=concurrency)
    job = run_sbatch(array.line(after=":".join(dict.fromkeys(waits)) or None))
    for number, row in enumerate(rows):
        append_record(row.run.events, "submitted", stage=",".join(row.config.stage_names), job=f"{job}_{number}")
        print(f"{row.run.name}: element {number} of array {job}, {concurrency} at a time")


def element_of(row: Submission) -> dict[str, Any]:
    """What an element of an array finds in the listing: its run, and what of it is to be trained."""
    return {"run": str(row.run.root.resolve()), "stages": list(row.config.stage_names)}


def listing_of(rows: Sequence[Submission]) -> Path:
    """Which run is which element: a file of its own for each array, which may wait for weeks."""
    first = min(row.run.name for row in rows)
    return rows[0].run.root.parent / ".sweep" / f"{first}_and_{len(rows) - 1}_more_{secrets.token_hex(4)}.json"


def show(rows: Sequence[Submission], *, concurrency: int | None) -> None:
    """dry=true: the exact lines."""
    for row in rows:
        code = row.run.code_copy(code_digest())
        jobs = row.jobs(code=code)
        if concurrency:
            jobs = [job for job in jobs if job.what == DATA]
        ids = [f"<job of {job.title}>" for job in jobs]
        for number, job in enumerate(jobs):
            waits, behind = waits_of(jobs, number=number, after=None, ids=ids[:number])
            print(shlex.join(job.line(after=waits, behind=behind)))
    if concurrency and rows:
        code, configs = rows[0].run.code_copy(code_digest()), [row.config for row in rows]
        print(shlex.join(sweep_job(configs, runs=listing_of(rows), code=code, concurrency=concurrency).line(after=None)))


def at_home(config: RunConfig, *, run: RunDir) -> RunConfig:
    """The config of a run that was found elsewhere than it says: called from another folder, or moved."""
    root = run.root.resolve().parent
    if root == Path(config.run.runs_dir).resolve():
        return config
    return replace(config, run=replace(config.run, runs_dir=str(root)))
