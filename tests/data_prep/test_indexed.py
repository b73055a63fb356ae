"""Shards: the same bytes as megatron-core's, both ways; damage is named; shards of others are taken only with EOD."""

import errno
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.indexed import HEADER, ShardWriter, map_tokens, naming_full_disk, partial, read_index, writer_of
from data_prep.manifest import TokenizerEntry, accepted_states, import_shards, read_manifest, verify_source, write_manifest

EOD = 7
DTYPES = ["int32", "uint16"]
TOKENIZER = TokenizerEntry(kind="huggingface", fingerprint="f", vocab_size=1000, eod_id=EOD)


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


def random_documents(count=50):
    rng = np.random.default_rng(0)
    return [np.append(rng.integers(8, 999, size=length), EOD) for length in rng.integers(0, 40, size=count)]


def write_ours(stem: Path, *, documents, dtype="int32"):
    with ShardWriter(stem, dtype=np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)
    return writer.close()


def write_megatron(stem: Path, *, documents, dtype="int32", multimodal=False):
    """`documents` are lists of sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{stem}.bin", dtype=np.dtype(dtype).type, multimodal=multimodal)
    for sequences in documents:
        joined = np.concatenate([np.empty(0, dtype), *sequences])
        lengths = [len(sequence) for sequence in sequences]
        builder.add_document(joined, lengths, [0] * len(lengths))
    builder.finalize(f"{stem}.idx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 50])
def test_bytes_equal_megatrons(tmp_path, dtype, count):
    documents = random_documents(count)
    write_ours(tmp_path / "ours", documents=documents, dtype=dtype)
    write_megatron(tmp_path / "theirs", documents=[[document] for document in documents], dtype=dtype)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_ours(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = random_documents()
    write_ours(tmp_path / "ours", documents=documents, dtype=dtype)
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == len(documents)
    assert all(np.array_equal(read, document) for read, document in zip(dataset[0 : len(documents)], documents, strict=True))


@pytest.mark.parametrize("multimodal", [False, True])
def test_reads_megatrons_documents_of_several_sequences(tmp_path, multimodal):
    documents = [[ids(1, 2), ids(3)], [ids(4)], [], [ids(5, 6), ids(), ids(EOD)]]
    write_megatron(tmp_path / "theirs", documents=documents, multimodal=multimodal)
    index = read_index(tmp_path / "theirs.idx")
    assert index.sequence_lengths.tolist() == [2, 1, 1, 2, 0, 1]
    assert index.pointers.tolist() == [0, 8, 12, 16, 24, 24]
    assert index.document_indices.tolist() == [0, 2, 3, 3, 6]
    assert (index.num_documents, index.num_tokens, index.dtype) == (4, 7, np.int32)
    assert map_tokens(tmp_path / "theirs.bin", index).tolist() == [1, 2, 3, 4, 5, 6, EOD]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=30), max_size=20), st.sampled_from(DTYPES))
def test_round_trip(tmp_path_factory, documents, dtype):
    stem = tmp_path_factory.mktemp("shard") / "s"
    entry = write_ours(stem, documents=[np.array(document) for document in documents], dtype=dtype)
    index = read_index(stem.with_suffix(".idx"))
    tokens = map_tokens(stem.with_suffix(".bin"), index)
    cuts = np.cumsum(index.sequence_lengths)[:-1]
    read = [part.tolist() for part in np.split(tokens, cuts)] if documents else []
    assert read == documents
    assert (entry.documents, entry.tokens, entry.file) == (len(documents), sum(map(len, documents)), "s")
    assert entry.bin_bytes == stem.with_suffix(".bin").stat().st_size


def damage(content: bytes, *, at: int, by: bytes) -> bytes:
    return content[:at] + by + content[at + len(by) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: damage(c, at=0, by=b"GARBAGE"), "is not a Megatron index: it starts with b'GARBAGE"),
        (lambda c: damage(c, at=9, by=b"\x02"), "has version 2; this reader knows version 1"),
        (lambda c: damage(c, at=17, by=b"\x09"), "has dtype code 9"),
        (lambda c: c[:20], "is truncated: the header"),
        (lambda c: c[:-1], "is truncated: 50 sequences and 51 document borders take 1,042 bytes"),
        (lambda c: c + b"12345", "is too long"),
        (lambda c: damage(c, at=len(c) - 8, by=struct.pack("<q", 3)), "document borders that do not run from 0"),
        (lambda c: HEADER.pack(b"MMIDIDX\x00\x00", 1, 4, 0, 0), "document borders"),
    ],
)
def test_damaged_index_is_refused(tmp_path, change, message):
    write_ours(tmp_path / "s", documents=random_documents())
    path = tmp_path / "s.idx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match="prepare this shard again") as error:
        read_index(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_missing_index_and_wrong_bin_are_refused(tmp_path):
    write_ours(tmp_path / "s", documents=random_documents())
    with pytest.raises(DataError, match=r"nothing\.idx is missing"):
        read_index(tmp_path / "nothing.idx")
    index = read_index(tmp_path / "s.idx")
    with (tmp_path / "s.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"s\.bin holds .* bytes; its \.idx describes"):
        map_tokens(tmp_path / "s.bin", index)
    with pytest.raises(DataError, match="is missing"):
        map_tokens(tmp_path / "t.bin", index)


@pytest.mark.parametrize(
    ("document", "message"), [(ids(), "a document of 0 tokens"), (ids(70_000), "do not fit in uint16"), (ids(-1), "do not fit")]
)
def test_ids_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, document, message):
    with pytest.raises(DataError, match=message), ShardWriter(tmp_path / "s", dtype=np.dtype("uint16")) as writer:
        writer.add_document(ids(1, EOD))
        writer.add_document(document)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_appears_at_close(tmp_path):
    writer = ShardWriter(tmp_path / "s", dtype=np.dtype("int32"))
    writer.add_document(ids(1, EOD))
    assert [path.name for path in tmp_path.iterdir()] == [partial(tmp_path / "s.bin").name]
    assert writer_of(partial(tmp_path / "s.bin")) == os.getpid() and writer_of(tmp_path / "s.bin") is None
    assert writer.close() == writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]


def test_only_a_full_disk_is_translated(tmp_path):
    with (
        pytest.raises(DataError, match=r"cannot write .*x: No space left on device \(.* GiB free"),
        naming_full_disk(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), naming_full_disk(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatrons_shards_with_eod_become_a_source(tmp_path, dtype):
    write_megatron(tmp_path / "b_text_document", documents=[[ids(1, 2), ids(3, EOD)], [ids(EOD)]], dtype=dtype)
    write_megatron(tmp_path / "a_text_document", documents=[[ids(9, EOD)]], dtype=dtype)
    write_megatron(tmp_path / "valid", documents=[[ids(4, EOD)]], dtype=dtype)
    manifest = import_shards(tmp_path, source="web", tokenizer=TOKENIZER, held_out=["valid"])
    assert [shard.file for shard in manifest.train.shards] == ["a_text_document", "b_text_document"]
    assert (manifest.dtype, manifest.train.documents, manifest.train.tokens, manifest.held_out.tokens) == (dtype, 3, 7, 2)
    assert read_manifest(tmp_path) == manifest
    assert verify_source(tmp_path) == []


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[ids(1, EOD)], [ids(2), ids(3)]], r"web_0\.bin: document 1 ends in token 3 \(1 of 2 documents break the rule\)"),
        ([[ids(1, EOD)], [], [ids(EOD)]], "document 1 is empty"),
        ([[]], "document 0 is empty"),
        ([[ids(1, 1000, EOD)]], "token ids from 1 to 1000; the tokenizer has ids 0 to 999"),
        ([[ids(1, -1, EOD)]], "token ids from -1"),
        ([], "holds no training documents"),
    ],
)
def test_megatrons_shards_that_break_a_rule_are_refused(tmp_path, documents, message):
    write_megatron(tmp_path / "web_0", documents=documents)
    with pytest.raises(DataError, match=message):
        import_shards(tmp_path, source="web", tokenizer=TOKENIZER)
    assert not (tmp_path / "manifest.json").exists()


def test_import_refuses_mixed_types_holes_and_unknown_names(tmp_path):
    with pytest.raises(DataError, match="give the folder"):
        import_shards(tmp_path, source="web", tokenizer=TOKENIZER)
    write_ours(tmp_path / "a", documents=[ids(1, EOD)])
    with pytest.raises(DataError, match=r"asked for \['b'\]"):
        import_shards(tmp_path, source="web", tokenizer=TOKENIZER, held_out=["b"])
    content = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(damage(content, at=HEADER.size + 4, by=struct.pack("<q", 4)))
    with pytest.raises(DataError, match="do not lie end to end"):
        import_shards(tmp_path, source="web", tokenizer=TOKENIZER)
    write_ours(tmp_path / "b", documents=[ids(1, EOD)], dtype="uint16")
    with pytest.raises(DataError, match=r"int32.*uint16"):
        import_shards(tmp_path, source="web", tokenizer=TOKENIZER)


def test_verify_names_what_changed(tmp_path):
    write_ours(tmp_path / "a", documents=random_documents())
    import_shards(tmp_path, source="web", tokenizer=TOKENIZER)
    path = tmp_path / "a.bin"
    path.write_bytes(damage(path.read_bytes(), at=100, by=b"\x01\x02"))
    (problem,) = verify_source(tmp_path)
    assert "a: bin_xxh3 is" in problem
    path.write_bytes(path.read_bytes()[:-4])
    assert "its .idx describes" in verify_source(tmp_path)[0]
    path.unlink()
    assert "a.bin is missing" in verify_source(tmp_path)[0]


def states(folder: Path):
    stats = {path.name: path.stat() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}
    return {name: [stat.st_size, str(stat.st_mtime_ns)] for name, stat in stats.items()}


def test_verify_leaves_a_receipt_of_what_it_read(tmp_path):
    write_ours(tmp_path / "a", documents=random_documents())
    write_ours(tmp_path / "valid", documents=random_documents(3))
    manifest = import_shards(tmp_path, source="web", tokenizer=TOKENIZER, held_out=["valid"])
    assert accepted_states(tmp_path) == {}
    assert verify_source(tmp_path) == [] and accepted_states(tmp_path) == states(tmp_path)
    read = accepted_states(tmp_path)
    os.utime(tmp_path / "a.bin", ns=(0, 0))
    assert accepted_states(tmp_path) == read != states(tmp_path)
    assert verify_source(tmp_path) == [] and accepted_states(tmp_path)["a.bin"][1] == "0"
    write_manifest(tmp_path, manifest=replace(manifest, text_bytes=1))
    assert accepted_states(tmp_path) == {}


def test_no_receipt_of_damaged_or_moving_shards(tmp_path, monkeypatch):
    write_ours(tmp_path / "a", documents=random_documents())
    import_shards(tmp_path, source="web", tokenizer=TOKENIZER)
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(damage(content, at=100, by=b"\x01\x02"))
    assert verify_source(tmp_path) and not (tmp_path / "verified.json").exists()
    (tmp_path / "a.bin").write_bytes(content)
    with monkeypatch.context() as patched:
        patched.setattr(
            "data_prep.manifest._verify_shard", lambda stem, *, shard: os.utime(tmp_path / "a.bin", ns=(0, 0)) or []
        )
        assert verify_source(tmp_path) == [] and accepted_states(tmp_path) == {}
    assert verify_source(tmp_path) == [] and accepted_states(tmp_path) == states(tmp_path)


def test_receipts_that_cannot_be_written_or_read(tmp_path):
    write_ours(tmp_path / "a", documents=random_documents())
    import_shards(tmp_path, source="web", tokenizer=TOKENIZER)
    partial(tmp_path / "verified.json").mkdir()  # what a folder where nobody may write does, for root too
    assert verify_source(tmp_path) == [] and accepted_states(tmp_path) == {}
    for content in ("{", "[]", "{}", "null", '{"manifest": 1, "files": {}}'):
        (tmp_path / "verified.json").write_text(content)
        assert accepted_states(tmp_path) == {}


def test_verify_survives_an_index_with_borders_out_of_range(tmp_path):
    write_ours(tmp_path / "a", documents=random_documents())
    import_shards(tmp_path, source="web", tokenizer=TOKENIZER)
    path = tmp_path / "a.idx"
    content = path.read_bytes()
    path.write_bytes(damage(content, at=len(content) - 16, by=struct.pack("<q", 10**9)))
    (problem,) = verify_source(tmp_path)
    assert "a: idx_xxh3 is" in problem
