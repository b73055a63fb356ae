"""From rows to published shards: nothing lost, nothing half done, nothing overwritten."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_prep.build import is_held_out, list_inputs, prepare_source, prepare_sources, verify_source
from data_prep.errors import DataError
from data_prep.indexed import map_tokens, read_index
from data_prep.manifest import accepted_states, read_manifest, split_of, write_manifest
from data_prep.spec import DataSettings, Source, TokenizerSpec
from data_prep.tokenizers import build_tokenizer

EOD = "<|endoftext|>"
SETTINGS = {
    "held_out_fraction": 0.2,
    "shard_tokens": 2000,
    "length_buckets": (),
    "chunk_tokens": 64,
    "group_tokens": 4096,
    "num_workers": 1,
    "num_machines": 1,
    "max_rejected_rows": 0,
    "max_row_mib": 1,
    "shuffle_mib": 0,
    "oracle_fraction": 0.0,
    "dropped_samples": 2,
    "reader": "mmap",
    "cache_dir": None,
    "cache_gib": 1.0,
    "prefetch_batches": 2,
    "trace": False,
}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """Bytes as tokens: ids are easy to count."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOD])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


class Lab:
    """A folder with inputs, and what is prepared from them."""

    def __init__(self, folder: Path, tokenizer_file: Path):
        self.folder, self.data_dir = folder, folder / "data"
        self.tokenizer = TokenizerSpec(kind="huggingface", ranks_file=None, file=str(tokenizer_file), eod=EOD)

    def write(self, name, rows):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return path

    def texts(self, name, texts):
        return self.write(name, [{"text": text} for text in texts])

    def source(self, pattern="*.jsonl"):
        return Source(inputs=(str(self.folder / pattern),), format="jsonl", share=1.0)

    def prepare(self, name="web", *, pattern="*.jsonl", seed=1, on_progress=None, engine="local", **changes):
        return prepare_source(
            name,
            self.source(pattern),
            tokenizer=self.tokenizer,
            settings=DataSettings(**(SETTINGS | changes)),
            seed=seed,
            data_dir=self.data_dir,
            on_progress=on_progress,
            engine=engine,
        )

    def read_back(self, name="web"):
        """The texts of the train and of the held-out documents, in order."""
        manifest = read_manifest(self.data_dir / name)
        return [self._read_split(name, shards=split.shards) for split in (manifest.train, manifest.held_out)]

    def _read_split(self, name, *, shards):
        tokenizer = build_tokenizer(self.tokenizer)
        texts = []
        for shard in shards:
            stem = self.data_dir / name / shard.file
            index = read_index(stem.with_suffix(".idx"))
            documents = np.split(map_tokens(stem.with_suffix(".bin"), index), np.cumsum(index.sequence_lengths)[:-1])
            assert all(document[-1] == tokenizer.eod_id for document in documents)
            assert (shard.documents, shard.tokens) == (len(documents), index.num_tokens)
            texts += [tokenizer.decode(document[:-1]) for document in documents]
        return texts


@pytest.fixture
def lab(tmp_path, tokenizer_file):
    return Lab(tmp_path, tokenizer_file)


def some_texts(count=200):
    return [f"document {n} says {EOD} and 🎉 " + "x" * (n % 90) for n in range(count)]


def snapshot(folder: Path):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_row_comes_out_once_and_in_order(lab):
    texts = some_texts()
    lab.texts("a.jsonl", texts[:150])
    lab.write("b.jsonl", ["\n", {"text": ""}, "bad\n", *({"text": text} for text in texts[150:]), {"text": None}])
    seen = []
    manifest = lab.prepare(max_rejected_rows=5, on_progress=seen.append)
    train, held_out = lab.read_back()
    assert Counter(train + held_out) == Counter(texts)
    assert train == [text for text in texts if text in set(train)]
    assert (manifest.rejected_rows, manifest.empty_documents) == (2, 1)
    assert manifest.train.documents + manifest.held_out.documents + 3 == len(texts) + 3
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.train.tokens + manifest.held_out.tokens == manifest.text_bytes + len(texts)  # a byte a token, and EOD
    assert len((lab.data_dir / "web" / "rejects.jsonl").read_text().splitlines()) == 2
    assert verify_source(lab.data_dir / "web") == []
    assert [seen[-1].done, seen[-1].documents, seen[-1].rejected_rows] == [True, len(texts), 2]


