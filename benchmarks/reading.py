"""How fast windows are read, beside what the machine can do: from the page cache, beside a plain sequential copy of the same
bytes; from the disk, beside fio. Goal: random windows of 16 KiB reach 95% of the sequential copy into memory of the same shape.

GB/s are 10^9 bytes a second. Hot: 2 GiB in 8 shards, every measurement on maps opened anew, taken in turn, median of 5. A copy
into memory of its own (batches) is slower than one into the same 16 KiB over and over; both are shown. Cold: 4,000 windows of
200 shards, caches dropped before each measurement, median of 3; fio reads blocks of 16 KiB of the same files.
"""

import gc
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import write_result
from data_prep import storage
from data_prep.indexed import ShardWriter
from data_prep.manifest import Manifest, TokenizerEntry, split_of, write_manifest
from data_prep.storage import LocalFolder
from data_prep.stream import SourceStream

LENGTH = 4097
WINDOW_BYTES = 4 * LENGTH
HOT, COLD = (8, 1 << 26), (200, 1 << 22)  # shards, tokens of each: 2 GiB, 3.1 GiB
BATCHES = (12, 5760)
COLD_WINDOWS = 4000
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def write_source(directory: Path, *, shards: int, tokens: int) -> Path:
    """Random ids in documents of a million tokens."""
    directory.mkdir()
    ids = np.random.default_rng(0).integers(0, 100_000, size=1 << 20, dtype=np.int32)
    entries = []
    for number in range(shards):
        with ShardWriter(directory / f"shard_{number:05d}", dtype=np.dtype("int32")) as writer:
            for _ in range(tokens >> 20):
                writer.add_document(ids)
        entries.append(writer.close())
    manifest = Manifest(
        format_version=1,
        source=directory.name,
        dtype="int32",
        tokenizer=TokenizerEntry(kind="cl100k", fingerprint="0", vocab_size=100_000, eod_id=0),
        text_bytes=0,
        train=split_of(entries),
        held_out=split_of([]),
        settings={},
        rejected_rows=0,
        empty_documents=0,
    )
    write_manifest(directory, manifest=manifest)
    return directory


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.bin"))


def close_shards() -> None:
    """Maps hold pages that could not be dropped, and entries in the tables of pages."""
    storage.OPEN_SHARDS.clear()
    gc.collect()


def rate(work: Callable[[], int]) -> float:
    """GB/s of work that gives the windows it read."""
    began = time.perf_counter()
    windows = work()
    return windows * WINDOW_BYTES / (time.perf_counter() - began) / 1e9


# From the page cache


def copy_in_order(directory: Path, *, batch: int | None) -> int:
    """The shards from first to last byte, a window at a time, into one buffer, or into batches in memory of their own."""
    out, done = np.empty((batch or 1, LENGTH), dtype=np.int32), 0
    for path in files_of(directory):
        tokens = np.asarray(np.memmap(path, dtype=np.int32, mode="r"))
        for start in range(0, len(tokens) - LENGTH + 1, LENGTH):
            row = done % len(out)
            if batch and not row:
                out = np.empty((batch, LENGTH), dtype=np.int32)
            np.copyto(out[row], tokens[start : start + LENGTH])
            done += 1
    return done


