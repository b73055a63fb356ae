"""The frozen plan of a source: which rows each task takes. It is made from the inputs before work starts, and is the same for
any number of workers, so that shards are the same bytes wherever they were made.

    plan.json  settings, inputs, and the tasks of every stage
    stages     with deduplication: curate_1, pairs_1, clusters_1, curate_2, ...; always last: tokenize
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from data_prep.curate.files import files_of
from data_prep.errors import DataError
from data_prep.inputs import InputFile, open_input
from data_prep.prepare.keys import groups_of, is_dedup
from data_prep.prepare.place import Place
from data_prep.readers import Piece, can_be_cut
from data_prep.spec import DataSettings, Source

FILE = "plan.json"
FORMAT_VERSION = 1
PIECE_BYTES = 1 << 26
# Tokens a byte of input, where nothing was read yet: text has about 4 bytes a token, and compresses to a third or so.
TOKENS_PER_BYTE = {"plain": 0.25, "parquet": 0.6, "compressed": 0.8}
CURATED_TOKENS = 1 << 26  # of a task that filters: quality stages are a hundred times slower than tokenizing

Settings = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class Stage:
    """One step of the way, all of whose tasks can be done at once when the stage before is whole. `parts`: of each task, the
    pieces (of inputs) or the tasks of `takes_from` that it reads, first and last + 1."""

    name: str
    kind: str  # curate | pairs | clusters | tokenize
    parts: tuple[tuple[int, int], ...]
    takes_from: str | None
    first_step: int
    last_step: int

    def task(self, number: int) -> str:
        """The name of a task, as its receipt has it."""
        return f"{self.name}_{number:05d}"


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a source's shards. `pieces`: file, first byte, and byte after the last or None."""

    source: str
    settings: Settings
    files: tuple[InputFile, ...]
    pieces: tuple[tuple[int, int, int | None], ...]
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def piece(self, number: int) -> Piece:
        file, start, end = self.pieces[number]
        return Piece(self.files[file], start, end)

    def input_bytes(self, stage: Stage, part: int) -> int:
        """Of the inputs that a part of a task stands for, for the progress."""
        if stage.takes_from is None:
            piece = self.piece(part)
            return (piece.file.size if piece.end is None else piece.end) - piece.start
        before = self.stage(stage.takes_from)
        return sum(self.input_bytes(before, each) for each in range(*before.parts[part]))

    @cached_property
    def digest(self) -> str:
        """What receipts name the plan by. Paths are in it only as the settings have them: a folder may move."""
        rest = [self.settings, self.pieces, [asdict(stage) for stage in self.stages]]
        return xxhash.xxh3_128_hexdigest(json.dumps(rest).encode())

    @staticmethod
    def read_digest(place: Place) -> str | None:
        """Of the plan that is there now."""
        data = place.read(FILE)
        return decode_plan(data, path=place.path(FILE)).digest if data is not None else None

    def encode(self) -> bytes:
        fields = {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "settings": self.settings,
            "files": [astuple(file) for file in self.files],
            "pieces": self.pieces,
            "stages": [asdict(stage) for stage in self.stages],
        }
        return json.dumps(fields).encode()


