"""Window tables: held to a reading of the rules one document at a time, for both kinds; written whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.indexed import ShardWriter
from data_prep.manifest import Manifest, TokenizerEntry, split_of, write_manifest
from data_prep.stream import SourceStream
from data_prep.windows import build_window_table, read_window_table
from data_prep.workplace import workplace

EOD = 9
REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = ["anchored", "best_fit"]
SHARDS = st.lists(st.lists(st.integers(1, 40), max_size=25), min_size=1, max_size=3)


def write_source(directory: Path, shards, *, shortest=None):
    """`shards`: lists of document lengths; `shortest`: the bucket of each shard."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, lengths in enumerate(shards):
        with ShardWriter(directory / f"shard_{number:05d}", dtype=np.dtype("uint16")) as writer:
            for length in lengths:
                writer.add_document(np.append(np.zeros(length - 1, np.int32), EOD))
        entries.append(replace(writer.close(), min_document_tokens=shortest[number] if shortest else 0))
    manifest = Manifest(
        format_version=1,
        source=directory.name,
        dtype="uint16",
        tokenizer=TokenizerEntry(kind="cl100k", fingerprint="0", vocab_size=10, eod_id=EOD),
        text_bytes=0,
        train=split_of(entries),
        held_out=split_of([]),
        settings={},
        rejected_rows=0,
        empty_documents=0,
    )
    write_manifest(directory, manifest=manifest)
    return directory


def build(directory: Path, *, kind, seq_length, **options):
    return build_window_table(directory, name="web", kind=kind, seq_length=seq_length, **options)


def read(place, *, kind, seq_length, digest=None, **options):
    digest = digest or SourceStream(place, name="web").digest
    return read_window_table(place, name="web", kind=kind, seq_length=seq_length, digest=digest, **options)


def windows_of(table):
    """[(offset, length), ...] of each window."""
    row, offset, length = (values.tolist() for values in table.pieces(np.arange(table.num_windows)))
    assert row == sorted(row)
    windows = [[] for _ in range(table.num_windows)]
    for number, *piece in zip(row, offset, length, strict=True):
        windows[number].append(tuple(piece))
    return windows


def documents_of(shards):
    """(offset, length) in the stream."""
    lengths = [length for shard in shards for length in shard]
    return list(zip(accumulate(lengths, initial=0), lengths, strict=False))


def times_read(pieces, *, tokens):
    count = np.zeros(tokens, dtype=int)
    for offset, length in pieces:
        assert offset >= 0 and length > 0 and offset + length <= tokens
        count[offset : offset + length] += 1
    return count


def best_fit_decreasing(sizes, *, space):
    """What is left in each window, one piece at a time."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        taken = min(fitting, default=space)
        if fitting:
            rooms.remove(taken)
        rooms.append(taken - size)
    return rooms


@settings(max_examples=80)
@given(SHARDS.filter(any), st.integers(1, 16))
def test_anchored_windows(tmp_path_factory, shards, seq_length):
    documents = documents_of(shards)
    wanted = [
        (offset + n * seq_length, seq_length + 1) for offset, length in documents for n in range((length - 1) // seq_length)
    ]
    directory = write_source(tmp_path_factory.mktemp("data") / "web", shards)
    if not wanted:
        with pytest.raises(DataError, match="yields no anchored window"):
            build(directory, kind="anchored", seq_length=seq_length)
        return
    table = build(directory, kind="anchored", seq_length=seq_length)
    windows = windows_of(table)
    assert windows == [[window] for window in wanted]
    total = sum(map(sum, shards))
    inputs = times_read([(offset, seq_length) for ((offset, _),) in windows], tokens=total)
    assert inputs.max() == 1 and inputs.sum() == table.tokens == len(wanted) * seq_length
    assert table.unread_tokens == (times_read(wanted, tokens=total) == 0).sum()
    assert table.unread_documents == sum(length <= seq_length for _, length in documents)


@settings(max_examples=150)
@given(SHARDS.filter(any), st.integers(1, 50))
def test_best_fit_windows(tmp_path_factory, shards, seq_length):
    directory = write_source(tmp_path_factory.mktemp("data") / "web", shards)
    table = build(directory, kind="best_fit", seq_length=seq_length)
    windows = windows_of(table)
    pieces = [piece for window in windows for piece in window]
    total = sum(map(sum, shards))
    assert (times_read(pieces, tokens=total) == 1).all()
    assert (table.tokens, table.unread_tokens, table.unread_documents) == (total, 0, 0)
    assert set(pieces) == {
        (offset + begun, min(seq_length, length - begun))
        for offset, length in documents_of(shards)
        for begun in range(0, length, seq_length)
    }
    assert all(window == sorted(window) for window in windows)
    assert [window[0] for window in windows] == sorted(window[0] for window in windows)
    check_packing(windows, shards=shards, seq_length=seq_length)


def check_packing(windows, *, shards, seq_length):
    """Each shard's windows are its own, and as full as best-fit decreasing makes them."""
    borders = list(accumulate(map(sum, shards), initial=0))
    ours = [window for window in windows if any(low <= window[0][0] < high for low, high in pairwise(borders))]
    assert ours == windows
    for low, high in pairwise(borders):
        inside = [window for window in windows if low <= window[0][0] < high]
        assert all(offset + length <= high for window in inside for offset, length in window)
        sizes = [length for window in inside for _, length in window]
        left = [seq_length - sum(length for _, length in window) for window in inside]
        assert sorted(left) == sorted(best_fit_decreasing(sizes, space=seq_length)) and min(left, default=0) >= 0


