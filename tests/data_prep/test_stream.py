"""A source read as one stream: the same tokens whatever the shards, and damage that is found at opening."""

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import storage
from data_prep.errors import DataError
from data_prep.indexed import ShardWriter
from data_prep.manifest import Manifest, TokenizerEntry, read_manifest, split_of, verify_source, write_manifest
from data_prep.order import SourceOrder
from data_prep.stream import SourceStream

EOD = 999


def documents(count, *, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(0, EOD, size=rng.integers(0, longest)), EOD).astype(np.int32) for _ in range(count)]


def write_source(directory: Path, *, train, held_out=(), dtype="int32"):
    """`train` and `held_out` are lists of shards, each a list of documents."""
    directory.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, shards in (("shard", train), ("held_out", held_out)):
        entries = []
        for number, shard in enumerate(shards):
            with ShardWriter(directory / f"{split}_{number:05d}", dtype=np.dtype(dtype)) as writer:
                for document in shard:
                    writer.add_document(document)
            entries.append(writer.close())
        splits[split] = split_of(entries)
    manifest = Manifest(
        format_version=1,
        source=directory.name,
        dtype=dtype,
        tokenizer=TokenizerEntry(kind="cl100k", fingerprint="0", vocab_size=1000, eod_id=EOD),
        text_bytes=0,
        train=splits["shard"],
        held_out=splits["held_out"],
        settings={},
        rejected_rows=0,
        empty_documents=0,
    )
    write_manifest(directory, manifest=manifest)
    return directory


def cut(items, borders):
    ends = [0, *sorted(borders), len(items)]
    return [items[low:high] for low, high in pairwise(ends)]


@pytest.fixture(scope="module", params=["int32", "uint16"])
def source(request, tmp_path_factory):
    """Five shards, two of them empty, and their tokens end to end."""
    whole = documents(60)
    directory = tmp_path_factory.mktemp("data") / "web"
    write_source(directory, train=cut(whole, [0, 7, 30, 31]), held_out=[documents(9, seed=1)], dtype=request.param)
    return SourceStream(directory, name="web"), np.concatenate(whole)


def test_the_stream_is_its_shards_end_to_end(source):
    stream, tokens = source
    assert stream.num_tokens == len(tokens)
    assert np.array_equal(stream.read(0, len(tokens)), tokens)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_stretch_is_stitched_over_shard_borders(source, data):
    stream, tokens = source
    offset = data.draw(st.integers(0, len(tokens)))
    count = data.draw(st.integers(0, len(tokens) - offset))
    assert np.array_equal(stream.read(offset, count), tokens[offset : offset + count])


def test_tokens_are_int32_in_memory_of_their_own(source):
    stream, tokens = source
    read = stream.read(3, 10)
    assert read.dtype == np.int32
    assert type(read) is np.ndarray
    read[:] = 0
    assert np.array_equal(stream.read(3, 10), tokens[3:13])


def test_documents_are_whole_and_in_order(source):
    stream, tokens = source
    found = list(stream.documents())
    assert len(found) == 60
    assert all(document[-1] == EOD and (document[:-1] != EOD).all() for document in found)
    assert np.array_equal(np.concatenate(found), tokens)


def test_held_out_documents_are_a_stream_of_their_own(source):
    held_out = SourceStream(source[0].directory, name="web", split="held_out")
    wanted = documents(9, seed=1)
    assert held_out.num_tokens == sum(map(len, wanted))
    assert all(np.array_equal(a, b) for a, b in zip(held_out.documents(), wanted, strict=True))


def test_every_token_of_an_epoch_is_read_through_the_order(source):
    stream, tokens = source
    order = SourceOrder(name="web", num_tokens=len(tokens), seq_length=8, chunk_tokens=32, group_tokens=64, seed=1)
    _, offsets = order.locate(np.arange(order.num_windows))
    read = {int(offset): stream.read(int(offset), 9) for offset in offsets}
    laid_out = np.concatenate([read[offset][:-1] for offset in sorted(read)])
    assert np.array_equal(laid_out, tokens[: len(laid_out)])
    assert len(tokens) - len(laid_out) <= 8


def test_a_split_without_shards_is_empty(tmp_path):
    held_out = SourceStream(write_source(tmp_path / "web", train=[documents(3)]), name="web", split="held_out")
    assert held_out.num_tokens == 0
    assert held_out.read(0, 0).shape == (0,)
    assert list(held_out.documents()) == []


def test_opening_opens_no_shard(tmp_path):
    directory = write_source(tmp_path / "web", train=[documents(2, seed=i) for i in range(5)])
    storage.OPEN_SHARDS.clear()
    stream = SourceStream(directory, name="web")
    assert len(storage.OPEN_SHARDS) == 0
    stream.read(0, stream.num_tokens)
    assert len(storage.OPEN_SHARDS) == 5


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_windows_are_what_reads_give(source, data):
    stream, tokens = source
    length = data.draw(st.integers(0, 60))
    offsets = data.draw(st.lists(st.integers(0, len(tokens) - length), max_size=20))
    windows = stream.read_windows(np.array(offsets, dtype=np.int64), length)
    assert windows.shape == (len(offsets), length) and windows.dtype == np.int32
    assert all(np.array_equal(window, tokens[o : o + length]) for window, o in zip(windows, offsets, strict=True))


