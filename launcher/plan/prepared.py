"""What is prepared of a run's sources: manifests, sizes, window tables, and the state of every shard."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from data_prep.errors import DataError
from data_prep.manifest import Manifest, read_manifest
from data_prep.spec import Source, WindowKind
from data_prep.storage import Folder, Reading, open_folder
from data_prep.stream import SourceStream
from data_prep.windows import TableKind, WindowTable, read_window_table
from launcher.config.reading import SourceSize, all_sources
from launcher.config.schema import RunConfig


@dataclass
class Prepared:
    """The training tokens of each source, opened, and their sizes with those of the window tables that stages ask for."""

    streams: dict[str, SourceStream] = field(default_factory=dict)
    sizes: dict[str, SourceSize] = field(default_factory=dict)

    @property
    def manifests(self) -> dict[str, Manifest]:
        return {name: stream.manifest for name, stream in self.streams.items()}


def folder_of(config: RunConfig, name: str) -> Folder:
    """Where a source lies; a bucket lies with its parent."""
    data = config.data
    reading = Reading(reader=data.reader, cache_dir=data.cache_dir, cache_gib=data.cache_gib)
    return open_folder(config.run.data_dir, all_sources(config)[name].parent or name, reading=reading)


def open_source(config: RunConfig, name: str) -> SourceStream:
    """The training tokens of a source. DataError where it is not prepared."""
    least = all_sources(config)[name].min_document_tokens or 0
    return SourceStream(folder_of(config, name), name=name, min_document_tokens=least)


def open_table(config: RunConfig, stream: SourceStream, *, kind: TableKind, seq_length: int) -> WindowTable:
    """The window table of a source. DataError where it is not prepared, or from other shards."""
    least = all_sources(config)[stream.name].min_document_tokens or 0
    return read_window_table(
        folder_of(config, stream.name),
        name=stream.name,
        kind=kind,
        seq_length=seq_length,
        min_document_tokens=least,
        digest=stream.digest,
    )


def wanted_tables(config: RunConfig) -> Iterator[tuple[str, Source, TableKind, int]]:
    """Every window table that a stage reads, once."""
    seen = set()
    for stage in config.stages:
        for name, source in stage.mixture.sources.items():
            kind, seq_length = stage.mixture.windows_of(name), stage.stage.seq_length
            if kind != "stream" and (name, kind, seq_length) not in seen:
                seen.add((name, kind, seq_length))
                yield name, source, kind, seq_length


def read_source(config: RunConfig, name: str, *, into: Prepared) -> list[str]:
    """Adds what is known of one source; returns what is wrong with its window tables. DataError: it is not prepared."""
    stream = open_source(config, name)
    into.streams[name] = stream
    tables: dict[tuple[WindowKind, int], tuple[int, int]] = {}
    missing = []
    for wanted, _, kind, seq_length in wanted_tables(config):
        if wanted == name:
            try:
                table = open_table(config, stream, kind=kind, seq_length=seq_length)
                tables[kind, seq_length] = (table.num_windows, table.tokens)
            except DataError as error:
                missing.append(str(error))
    into.sizes[name] = SourceSize(stream.num_tokens, tables)
    return missing


def known_sizes(config: RunConfig) -> dict[str, SourceSize]:
    """Of the sources that are prepared; the others are left out. Manifests are read, shards are not looked at."""
    sizes = {}
    for name, source in all_sources(config).items():
        try:
            manifest = read_manifest(folder_of(config, name))
        except (DataError, OSError):
            continue
        least = source.min_document_tokens or 0
        tokens = sum(shard.tokens for shard in manifest.train.shards if shard.min_document_tokens >= least)
        sizes[name] = SourceSize(tokens)
    return sizes
