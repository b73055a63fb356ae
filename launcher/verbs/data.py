"""phidias data: raw text to shards, for every source of the selected stages. dry=true lists what would be read; engine=slurm
submits the work as an array; action=verify checks shards that are there against their manifests; action=import takes over
shards that Megatron wrote."""

import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.build import list_inputs, prepare_sources
from data_prep.errors import DataError
from data_prep.manifest import Manifest, import_shards, verify_source
from data_prep.prepare.place import open_place
from data_prep.spec import Source
from data_prep.storage import open_folder
from data_prep.tokenizers import build_tokenizer, tokenizer_entry
from data_prep.windows import WindowTable, build_window_table
from launcher.config.errors import ConfigError, Problem
from launcher.config.reading import all_sources
from launcher.config.schema import RunConfig
from launcher.jobs.graph import data_job
from launcher.jobs.slurm import run_sbatch
from launcher.plan.page import short
from launcher.plan.preflight import check_vocabulary
from launcher.plan.prepared import wanted_tables
from launcher.report.data_page import render_data_page
from launcher.rundir.exits import ExitClass
from launcher.verbs.data_progress import DataProgress
from launcher.verbs.request import Request

PAGE = "data.html"
OPTIONS = {"dry": ("true", "false"), "action": ("verify", "import"), "engine": ("local", "slurm", "datatrove", "ray")}


def act(request: Request) -> int:
    action, engine, dry = (
        request.options.get("action"),
        request.options.get("engine", "local"),
        request.options.get("dry") == "true",
    )
    if action and (dry or "engine" in request.options):
        other = "dry=true" if dry else f"engine={engine}"
        rule = "dry and engine are about preparing, an action deals with shards that are there"
        raise ConfigError(Problem("action", f"action={action} with {other}", rule, "leave one of them out"))
    console = Console(highlight=False, markup=False)  # file names may hold [brackets]
    if action:
        return {"verify": verify, "import": import_megatron}[action](request.config, console=console)
    refuse_remote_tables(request.config)
    if dry:
        list_only(request.config, console=console)
    if engine == "slurm":
        return submit(request, console=console, dry=dry)
    return ExitClass.DONE if dry else prepare(request.config, console=console, engine=engine)


def refuse_remote_tables(config: RunConfig) -> None:
    tables = [name for name, *_ in wanted_tables(config)] if is_remote(config) else []
    if tables:
        rule = "window tables are written beside shards on a file system of this machine"
        fix = "a local folder, or windows: stream for these sources"
        raise ConfigError(Problem("run.data_dir", f"{config.run.data_dir}, with tables of {', '.join(tables)}", rule, fix))


def is_remote(config: RunConfig) -> bool:
    return "://" in config.run.data_dir


def submit(request: Request, *, console: Console, dry: bool) -> int:
    """engine=slurm: an array whose elements share the work; each runs `phidias data` with the same overrides."""
    refuse_unreadable_tokenizer(request.config)
    sources = sources_of(request.config)
    list_inputs(sources)
    command = data_job(request.config, words=(*request.search_path, *request.overrides)).line(after=None)
    console.print(shlex.join(command), soft_wrap=True)
    if not dry:
        console.print(
            f"job {run_sbatch(command)}: `squeue -j` shows it, a second call goes on where it stopped", soft_wrap=True
        )
    return ExitClass.DONE


def sources_of(config: RunConfig) -> dict[str, Source]:
    """The sources of all stages that are made from inputs; buckets are part of their parents."""
    return {name: source for name, source in all_sources(config).items() if source.parent is None}


def prepare(config: RunConfig, *, console: Console, engine: str) -> int:
    sources = sources_of(config)
    refuse_unreadable_tokenizer(config)
    with DataProgress(sources, console=console) as progress, terminated_as_interrupted():
        manifests = prepare_sources(
            sources,
            tokenizer=config.tokenizer,
            settings=config.data,
            seed=config.run.seed,
            data_dir=config.run.data_dir,
            on_progress=progress.update,
            token=array_token(),
            engine=engine,
        )
    tables = build_tables(config)
    open_place(config.run.data_dir, "").write(PAGE, render_data_page(manifests, place=config.run.data_dir).encode())
    console.print(f"data in {config.run.data_dir}, with a page of figures, {PAGE}:")
    console.print(manifest_table(manifests))
    if tables:
        console.print(window_table(tables))
    if problems := check_vocabulary(config, manifests=manifests):
        raise ConfigError(*problems)
    return ExitClass.DONE


