"""What the data order costs beside megatron-core's index files, in one run: `python -m benchmarks.data_order [--quick]`.

A. Ours and BlendedMegatronDatasetBuilder (GPTDataset, one builder thread: its default) on the same sources: seconds from the
   start of building to the first global batch of 5,760 samples in memory (order or indexes ready, then the batch read), peak
   memory, bytes written. Cold: no index cache; warm: a second start over the caches of the first.
B. Ours at 9.8T tokens in 50 sources and about 2,300 shards: from the imports to the first global batch, and to a rank's slice
   of 12; the windows of a global batch at random places of the run, and reading them, also for 500 and 1,000 sources.
C. The windows of a global batch, and the positions of the ledger, under one phase and under three.
D. Weights at which index files are known to fail.

Every start is a process of its own; its imports (Megatron's process group too) are timed apart. A source of A has one shard,
documents of 200 to 1,800 tokens, and is read for about one epoch; its share falls with its number. The .bin files are sparse:
both read holes. The .idx files were just written, so that Megatron finds them in the page cache. Peak memory is VmHWM, as
ru_maxrss of a child counts what its parent held at the fork; it includes the mapped pages of files. Ours has the tokens
[N, 4097] int32 in the first batch, Megatron tokens, labels and loss mask of every sample; the second batch is the tokens alone
for both. Megatron reads its .bin files without a memory map (mmap_bin_files=False): its map is a plain one, for which the
system reads `disk_read_ahead_kb` around every missing page, in holes too; where that is megabytes, a batch takes minutes. The
map, its default, is measured at 10M samples of 50 sources; so are two builder threads.

A case that takes over 300 s, or more anonymous memory than RLIMIT_DATA (RLIMIT_AS would count the maps of sparse files), is
recorded as stopped. The scratch folder needs 8 GB (TMPDIR says where) and is removed at the end, on Ctrl-C too.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION, ShardEntry
from data_prep.manifest import Manifest, TokenizerEntry, split_of, write_manifest
from data_prep.mixing import Extent, plan_phases, schedule_of
from data_prep.order import SourceOrder, StageOrder, Windows
from data_prep.spec import Amount, Mixture, Phase, Source
from data_prep.storage import LocalFolder
from data_prep.stream import SourceStream

SEQ_LENGTH, BATCH, SLICE = 4096, 5760, 12
CHUNK_TOKENS, GROUP_TOKENS = 131_072, 2**31  # model_configs/config.yaml
SEED, VOCAB_SIZE = 1234, 100_352
SAMPLES, SOURCES = (1_000_000, 10_000_000, 48_000_000), (3, 50, 500)
FULL_TOKENS, FULL_SHARD_TOKENS, FULL_SOURCES = 9.8e12, 2**32, (50, 500, 1000)
DOCUMENT_TOKENS = (200, 1800)  # 1,000 on average
DOCUMENTS_AT_ONCE = 1 << 22
TIMEOUT_S, MEMORY_GIB = 300, 20
COST_BATCHES, READ_BATCHES = 200, 10
SAID = ("stopped", "failed", "index_ready_s", "batch_read_s", "first_batch_cpu_s", "peak_rss_mb", "process_s")
OURS, MEGATRON = "benchmarks.data_order", "benchmarks.order_megatron"
# The imports of a process are timed before anything else is loaded.
START = "import sys, time; began = time.perf_counter(); import {module} as m; m.work(sys.argv[1], time.perf_counter() - began)"

Figures = dict[str, Any]
# What a process of its own finds in its case file: folder, names, weights, samples, and what to do.
Case = dict[str, Any]


# Sources on disk


def falling_weights(count: int) -> list[float]:
    parts = [1 / (index + 3) for index in range(count)]
    return [part / sum(parts) for part in parts]


def document_lengths(seed: int, count: int) -> Iterator[NDArray[np.int32]]:
    """Lengths of `count` documents, some at a time; the same at every call."""
    rng, (low, high) = np.random.default_rng(seed), DOCUMENT_TOKENS
    for start in range(0, count, DOCUMENTS_AT_ONCE):
        yield rng.integers(low, high + 1, size=min(DOCUMENTS_AT_ONCE, count - start), dtype=np.int32)


def write_index(path: Path, *, seed: int, documents: int) -> int:
    """An .idx of documents end to end; returns their tokens."""
    tokens = 0
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[np.dtype("int32")], documents, documents + 1))
        for lengths in document_lengths(seed, documents):
            file.write(lengths.data)
        for lengths in document_lengths(seed, documents):
            ends = np.cumsum(lengths, dtype=np.int64) + tokens
            file.write(((ends - lengths) * 4).data)
            tokens = int(ends[-1])
        for start in range(0, documents + 1, DOCUMENTS_AT_ONCE):
            file.write(np.arange(start, min(start + DOCUMENTS_AT_ONCE, documents + 1), dtype=np.int64).data)
    return tokens


def write_sparse(path: Path, *, tokens: int) -> None:
    with path.open("wb") as file:
        file.truncate(4 * tokens)


def write_source(directory: Path, *, entries: Sequence[ShardEntry]) -> None:
    manifest = Manifest(
        format_version=1,
        source=directory.name,
        dtype="int32",
        tokenizer=TokenizerEntry(kind="cl100k", fingerprint="0", vocab_size=VOCAB_SIZE, eod_id=VOCAB_SIZE - 1),
        text_bytes=0,
        train=split_of(entries),
        held_out=split_of([]),
        settings={},
        rejected_rows=0,
        empty_documents=0,
    )
    write_manifest(directory, manifest=manifest)


def entry_of(file: str, *, documents: int, tokens: int) -> ShardEntry:
    return ShardEntry(file=file, documents=documents, tokens=tokens, bin_bytes=4 * tokens, bin_xxh3="0", idx_xxh3="0")


def write_indexed_sources(folder: Path, *, samples: int, weights: Sequence[float]) -> Case:
    """Sources of one shard with a real .idx, each a bit more than what is read of it."""
    names = [f"source_{index:04d}" for index in range(len(weights))]
    documents_all = 0
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        (folder / name).mkdir(parents=True)
        documents = math.ceil(1.01 * samples * weight * SEQ_LENGTH / 1000) + 200
        tokens = write_index(folder / name / "shard.idx", seed=index, documents=documents)
        write_sparse(folder / name / "shard.bin", tokens=tokens)
        write_source(folder / name, entries=[entry_of("shard", documents=documents, tokens=tokens)])
        documents_all += documents
    return {"folder": str(folder), "names": names, "weights": list(weights), "samples": samples, "documents": documents_all}


def write_full_sources(folder: Path, *, count: int) -> Case:
    """Sources of 9.8T tokens together, in shards of up to 2^32 tokens without an .idx, which ranks do not read."""
    names, weights = [f"source_{index:04d}" for index in range(count)], falling_weights(count)
    shards_all = 0
    for name, weight in zip(names, weights, strict=True):
        (folder / name).mkdir(parents=True)
        shards = math.ceil(FULL_TOKENS * weight / FULL_SHARD_TOKENS)
        tokens = math.ceil(FULL_TOKENS * weight / shards)
        files = [f"shard_{number:05d}" for number in range(shards)]
        for file in files:
            write_sparse(folder / name / f"{file}.bin", tokens=tokens)
        write_source(folder / name, entries=[entry_of(file, documents=tokens // 1000, tokens=tokens) for file in files])
        shards_all += shards
    samples = int(FULL_TOKENS / SEQ_LENGTH)
    return {"folder": str(folder), "names": names, "weights": weights, "samples": samples, "shards": shards_all}


# What a rank does: in a process of its own


@dataclass(frozen=True)
class Stage:
    streams: list[SourceStream]
    order: StageOrder
    num_samples: int

    def tokens(self, first: int, count: int) -> NDArray[np.int32]:
        """The windows [count, S + 1] of consecutive samples, as training.data.StageData reads them."""
        windows = self.order.windows(first, count)
        out = np.empty((count, SEQ_LENGTH + 1), dtype=np.int32)
        for source, stream in enumerate(self.streams):
            at = np.flatnonzero(windows.source == source)
            if len(at):
                out[at] = stream.read_windows(windows.offset[at], SEQ_LENGTH + 1)
        return out


def mixture_of(case: Case) -> Mixture:
    """One phase, or three of equal length with the weights turned round."""
    names, weights, count = case["names"], case["weights"], case.get("phases", 1)
    phases = []
    for number in range(1, count):
        turn = number * len(names) // count
        amounts = {name: Amount(share=share) for name, share in zip(names, weights[turn:] + weights[:turn], strict=True)}
        phases.append(Phase(start_tokens=float(number * case["samples"] // count * SEQ_LENGTH), sources=amounts))
    first = {name: Source(share=share) for name, share in zip(names, weights, strict=True)}
    return Mixture(name="benchmark", sources=first, phases=tuple(phases))


def open_stage(case: Case) -> Stage:
    """Manifests and shards of every source, the phases, and the order: what a rank does before its first batch."""
    names = case["names"]
    folders = [LocalFolder(Path(case["folder"]) / name, reader=case.get("reader", "mmap")) for name in names]
    streams = [SourceStream(folder, name=name) for folder, name in zip(folders, names, strict=True)]
    orders = [
        SourceOrder(
            name=stream.name,
            num_tokens=stream.num_tokens,
            seq_length=SEQ_LENGTH,
            chunk_tokens=CHUNK_TOKENS,
            group_tokens=GROUP_TOKENS,
            seed=SEED,
        )
        for stream in streams
    ]
    extent = Extent(SEQ_LENGTH, case["samples"], {order.name: order.num_windows for order in orders})
    schedule = schedule_of(plan_phases(mixture_of(case), extent=extent), names=names, seed=SEED)
    return Stage(streams, StageOrder(orders=orders, schedule=schedule, starts=[0] * len(names)), case["samples"])


def ours_start(case: Case) -> Figures:
    count, before = case["batch"], Reading.now()
    stage = open_stage(case)
    ready = Reading.now()
    batch = stage.tokens(0, count)
    figures = start_figures(before, ready, Reading.now(), batch_bytes=batch.nbytes)
    second = min(count, stage.num_samples - count)
    figures["second_batch_tokens_s"] = round(seconds(lambda: stage.tokens(count, second)), 4)
    counts = stage.order.schedule.counts(stage.num_samples)
    return {**figures, **share_figures(counts, weights=case["weights"], samples=stage.num_samples)}


def ours_costs(case: Case) -> Figures:
    """Milliseconds of a global batch, at random places of the run and in order."""
    stage = open_stage(case)
    rng = np.random.default_rng(0)
    places = rng.integers(0, stage.num_samples - BATCH, size=COST_BATCHES).tolist()
    borders = [start - BATCH // 2 for start in stage.order.schedule.starts[1:]]

    def windows(first: int) -> Windows:
        return stage.order.windows(first, BATCH)

    figures = {
        "windows_random_ms": spread_ms(windows, places),
        "windows_in_order_ms": spread_ms(windows, [number * BATCH for number in range(COST_BATCHES)]),
        "positions_ms": spread_ms(stage.order.positions, places),
    }
    if borders:
        figures["windows_over_phase_border_ms"] = spread_ms(windows, borders * 20)
    if case["read"]:
        figures["windows_and_read_random_ms"] = spread_ms(lambda first: stage.tokens(first, BATCH), places[:READ_BATCHES])
    return figures


def spread_ms(task: Callable[[int], Any], places: Sequence[int]) -> Figures:
    """How long a task takes over places, after one that is not counted."""
    task(places[0] + 1)
    times = sorted(1000 * seconds(lambda place=place: task(place)) for place in places)
    middle, high = statistics.median(times), times[math.ceil(0.9 * len(times)) - 1]
    figures = {"median": middle, "min": times[0], "p90": high, "max": times[-1]}
    return {**{name: round(value, 3) for name, value in figures.items()}, "batches": len(times)}


def seconds(task: Callable[[], Any]) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


# Figures that both sides give


@dataclass(frozen=True)
class Reading:
    """What a process has used by now."""

    wall_s: float
    cpu_s: float
    memory_mb: dict[str, float]
    written_bytes: int

    @classmethod
    def now(cls) -> "Reading":
        return cls(time.perf_counter(), time.process_time(), memory_mb(), written_bytes())


def start_figures(before: Reading, ready: Reading, done: Reading, *, batch_bytes: int) -> Figures:
    return {
        "index_ready_s": round(ready.wall_s - before.wall_s, 4),
        "batch_read_s": round(done.wall_s - ready.wall_s, 4),
        "first_batch_s": round(done.wall_s - before.wall_s, 4),
        "first_batch_cpu_s": round(done.cpu_s - before.cpu_s, 4),
        "peak_rss_mb": done.memory_mb["VmHWM"],
        "peak_rss_index_ready_mb": ready.memory_mb["VmHWM"],
        "peak_rss_after_imports_mb": before.memory_mb["VmHWM"],
        "rss_anonymous_at_end_mb": done.memory_mb["RssAnon"],
        "rss_file_at_end_mb": done.memory_mb["RssFile"],
        "batch_mb": round(batch_bytes / 1e6, 1),
        "written_bytes": done.written_bytes - before.written_bytes,
    }


def share_figures(counts: NDArray[np.int64], *, weights: Sequence[float], samples: int) -> Figures:
    """How far the samples of a source are from its weight over the whole order, at worst."""
    wanted = np.array(weights) / sum(weights) * samples
    return {
        "samples_in_order": int(counts.sum()),
        "worst_source_off_by_samples": round(float(np.abs(counts - wanted).max()), 1),
    }


def memory_mb() -> dict[str, float]:
    """Of this process, MB of 10^6 bytes."""
    rows = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    wanted = ("VmHWM:", "RssAnon:", "RssFile:")
    return {row[0][:-1]: round(int(row[1]) * 1024 / 1e6, 1) for row in rows if row and row[0] in wanted}


def written_bytes() -> int:
    """Bytes that this process has handed to write calls."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["wchar"])