def test_shards_close_at_the_first_border_past_their_size(lab):
    lab.texts("a.jsonl", some_texts())
    manifest = lab.prepare()
    shards = manifest.train.shards
    # A byte is a token here, four times what the plan thinks: one task, which goes on at one and a half times the size.
    assert [shard.file for shard in shards] == ["shard_00000", *(f"shard_00000r{number}" for number in range(1, len(shards)))]
    assert len(shards) > 3 and all(3000 <= shard.tokens < 3200 for shard in shards[:-1])
    assert manifest.held_out.shards[0].file == "held_out_00000"
    assert manifest.dtype == "uint16"


def of_length(texts, *, low, high=10**9):
    """Those of low..high-1 tokens, a byte a token and EOD."""
    return [text for text in texts if low <= len(text.encode()) + 1 < high]


def test_buckets_hold_the_same_documents_in_the_same_order(lab):
    lab.texts("a.jsonl", some_texts(400))
    plain, sorted_by = lab.prepare("plain"), lab.prepare("sorted", length_buckets=(64, 100))
    (train, held_out), (bucketed, bucketed_held_out) = lab.read_back("plain"), lab.read_back("sorted")
    assert bucketed_held_out == held_out and {shard.min_document_tokens for shard in sorted_by.held_out.shards} == {0}
    parts = [of_length(train, low=low, high=high) for low, high in ((0, 64), (64, 100), (100, 10**9))]
    assert bucketed == [text for part in parts for text in part] and all(parts)
    assert (sorted_by.train.documents, sorted_by.train.tokens) == (plain.train.documents, plain.train.tokens)
    assert (sorted_by.text_bytes, read_manifest(lab.data_dir / "sorted")) == (plain.text_bytes, sorted_by)
    assert verify_source(lab.data_dir / "sorted") == []


def test_the_manifest_lists_the_shortest_bucket_first(lab):
    lab.texts("a.jsonl", some_texts(400))
    shards = lab.prepare(length_buckets=(64, 100, 5000)).train.shards  # no document has 5000 tokens
    stems = {0: "shard_00000", 64: "shard_b64_00000", 100: "shard_b100_00000"}
    numbers = {border: sum(shard.min_document_tokens == border for shard in shards) for border in stems}
    assert [shard.file for shard in shards] == [
        f"{stem}r{number}" if number else stem for border, stem in stems.items() for number in range(numbers[border])
    ]
    assert min(numbers.values()) > 1


def test_verify_finds_a_document_shorter_than_its_bucket(lab):
    lab.texts("a.jsonl", some_texts(400))
    manifest = lab.prepare(length_buckets=(64,))
    lied = [replace(shard, min_document_tokens=80 if shard.min_document_tokens else 0) for shard in manifest.train.shards]
    write_manifest(lab.data_dir / "web", manifest=replace(manifest, train=split_of(lied)))
    problems = verify_source(lab.data_dir / "web")
    assert problems and all("shard_b64" in problem for problem in problems)
    assert "min_document_tokens is 65, the manifest says 80" in problems[0]
    assert accepted_states(lab.data_dir / "web") == {}


def test_a_source_from_before_the_buckets_has_none(lab):
    lab.texts("a.jsonl", some_texts())
    manifest = lab.prepare()
    before = {key: value for key, value in manifest.settings.items() if key != "length_buckets"}
    assert len(before) == len(manifest.settings) - 1
    write_manifest(lab.data_dir / "web", manifest=replace(manifest, settings=before))
    assert lab.prepare().settings == before
    with pytest.raises(DataError, match=r"length_buckets: found \[\], wanted \[64, 100\]"):
        lab.prepare(length_buckets=(64, 100))


@pytest.mark.parametrize("buckets", [(100, 64), (64, 64)])
def test_buckets_out_of_order_are_refused(lab, buckets):
    lab.texts("a.jsonl", some_texts())
    with pytest.raises(DataError, match=r"length_buckets is \[.*\]; each length is larger than the one before"):
        lab.prepare(length_buckets=buckets)
    assert not lab.data_dir.exists()


def test_an_error_leaves_no_bucket_behind(lab):
    lab.write("a.jsonl", [*({"text": text} for text in some_texts()), "bad\n"])
    with pytest.raises(DataError, match="line 201"):
        lab.prepare(length_buckets=(64, 100))
    assert {name.rpartition("/")[0] for name in snapshot(lab.data_dir)} == {"web", "web/failed"}
    assert not list(lab.data_dir.rglob("*.bin*"))


def test_held_out_goes_by_content(lab):
    texts = some_texts()
    lab.texts("a.jsonl", texts + texts[::-1])
    lab.texts("b.jsonl", texts[50:])
    lab.prepare(pattern="a.jsonl")
    lab.prepare("other", pattern="b.jsonl")
    train, held_out = lab.read_back()
    assert set(train).isdisjoint(held_out) and 20 < len(set(held_out)) < 70
    assert set(lab.read_back("other")[1]) == set(held_out) & set(texts[50:])


