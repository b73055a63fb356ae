"""The report from a run directory whose every figure is known: history, summary, curves and page."""

import base64
import gzip
import io
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import TypeAdapter
from rich.console import Console

from data_prep.indexed import ShardWriter
from data_prep.manifest import Manifest, TokenizerEntry, split_of, write_manifest
from data_prep.statistics import unigram_entropy
from launcher.config.compose import compose_run
from launcher.config.schema import RunConfig
from launcher.config.validate import dump_run, validate_run
from launcher.plan.memory import GIB
from launcher.report import report_rows
from launcher.report.figures import EARLY_POINTS, EVEN_POINTS, build_figures, extremes, sample_rows, stretches
from launcher.report.format import format_count, format_duration, format_number, format_percent
from launcher.report.history import read_history
from launcher.report.page import make_report
from launcher.report.report_bands import Band, work_s
from launcher.report.report_config import NoBaseError, base_of, compose_base, config_section, differing
from launcher.report.report_plan import Plans, compare_stage, measure, plan_section
from launcher.report.report_rows import read_metrics
from launcher.report.report_timeline import MOST_MARKS, WORDS, build_timeline
from launcher.report.summary import print_summary, summarise, weighted_mean
from launcher.report.tables import describe_event
from launcher.rundir.goodput import measure_goodput
from launcher.rundir.lock import lock_run
from launcher.rundir.paths import RunDir
from launcher.rundir.records import write_json
from tests.launcher.chromium import BROWSER, Page
from tests.training.tiny import run_config, stage_config

BATCH, SEQ_LENGTH = 8, 32
EVALUATED = 96
SHARES = {"pretrain": {"a": 0.75, "b": 0.25}, "midtrain": {"a": 0.5, "b": 0.3, "c": 0.2}}
HELD_OUT = {"a": 2.0, "b": 3.0, "c": 1.0}


def page_of(run: RunDir) -> str:
    make_report(run)
    return run.report.read_text()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    def mixture(stage: str) -> dict[str, Any]:
        sources = {name: {"inputs": ["x"], "format": "text", "share": share} for name, share in SHARES[stage].items()}
        sources["b"]["max_epochs"] = 2.0
        return {"name": stage, "sources": sources}

    stages = [stage_config(stage={"name": name}, mixture=mixture(name)) for name in SHARES]
    return run_config(tmp_path, stages=stages)


