"""Sources with steps: what is dropped is counted by reason, kept to look at, and the same however many work on it."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from data_prep.build import prepare_source
from data_prep.errors import DataError
from data_prep.spec import DataSettings, Source
from tests.data_prep.test_build import SETTINGS, Lab, snapshot, tokenizer_file  # noqa: F401 (a fixture)

WORDS = np.array([f"word{number}" for number in range(5000)])
MINHASH = {"kind": "minhash_dedup"}
EXACT = {"kind": "exact_dedup"}


def text(seed, count=120):
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=count))


def near(seed, other):
    """All but a few words of `seed`."""
    words = text(seed).split()
    words[other % len(words)] = "other"
    return " ".join(words)


class Curated(Lab):
    def rows(self, rows, *, files=6):
        for number in range(files):
            self.write(f"{number}.jsonl", rows[number::files])

    def prepare(self, name="web", *, steps=(), id_field=None, seed=1, **changes):
        return prepare_source(
            name,
            Source(inputs=(f"{self.folder}/*.jsonl",), format="jsonl", share=1.0, steps=steps, id_field=id_field),
            tokenizer=self.tokenizer,
            settings=DataSettings(**(SETTINGS | {"shard_tokens": 20_000, "shuffle_mib": 1, "max_row_mib": 8} | changes)),
            seed=seed,
            data_dir=self.data_dir,
        )

    def texts_back(self, name="web"):
        train, held_out = self.read_back(name)
        return train + held_out

    def samples(self, name="web"):
        paths = sorted((self.data_dir / name / "dropped").glob("*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture
def lab(tmp_path, tokenizer_file):  # noqa: F811
    return Curated(tmp_path, tokenizer_file)


def planted():
    """200 documents, 40 of them with one exact copy, 40 with two near ones; 5 rows for the filter and an empty one."""
    rows = [{"text": text(seed), "id": f"first-{seed}", "kind": "good"} for seed in range(200)]
    rows += [{"text": text(seed), "id": f"copy-{seed}", "kind": "good"} for seed in range(40)]
    rows += [
        {"text": near(seed, other), "id": f"near-{seed}-{other}", "kind": "good"}
        for seed in range(100, 140)
        for other in (7, 80)
    ]
    rows += [{"text": text(1000 + seed), "id": f"bad-{seed}", "kind": "bad"} for seed in range(5)]
    return [*rows, {"text": "", "id": "empty", "kind": "good"}]


STEPS = ({"kind": "metadata", "field": "kind", "equals": "good"}, EXACT, MINHASH)


def test_planted_copies_go_and_every_row_is_accounted_for(lab):
    lab.rows(planted())
    manifest = lab.prepare(steps=STEPS, id_field="id")
    found = manifest.statistics
    assert found.dropped["exact_dedup"] == {"copy": 40} and sum(found.dropped["metadata"].values()) == 5
    assert found.dropped["minhash_dedup"]["copy"] >= 78  # of 80: a window of 5 words changed of 116
    kept = Counter(lab.texts_back())
    assert max(kept.values()) == 1 and len(kept) == 200 + 80 - found.dropped["minhash_dedup"]["copy"]
    out = manifest.train.documents + manifest.held_out.documents
    assert (
        found.rows
        == 326
        == out + manifest.empty_documents + manifest.rejected_rows + sum(sum(row.values()) for row in found.dropped.values())
    )
    samples = lab.samples()
    assert {sample["step"] for sample in samples} == {"metadata", "exact_dedup", "minhash_dedup"}
    assert all(sample["id"].split("-")[0] in ("bad", "first", "copy", "near") and sample["text"] for sample in samples)
    assert {path.name for path in (lab.data_dir / "web").iterdir() if path.is_dir()} == {"receipts", "dropped"}


def test_any_number_of_workers_drops_the_same(lab):
    lab.rows(planted())
    lab.prepare(steps=STEPS)
    first = snapshot(lab.data_dir)
    assert len([name for name in first if "receipts/curate_2" in name]) > 1
    shutil.rmtree(lab.data_dir)
    lab.prepare(steps=STEPS, num_workers=3)
    assert snapshot(lab.data_dir) == first


def test_steps_before_the_tokenizer_need_no_files_between(lab):
    lab.rows(planted())
    manifest = lab.prepare(steps=STEPS[:1])
    assert sorted(manifest.statistics.dropped) == ["metadata"]
    assert not [name for name in snapshot(lab.data_dir) if "curate" in name]


def test_a_step_that_changed_is_another_source(lab):
    lab.rows(planted())
    lab.prepare(steps=STEPS)
    with pytest.raises(DataError, match=r"prepared with other settings: steps: found .*minhash_dedup.*, wanted "):
        lab.prepare(steps=STEPS[:2])


def test_a_step_that_cannot_be_built_is_known_before_work_starts(lab):
    lab.rows(planted())
    with pytest.raises(DataError, match=r"no_such\.bin"):
        lab.prepare(steps=({"kind": "language", "model_file": "no_such.bin"},))
    assert not list(lab.data_dir.rglob("*.bin*"))


def test_a_field_that_a_step_cannot_use_is_named_with_its_row(lab):
    lab.rows([{"text": "a question", "answers": ["1", "1"]}, {"text": "another", "answers": "none"}], files=1)
    with pytest.raises(DataError, match=r"0\.jsonl, line 2: .*answers"):
        lab.prepare(steps=({"kind": "difficulty", "min_answers": 1, "max_agreement": 1.0},))


def test_another_benchmark_file_is_another_source(lab):
    lab.rows(planted())
    items = lab.folder / "bench.json"
    steps = (
        {
            "kind": "decontaminate",
            "benchmarks": {"quiz": {"inputs": [str(items)], "text_fields": ["question"]}},
            "noted_overlap": 0.2,
            "contaminated_overlap": 0.4,
        },
    )
    items.write_text(json.dumps({"question": text(3)}) + "\n")
    manifest = lab.prepare(steps=steps)
    assert manifest.statistics.dropped["decontaminate"] == {"contaminated_13gram": 2}  # the document, and its copy
    assert "quiz" in json.dumps(lab.samples())
    assert lab.prepare(steps=steps) == manifest
    items.write_text(json.dumps({"question": text(4)}) + "\n")
    with pytest.raises(DataError, match="prepared with other settings: step_files: found"):
        lab.prepare(steps=steps)


def test_every_step_says_what_it_kept_two_of_a_kind_too(lab):
    lab.rows([{"text": text(n % 15), "id": n, "kind": "good" if n % 4 else "bad"} for n in range(20)])
    field = {"kind": "metadata", "field": "id"}
    steps = ({**field, "min": 2}, EXACT, {**field, "max": 11}, {"kind": "metadata", "field": "kind", "equals": "good"})
    found = lab.prepare(steps=steps).statistics
    kept = {n: n % 15 for n in range(2, 20)}
    first = {label: sum(row.values()) for label, row in found.dropped.items()}
    assert list(found.kept) == ["metadata", "exact_dedup", "metadata_2", "metadata_3"]
    assert found.kept["metadata"] == len(kept) and found.kept["exact_dedup"] == len(set(kept.values()))
    assert found.kept["metadata_3"] == len(lab.texts_back()) == found.kept["metadata_2"] - first["metadata_3"]