@pytest.fixture(scope="module")
def realistic(tmp_path_factory):
    lengths = np.maximum(np.random.default_rng(0).lognormal(6.5, 1.0, size=20_000), 2).astype(int).tolist()
    return write_source(tmp_path_factory.mktemp("data") / "web", [lengths[:12_000], lengths[12_000:]])


def test_best_fit_wastes_little(realistic):
    table = build(realistic, kind="best_fit", seq_length=2048)
    assert table.tokens / (table.num_windows * 2048) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_any_windows_in_any_order(realistic, kind):
    table = build(realistic, kind=kind, seq_length=512)
    all_of = windows_of(table)
    asked = np.random.default_rng(0).integers(0, table.num_windows, size=1000)
    row, offset, length = table.pieces(asked)
    assert row.tolist() == [number for number, window in enumerate(asked) for _ in all_of[window]]
    assert list(zip(offset.tolist(), length.tolist(), strict=True)) == [piece for window in asked for piece in all_of[window]]
    assert all(len(values) == 0 for values in table.pieces(asked[:0]))


def files_of(directory: Path):
    return {path.name: path.read_bytes() for path in (directory / "windows").iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_shards_give_equal_tables_once(tmp_path, kind):
    shards = [[30, 5, 9, 1, 70], [12, 8]]
    first, second = (write_source(tmp_path / name, shards) for name in "ab")
    for directory in (first, second):
        build(directory, kind=kind, seq_length=8)
    assert files_of(first) == files_of(second)
    assert sorted(files_of(first)) == [f"{kind}_s8_m0.{end}" for end in ("first.npy", "json", "pieces.npy")]
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    build(first, kind=kind, seq_length=8)
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    build(first, kind=kind, seq_length=4)
    assert len(files_of(first)) == 6


class Elsewhere:
    """A folder that is not on this machine."""

    local = None

    def __init__(self, directory: Path):
        self.directory, self.name = directory, directory.name

    def path(self, file):
        return f"s3://{self.name}/{file}"

    def read_bytes(self, file):
        return (self.directory / file).read_bytes()


def test_a_table_read_from_a_store_is_the_same(tmp_path):
    directory = write_source(tmp_path / "web", [[30, 5, 9, 1, 70], [12, 8]])
    digest = SourceStream(directory, name="web").digest
    with pytest.raises(DataError, match=r"s3://web/windows/best_fit_s8_m0\.json .* is missing"):
        read(Elsewhere(directory), kind="best_fit", seq_length=8, digest=digest)
    made = build(directory, kind="best_fit", seq_length=8)
    found = read(Elsewhere(directory), kind="best_fit", seq_length=8, digest=digest)
    assert windows_of(found) == windows_of(made)
    assert (found.kind, found.seq_length, found.tokens, found.num_windows) == ("best_fit", 8, 135, made.num_windows)


def test_a_table_of_other_shards_is_refused_and_made_anew(tmp_path):
    directory = write_source(tmp_path / "web", [[30, 5]])
    with pytest.raises(DataError, match=r"source 'web': .*s8_m0\.json .* is missing; .*run `phidias data` with the same over"):
        read(directory, kind="best_fit", seq_length=8)
    before = build(directory, kind="best_fit", seq_length=8)
    write_source(directory, [[20, 15]])
    with pytest.raises(DataError, match="made of other shards"):
        read(directory, kind="best_fit", seq_length=8)
    after = build(directory, kind="best_fit", seq_length=8)
    assert windows_of(after) == windows_of(read(directory, kind="best_fit", seq_length=8)) != windows_of(before)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("pieces.npy", b""),
        ("pieces.npy", None),
        ("first.npy", b"garbage"),
        ("first.npy", "half"),
        ("json", b"{}"),
        ("json", b"["),
    ],
)
def test_damaged_tables_are_refused_and_made_anew(tmp_path, file, content):
    directory = write_source(tmp_path / "web", [[30, 5]])
    made = windows_of(build(directory, kind="best_fit", seq_length=8))
    path = directory / "windows" / f"best_fit_s8_m0.{file}"
    path.unlink() if content is None else path.write_bytes(path.read_bytes()[:-8] if content == "half" else content)
    with pytest.raises(DataError, match="run `phidias data`"):
        read(directory, kind="best_fit", seq_length=8)
    assert windows_of(build(directory, kind="best_fit", seq_length=8)) == made