@pytest.fixture
def run(tmp_path: Path, config: RunConfig) -> RunDir:
    run = RunDir(tmp_path / "runs" / "tiny")
    run.root.mkdir(parents=True)
    run.config.write_bytes(TypeAdapter(RunConfig).dump_json(config))
    return run


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_row(step: int, *, stage: str = "pretrain", loss: float | None = 4.0, **fields: Any) -> dict[str, Any]:
    tokens = step * BATCH * SEQ_LENGTH
    row = {
        "time": 1000.0 + step,
        "kind": "train",
        "stage": stage,
        "step": step,
        "samples": step * BATCH,
        "tokens": tokens,
        "loss": loss,
    }
    rates = {"lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 100.0 * step, "step_time_s": 0.1, "data_wait_s": 0.0}
    by_source = dict.fromkeys(SHARES[stage], loss) if loss is not None else {}
    counts = {name: round(share * tokens) for name, share in SHARES[stage].items()}
    return {**row, **rates, "loss_by_source": by_source, "tokens_by_source": counts, **fields}


def validation_row(step: int, *, stage: str = "pretrain", plus: float = 0.0) -> dict[str, Any]:
    losses = {name: HELD_OUT[name] + plus for name in SHARES[stage]}
    counts = dict.fromkeys(losses, EVALUATED)
    position = {"step": step, "samples": step * BATCH, "tokens": step * BATCH * SEQ_LENGTH}
    loss = sum(SHARES[stage][name] * losses[name] for name in losses)
    row = {"time": 1000.5 + step, "kind": "validation", "stage": stage, "loss": loss}
    return {**row, **position, "loss_by_source": losses, "tokens_by_source": counts}


def write_source(directory: Path, *, train: NDArray[Any], held_out: NDArray[Any]) -> None:
    directory.mkdir(parents=True)
    splits = {}
    for split, tokens in (("train", train), ("held_out", held_out)):
        with ShardWriter(directory / f"{split}_00000", dtype=np.dtype("uint16")) as writer:
            writer.add_document(tokens.astype(np.uint16))
            splits[split] = split_of([writer.close()])
    tokenizer = TokenizerEntry(kind="huggingface", fingerprint="f", vocab_size=250, eod_id=0)
    manifest = Manifest(
        format_version=1,
        source=directory.name,
        dtype="uint16",
        tokenizer=tokenizer,
        text_bytes=1,
        train=splits["train"],
        held_out=splits["held_out"],
        settings={},
        rejected_rows=0,
        empty_documents=0,
    )
    write_manifest(directory, manifest=manifest)


def held_out_text(name: str) -> NDArray[Any]:
    return np.random.default_rng(ord(name)).integers(1, 30, 400)


@pytest.fixture
def finished(run: RunDir, config: RunConfig) -> RunDir:
    """Six steps of pretraining and four of midtraining over three sources of 500 unique tokens."""
    write_rows(run.metrics, [train_row(step, loss=9.0 - step) for step in range(1, 7)])
    write_rows(run.metrics, [validation_row(6, plus=1.0)])
    write_rows(run.metrics, [train_row(step, stage="midtrain", loss=3.0 - step / 10) for step in range(1, 5)])
    write_rows(run.metrics, [validation_row(4, stage="midtrain")])
    write_rows(
        run.events,
        [{"time": 1000.0, "kind": "start"}, {"time": 1020.0, "kind": "stage_done", "stage": "midtrain", "exit": "DONE"}],
    )
    run.status.write_text(json.dumps({"name": "tiny", "stage": "midtrain", "state": "done"}))
    for name in "abc":
        write_source(Path(config.run.data_dir) / name, train=np.ones(500), held_out=held_out_text(name))
    return run


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


# History


def test_a_crash_and_resume_leaves_one_history(run: RunDir) -> None:
    write_rows(run.metrics, [train_row(step, loss=1.0) for step in range(1, 11)])
    write_rows(run.metrics, [train_row(step, loss=2.0) for step in range(8, 10)])
    train = read_history(run).stages[0].train
    assert train["step"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]  # step 10 was taken back and not trained again
    assert train["loss"].tolist() == [1.0] * 7 + [2.0] * 2
    assert train.loss_by_source["a"].tolist() == [1.0] * 7 + [2.0] * 2


def test_validations_past_a_resume_are_taken_back_and_those_at_a_step_stay(run: RunDir) -> None:
    rows = [train_row(4), validation_row(4), train_row(8), validation_row(8, plus=5.0)]
    write_rows(run.metrics, [*rows, train_row(6), validation_row(6, plus=1.0)])
    validation = read_history(run).stages[0].validation
    assert validation["step"].tolist() == [4, 6]
    assert validation.loss_by_source["b"].tolist() == [3.0, 4.0]


def test_a_validation_logged_before_its_step_stays_through_a_resume(run: RunDir) -> None:
    before = [train_row(4), validation_row(5), train_row(5), train_row(6)]
    write_rows(run.metrics, [*before, validation_row(5, plus=1.0), train_row(5), train_row(6)])
    stage = read_history(run).stages[0]
    assert stage.train["step"].tolist() == [4, 5, 6]
    assert stage.validation.loss_by_source["a"].tolist() == [3.0]


def test_missing_values_are_nan_and_late_sources_start_late(run: RunDir) -> None:
    write_rows(run.metrics, [train_row(1, loss=None), train_row(2, loss_by_source={"late": 1.5})])
    train = read_history(run).stages[0].train
    np.testing.assert_equal(train["loss"], [math.nan, 4.0])
    np.testing.assert_equal(train.loss_by_source["late"], [math.nan, 1.5])


def test_a_row_cut_off_by_a_crash_is_passed_over(run: RunDir) -> None:
    write_rows(run.metrics, [train_row(1)])
    with run.metrics.open("a") as file:
        file.write('{"time": 1002.0, "kind": "tr')
    assert len(read_history(run).stages[0].train) == 1


def test_stages_share_one_token_axis(finished: RunDir) -> None:
    history = read_history(finished)
    assert [stage.tokens_before for stage in history.stages] == [0, 6 * BATCH * SEQ_LENGTH]
    assert history.tokens == 10 * BATCH * SEQ_LENGTH


def test_wall_time_leaves_out_the_pause_between_stop_and_resume(run: RunDir) -> None:
    kinds = {990.0: "created", 1000.0: "start", 8999.0: "amended", 9000.0: "start", 9002.0: "resume"}
    write_rows(run.events, [{"time": time, "kind": kind} for time, kind in kinds.items()])
    write_rows(run.metrics, [train_row(100), train_row(50, time=9050.0)])  # the first at 1100.0, taken back by the second
    assert read_history(run).wall_s == pytest.approx(100 + 50)


def test_an_empty_run_has_an_empty_history(run: RunDir) -> None:
    history = read_history(run)
    assert (history.stages, history.tokens, history.wall_s) == ((), 0, 0.0)


def test_a_row_written_in_another_order_is_read_alike(run: RunDir) -> None:
    odd = [math.nan, None, 3.0]
    values = [(1.5, 0.25), *zip(odd, odd, strict=True)]
    rows = [train_row(step, loss=loss, grad_norm=norm) for step, (loss, norm) in enumerate(values, 1)]
    del rows[1]["grad_norm"]
    write_rows(run.metrics, rows)
    found = read_metrics(run.metrics)
    write_rows(run.root / "turned.jsonl", [dict(reversed(row.items())) for row in rows])
    turned = read_metrics(run.root / "turned.jsonl")
    np.testing.assert_equal(found.columns, turned.columns)
    assert list(found.for_goodput()) == list(turned.for_goodput()) and len(list(found.for_goodput())) == 4
    np.testing.assert_equal(found.columns["loss"], [1.5, math.nan, math.nan, 3.0])
    np.testing.assert_equal(found.columns["grad_norm"], [0.25, math.nan, math.nan, 3.0])


def test_of_a_long_run_every_loss_is_read_and_some_rows_whole(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_rows, "WHOLE_ROWS", 50)
    monkeypatch.setattr(report_rows, "WHOLE_END_ROWS", 5)
    rows = [train_row(step, loss=4.0, update_ratio=step / 1e6) for step in range(1, 1_001)]
    rows[499] |= {"loss": 90.0, "grad_norm": 70.0}
    write_rows(run.metrics, [*rows, *(train_row(step, update_ratio=0.5) for step in range(900, 951))])
    stage = read_history(run).stages[0]
    assert (stage.steps, len(stage.every["loss"]), stage.every["loss"].max(), stage.every["grad_norm"].max()) == (
        950,
        950,
        90,
        70,
    )
    steps, ratios = stage.train["step"], stage.train["update_ratio"]
    assert 50 <= len(steps) <= 60
    assert (steps[:5].tolist(), steps[-5:].tolist()) == ([1, 2, 3, 4, 5], [946, 947, 948, 949, 950])
    assert np.diff(steps).max() <= 21
    np.testing.assert_allclose(ratios, np.where(steps < 900, steps / 1e6, 0.5))
    assert stage.train.tokens_by_source["a"][-1] == 0.75 * 950 * BATCH * SEQ_LENGTH


# Summary


def test_summary_counts_tokens_epochs_and_losses(finished: RunDir, config: RunConfig) -> None:
    summary = summarise(finished, config)
    pretrain, midtrain = summary.stages
    assert (pretrain.steps, pretrain.tokens, pretrain.first_loss, pretrain.last_loss) == (6, 1536, 8.0, 3.0)
    assert pretrain.tokens_per_s == pytest.approx(350.0)  # the median of 100 ... 600
    assert midtrain.last_loss == pytest.approx(2.6)
    sources = {source.name: source for source in summary.sources}
    assert sources["a"].tokens == 0.75 * 1536 + 0.5 * 1024
    assert sources["a"].epochs == pytest.approx((0.75 * 1536 + 0.5 * 1024) / 500)
    assert sources["c"].shares == {"midtrain": pytest.approx(0.2)}
    assert sources["b"].max_epochs == 2.0
    assert not sources["b"].is_over_cap


def test_held_out_loss_stands_against_the_entropy_of_the_same_tokens(finished: RunDir, config: RunConfig) -> None:
    summary = summarise(finished, config)
    entropies = {name: unigram_entropy(held_out_text(name)[1 : EVALUATED + 1]) for name in "abc"}
    assert {source.name: source.entropy for source in summary.sources} == pytest.approx(entropies)
    assert {source.name: source.held_out_loss for source in summary.sources} == HELD_OUT
    assert summary.mixture_stage == "midtrain"
    assert summary.held_out_loss == pytest.approx(0.5 * 2.0 + 0.3 * 3.0 + 0.2 * 1.0)
    entropy = sum(SHARES["midtrain"][name] * entropies[name] for name in "abc")
    assert summary.entropy == pytest.approx(entropy)
    assert summary.below_entropy == pytest.approx(1 - 2.1 / entropy)
    assert f"held-out loss 2.100 is {100 * (1 - 2.1 / entropy):.1f}% below the unigram entropy {entropy:.3f}" == summary.verdict


def test_a_source_that_midtraining_dropped_keeps_its_last_held_out_loss(run: RunDir, config: RunConfig) -> None:
    write_rows(run.metrics, [train_row(1), validation_row(1, plus=1.0), validation_row(1, stage="midtrain")])
    write_rows(run.metrics, [validation_row(2, stage="midtrain") | {"loss_by_source": {"b": 7.0, "c": 8.0}}])
    losses = {source.name: source.held_out_loss for source in summarise(run, config).sources}
    assert losses == {"a": 2.0, "b": 7.0, "c": 8.0}


def test_totals_leave_out_a_source_without_held_out_text_as_training_does(finished: RunDir, config: RunConfig) -> None:
    rows = [row for row in read_rows(finished.metrics) if row["kind"] == "train"]
    finished.metrics.unlink()
    row = validation_row(4, stage="midtrain")
    write_rows(finished.metrics, [*rows, row | {"loss_by_source": {"a": 2.0, "c": 1.0}}])
    summary = summarise(finished, config)
    assert summary.sources[1].entropy is None
    entropies = {name: unigram_entropy(held_out_text(name)[1 : EVALUATED + 1]) for name in "ac"}
    assert summary.held_out_loss == pytest.approx((0.5 * 2.0 + 0.2 * 1.0) / 0.7)
    assert summary.entropy == pytest.approx((0.5 * entropies["a"] + 0.2 * entropies["c"]) / 0.7)


def test_a_run_directory_without_its_data_is_summarised(finished: RunDir, config: RunConfig) -> None:
    (Path(config.run.data_dir) / "a" / "manifest.json").unlink()
    (Path(config.run.data_dir) / "b" / "held_out_00000.bin").unlink()
    summary = summarise(finished, config)
    a, b, c = summary.sources
    assert (a.epochs, a.entropy, b.entropy) == (None, None, None)
    assert b.epochs is not None
    assert c.entropy is not None
    assert summary.entropy is None  # a mean over fewer sources than the loss would not compare
    assert summary.verdict == "held-out loss 2.100, unigram entropy of the held-out text not known"


def test_printed_summary_holds_the_figures_and_the_places(finished: RunDir, config: RunConfig) -> None:
    finished.checkpoints("pretrain").mkdir(parents=True)
    output = io.StringIO()
    summary = summarise(finished, config)
    print_summary(summary, console=Console(file=output, width=120))
    text = output.getvalue()
    for part in ("pretrain", "8.000", "3.000", "1,536", summary.verdict, str(finished.checkpoints("pretrain"))):
        assert part in text
    assert str(finished.report) not in text  # not written yet


def test_weighted_mean_wants_a_value_for_every_weight() -> None:
    weights = {"a": 1.0, "b": 3.0}
    assert weighted_mean({"a": 2.0, "b": 4.0, "other": 9.0}, weights=weights) == pytest.approx(3.5)
    assert weighted_mean({"a": 2.0, "b": None}, weights=weights) is None
    assert weighted_mean({}, weights={}) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9_999, "9,999"), (10_000, "10.0k"), (999_499, "999k"), (999_600, "1.00M"), (9.8e12, "9.80T"), (None, "–")],
)
def test_counts_read_as_people_write_them(value: float | None, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min"), (90_000, "1 d 1 h"), (math.nan, "–")],
)
def test_durations_show_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_missing_numbers_are_a_dash() -> None:
    assert (format_number(None), format_number(math.nan), format_percent(None)) == ("–",) * 3
    assert (format_number(1.23456), format_percent(0.12345)) == ("1.235", "12.3%")


