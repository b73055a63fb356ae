"""Every row of every format comes out, or is named with file and line."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.errors import DataError
from data_prep.readers import Rejects, RowCount, find_inputs, read_documents
from data_prep.spec import Source

TEXTS = ["first", "second\nline", "", "ünïcödé 🎉 \u2028 end", "with <|endoftext|> in it"]
ZST = zstandard.ZstdCompressor()


def jsonl(rows, *, field="text"):
    return b"".join(json.dumps({"id": n, field: row}).encode() + b"\n" for n, row in enumerate(rows))


def source(*inputs, format="jsonl", text_field="text"):
    return Source(inputs=tuple(str(i) for i in inputs), format=format, text_field=text_field, share=1.0)


def read(where: Path, *, tolerance=0, name="web", counts=None, **fields):
    """Texts and places of the files that a glob below `where` names."""
    spec = source(where, **fields)
    folder = where.parent if "*" not in str(where.parent) else where.parents[1]
    rejects = Rejects(folder / "rejects.jsonl", tolerance=tolerance)
    rows = list(read_documents(find_inputs(spec, name=name), source=spec, counts=counts or RowCount(), rejects=rejects))
    return [text for text, _ in rows], [str(place) for _, place in rows], rejects


def write_parquet(path, column, *, name="text", **options):
    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path, **options)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.json.gz", lambda content: gzip.compress(content[:60]) + gzip.compress(content[60:])),
        ("a.jsonl.zst", ZST.compress),
        ("a.ndjson.zst", lambda content: ZST.compress(content[:60]) + ZST.compress(content[60:])),
        ("a.jsonl.zst", lambda content: zstandard.ZstdCompressor(write_content_size=False).compress(content)),
    ],
)
def test_jsonl(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(jsonl(TEXTS)))
    texts, places, _ = read(tmp_path / "a.*")
    assert texts == TEXTS
    assert places[1] == f"{tmp_path / name}, line 2"


def test_jsonl_of_windows_and_without_a_last_newline(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\r\n{"text": "a"}\r\n\n   \n{"text": "b"}')
    counts = RowCount()
    texts, places, _ = read(tmp_path / "a.jsonl", counts=counts)
    assert texts == ["a", "b"] and places[1].endswith("line 5")
    assert (counts.rows, counts.blank_lines) == (2, 3)


def test_large_jsonl_through_small_reads(tmp_path):
    texts = [f"{n}" * 2000 for n in range(3000)]
    for pack, name in ((gzip.compress, "a.jsonl.gz"), (ZST.compress, "b.jsonl.zst")):
        (tmp_path / name).write_bytes(pack(jsonl(texts)))
        assert read(tmp_path / name)[0] == texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, kind):
    write_parquet(tmp_path / "a.parquet", pa.array(TEXTS * 40, pa.string()).cast(kind), row_group_size=7)
    texts, places, _ = read(tmp_path / "a.parquet", format="parquet")
    assert texts == TEXTS * 40
    assert places[-1] == f"{tmp_path / 'a.parquet'}, row 200"


def test_text_files_are_documents(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfkeeps\r\nits line ends")
    (tmp_path / "deep" / "er" / "a.txt").write_text("a")
    (tmp_path / "deep" / "c.txt").write_text("")
    texts, places, _ = read(tmp_path / "**" / "*.txt", format="text")
    assert texts == ["keeps\r\nits line ends", "", "a"]
    assert places[0] == str(tmp_path / "b.txt")


def test_inputs_are_sorted_and_read_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "other.jsonl"):
        (tmp_path / name).write_bytes(jsonl([name]))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "other.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    files = find_inputs(source(tmp_path / "*.jsonl", tmp_path / "b.jsonl", f"file://{tmp_path}/a.jsonl"), name="web")
    assert [Path(file.path).name for file in files] == ["a.jsonl", "b.jsonl", "link.jsonl"]
    assert [file.size for file in files] == [Path(file.path).stat().st_size for file in files]


def test_linked_folders_are_followed(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.jsonl").write_bytes(jsonl(["far"]))
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    assert read(tmp_path / "near" / "**" / "*.jsonl")[0] == ["far"]


def test_names_with_glob_characters_and_relative_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("we[i]rd.jsonl").write_bytes(jsonl(["x"]))
    assert [file.path for file in find_inputs(source("we[i]rd.jsonl"), name="web")] == [str(tmp_path / "we[i]rd.jsonl")]
    assert len(find_inputs(source("*.jsonl"), name="web")) == 1


def test_other_file_systems():
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/bucket/a.jsonl.gz", gzip.compress(jsonl(TEXTS)))
    spec = source("memory://bucket/*.gz")
    (file,) = find_inputs(spec, name="web")
    rows = read_documents([file], source=spec, counts=RowCount(), rejects=Rejects(Path("unused"), tolerance=0))
    assert [text for text, _ in rows] == TEXTS
    assert file.version and file.path.startswith("memory://")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', "is not valid JSON"),
        (b"hello", "is not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "is not valid JSON"),
        (b'{"text": "a", "x": NaN}', "is not valid JSON"),
        (b'\xef\xbb\xbf{"text": "a"}', "starts with a byte order mark (BOM); the rule is plain UTF-8"),
        (b'{"text": "\xff"}', "is not valid JSON: str is not valid UTF-8"),
        (b'{"text": "\\ud800"}', "is not valid JSON"),
        (b'{"text": "\xed\xa0\x80"}', "is not valid JSON"),
        (b'["text"]', "is a JSON list; the rule is an object with the field 'text'"),
        (b'{"txt": "a", "id": 1}', "has no field 'text'; it has txt, id"),
        (b"{}", "has no field 'text'; it has no fields"),
        (b'{"text": null}', "has null in 'text'; the rule is a string"),
        (b'{"text": 3}', "has int in 'text'; the rule is a string"),
        (b'{"text": ["a"]}', "has list in 'text'; the rule is a string"),
    ],
)
def test_malformed_lines(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "after"}\n')
    with pytest.raises(DataError, match="max_rejected_rows tolerates 0") as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 3: the row {reason}")
    texts, _, rejects = read(path, tolerance=1)
    assert texts == ["good", "after"] and rejects.count == 1
    listed = json.loads(rejects.path.read_text())
    assert (listed["file"], listed["line"]) == (str(path), 3) and listed["reason"].startswith(reason)


def test_rejects_stop_past_the_tolerance(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"bad\n" * 3)
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: .* after 2 others, listed in .*rejects\.jsonl"):
        read(tmp_path / "a.jsonl", tolerance=2)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 2


def test_malformed_rows_of_parquet_and_text(tmp_path):
    broken = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"a\xff")
    )
    write_parquet(tmp_path / "a.parquet", broken)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: the row is not valid UTF-8"):
        read(tmp_path / "a.parquet", format="parquet")
    write_parquet(tmp_path / "b.parquet", ["x", None])
    with pytest.raises(DataError, match=r"b\.parquet, row 2: the row has null in 'text'"):
        read(tmp_path / "b.parquet", format="parquet")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"c\.txt: the row is not valid UTF-8: .* at byte 3"):
        read(tmp_path / "c.txt", format="text")
    assert read(tmp_path / "c.txt", format="text", tolerance=1)[0] == []


def test_wrong_parquet_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"], name="content")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text'; it has id, content; set the source's text_field"):
        read(tmp_path / "a.parquet", format="parquet")
    assert read(tmp_path / "a.parquet", format="parquet", text_field="content")[0] == ["x"]
    with pytest.raises(DataError, match="column 'id' holds int64; documents are strings"):
        read(tmp_path / "a.parquet", format="parquet", text_field="id")


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", ZST.compress)])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.97])
def test_truncated_streams_are_refused(tmp_path, suffix, pack, keep):
    content = pack(jsonl([os.urandom(40).hex() for _ in range(2000)]))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"truncated or damaged|is empty") as error:
        read(path, tolerance=1000)
    assert str(path) in str(error.value)


def test_truncation_names_the_last_line(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(ZST.compress(jsonl(["x"] * 10)) + ZST.compress(jsonl(["y"]))[:-2])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst, line 1\d is the last that could be read"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_files_that_are_not_what_they_say(tmp_path, name):
    (tmp_path / name).write_bytes(jsonl(TEXTS))
    with pytest.raises(DataError, match=f"{name}.* truncated or damaged"):
        read(tmp_path / name, format="parquet" if "parquet" in name else "jsonl")


def test_checksums_of_streams_are_checked(tmp_path):
    content = bytearray(gzip.compress(jsonl(TEXTS)))
    content[-6] ^= 255
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match="truncated or damaged"):
        read(tmp_path / "a.jsonl.gz")


def test_truncated_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [os.urandom(30).hex() for _ in range(5000)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated or damaged"):
        read(path, format="parquet")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.bz2", "a.gz", "noextension"])
def test_unknown_extensions(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"jsonl files end in \.jsonl, \.ndjson, \.json, each also with \.gz"):
        find_inputs(source(tmp_path / name), name="web")
    with pytest.raises(DataError, match=r"parquet files end in \.parquet, \.pq; rename"):
        find_inputs(source(tmp_path / name, format="parquet"), name="web")


def test_missing_inputs(tmp_path):
    with pytest.raises(
        DataError, match=r"source 'web': input '.*nothing/\*\.jsonl' matches no file.*mixture\.sources\.web\.inputs"
    ):
        find_inputs(source(tmp_path / "nothing" / "*.jsonl"), name="web")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"cannot read input .*a\.jsonl: No such file"):
        find_inputs(source(tmp_path / "*.jsonl"), name="web")