def work(case_path: str, import_s: float, tasks: dict[str, Callable[[Case], Figures]] | None = None) -> None:
    """The whole of a process of its own: figures go to its standard output, in one line."""
    case = json.loads(Path(case_path).read_text())
    limit = case["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    figures = (tasks or {"start": ours_start, "costs": ours_costs})[case["task"]](case)
    print(json.dumps({"import_s": round(import_s, 3), **figures}))


# The processes


def run_case(module: str, case: Case, *, scratch: Path) -> Figures:
    """The figures of a process of its own, or when and how it ended without any."""
    path = scratch / "case.json"
    path.write_text(json.dumps({"task": "start", "batch": BATCH, "memory_bytes": memory_limit(), **case}))
    command = [sys.executable, "-W", "ignore", "-c", START.format(module=module), str(path)]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"stopped": f"not done after {TIMEOUT_S} s", "stopped_after_s": round(time.perf_counter() - began, 1)}
    process_s = round(time.perf_counter() - began, 3)
    if done.returncode:
        return {**failure_of(done), "failed_after_s": process_s}
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": process_s}


def failure_of(done: subprocess.CompletedProcess[str]) -> Figures:
    """The last line of a traceback, and the line of code that it is about."""
    said = done.stderr.replace(f"{sysconfig.get_path('purelib')}/", "")  # where packages lie here says nothing elsewhere
    lines = [line.removeprefix("[rank0]:").strip() for line in said.splitlines() if line.strip()]
    if not lines:
        return {"failed": f"exit status {done.returncode}"}
    at = [index for index, line in enumerate(lines) if line.startswith('File "')][-1:]
    return {"failed": lines[-1][:500], "failed_at": [" / ".join(lines[index : index + 2]) for index in at]}