def test_the_summary_says_where_the_time_went(finished: RunDir, config: RunConfig) -> None:
    """20 s from the start on, of which ten steps of 0.1 s."""
    found = summarise(finished, config).goodput
    assert found and (found.wall_s, found.productive_s) == (20.0, pytest.approx(1.0))
    assert sum(found.lost_s.values()) == pytest.approx(19.0)
    output = io.StringIO()
    print_summary(summarise(finished, config), console=Console(file=output, width=60))
    assert "\ngoodput 5.0% of 20 s; lost: " in output.getvalue()


def test_goodput_is_that_of_the_rows_as_they_are_read_elsewhere(run: RunDir, config: RunConfig) -> None:
    """With a crash, a row of an older phidias, a validation, and what is no row."""
    told = {1000.0: "start", 1001.0: "stage_start", 1051.0: "fault", 1060.0: "start", 1070.0: "resume"}
    events = [{"time": at, "kind": kind, "stage": "pretrain", "step": 30, "pid": int(at)} for at, kind in told.items()]
    write_rows(run.events, events)
    rows = [train_row(step, step_time_s=0.7, data_wait_s=0.1) for step in range(1, 51)]
    del rows[10]["data_wait_s"]
    write_rows(run.metrics, [*rows, {"time": 1050.0, "kind": "new"}])
    again = [train_row(step, time=1042.0 + step, step_time_s=0.6) for step in range(31, 61)]
    write_rows(run.metrics, [*again, validation_row(60) | {"time": 1110.0, "seconds": 5.0}])
    found = summarise(run, config).goodput
    assert found is not None and found.lost_s["recomputed"] > 0 and found.lost_s["validation"] == 5.0
    assert found == measure_goodput(run, events=events, until=None)