def test_held_out_fraction_and_seed():
    data = [str(number).encode() for number in range(20_000)]
    for fraction in (0.0, 0.01, 0.3):
        kept = sum(is_held_out(document, seed=3, fraction=fraction) for document in data)
        assert abs(kept - fraction * len(data)) < 5 * (fraction * len(data)) ** 0.5 + 1e-9
    sides = [[is_held_out(document, seed=seed, fraction=0.3) for document in data] for seed in (1, 2)]
    assert sides[0] != sides[1]
    assert is_held_out(b"a fixed document", seed=1, fraction=0.13) is False  # the split of data on disk never moves
    assert is_held_out(b"a fixed document", seed=1, fraction=0.131) is True


def test_two_runs_are_equal_and_the_second_does_nothing(lab):
    lab.texts("a.jsonl", some_texts())
    first = lab.prepare()
    before = {path: path.stat().st_mtime_ns for path in lab.data_dir.rglob("*")}
    # What is in the shards does not depend on these.
    assert lab.prepare(num_workers=2, max_rejected_rows=9, chunk_tokens=128) == first
    assert {path: path.stat().st_mtime_ns for path in lab.data_dir.rglob("*")} == before
    content = snapshot(lab.data_dir)
    shutil.rmtree(lab.data_dir)
    lab.prepare()
    assert snapshot(lab.data_dir) == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out_fraction": 0.1}, "held_out_fraction: found 0.2, wanted 0.1"),
        ({"shard_tokens": 9}, "shard_tokens: found 2000, wanted 9"),
        ({"length_buckets": (64,)}, "length_buckets: found [], wanted [64]"),
        ({"seed": 2}, "seed: found 1, wanted 2"),
        ({"pattern": "?.jsonl*"}, "b.jsonl.gz"),
    ],
)
def test_changed_settings_are_refused(lab, change, message):
    lab.texts("a.jsonl", some_texts())
    lab.prepare()
    lab.texts("b.jsonl.gz", [])
    before = snapshot(lab.data_dir)
    with pytest.raises(
        DataError, match=r"was prepared with other settings: .*; remove .*web or choose another run\.data_dir"
    ) as error:
        lab.prepare(**change)
    assert message in str(error.value)
    assert snapshot(lab.data_dir) == before


def test_changed_inputs_and_tokenizer_are_refused(lab, tmp_path):
    path = lab.texts("a.jsonl", some_texts())
    lab.prepare()
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match=r"inputs: found 1 files, .*inputs added, removed or changed: .*a\.jsonl\)"):
        lab.prepare()
    other = tmp_path / "other.json"
    other.write_text(Path(lab.tokenizer.file).read_text() + "\n")
    lab.tokenizer = TokenizerSpec(kind="huggingface", ranks_file=None, file=str(other), eod=EOD)
    with pytest.raises(DataError, match="tokenizer: found"):
        lab.prepare()


def test_a_foreign_folder_is_not_touched(lab):
    lab.texts("a.jsonl", some_texts())
    lab.write("data/web/precious.txt", ["mine"])
    with pytest.raises(DataError, match=r"web holds files, and neither a manifest\.json nor a plan\.json"):
        lab.prepare()
    assert snapshot(lab.data_dir) == {"web/precious.txt": b"mine"}


def test_sources_without_documents_are_refused(lab):
    lab.texts("a.jsonl", ["", ""])
    with pytest.raises(DataError, match="no document to train on: 2 rows, 2 empty, 0 rejected, 0 dropped, 0 held out"):
        lab.prepare()
    assert not (lab.data_dir / "web" / "manifest.json").exists()


def test_a_malformed_row_stops_and_leaves_its_list(lab):
    lab.write("a.jsonl", [*({"text": text} for text in some_texts()), "bad\n", "worse\n"])
    with pytest.raises(DataError, match=r"a\.jsonl, line 201: the row is not valid JSON"):
        lab.prepare()
    assert not list(lab.data_dir.rglob("*.bin*"))
    listed = lab.data_dir / "web" / "rejects" / "tokenize_00000.jsonl"
    with pytest.raises(DataError, match=rf"a\.jsonl, line 202: .* after 1 others, listed in {listed}"):
        lab.prepare(max_rejected_rows=1)
    assert json.loads(listed.read_text())["line"] == 201
    assert lab.prepare(max_rejected_rows=2).rejected_rows == 2
    assert len((lab.data_dir / "web" / "rejects.jsonl").read_text().splitlines()) == 2