def with_lengths(directory, lengths):
    """The manifest of the source says that its shards hold documents of at least these lengths."""
    manifest = read_manifest(directory)
    shards = [replace(shard, min_document_tokens=length) for shard, length in zip(manifest.train.shards, lengths, strict=True)]
    write_manifest(directory, manifest=replace(manifest, train=split_of(shards)))


def test_only_shards_of_long_documents(tmp_path):
    parts = [documents(3, seed=i) for i in range(4)]
    directory = write_source(tmp_path / "web", train=parts)
    with_lengths(directory, [0, 100, 200, 100])
    long = SourceStream(directory, name="web", min_document_tokens=100)
    wanted = np.concatenate([*parts[1], *parts[2], *parts[3]])
    assert np.array_equal(long.read(0, long.num_tokens), wanted)
    assert np.array_equal(np.concatenate(list(long.documents())), wanted)
    assert sorted(long.states) == [f"shard_{number:05d}.bin" for number in (1, 2, 3)]
    assert long.digest != SourceStream(directory, name="web").digest
    none = SourceStream(directory, name="web", min_document_tokens=201)
    assert none.num_tokens == 0 and none.states == {} and none.read_windows([], 5).shape == (0, 5)


def test_the_stream_knows_its_files_and_its_eod(source):
    stream, _ = source
    assert stream.eod_id == EOD
    assert {file: state.size for file, state in stream.states.items()} == {
        f"{shard.file}.bin": shard.bin_bytes for shard in stream.shards
    }


def test_a_source_that_was_prepared_again_is_read_anew(tmp_path):
    first, second = [[documents(4, seed=0)], [documents(4, seed=1)]]
    old = SourceStream(write_source(tmp_path / "web", train=[first[0]]), name="web")
    old.read(0, old.num_tokens)
    new = SourceStream(write_source(tmp_path / "web", train=[second[0]]), name="web")
    assert np.array_equal(new.read(0, new.num_tokens), np.concatenate(second[0]))
    assert np.array_equal(old.read(0, old.num_tokens), np.concatenate(first[0]))  # its map outlives the replaced file


# What is refused


@pytest.mark.parametrize(("offset", "count"), [(-1, 5), (0, 10**9), (5, -1)])
def test_reads_outside_the_stream(source, offset, count):
    stream, tokens = source
    with pytest.raises(DataError, match=f"source web: asked for tokens {offset} .* has {len(tokens)}"):
        stream.read(offset, count)


def test_windows_outside_the_stream(source):
    stream, tokens = source
    with pytest.raises(DataError, match=f"source web: asked for tokens -1 to 4, the stream has {len(tokens)}"):
        stream.read_windows([3, -1], 5)
    with pytest.raises(DataError, match=f"asked for tokens {len(tokens) - 4} to {len(tokens) + 1}"):
        stream.read_windows([len(tokens) - 4, 0], 5)


def test_a_shard_replaced_since_the_launch(tmp_path):
    directory = write_source(tmp_path / "web", train=[documents(3), documents(4)])
    recorded = SourceStream(directory, name="web").states
    SourceStream(directory, name="web").refuse_replaced(recorded)
    path = directory / "shard_00001.bin"
    os.utime(path, ns=(0, 10**18))
    stream = SourceStream(directory, name="web")
    with pytest.raises(DataError) as error:
        stream.refuse_replaced(recorded)
    size = path.stat().st_size
    for word in ("source web", path, f"{size} bytes", "2001-09-09 01:46:40", "phidias data action=verify"):
        assert str(word) in str(error.value)
    assert verify_source(directory) == []
    stream.refuse_replaced(recorded)
    os.utime(path, ns=(0, 2 * 10**18))
    with pytest.raises(DataError, match=r"shard_00001\.bin was"):
        SourceStream(directory, name="web").refuse_replaced(recorded)


def test_a_shard_that_was_not_recorded_is_not_refused(source):
    source[0].refuse_replaced({})


def test_missing_manifest(tmp_path):
    with pytest.raises(DataError, match=r"no data for source 'web': .*manifest.json is missing.*phidias data"):
        SourceStream(tmp_path / "web", name="web")


@pytest.mark.parametrize("change", [-4, -1, 4])
def test_a_shard_of_another_size(tmp_path, change):
    directory = write_source(tmp_path / "web", train=[documents(3), documents(5)])
    path = directory / "shard_00001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(DataError) as error:
        SourceStream(directory, name="web")
    message = str(error.value)
    assert all(f"{word}" in message for word in ("source web", path, len(data), len(data) + change, "phidias data"))


def test_a_missing_shard(tmp_path):
    directory = write_source(tmp_path / "web", train=[documents(3)])
    (directory / "shard_00000.bin").unlink()
    with pytest.raises(DataError, match=r"source web: .*shard_00000.bin is missing"):
        SourceStream(directory, name="web")


def test_an_index_of_another_run(tmp_path):
    directory = write_source(tmp_path / "web", train=[documents(3)])
    other = write_source(tmp_path / "other", train=[documents(4)])
    (directory / "shard_00000.idx").write_bytes((other / "shard_00000.idx").read_bytes())
    with pytest.raises(DataError, match=r"shard_00000.idx describes \d+ tokens, the manifest"):
        list(SourceStream(directory, name="web").documents())