# Curves


def test_a_stretch_is_the_mean_of_its_rows_that_have_a_value() -> None:
    tokens = np.arange(1.0, 10_001.0)
    found = stretches(tokens, points=100)
    assert found.rows.sum() == 10_000
    np.testing.assert_allclose(found.means(tokens, tokens), found.tokens)
    gaps = np.where(tokens % 2 == 0, np.nan, 5.0)
    means = found.means(tokens, gaps)
    assert means[0] == 5.0 and np.isnan(means[1])  # the first stretches are of one row
    np.testing.assert_allclose(means[found.rows > 1], 5.0)
    some = tokens[::7]  # other rows than those that made the stretches
    np.testing.assert_allclose(found.means(some, some)[-50:-1], found.tokens[-50:-1], atol=4)
    assert found.largest(tokens, np.where(tokens == 9_000, 9.0, 1.0)).max() == 9.0


def test_decimation_bounds_the_points_and_keeps_every_spike() -> None:
    x, y = np.arange(400_000.0), np.full(400_000, 2.0)
    y[[123_456, 399_998]] = (50.0, -50.0)
    few_x, few_y = extremes(x, y, points=600)
    assert len(few_x) <= 2 * (600 + EARLY_POINTS)
    assert few_x[few_y == 50.0].tolist() == [123_456.0]
    assert few_x[few_y == -50.0].tolist() == [399_998.0]
    assert (few_x[0], few_x[-1]) == (0.0, 399_999.0)
    assert (np.diff(few_x) > 0).all()


def test_sampled_rows_are_dense_near_the_beginning() -> None:
    rows = sample_rows(1_000_000, points=500)
    assert rows[0] == 0
    assert rows[-1] == 999_999
    assert (rows < 1000).sum() > 50
    assert sample_rows(10, points=500).tolist() == list(range(10))


def test_figures_hold_the_curves_over_all_stages(finished: RunDir, config: RunConfig) -> None:
    history = read_history(finished)
    figures = build_figures(history, config=config, summary=summarise(finished, config, history=history), plans=Plans(finished))
    raw, smooth, held_out = figures["traces"]["loss"]
    step = BATCH * SEQ_LENGTH
    assert raw["x"] == [*(step * i for i in range(1, 7)), None, *(step * i for i in range(7, 11))]
    assert raw["y"] == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, None, 2.9, 2.8, 2.7, 2.6]
    assert smooth["y"] == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.9, 2.8, 2.7, 2.6]
    assert figures["grid"] == {"tokens": [step * i for i in range(1, 11)], "rows": [1] * 10, "sizes": [6, 4]}
    assert held_out["y"] == [0.75 * 3.0 + 0.25 * 4.0, None, pytest.approx(2.1)]
    assert figures["borders"] == [{"name": "pretrain", "tokens": 0}, {"name": "midtrain", "tokens": 6 * step}]
    names = {trace["name"]: trace["source"] for trace in figures["traces"]["sources"]}
    assert names == {"a": 0, "a held-out": 0, "b": 1, "b held-out": 1, "c": 2, "c held-out": 2}