def build_tables(config: RunConfig) -> dict[str, WindowTable]:
    """The window table of every source that a stage reads in other windows than a stream's."""
    tables = {}
    for name, source, kind, seq_length in wanted_tables(config):
        directory, least = Path(config.run.data_dir) / (source.parent or name), source.min_document_tokens or 0
        tables[name] = build_window_table(directory, name=name, kind=kind, seq_length=seq_length, min_document_tokens=least)
    return tables


def window_table(tables: dict[str, WindowTable]) -> Table:
    table = Table("windows of", "kind", box=None, pad_edge=False, header_style="bold cyan")
    for column in ("length", "windows", "tokens", "unread documents", "unread tokens"):
        table.add_column(column, justify="right")
    for name, row in tables.items():
        figures = (row.seq_length, row.num_windows, row.tokens, row.unread_documents, row.unread_tokens)
        table.add_row(name, row.kind, *(short(figure) for figure in figures))
    return table


def refuse_unreadable_tokenizer(config: RunConfig) -> None:
    """Says once what every source would say. Wrong inputs come first, as where the tokenizer is right."""
    try:
        build_tokenizer(config.tokenizer)
    except DataError:
        list_inputs(sources_of(config))
        raise


def list_only(config: RunConfig, *, console: Console) -> int:
    """dry=true: the files each source would read. Globs that match nothing are refused, as they would be."""
    console.print(f"would be written to {config.run.data_dir}:")
    table = Table("source", box=None, pad_edge=False, header_style="bold cyan")
    for name in ("files", "bytes"):
        table.add_column(name, justify="right")
    for name, files in list_inputs(sources_of(config)).items():
        table.add_row(name, f"{len(files):,}", short(sum(file.size for file in files)))
    console.print(table)
    return ExitClass.DONE


def array_token() -> str | None:
    """Elements of one array give up a source together; requeued, they try again."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else None


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """scancel and a time limit send SIGTERM: what is half written is put down as on Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def verify(config: RunConfig, *, console: Console) -> int:
    findings = {name: findings_of(config.run.data_dir, name) for name in sources_of(config)}
    for name, lines in findings.items():
        console.print(f"{name}: {'shards agree with the manifest' if not lines else f'{len(lines)} findings'}")
        for line in lines:
            console.print(f"  {line}", soft_wrap=True)
    return ExitClass.STATE if any(findings.values()) else ExitClass.DONE


def findings_of(data_dir: str, name: str) -> list[str]:
    """What is wrong with one source; that it is not there does not keep the others from being checked."""
    try:
        return verify_source(open_folder(data_dir, name))
    except DataError as error:
        return [str(error)]


def import_megatron(config: RunConfig, *, console: Console) -> int:
    """action=import: a manifest for every source whose folder holds shards and none yet. Stems that begin with `held_out` or
    `valid` are kept for validation."""
    if is_remote(config):
        rule = "shards are taken over where Megatron wrote them, on a file system of this machine"
        raise ConfigError(Problem("run.data_dir", config.run.data_dir, rule, "a local folder"))
    tokenizer = tokenizer_entry(build_tokenizer(config.tokenizer), kind=config.tokenizer.kind)
    manifests = {}
    for name in sources_of(config):
        directory = Path(config.run.data_dir) / name
        # A plan says that these shards are ours, and perhaps not all there.
        if any(directory.glob("*.idx")) and not any((directory / file).exists() for file in ("manifest.json", "plan.json")):
            held_out = [path.stem for path in sorted(directory.glob("*.idx")) if path.stem.startswith(("held_out", "valid"))]
            manifests[name] = import_shards(directory, source=name, tokenizer=tokenizer, held_out=held_out)
    if not manifests:
        rule = f"action=import takes over .bin and .idx files in {config.run.data_dir}/<source>/ that have no manifest.json yet"
        raise ConfigError(Problem("mixture.sources", "no such folder", rule, "put the shards there, or drop action=import"))
    console.print(manifest_table(manifests))
    return ExitClass.DONE


def manifest_table(manifests: dict[str, Manifest]) -> Table:
    table = Table("source", box=None, pad_edge=False, header_style="bold cyan")
    for column in ("documents", "tokens", "held out", "bytes/token", "rejected", "shards"):
        table.add_column(column, justify="right")
    for name, manifest in manifests.items():
        tokens = manifest.train.tokens + manifest.held_out.tokens
        table.add_row(
            name,
            f"{manifest.train.documents + manifest.held_out.documents:,}",
            short(manifest.train.tokens),
            short(manifest.held_out.tokens),
            f"{manifest.text_bytes / tokens:.2f}" if manifest.text_bytes else "–",
            f"{manifest.rejected_rows:,}",
            f"{len(manifest.train.shards) + len(manifest.held_out.shards)}",
        )
    return table