def memory_limit() -> int:
    """What a case may take: 20 GiB, or 85% of what the machine has left."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(rows["MemAvailable"].split()[0]) * 1024
    return min(MEMORY_GIB << 30, int(0.85 * available))


def read_ahead_kb(folder: Path) -> int | None:
    """How much the system reads where a page of a plain memory map is missing."""
    device = folder.stat().st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    return int(path.read_text()) if path.exists() else None


def say(name: str, figures: Figures) -> None:
    parts = [f"{key} {figures[key]}" for key in SAID if key in figures]
    print(f"{time.strftime('%H:%M:%S')} {name}: {', '.join(parts)}", flush=True)


def side_by_side(case: Case, *, scratch: Path, variants: bool = False) -> Figures:
    """One set of sources, started twice by both; `variants`: Megatron cold once more in each of its other ways."""
    plans: dict[str, tuple[str, Case]] = {
        "ours_first_start": (OURS, {}),
        "ours_second_start": (OURS, {}),
        "megatron_cold": (MEGATRON, {}),
        "megatron_warm": (MEGATRON, {}),
    }
    if variants:
        plans["megatron_cold_2_threads"] = (MEGATRON, {"cache": str(scratch / "cache_threads"), "threads": 2})
        plans["megatron_cold_mmap"] = (MEGATRON, {"cache": str(scratch / "cache_mmap"), "mmap": True})
    found: Figures = {"samples": case["samples"], "sources": len(case["names"]), "documents": case["documents"]}
    for name, (module, more) in plans.items():
        found[name] = run_case(module, {**case, "cache": str(scratch / "cache"), **more}, scratch=scratch)
        say(f"{case['samples']:,} samples, {len(case['names'])} sources, {name}", found[name])
    return found


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="phidias-order-") as folder:
        yield Path(folder)


# A, B, C, D


def measure_both(samples: Sequence[int], sources: Sequence[int]) -> list[Figures]:
    found = []
    for number in samples:
        for count in sources:
            with scratch_folder() as scratch:
                began = time.perf_counter()
                case = write_indexed_sources(scratch / "data", samples=number, weights=falling_weights(count))
                prepared_s = round(time.perf_counter() - began, 1)
                sides = side_by_side(case, scratch=scratch, variants=(number, count) == (10_000_000, 50))
                found.append({**sides, "sources_written_s": prepared_s})
    return found


def measure_full(sources: Sequence[int]) -> Figures:
    """B and C: the starts at the first number of sources, costs at all."""
    found: Figures = {"tokens": FULL_TOKENS, "samples": int(FULL_TOKENS / SEQ_LENGTH), "shards": {}, "starts": {}, "costs": {}}
    for count in sources:
        with scratch_folder() as scratch:
            case = write_full_sources(scratch / "data", count=count)
            found["shards"][str(count)] = case["shards"]
            for batch, reader in [(BATCH, "mmap"), (BATCH, "pread"), (SLICE, "mmap")] if count == sources[0] else []:
                name = f"{batch}_samples_{reader}"
                found["starts"][name] = run_case(OURS, {**case, "batch": batch, "reader": reader}, scratch=scratch)
                say(f"9.8T tokens, {name}", found["starts"][name])
            for phases in (1, 3):
                costs = {**case, "task": "costs", "phases": phases, "read": phases == 1}
                found["costs"][f"{count}_sources_{phases}_phases"] = run_case(OURS, costs, scratch=scratch)
            print(f"{time.strftime('%H:%M:%S')} costs at {count} sources: done", flush=True)
    return found


def measure_extremes() -> Figures:
    """Both sides at weights, and at numbers of samples, that are far apart."""
    tiny = [0.9, *[0.1 / 499] * 499]
    cases: dict[str, tuple[int, list[float]]] = {
        "1M samples, two of three sources at 1e-6": (1_000_000, [1 - 2e-6, 1e-6, 1e-6]),
        "1M samples, two of three sources at 1e-9": (1_000_000, [1 - 2e-9, 1e-9, 1e-9]),
        "10,000 samples, one source at 0.9 and 499 share 0.1": (10_000, tiny),
        "1,000,000 samples, one source at 0.9 and 499 share 0.1": (1_000_000, tiny),
        "10,000 samples, one of two sources at 0": (10_000, [1.0, 0.0]),
    }
    found = {}
    for name, (samples, weights) in cases.items():
        with scratch_folder() as scratch:
            case = write_indexed_sources(scratch / "data", samples=samples, weights=weights)
            megatron = run_case(MEGATRON, {**case, "cache": str(scratch / "cache")}, scratch=scratch)
            found[name] = {"ours": run_case(OURS, case, scratch=scratch), "megatron": megatron}
        for side, figures in found[name].items():
            say(f"{name}, {side}", figures)
    return found


# The tables


def show(figures: Figures) -> None:
    from rich.console import Console  # not in the processes that are measured

    console = Console(width=150)
    console.print(both_table(figures["both"]), full_table(figures["full"]), costs_table(figures["full"]))
    if figures["extremes"]:
        console.print(extremes_table(figures["extremes"]))


def both_table(rows: Sequence[Figures]) -> Any:
    from rich.table import Table

    table = Table(title="To the first global batch of 5,760 samples", title_justify="left")
    for column in (
        "samples",
        "sources",
        "",
        "index ready s",
        "batch read s",
        "together s",
        "peak RSS MB",
        "of imports",
        "written MB",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        for name in (name for name in row if name.startswith(("ours", "megatron"))):
            head = (f"{row['samples']:,}", str(row["sources"])) if name == "ours_first_start" else ("", "")
            table.add_row(*head, name.replace("_", " "), *start_cells(row[name]), end_section=name == list(row)[-2])
    return table


def start_cells(found: Figures) -> list[str]:
    if "first_batch_s" not in found:
        return [(found.get("stopped") or found["failed"])[:60].replace("[", "(")]
    times = [f"{found[key]:,.3f}" for key in ("index_ready_s", "batch_read_s", "first_batch_s")]
    memory = [f"{found[key]:,.0f}" for key in ("peak_rss_mb", "peak_rss_after_imports_mb")]
    return [*times, *memory, f"{found['written_bytes'] / 1e6:,.1f}"]


def full_table(found: Figures) -> Any:
    from rich.table import Table

    table = Table(title="Ours at 9.8T tokens, 50 sources: a process start", title_justify="left")
    for column in ("", "order ready s", "batch read s", "together s", "peak RSS MB", "of imports", "written MB", "imports s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in found["starts"].items():
        table.add_row(name.replace("_", " "), *start_cells(row), f"{row.get('import_s', math.nan):.3f}")
    return table


def costs_table(found: Figures) -> Any:
    from rich.table import Table

    columns = (
        "windows_random_ms",
        "windows_in_order_ms",
        "windows_over_phase_border_ms",
        "positions_ms",
        "windows_and_read_random_ms",
    )
    table = Table(title="Ours, a global batch of 5,760 samples: median (90%) ms", title_justify="left")
    for column in ("", *columns):
        table.add_column(column.replace("_", " ").removesuffix(" ms"), justify="right" if column else "left")
    for name, row in found["costs"].items():
        cells = [f"{row[key]['median']:.2f} ({row[key]['p90']:.2f})" if key in row else "" for key in columns]
        table.add_row(name.replace("_", " "), *cells)
    return table


def extremes_table(found: Figures) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Weights far apart", title_justify="left", show_lines=True)
    for column in ("", "", "samples", "a source off by", "failed"):
        table.add_column(column)
    for name, sides in found.items():
        for side, row in sides.items():
            off = row.get("worst_source_off_by_samples", "")
            table.add_row(
                name,
                side,
                f"{row.get('samples_in_order', '')}",
                f"{off}",
                escape(row.get("failed", row.get("stopped", ""))[:300]),
            )
    return table


def main() -> None:
    from benchmarks.machine import write_result  # not in the processes that are measured

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="1M samples of 3 and 50 sources only, and 9.8T tokens in 50 sources"
    )
    quick = parser.parse_args().quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder is removed
    began = time.perf_counter()
    figures: Figures = {
        "seq_length": SEQ_LENGTH,
        "mean_document_tokens": sum(DOCUMENT_TOKENS) // 2,
        "memory_limit_bytes": memory_limit(),
        "timeout_s": TIMEOUT_S,
        "disk_read_ahead_kb": read_ahead_kb(Path(tempfile.gettempdir())),
        "free_disk_gb": round(shutil.disk_usage(tempfile.gettempdir()).free / 1e9),
        "both": measure_both(SAMPLES[:1], SOURCES[:2]) if quick else measure_both(SAMPLES, SOURCES),
        "full": measure_full(FULL_SOURCES[:1] if quick else FULL_SOURCES),
        "extremes": {} if quick else measure_extremes(),
    }
    figures["benchmark_took_s"] = round(time.perf_counter() - began)
    write_result("data_order_quick" if quick else "data_order", figures)
    show(figures)


if __name__ == "__main__":
    main()