def test_a_table_of_another_format_is_refused(tmp_path):
    directory = write_source(tmp_path / "web", [[30, 5]])
    build(directory, kind="anchored", seq_length=8)
    path = directory / "windows" / "anchored_s8_m0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(DataError, match="format_version 2, this code reads 1"):
        read(directory, kind="anchored", seq_length=8)


def test_a_table_under_another_name_is_refused(tmp_path):
    directory = write_source(tmp_path / "web", [[30, 5]])
    build(directory, kind="best_fit", seq_length=8)
    for path in list((directory / "windows").iterdir()):
        path.rename(path.with_name(path.name.replace("_s8", "_s16")))
    with pytest.raises(DataError, match="it describes windows/best_fit_s8_m0"):
        read(directory, kind="best_fit", seq_length=16)


def test_only_the_shards_of_long_documents(tmp_path):
    directory = write_source(tmp_path / "web", [[5, 3], [20, 10], [40]], shortest=[0, 10, 30])
    table = build(directory, kind="anchored", seq_length=4, min_document_tokens=10)
    assert [window for (window,) in windows_of(table)] == [
        *((offset, 5) for offset in (0, 4, 8, 12, 20, 24)),
        *((30 + 4 * n, 5) for n in range(9)),
    ]
    assert (table.tokens, table.unread_tokens, table.unread_documents) == (60, 3 + 1 + 3, 0)
    assert (directory / "windows" / "anchored_s4_m10.json").exists()


@pytest.mark.parametrize(
    ("kind", "message"), [("anchored", r"longest document has 7 tokens.*seq_length 7.*a document of 8"), ("best_fit", None)]
)
def test_a_source_without_windows_is_refused(tmp_path, kind, message):
    directory = write_source(tmp_path / "web", [[5, 3], [7]])
    if message is None:
        directory, message = write_source(tmp_path / "web", [[]]), "yields no best_fit window: its longest document has 0"
    with pytest.raises(DataError, match=message):
        build(directory, kind=kind, seq_length=7)
    assert list((directory / "windows").iterdir()) == []


def test_an_index_of_another_shard_is_refused(tmp_path):
    directory = write_source(tmp_path / "web", [[30, 5], [20]])
    (directory / "shard_00000.idx").write_bytes((directory / "shard_00001.idx").read_bytes())
    with pytest.raises(DataError, match=r"shard_00000\.idx describes 1 documents of 20 tokens, the manifest 2 of 35"):
        build(directory, kind="best_fit", seq_length=8)


def test_one_writer_at_a_time(tmp_path):
    directory = write_source(tmp_path / "web", [[30, 5]])
    with workplace(directory / "windows" / "best_fit_s8_m0"), pytest.raises(DataError, match="another process is writing"):
        build(directory, kind="best_fit", seq_length=8)
    build(directory, kind="best_fit", seq_length=8)


def build_and_die(directory: Path, *, renames: int):
    """In another process, killed when it has renamed so many files."""
    script = f"""
import os, signal
from pathlib import Path
from data_prep.windows import build_window_table
rename, left = Path.rename, [{renames}]
def count(self, target):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return rename(self, target)
Path.rename = count
build_window_table(Path({str(directory)!r}), name="web", kind="best_fit", seq_length=8)
"""
    return subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_killed_process_leaves_no_header_without_its_arrays(tmp_path, renames):
    directory = write_source(tmp_path / "web", [[30, 5]])
    build(directory, kind="best_fit", seq_length=8)
    write_source(directory, [[20, 15, 9], [40]])
    ended = build_and_die(directory, renames=renames)
    assert ended.returncode == (-signal.SIGKILL if renames < 3 else 0), ended.stderr
    header = directory / "windows" / "best_fit_s8_m0.json"
    assert header.exists() == (renames == 3)
    made = windows_of(build(directory, kind="best_fit", seq_length=8))
    clean = write_source(tmp_path / "clean", [[20, 15, 9], [40]])
    assert made == windows_of(build(clean, kind="best_fit", seq_length=8))
    assert sorted(files_of(directory)) == sorted(files_of(clean))


def test_a_full_disk_is_named(tmp_path):
    directory = write_source(tmp_path / "web", [[30, 5] * 500])
    script = f"""
import resource
from pathlib import Path
from data_prep.errors import DataError
from data_prep.windows import build_window_table
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    build_window_table(Path({str(directory)!r}), name="web", kind="best_fit", seq_length=8)
except DataError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "cannot write" in ended.stdout and "best_fit_s8_m0.partial" in ended.stdout, ended.stderr
    assert list((directory / "windows").iterdir()) == []