def test_a_long_stage_and_a_diverged_row_still_make_a_small_valid_figure(run: RunDir, config: RunConfig) -> None:
    rows = [train_row(step, loss=4.0) for step in range(1, 5_001)]
    rows[2_500]["loss"] = rows[2_500]["loss_by_source"]["a"] = math.inf
    write_rows(run.metrics, rows)
    history = read_history(run)
    figures = build_figures(history, config=config, summary=summarise(run, config, history=history), plans=Plans(run))
    text = json.dumps(figures, allow_nan=False)
    longest = max(len(trace["y"]) for traces in figures["traces"].values() for trace in traces)
    assert longest <= 2 * (EVEN_POINTS + EARLY_POINTS)
    assert len(text) < 200_000


# Page


def test_page_is_self_contained_and_holds_figures_tables_and_config(finished: RunDir) -> None:
    from plotly.offline import get_plotlyjs

    finished.code.write_text(json.dumps({"version": "0.1.0", "commit": "abcdef0123456789", "dirty": True}))
    page = page_of(finished)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page)
    assert "@import" not in page
    assert len(page) < 5_000_000
    packed = re.search(r'id="plotly">(.*?)</script>', page, re.DOTALL)
    assert packed is not None
    assert gzip.decompress(base64.b64decode(packed[1])).decode() == get_plotlyjs()
    drawn = {"loss", "sources", "lr", "grad_norm", "throughput", "timeline"}
    assert set(re.findall(r'id="chart-([a-z_0-9]+)"', page)) == drawn  # what these rows do not say has no chart
    for part in (
        "Phidias 0.1.0 · abcdef012345 with uncommitted changes",
        "below the unigram entropy",
        "3.33",
        "global_batch_size",
        "stage done",
    ):
        assert part in page


def test_the_page_divides_the_time(run: RunDir) -> None:
    """In an hour: 6 minutes before the first step, 36 of steps, a wait of 18 minutes. A run that is live goes on."""
    began = time.time() - 3600
    told = {0: "job_start", 360: "stage_start", 2520: "stop", 2521: "job_end"}
    rows = [{"time": began + at, "kind": kind, "stage": "pretrain", "job": "7"} for at, kind in told.items()]
    write_rows(run.events, [row | ({"after": "requeue"} if row["kind"] == "job_end" else {}) for row in rows])
    write_rows(run.metrics, [train_row(100, time=began + 2520, step_time_s=21.6, data_wait_s=0.0)])
    with lock_run(run):
        page = page_of(run)
    table = re.search(r'<div class="time">(.*?)</table>', page, re.DOTALL)
    assert table is not None
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", table[1], re.DOTALL)]
    assert [cells[i : i + 3] for i in range(0, len(cells), 5)] == [
        ["productive", "0.60", "60.0%"],
        ["queue", "0.30", "30.0%"],
        ["start-up", "0.10", "10.0%"],
        ["other", "0.00", "0.0%"],
    ]
    assert cells[4].startswith("steps that count") and 'class="number">0.60' in table[1]


def test_text_from_files_cannot_become_markup(finished: RunDir) -> None:
    write_rows(
        finished.events,
        [{"time": 2000.0, "kind": "fault", "stage": "pretrain", "error": "</script><img src=x onerror=alert(1)>"}],
    )
    write_rows(finished.metrics, [train_row(5, stage="midtrain", loss_by_source={"</script><b>": 1.0})])
    page = page_of(finished)
    assert "<img" not in page
    assert "<b>" not in page
    assert "&lt;/script&gt;&lt;img" in page


def test_a_run_that_has_not_begun_has_a_page(run: RunDir) -> None:
    page = page_of(run)
    assert "not started" in page
    assert figures_of(page)["entropy"] is None
    assert page.count("No step is logged yet.") == 2
    assert "No plan.json" in page and "no launch of it says" in page


def test_exposure_over_its_cap_is_marked(finished: RunDir) -> None:
    write_rows(finished.metrics, [train_row(5, stage="midtrain", tokens_by_source={"b": 4_000})])
    page = page_of(finished)
    assert page.count('class="over"') == 1
    assert f"{(0.25 * 1536 + 4_000) / 500:.2f}</strong>" in page


def test_events_read_as_words() -> None:
    checkpoint = {
        "time": 1.0,
        "kind": "checkpoint",
        "stage": "p",
        "step": 1200,
        "samples": 9600,
        "tokens": 2e6,
        "finished": False,
        "validation_loss": 2.34567,
        "seconds": 1.5,
        "stall_s": 0.25,
        "bytes": 3e9,
    }
    assert (
        describe_event(checkpoint)
        == "step 1,200 · 9,600 samples · 2.00M tokens · held-out loss 2.346 · 1.50 s · stood still 0.25 s · 3.00 GB"
    )
    assert describe_event({"time": 1.0, "kind": "amended", "changes": {"layout.tp": [1, 2]}}) == "layout.tp: 1 → 2"
    assert describe_event({"time": 1.0, "kind": "start", "command": ["phidias", "train"], "pid": 7}) == "phidias train · pid 7"
    assert describe_event({"time": 1.0, "kind": "new_kind", "whatever": None, "rank": 3}) == "rank 3"


# Plan against what became of it


