"""The demo corpora: found on any machine, in four formats, and a tokenizer that fits them."""

import json

import pytest

from data_prep import demo
from data_prep.build import prepare_sources
from data_prep.readers import Rejects, RowCount, find_inputs, read_documents
from data_prep.spec import DataSettings, Source, TokenizerSpec
from data_prep.tokenizers import build_tokenizer

INPUTS = {
    "code": ("jsonl", "code/*.jsonl.gz"),
    "reference": ("jsonl", "reference/*.jsonl.zst"),
    "prose": ("text", "prose/*.txt"),
    "long": ("parquet", "long/*.parquet"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    demo.build_demo(path)
    return path


@pytest.fixture(scope="module")
def texts(folder):
    found = {}
    for name, source in sources(folder).items():
        rejects = Rejects(folder / "rejects.jsonl", tolerance=0)
        rows = read_documents(find_inputs(source, name=name), source=source, counts=RowCount(), rejects=rejects)
        found[name] = [text for text, _ in rows]
    return found


def sources(folder):
    return {
        name: Source(inputs=(str(folder / "raw" / pattern),), format=format, share=0.25)
        for name, (format, pattern) in INPUTS.items()
    }


def test_table_counts_what_is_there(folder, texts):
    corpora = demo.build_demo(folder)
    assert {corpus.source: corpus.documents for corpus in corpora} == {name: len(found) for name, found in texts.items()}
    assert all(len(found) > 20 for found in texts.values())
    assert demo.table(corpora).splitlines()[0].split() == ["source", "files", "documents", "MB", "text"]


def test_sources_do_not_overlap(texts):
    assert all(len(set(found)) == len(found) for found in texts.values())
    assert set(texts["code"]).isdisjoint(texts["long"])
    assert min(map(len, texts["long"])) > demo.LONG_CHARACTERS >= max(map(len, texts["code"]))


def test_tokenizer(folder, texts):
    spec = TokenizerSpec(kind="huggingface", ranks_file=None, file=str(folder / "tokenizer.json"), eod=demo.EOD)
    tokenizer = build_tokenizer(spec)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (demo.VOCAB_SIZE, 0)
    (ids,) = tokenizer.encode_documents([texts["code"][0]])
    assert tokenizer.decode(ids) == texts["code"][0] and len(ids) < len(texts["code"][0]) / 2
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert [entry["content"] for entry in added] == list(demo.SPECIAL_TOKENS) and all(entry["special"] for entry in added)


def test_enough_tokens_for_a_demo_run(folder):
    manifests = prepare_sources(
        sources(folder),
        tokenizer=TokenizerSpec(kind="huggingface", ranks_file=None, file=str(folder / "tokenizer.json"), eod=demo.EOD),
        settings=DataSettings(
            held_out_fraction=0.02,
            shard_tokens=10**6,
            chunk_tokens=1024,
            group_tokens=2**20,
            num_workers=1,
            max_rejected_rows=0,
            num_machines=1,
            max_row_mib=32,
            shuffle_mib=32,
            oracle_fraction=0.1,
            dropped_samples=0,
            length_buckets=(512,),
            reader="mmap",
            cache_dir=None,
            cache_gib=1.0,
            prefetch_batches=0,
            trace=False,
        ),
        seed=1,
        data_dir=folder / "data",
    )
    assert 2.5e6 < sum(manifest.train.tokens for manifest in manifests.values()) < 12e6
    assert all(manifest.held_out.documents for manifest in manifests.values())


def test_second_time_does_nothing(folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(demo, "collect", lambda: pytest.fail("collected again"))
    demo.build_demo(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_missing_tokenizer_is_trained_on_what_is_on_disk(folder, texts, monkeypatch):
    path = folder / "tokenizer.json"
    path.rename(folder / "kept.json")
    monkeypatch.setattr(demo, "collect", lambda: pytest.fail("collected again"))
    monkeypatch.setattr(demo, "train_tokenizer", lambda documents: json.dumps(list(documents)))
    demo.build_demo(folder)
    trained_on = json.loads(path.read_text())
    (folder / "kept.json").replace(path)
    assert trained_on == [text for found in texts.values() for text in found]


def test_training_gives_the_same_tokenizer_twice(texts):
    sample = texts["reference"][::20]
    assert demo.train_tokenizer(sample) == demo.train_tokenizer(sample)


def test_somebody_elses_folder_is_not_touched(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    assert demo.main([str(tmp_path)]) == 2
    assert "was not written by the demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert demo.main([]) == 2
