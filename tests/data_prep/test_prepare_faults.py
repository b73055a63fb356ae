"""What a review of data preparation found: text lost in silence, settings mixed, one fault that takes others with it."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.build import prepare_sources
from data_prep.errors import DataError
from data_prep.inputs import find_inputs
from data_prep.parquet import PARQUET_ROWS, _rows_at_once
from data_prep.prepare.documents import encode_row
from data_prep.prepare.place import LocalPlace
from data_prep.prepare.plan import plan_source
from data_prep.readers import Rejects, RowCount, read_documents
from data_prep.spec import DataSettings, Source
from launcher.verbs.data import array_token
from tests.data_prep.test_build import SETTINGS, Lab, some_texts, tokenizer_file  # noqa: F401 (a fixture)
from tests.data_prep.test_curated import EXACT, MINHASH, Curated, text


@pytest.fixture
def lab(tmp_path, tokenizer_file):  # noqa: F811
    return Curated(tmp_path, tokenizer_file)


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_an_input_that_changes_under_the_work_is_refused(tmp_path, tokenizer_file, change):  # noqa: F811
    lab = Lab(tmp_path, tokenizer_file)
    for number in range(6):
        lab.texts(f"{number}.jsonl", some_texts(60))
    done = []

    def meanwhile(update):
        for number in range(6) if not done else ():
            path = lab.folder / f"{number}.jsonl"
            path.unlink() if change == "gone" else path.write_text('{"text": "x"}\n' * (1 if change == "shorter" else 999))
        done.append(update)

    with pytest.raises(DataError, match=r"\.jsonl changed since it was planned: it was .* bytes of version"):
        lab.prepare(on_progress=meanwhile)
    assert not (lab.data_dir / "web" / "manifest.json").exists()


def test_names_with_colons_are_names(tmp_path):
    for name in ("x", "x::y.txt", "File::Spec.txt"):
        (tmp_path / name).write_text(f"I am {name}")
    source = Source(inputs=(f"{tmp_path}/*",), format="text", share=1.0)
    rejects = Rejects(tmp_path / "rejects", tolerance=0)
    rows = read_documents(find_inputs(source, name="web"), source=source, counts=RowCount(), rejects=rejects)
    assert {found for found, _ in rows} == {"I am x", "I am x::y.txt", "I am File::Spec.txt"}


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text('{"text": "x"}\n')
    scandir = os.scandir

    def refusing(path="."):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may list everything
    with pytest.raises(DataError, match=r"cannot list .*/b, of input .*: Permission denied"):
        find_inputs(Source(inputs=(f"{tmp_path}/**/*.jsonl",), format="jsonl"), name="web")


def test_what_json_has_no_word_for_survives_a_stage(lab):
    pq.write_table(
        pa.table({"text": [text(n) for n in range(40)], "score": [float("nan"), *map(float, range(39))]}),
        lab.folder / "a.parquet",
    )
    source = Source(
        inputs=(f"{lab.folder}/a.parquet",),
        format="parquet",
        steps=(EXACT, {"kind": "metadata", "field": "score", "min": 0.0}),
        share=1.0,
    )
    settings = DataSettings(**SETTINGS)
    shared = {"tokenizer": lab.tokenizer, "settings": settings, "seed": 1, "data_dir": lab.data_dir}
    manifest = prepare_sources({"web": source}, **shared)["web"]
    assert manifest.rejected_rows == 0 and manifest.statistics.rows == 40
    assert json.loads(encode_row({"big": 2**70, "nan": float("inf")}).replace(b"Infinity", b"null"))["big"] == 2**70


def test_metadata_keeps_its_names_through_a_stage(lab):
    lab.rows([{"text": text(n), "document_id": n, "id": f"row-{n}"} for n in range(20)])
    field = {"kind": "metadata", "field": "document_id", "min": 5}
    before, after = (
        lab.prepare(name, steps=steps, id_field="id") for name, steps in (("a", (field, EXACT)), ("b", (EXACT, field)))
    )
    assert before.statistics.dropped == after.statistics.dropped == {"metadata": {"metadata_value": 5}}
    assert {sample["id"] for sample in lab.samples("b")} <= {f"row-{n}" for n in range(5)}


def test_languages_are_counted_once(lab):
    lab.rows([{"text": text(n % 9), "language": "en"} for n in range(10)])
    assert lab.prepare(steps=(EXACT, MINHASH)).statistics.found == {"language": {"en": 9}}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_fault_nobody_foresaw_stops_its_source_alone(lab, monkeypatch, num_workers):
    lab.rows([{"text": text(n)} for n in range(20)])
    (lab.folder / "broken.parquet").write_bytes((lab.folder / "0.jsonl").read_bytes())
    sources = {
        "broken": Source(inputs=(f"{lab.folder}/broken.parquet",), format="parquet", share=0.5),
        "good": Source(inputs=(f"{lab.folder}/*.jsonl",), format="jsonl", share=0.5),
    }
    if num_workers == 1:
        monkeypatch.setattr("data_prep.parquet.pq.ParquetFile", lambda *_, **__: 1 // 0)
    settings = DataSettings(**(SETTINGS | {"num_workers": num_workers}))
    with pytest.raises(
        DataError, match="ZeroDivisionError.*fault of data_prep" if num_workers == 1 else "truncated or damaged"
    ):
        prepare_sources(sources, tokenizer=lab.tokenizer, settings=settings, seed=1, data_dir=lab.data_dir)
    assert (lab.data_dir / "good" / "manifest.json").exists()


def test_a_plan_is_not_changed_under_who_works_on_it(lab):
    lab.rows([{"text": text(n)} for n in range(20)])
    lab.prepare(seed=1)
    (lab.data_dir / "web" / "manifest.json").unlink()
    for receipt in (lab.data_dir / "web" / "receipts").iterdir():
        receipt.unlink()
    with (
        LocalPlace(lab.data_dir / "web").claim("tokenize_00000"),
        pytest.raises(DataError, match="by another process: seed: found 1"),
    ):
        lab.prepare(seed=2)
    lab.prepare(seed=2)


def test_receipts_of_another_plan_are_no_receipts(lab):
    lab.rows([{"text": text(n)} for n in range(20)])
    lab.prepare()
    folder = lab.data_dir / "web"
    (folder / "manifest.json").unlink()
    path = sorted((folder / "receipts").iterdir())[0]
    path.write_text(path.read_text().replace('"plan": "', '"plan": "another '))
    assert lab.prepare().statistics.rows == 20 and '"plan": "another' not in path.read_text()


def test_large_rows_of_parquet_are_read_few_at_a_time(tmp_path):
    for name, size, wanted in (("small", 10, PARQUET_ROWS), ("large", 4 << 20, 2)):
        pq.write_table(
            pa.table({"text": ["é" * (size // 2)] * 3}), tmp_path / f"{name}.parquet", use_dictionary=False, compression=None
        )
        assert _rows_at_once(pq.ParquetFile(tmp_path / f"{name}.parquet")) == pytest.approx(wanted, abs=1)


def test_steps_of_a_large_source_have_tasks_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.prepare.plan.CURATED_TOKENS", 2000)
    lab = Lab(tmp_path, tmp_path / "none")
    for number in range(20):
        lab.texts(f"{number}.jsonl", some_texts(20))
    field = {"kind": "metadata", "field": "kind", "equals": "good"}
    source = Source(inputs=(f"{lab.folder}/*.jsonl",), format="jsonl", steps=(field,), share=1.0)
    files = find_inputs(source, name="web")
    data = DataSettings(**(SETTINGS | {"shard_tokens": 10**6}))
    plan = plan_source("web", source, files=files, settings={"seed": 1}, data=data)
    assert [(stage.name, len(stage.parts)) for stage in plan.stages] == [("curate_1", 4), ("tokenize", 1)]


def test_a_requeued_array_tries_again(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert array_token() is None
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    first = array_token()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert first != array_token()