def predicted(**changes: Any) -> dict[str, Any]:
    """A stage of plan.json on GPUs."""
    speed = {"tokens_per_s": 500.0, "step_time_s": 0.5, "mfu": 0.4, "days": 2000 / 86400}
    memory = {"peak": 50.0, "capacity": 80.0}
    tflops = {"causal": 400.0, "full": 440.0}
    amounts = {"stage": "pretrain", "tokens": 3072.0, "num_steps": 12}
    return {**amounts, **speed, "memory_gib": memory, "model_tflops_per_gpu": tflops, **changes}


def on_gpus(step: int) -> dict[str, Any]:
    speed = {"step_time_s": 0.6, "mfu": 0.3, "tflops_per_gpu": 300.0, "tokens_per_s": 400.0}
    return train_row(step, **speed, memory_max_bytes=(50 + step) * GIB)


def test_the_plan_stands_against_what_was_measured(run: RunDir) -> None:
    """Half of the tokens are trained, in 1,500 s at work of which the plan allows half of its 2,000."""
    run.plan.write_text(json.dumps([predicted()]))
    write_rows(run.metrics, [on_gpus(step) for step in range(1, 7)])
    bands = [
        Band("start_up", "pretrain", 0, 300),
        Band("training", "pretrain", 300, 1500),
        Band("queue", "pretrain", 1500, 9000),
    ]
    history, plans = read_history(run), Plans(run)
    rows = compare_stage(measure(history.stages[0], bands=bands), predicted=plans.predicted("pretrain"))
    assert {row.name: (row.planned, row.measured, row.ratio and round(row.ratio, 3)) for row in rows} == {
        "tokens": (3072, 1536, 0.5),
        "steps": (12, 6, 0.5),
        "tokens/s": (500, 400, 0.8),
        "step time": (0.5, pytest.approx(0.6), 1.2),
        "TFLOP/s per GPU": (400, 300, 0.75),
        "MFU": (0.4, pytest.approx(0.3), 0.75),
        "memory of a GPU": (50, 56, 1.12),
        "duration": (pytest.approx(2000), 1500, 1.5),
    }
    section = plan_section(history, plans=plans, bands=bands)
    cells = [re.sub("<[^>]*>", " ", cell).split() for cell in re.findall("<td.*?</td>", section)]
    assert cells[-5:-1] == [
        ["duration"],
        ["33", "min", "20", "s", "16", "min", "40", "s", "for", "the", "tokens", "so", "far"],
        ["25", "min", "00", "s"],
        ["150%"],
    ]


def test_on_cpu_ranks_the_page_says_that_no_speed_is_predicted(run: RunDir) -> None:
    nothing = dict.fromkeys(("tokens_per_s", "step_time_s", "mfu", "days", "model_tflops_per_gpu"))
    run.plan.write_text(json.dumps([predicted(**nothing, memory_gib={"peak": 0.01, "capacity": None})]))
    write_rows(run.metrics, [train_row(step, memory_max_bytes=GIB) for step in range(1, 7)])
    page = page_of(run)
    section = page[page.index("<h2>Plan") : page.index("<h2>Exposure")]
    assert "The cluster has no GPUs, so the plan predicts no speed" in section
    assert re.findall("<tr><td>([a-zA-Z/ ]+)</td>", section) == ["tokens", "steps", "pretrain"]
    assert "1,536" in section and "3,072" in section and "50.0%" in section


def test_cards_say_what_rows_know(run: RunDir) -> None:
    run.plan.write_text(json.dumps([predicted(), predicted(stage="midtrain", tokens=3072.0)]))
    write_rows(run.events, [{"time": 1000.0, "kind": "start"}])
    write_rows(run.metrics, [on_gpus(step) for step in range(1, 7)])
    cards = re.findall('class="label">(.*?)</div>.*?class="value">(.*?)</div>.*?class="note">(.*?)</div>', page_of(run))
    assert cards[1] == ("Tokens trained", "1,536", "6 steps · 25.0% of the plan")
    assert cards[4:6] == [
        ("MFU", "30.0%", "300 TFLOP/s a GPU, causal FLOPs"),
        ("Memory", "56.0 GiB", "of the fullest rank, at most"),
    ]
    assert cards[6] == ("Goodput", "60.0%", "of 6 s; most lost: other")


def test_charts_are_those_that_rows_have_figures_for(run: RunDir, config: RunConfig) -> None:
    run.plan.write_text(json.dumps([predicted()]))
    parts = {"forward_s": 0.1, "backward_s": 0.2, "optimizer_s": 0.05, "exposed_s": 0.03, "checkpoint_s": 0.0}
    norms = {"weight_norm": 3.0, "update_ratio": 1e-3, "zero_grads": 0.25, "epochs_by_source": {"a": 0.5, "b": 0.25}}
    write_rows(run.metrics, [on_gpus(step) | parts | norms for step in range(1, 7)])
    page = page_of(run)
    traces = figures_of(page)["traces"]
    for chart in ("mfu", "memory", "split", "weight_norm", "update_ratio", "zero_grads", "epochs"):
        assert f'id="chart-{chart}"' in page
    assert "chart-fp8" not in page
    assert {trace["name"]: trace["y"][0] for trace in traces["split"]} == {
        "forward": 0.1, "backward": 0.2, "optimizer": 0.05, "exposed communication and waiting": 0.03, "data wait": 0.0,
        "checkpoint": 0.0,
    }  # fmt: skip
    assert {trace["name"]: trace["y"] for trace in traces["epochs"]} == {"a": [0.5] * 6, "b": [0.25] * 6}
    assert traces["memory"][0]["y"] == [51.0, 52.0, 53.0, 54.0, 55.0, 56.0]
    assert [trace["y"] for trace in traces["mfu"] if trace["kind"] == "plan"] == [[0.4, 0.4]]


