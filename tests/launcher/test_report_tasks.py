"""Scores and decontamination on pages: what eval/ and manifests say, and nothing where they say nothing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from data_prep.curate.spec import BenchmarkSpec, DecontaminateSpec
from launcher.config.compose import compose_run
from launcher.report import report_contamination
from launcher.report.compare_tasks import caution, cell, score_document, task_scores
from launcher.report.report_contamination import contamination_section
from launcher.report.report_tasks import evaluations, tasks_table
from launcher.rundir.paths import RunDir
from launcher.rundir.records import write_json


def write_scores(run, *, name, step, value, stderr=0.01, documents=100):
    metrics = {"acc": {"value": value, "stderr": stderr, "higher_is_better": True}}
    row = {"metrics": metrics, "num_fewshot": 0, "documents": documents, "version": 1.0, "is_group": False}
    run.eval(name).parent.mkdir(parents=True, exist_ok=True)
    held_out = {"agrees": True, "mixture": {"loss": 3.0}}
    write_json(run.eval(name), {"step": step, "tokens": step * 10, "held_out": held_out, "tasks": {"rows": {"arc": row}}})
    return run


def group(label, *runs):
    return SimpleNamespace(label=label, readings=[SimpleNamespace(curve=SimpleNamespace(run=run)) for run in runs])


def test_a_column_a_step_and_the_stages_own_export_counts(tmp_path):
    run = RunDir(tmp_path)
    for name, step, value in (("pre", 30, 0.5), ("pre@10", 10, 0.25), ("pre@30", 30, 0.9), ("pretrain@5", 5, 0.1)):
        write_scores(run, name=name, step=step, value=value)
    found = evaluations(run, stage="pre")
    assert [one["step"] for one in found] == [10, 30]
    page = tasks_table(found)
    assert page.index("step 10 (") < page.index("step 30 (") and "0.2500" in page and "0.5000" in page and "0.9" not in page
    assert "0-shot, 100 documents" in page and tasks_table([]) == ""
    (tmp_path / "eval" / "pre@20.json").write_text("{torn")
    assert len(evaluations(run, stage="pre")) == 2


def test_scores_beside_each_other(tmp_path):
    runs = [RunDir(tmp_path / name) for name in "abcd"]
    for run, value in zip(runs, (0.4, 0.6, 0.3, 0.2), strict=True):
        write_scores(run, name="pre", step=10, value=value, documents=50 if run is runs[3] else 100)
    groups = [group("two", *runs[:2]), group("one", runs[2]), group("other", runs[3]), group("none", RunDir(tmp_path / "e"))]
    found = task_scores(groups, stage="pre")
    (alike, apart) = found.values()
    assert cell(alike, "two") == "0.5000 ± 0.0071" and cell(alike, "one") == "0.3000 ± 0.0100" and cell(alike, "none") == ""
    assert set(apart) == {"other"} and caution(found) == ""
    assert score_document(found)[0]["groups"]["two"]["runs"] == 2
    write_scores(runs[2], name="pre", step=20, value=0.3)
    assert caution(task_scores(groups, stage="pre")) == "scores are of exports at 100, 200 tokens of the stage"


@pytest.fixture
def config():
    config = compose_run(["run=demo"])
    step = DecontaminateSpec(
        kind="decontaminate",
        benchmarks={name: BenchmarkSpec(inputs=(f"{name}.jsonl",), text_fields=("question",)) for name in ("gsm8k", "arc")},
        noted_overlap=0.2,
        contaminated_overlap=0.4,
    )
    stage = config.stages[0]
    sources = dict(stage.mixture.sources)
    name = next(iter(sources))
    sources[name] = replace(sources[name], steps=(step,))
    return replace(config, stages=(replace(stage, mixture=replace(stage.mixture, sources=sources)),))


def test_what_decontamination_dropped_by_source(config, monkeypatch):
    counts = {"contaminated_13gram": 20, "contaminated_7gram": 5}
    statistics = SimpleNamespace(rows=10_000, dropped={"1_decontaminate": counts, "0_length": {"short": 7}})
    monkeypatch.setattr(report_contamination, "manifest_of", lambda config, name: SimpleNamespace(statistics=statistics))
    page = contamination_section(config)
    assert "gsm8k, arc" in page and ">20<" in page and ">5<" in page and "0.250%" in page and "nothing" in page
    monkeypatch.setattr(report_contamination, "manifest_of", lambda config, name: None)
    assert "gsm8k, arc" in contamination_section(config)  # the data lies elsewhere
    assert contamination_section(compose_run(["run=demo"])) == ""