def test_sources_run_side_by_side(lab):
    lab.texts("a.jsonl", some_texts())
    lab.texts("b.jsonl", some_texts(100))
    sources = {"one": lab.source("a.jsonl"), "two": lab.source("b.jsonl")}
    shared = {"tokenizer": lab.tokenizer, "seed": 1, "data_dir": lab.data_dir}
    seen = []
    settings = DataSettings(**(SETTINGS | {"num_workers": 2}))
    manifests = prepare_sources(sources, settings=settings, on_progress=seen.append, **shared)
    assert list(manifests) == ["one", "two"] and manifests["two"] == read_manifest(lab.data_dir / "two")
    assert {update.source for update in seen if update.done} == {"one", "two"}
    assert manifests == prepare_sources(sources, settings=DataSettings(**SETTINGS), **shared)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_one_bad_source_stops_no_other(lab, num_workers):
    lab.texts("a.jsonl", some_texts())
    for name in ("b", "c"):
        lab.write(f"{name}.jsonl", ["bad\n"])
    sources = {name: lab.source(f"{name}.jsonl") for name in ("b", "a", "c")}
    settings = DataSettings(**(SETTINGS | {"num_workers": num_workers}))
    with pytest.raises(DataError, match=r"(?s)2 of 3 sources failed:.*b\.jsonl, line 1.*c\.jsonl, line 1"):
        prepare_sources(sources, settings=settings, tokenizer=lab.tokenizer, seed=1, data_dir=lab.data_dir)
    assert [path.parent.name for path in lab.data_dir.rglob("manifest.json")] == ["a"]


def test_inputs_are_listed_before_anything_is_written(lab):
    lab.texts("a.jsonl", some_texts())
    sources = {"one": lab.source("a.jsonl"), "two": lab.source("gone*"), "three": lab.source("lost*")}
    assert [file.size for file in list_inputs({"one": sources["one"]})["one"]] == [(lab.folder / "a.jsonl").stat().st_size]
    with pytest.raises(DataError, match=r"(?s)2 of 3 sources failed.*'two'.*'three'"):
        prepare_sources(sources, settings=DataSettings(**SETTINGS), tokenizer=lab.tokenizer, seed=1, data_dir=lab.data_dir)
    assert not lab.data_dir.exists()


def in_subprocess(lab, code, *, name="web", **environment):
    """Runs `prepare` of the source in another process, `code` before it."""
    script = f"""
import os, resource, signal, sys
from pathlib import Path
from tests.data_prep.test_build import Lab
from data_prep.errors import DataError
lab = Lab(Path({str(lab.folder)!r}), Path({lab.tokenizer.file!r}))
on_progress = None
{code}
try:
    lab.prepare({name!r}, on_progress=on_progress)
except DataError as error:
    sys.exit(str(error))
"""
    return subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_full_disk_is_named_and_earlier_data_stays(lab):
    lab.texts("a.jsonl", some_texts())
    lab.prepare("before")
    before = snapshot(lab.data_dir)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
    for size, file in ((100, "plan.json"), (2000, "shard_00000.bin")):
        ended = in_subprocess(lab, limit.format(size))
        assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
        assert f"cannot write {lab.data_dir}/web/{file}" in ended.stderr and "GiB free on its disk" in ended.stderr
        assert not list(lab.data_dir.rglob("*.partial")) and not (lab.data_dir / "web" / "manifest.json").exists()
    shutil.rmtree(lab.data_dir / "web")
    assert snapshot(lab.data_dir) == before
    assert verify_source(lab.data_dir / "before") == []


def test_manifests_that_cannot_be_used(lab):
    with pytest.raises(DataError, match=r"no data for source 'web': .*web/manifest\.json is missing; .*run `phidias data`"):
        read_manifest(lab.data_dir / "web")
    lab.texts("a.jsonl", some_texts())
    manifest = lab.prepare()
    path = lab.data_dir / "web" / "manifest.json"
    good = path.read_text()
    write_manifest(path.parent, manifest=manifest)
    assert path.read_text() == good and read_manifest(path.parent) == manifest
    for content, message in (
        (good[:-20], "is not JSON"),
        ("[]", "format_version None; this code reads 1"),
        (good.replace('"format_version": 1', '"format_version": 2'), "format_version 2; this code reads 1"),
        (good.replace('"uint16"', '"int8"'), "is not a manifest"),
        (good.replace('"text_bytes"', '"bytes"'), "is not a manifest"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_manifest(path.parent)