# Timeline


def test_bands_say_what_the_run_did_when(run: RunDir, config: RunConfig) -> None:
    job: dict[str, Any] = {"job": "7", "restarts": 0}
    told = [("job_start", 100, job), ("stage_start", 160, {}), ("fault", 400, {}), ("start", 430, job)]
    told += [("resume", 460, {"step": 20}), ("stop", 700, {}), ("job_end", 710, {"after": "requeue"})]
    told += [("job_start", 900, job), ("resume", 950, {"step": 40}), ("stop", 960, {})]
    write_rows(run.events, [{"time": 1.0 * at, "kind": kind, "stage": "pretrain", **more} for kind, at, more in told])
    write_rows(run.metrics, [train_row(20, time=390.0, step_time_s=10.0), train_row(40, time=690.0, step_time_s=10.0)])
    bands = summarise(run, config).bands
    assert [(band.cause, band.stage, band.begin, band.end) for band in bands] == [
        ("start_up", "pretrain", 100, 160),
        ("training", "pretrain", 160, 400),
        ("restart", "pretrain", 400, 460),
        ("training", "pretrain", 460, 700),
        ("other", "pretrain", 700, 710),
        ("queue", "pretrain", 710, 900),
        ("start_up", "pretrain", 900, 950),
        ("training", "pretrain", 950, 960),
    ]
    assert work_s(bands, stage="pretrain") == 610 + 60
    assert work_s(bands, stage="midtrain") == 0


def test_the_timeline_has_a_lane_for_each_kind_of_event() -> None:
    events = [{"time": float(at), "kind": "checkpoint", "stage": "p", "step": at} for at in range(3 * MOST_MARKS)]
    events += [{"time": 7.0, "kind": "fault", "error": "x" * 500}, {"time": 8.0, "kind": "new_kind"}, {"kind": "untimed"}]
    timeline = build_timeline(events, bands=[Band("queue", "p", 1.0, 2.5), Band("training", "p", 2.5, 62.5)])
    lanes = {lane["name"]: lane for lane in timeline["lanes"]}
    assert list(lanes) == ["faults", "checkpoints", "other"]
    assert (len(lanes["checkpoints"]["times"]), lanes["checkpoints"]["hidden"]) == (MOST_MARKS, 2 * MOST_MARKS)
    assert lanes["checkpoints"]["words"][1] == "checkpoint · p · step 3"
    assert (lanes["other"]["times"], lanes["other"]["words"]) == ([8000], ["new kind"])
    assert len(lanes["faults"]["words"][0]) == WORDS and lanes["faults"]["words"][0].startswith("fault · xxx")
    assert timeline["bands"] == [
        {"kind": "away", "begin": 1000, "end": 2500, "words": "queue, 2 s"},
        {"kind": "training", "begin": 2500, "end": 62500, "words": "training p, 1 min 00 s"},
    ]


# Config


def launched(run: RunDir, *words: str) -> RunDir:
    write_rows(run.events, [{"time": 1.0, "kind": "start", "command": list(words)}])
    return run


def test_the_config_is_compared_with_what_its_run_file_says_alone(run: RunDir) -> None:
    config = compose_run(["run=demo", "run.seed=7", "monitor.log_interval=3", "stage=demo_pretrain", "optim.weight_decay=0.05"])
    launched(run, "phidias train", "run=demo", "run.seed=7", "monitor.log_interval=3", "stage=demo_pretrain")
    assert str(base_of(read_history(run))) == "run=demo"
    base, free = compose_base(base_of(read_history(run)))
    before = {stage.stage.name: stage for stage in base.stages}["demo_pretrain"].optim.weight_decay
    assert differing(config, base=base, free=free) == [
        ("run.seed", 42, 7),
        ("monitor.log_interval", base.monitor.log_interval, 3),
        ("stages.demo_pretrain.optim.weight_decay", before, 0.05),
    ]
    section = config_section(config, history=read_history(run))
    assert section.count("<tr>") == 4 and "stages.<wbr>demo_pretrain.<wbr>optim.<wbr>weight_decay" in section
    assert "without a change" in config_section(base, history=read_history(run))


def test_a_section_that_the_base_lacks_is_one_line(run: RunDir) -> None:
    base, free = compose_base(base_of(read_history(launched(run, "phidias train", "run=demo"))))
    tree = dump_run(base)
    tree["stages"][0]["mixture"]["sources"]["more"] = tree["stages"][0]["mixture"]["sources"]["prose"]
    found = differing(validate_run(tree), base=base, free=free)
    assert found == [("stages.demo_pretrain.mixture.sources.more", "absent", "present")]


def test_a_base_that_is_gone_is_said_in_a_sentence(run: RunDir, config: RunConfig, tmp_path: Path) -> None:
    launched(run, "phidias train", f"--config-dir={tmp_path}/yaml", "run=mine", "run.seed=7")
    assert "is not there any more" in config_section(config, history=read_history(run))
    (tmp_path / "yaml").mkdir()
    assert "run=mine cannot be composed any more" in config_section(config, history=read_history(run))
    launched(run, "phidias job", "work")  # a requeue does not say what it trains
    assert base_of(read_history(run)).words == ("run=mine",)
    run.events.unlink()
    with pytest.raises(NoBaseError):
        base_of(read_history(launched(run, "phidias job", "work")))