def read_at_random(stream: SourceStream, *, batch: int, windows: int) -> int:
    offsets = np.random.default_rng(1).integers(0, stream.num_tokens - LENGTH, size=windows // batch * batch)
    for low in range(0, len(offsets), batch):
        stream.read_windows(offsets[low : low + batch], LENGTH)
    return len(offsets)


def open_stream(directory: Path, *, reader: storage.Reader) -> SourceStream:
    return SourceStream(LocalFolder(directory, reader=reader), name=directory.name)


def hot_rates(directory: Path) -> dict[str, list[float]]:
    """One round: every copy and reader once, each with its shards opened anew."""
    windows = HOT[0] * HOT[1] // LENGTH
    found = {"sequential_copy_one_buffer": [rate(lambda: copy_in_order(directory, batch=None))]}
    for batch in BATCHES:
        found[f"sequential_copy_batches_of_{batch}"] = [rate(lambda batch=batch: copy_in_order(directory, batch=batch))]
        for reader in ("mmap", "pread"):
            close_shards()
            stream = open_stream(directory, reader=reader)
            work = lambda stream=stream, batch=batch: read_at_random(stream, batch=batch, windows=windows)  # noqa: E731
            found[f"{reader}_random_batches_of_{batch}"] = [rate(work)]
    close_shards()
    return found


def hot(directory: Path, *, rounds: int = 5) -> dict[str, Any]:
    for path in files_of(directory):
        path.read_bytes()
    hot_rates(directory)
    taken = [hot_rates(directory) for _ in range(rounds)]
    figures: dict[str, Any] = {name: spread([rates[name][0] for rates in taken]) for name in taken[0]}
    for batch in BATCHES:
        for reader in ("mmap", "pread"):
            found = figures[f"{reader}_random_batches_of_{batch}"]
            found["of_copy_into_one_buffer"] = ratio(found, figures["sequential_copy_one_buffer"])
            found["of_copy_into_such_batches"] = ratio(found, figures[f"sequential_copy_batches_of_{batch}"])
    return figures


def spread(rates: list[float]) -> dict[str, float]:
    """The median of all rounds, the slowest and the fastest [GB/s]."""
    return {
        "gb_s": round(statistics.median(rates), 3),
        "min_gb_s": round(min(rates), 3),
        "max_gb_s": round(max(rates), 3),
    }


def ratio(found: dict[str, float], beside: dict[str, float]) -> float:
    return round(found["gb_s"] / beside["gb_s"], 3)


# From the disk


def drop_caches(directory: Path) -> None:
    close_shards()
    for path in files_of(directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("1")


def read_cold(directory: Path, *, reader: storage.Reader, threads: int, batch: int) -> float:
    """GB/s of `threads` that read batches of random windows side by side."""
    drop_caches(directory)
    stream = open_stream(directory, reader=reader)
    offsets = np.random.default_rng().integers(0, stream.num_tokens - LENGTH, size=COLD_WINDOWS)
    shares = [offsets[first::threads] for first in range(threads)]

    def read(share: NDArray[np.int64]) -> int:
        return sum(len(stream.read_windows(share[low : low + batch], LENGTH)) for low in range(0, len(share), batch))

    with ThreadPoolExecutor(threads) as pool:
        return rate(lambda: sum(pool.map(read, shares)))


def read_with_fio(directory: Path, *, threads: int) -> float:
    drop_caches(directory)
    options = {
        "name": "cold",
        "filename": ":".join(path.name for path in files_of(directory)),
        "rw": "randread",
        "bs": "16k",
        "ioengine": "psync",
        "numjobs": threads,
        "io_size": COLD_WINDOWS * 16384 // threads,
        "file_service_type": "random",
        "randrepeat": 0,
        "output-format": "json",
    }
    command = ["fio", "--readonly", "--thread", "--group_reporting", *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]) / 1e9


def cold(directory: Path, *, rounds: int = 3) -> dict[str, Any]:
    works: dict[str, Callable[[], float]] = {}
    for threads in (1, 8):
        if shutil.which("fio"):
            works[f"fio_psync_{threads}_threads"] = lambda threads=threads: read_with_fio(directory, threads=threads)
        for reader in ("mmap", "pread"):
            for batch in (1, 12):
                works[f"{reader}_{threads}_threads_batches_of_{batch}"] = lambda reader=reader, threads=threads, batch=batch: (
                    read_cold(directory, reader=reader, threads=threads, batch=batch)
                )
    taken = [{name: work() for name, work in works.items()} for _ in range(rounds)]
    return {
        "fio": "psync, randread, bs=16k" if shutil.which("fio") else "not installed: nothing to compare with",
        "all_caches_dropped": os.access(DROP_CACHES, os.W_OK),
        **{name: spread([rates[name] for rates in taken]) for name in works},
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="phidias-reading-") as folder:
        hot_source = write_source(Path(folder) / "hot", shards=HOT[0], tokens=HOT[1])
        figures = {"hot": hot(hot_source)}
        shutil.rmtree(hot_source)
        figures["cold"] = cold(write_source(Path(folder) / "cold", shards=COLD[0], tokens=COLD[1]))
    write_result("reading", {"window_bytes": WINDOW_BYTES, **figures})


if __name__ == "__main__":
    main()