def decode_plan(data: bytes, *, path: str) -> Plan:
    """DataError: not a plan of this version."""
    try:
        fields = json.loads(data)
        if fields["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {fields['format_version']!r}, this code reads {FORMAT_VERSION}")
        return Plan(
            source=fields["source"],
            settings=fields["settings"],
            files=tuple(InputFile(path=path, size=size, version=version) for path, size, version in fields["files"]),
            pieces=tuple((file, start, end) for file, start, end in fields["pieces"]),
            stages=tuple(_stage_of(stage) for stage in fields["stages"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a plan ({error}); remove its folder and run `phidias data` again") from error


def _stage_of(fields: dict[str, Any]) -> Stage:
    return Stage(**{**fields, "parts": tuple((low, high) for low, high in fields["parts"])})


def plan_source(name: str, source: Source, *, files: tuple[InputFile, ...], settings: Settings, data: DataSettings) -> Plan:
    """The plan of a source: pieces in a keyed order, dealt out so that a task makes about one shard."""
    pieces = _cut(files, source=source, most=_piece_bytes(data))
    tokens = np.array([_tokens(files[file], source=source, start=start, end=end) for file, start, end in pieces])
    if data.shuffle_mib:
        order = _keyed_order(files, pieces=pieces, seed=int(settings["seed"]), name=name)
        pieces, tokens = [pieces[index] for index in order], tokens[order]
    stages = _stages(source, tokens=tokens, shard_tokens=data.shard_tokens)
    return Plan(source=name, settings=settings, files=files, pieces=tuple(pieces), stages=tuple(stages))


def _piece_bytes(data: DataSettings) -> int:
    """So that even a shard of a small source is mixed from several places."""
    return min(PIECE_BYTES, max(1 << 16, data.shard_tokens // 2))


def _cut(files: Sequence[InputFile], *, source: Source, most: int) -> list[tuple[int, int, int | None]]:
    pieces: list[tuple[int, int, int | None]] = []
    for number, file in enumerate(files):
        if file.size <= most or not can_be_cut(file, format=source.format):
            pieces.append((number, 0, None))
        else:
            borders = [round(part) for part in np.linspace(0, file.size, math.ceil(file.size / most) + 1).tolist()]
            pieces += [(number, low, high) for low, high in itertools.pairwise(borders)]
    return pieces


def _tokens(file: InputFile, *, source: Source, start: int, end: int | None) -> float:
    """About how many tokens a piece holds."""
    kind = "parquet" if source.format == "parquet" else "plain"
    if kind == "plain" and source.format == "jsonl" and not can_be_cut(file, format=source.format):
        kind = "compressed"
    return max(1, (file.size if end is None else end) - start) * TOKENS_PER_BYTE[kind]


def _keyed_order(
    files: Sequence[InputFile], *, pieces: Sequence[tuple[int, int, int | None]], seed: int, name: str
) -> list[int]:
    """A permutation that depends on the seed and on each piece's place below the common folder."""
    folder = common_folder(files)
    names = [files[file].path.removeprefix(folder) for file, _, _ in pieces]
    texts = [f"{seed}\0{name}\0{path}\0{start}" for path, (_, start, _) in zip(names, pieces, strict=True)]
    keys = [xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogateescape")) for text in texts]  # names need not be UTF-8
    return sorted(range(len(pieces)), key=keys.__getitem__)


def _stages(source: Source, *, tokens: Any, shard_tokens: int) -> list[Stage]:
    """Each deduplication ends a part of the steps: what it drops is known when all documents before it are."""
    cuts = [number + 1 for number, step in enumerate(source.steps) if is_dedup(step)]
    stages: list[Stage] = []
    first, previous, parts = 0, None, deal(tokens, limit=min(CURATED_TOKENS, shard_tokens))
    for number, last in enumerate(cuts, start=1):
        curate = Stage(f"curate_{number}", "curate", tuple(parts), previous, first, last)
        groups = groups_of(source.steps[last - 1], tokens=float(tokens.sum()))
        pairs = Stage(
            f"pairs_{number}", "pairs", tuple((group, group + 1) for group in range(groups)), curate.name, last - 1, last
        )
        clusters = Stage(f"clusters_{number}", "clusters", ((0, groups),), pairs.name, last - 1, last)
        stages += [curate, pairs, clusters]
        sums = np.array([tokens[low:high].sum() for low, high in parts])
        first, previous, parts, tokens = last, curate.name, [(task, task + 1) for task in range(len(parts))], sums
    steps = len(source.steps)
    if (
        first < steps and tokens.sum() > CURATED_TOKENS
    ):  # or a task of a whole shard would take hours, and begin anew when killed
        number = len(cuts) + 1
        stages.append(Stage(f"curate_{number}", "curate", tuple(parts), previous, first, steps))
        tokens = np.array([tokens[low:high].sum() for low, high in parts])
        first, previous = steps, f"curate_{number}"
    final = deal(tokens, limit=shard_tokens)
    return [*stages, Stage("tokenize", "tokenize", tuple(final), previous, first, steps)]


def deal(tokens: Any, *, limit: float) -> list[tuple[int, int]]:
    """Consecutive runs of equal size, none far above the limit; a piece is never cut here."""
    if not len(tokens):
        return []
    count = max(1, math.ceil(float(tokens.sum()) / limit))
    middles = np.cumsum(tokens) - tokens / 2
    runs = np.minimum(middles * count // tokens.sum(), count - 1)
    borders = [0, *(np.flatnonzero(np.diff(runs)) + 1).tolist(), len(tokens)]
    return list(itertools.pairwise(borders))


def settings_of(source: Source, *, files: tuple[InputFile, ...], settings: DataSettings, seed: int, tokenizer: str) -> Settings:
    """All that decides what is in the shards. Shares, epochs and tolerances do not."""
    folder = common_folder(files)
    named = [(file.path.removeprefix(folder), file.size, file.version) for file in files]  # the whole folder may move
    digest = xxhash.xxh3_128_hexdigest(json.dumps(named).encode())
    return {
        "format": source.format or "",  # a source with inputs has one
        "text_field": source.text_field,
        "steps": json.dumps([asdict(step) for step in source.steps]),
        "step_files": _digest_of(path for step in source.steps for path in files_of(step)),
        "held_out_fraction": settings.held_out_fraction,
        "shard_tokens": settings.shard_tokens,
        "length_buckets": str(list(settings.length_buckets)),
        "shuffle_mib": settings.shuffle_mib,
        "max_row_mib": settings.max_row_mib,
        "seed": seed,
        "tokenizer": tokenizer,
        "inputs": f"{len(files)} files, {sum(file.size for file in files)} bytes, {digest}",
    }


def _digest_of(paths: Iterable[str]) -> str:
    """Of the files that steps read: a model, benchmarks. One that is missing is the step's to refuse."""
    digest = xxhash.xxh3_128()
    for path in paths:
        with contextlib.suppress(OSError), open_input(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def common_folder(files: Sequence[InputFile]) -> str:
    """The longest folder that all files lie below, with its last slash; of paths and of URLs."""
    folders = [file.path.split("/")[:-1] for file in files]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "".join(f"{parts[0]}/" for parts in common)


def differences(found: Settings, wanted: Settings) -> list[str]:
    """What of `wanted` was made otherwise, one line each."""
    return [f"{key}: found {found.get(key)}, wanted {value}" for key, value in wanted.items() if found.get(key) != value]


def changed_inputs(before: Sequence[InputFile], after: Sequence[InputFile]) -> str:
    """In brackets, the first few files that are not the same."""
    changed = sorted({file.path for file in {*before} ^ {*after}})
    named = [*changed[:3], *(["..."] if len(changed) > 3 else [])]
    return f" (inputs added, removed or changed: {', '.join(named)})" if named else ""