# In a browser

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")


def smoothed_in(page: Page, *, tokens: list[float], rows: list[int], sizes: list[int], values: Any, part: float) -> Any:
    grid = {"tokens": tokens, "rows": rows, "sizes": sizes}
    return page.run(f"smoothed({json.dumps(grid)}, {json.dumps(values)}, {part})")


@needs_browser
def test_the_page_in_a_browser(run: RunDir, tmp_path: Path) -> None:
    """On a phone in the dark: every chart is drawn, nothing goes wrong or leaves the screen, controls work by keyboard."""
    run.plan.write_text(json.dumps([predicted()]))
    write_rows(run.events, [{"time": 1000.0, "kind": "start"}, {"time": 1003.0, "kind": "fault", "error": "<b>no"}])
    rates = {"forward_s": 0.2, "backward_s": 0.3, "epochs_by_source": {"a": 1.0}}
    rows = [on_gpus(step) | rates | {"loss": 4.0 + step % 2} for step in range(1, 101)]
    rows += [train_row(step, stage="midtrain", loss=3.0) for step in range(1, 40)]
    write_rows(run.metrics, rows)
    make_report(run)
    page = Page(run.report, width=390, dark=True, profile=tmp_path / "profile")
    try:
        page.wait_for("document.querySelectorAll('.chart').length && !document.querySelector('.chart:not(:has(svg))')")
        assert page.run("document.documentElement.scrollWidth") == 390
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 24)"
        assert page.run("document.querySelectorAll('#chart-timeline .points path').length") >= 3
        smooth = "document.getElementById('chart-loss').data.find((trace) => trace.name.endsWith('smoothed')).y"
        before = page.run(smooth)
        page.run("document.getElementById('smoothing').focus()")
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="Home", code="Home", windowsVirtualKeyCode=36)
        page.wait_for(f"document.getElementById('smoothing-told').textContent === '0%' && {smooth}[1] === 4")
        assert page.run(smooth)[:2] == [5, 4] and 4.3 < before[50] < 4.7
        page.run("document.getElementById('log-loss').focus()")
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key=" ", code="Space", windowsVirtualKeyCode=32, text=" ")
        page.wait_for("document.getElementById('chart-loss').layout.yaxis.type === 'log'")

        line = [float(i) for i in range(1, 101)]
        one = [1] * 100
        straight = smoothed_in(page, tokens=line, rows=one, sizes=[100], values=line, part=0.2)
        np.testing.assert_allclose(straight["y"][:90], line[:90])  # a straight line stays one, but for the last half window
        gaps = [5.0 if i % 3 else None for i in range(100)]
        found = smoothed_in(page, tokens=line, rows=one, sizes=[60, 40], values=gaps, part=0.3)
        assert set(found["y"]) == {5.0, None} and found["x"].count(None) == 1  # the pen is lifted between the stages only
        weighed = smoothed_in(page, tokens=[1, 2, 3, 4, 5], rows=[1, 1, 1, 1, 6], sizes=[5], values=[0, 0, 0, 0, 10], part=1.0)
        assert weighed["y"] == [
            0,
            0,
            0,
            7.5,
            7.5,
        ]  # the last point has six rows
        page.run("document.getElementById('chart-timeline').scrollIntoView({block: 'center'})")
        x, y = page.run(
            "(() => { const marks = document.querySelectorAll('#chart-timeline .points path');"
            " const box = marks[marks.length - 1].getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        page.wait_for("document.querySelector('#chart-timeline .hoverlayer').textContent.includes('fault · bno')")
        assert page.errors == []
    finally:
        page.close()


def test_what_eval_measured_is_shown_where_it_was(finished: RunDir, config: RunConfig) -> None:
    assert "What was exported" not in page_of(finished)
    stage = config.stage_names[0]
    finished.eval(stage).parent.mkdir()
    bucket = {"begin": 0, "end": 16, "loss": 2.5, "rise": None, "rise_error": None, "rises": False}
    later = {"begin": 16, "end": 32, "loss": 2.75, "rise": 0.25, "rise_error": 0.05, "rises": True}
    positions = {"documents": {"a": 3, "b": 4}, "reference": 16, "buckets": [bucket, later], "rises": True}
    needles = [{"length": 32, "depth": depth, "trials": 4, "recalled": 1, "gain": 1.5} for depth in (0.0, 0.5)]
    long = {"positions": positions, "needles": needles, "why_not": None}
    held_out = {"agrees": True, "mixture": {"loss": 2.625}}
    write_json(finished.eval(stage), {"step": 1200, "held_out": held_out, "long_context": long})
    page = page_of(finished)
    assert "What was exported" in page and f"{stage}, step 1,200" in page
    assert "Held-out loss 2.625: agrees with what the run measured." in page
    assert "Loss by position in 7 held-out documents: it rises past 16 tokens." in page
    assert '<td>16 to 32</td><td class="number">2.750</td><td class="number">+0.250</td>' in page
    assert page.count('<strong class="over">rises</strong>') == 1
    assert '<td class="number">25.0% <small>+1.5</small></td>' in page
    finished.eval(stage).write_text("[")
    assert "What was exported" not in page_of(finished)
