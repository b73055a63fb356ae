"""Comparing runs whose every loss is known: groups, equal tokens and FLOPs, how sure a difference is, and the best mixture."""

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_prep.mixing import PhaseRow, rows_to_json
from data_prep.order import SLOTS
from launcher.cli import main
from launcher.config.errors import ConfigError
from launcher.config.validate import dump_run, validate_run
from launcher.plan.prepared import Prepared
from launcher.report.compare import Comparison, Measured, compare_runs
from launcher.report.compare_document import document
from launcher.report.compare_history import read_losses
from launcher.report.compare_page import render_page
from launcher.report.compare_stats import judge, mean_of, spread_of, t_quantile
from launcher.report.history import read_history
from launcher.report.mixture_fit import MixtureFit, fit_mixtures
from launcher.rundir.freeze import open_run
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_json, write_json
from tests.training.tiny import run_config, stage_config

NAMES = ("a", "b", "c")
SEQ_LENGTH, EVALUATED = 32, 256
END = 1536  # tokens of the stage
EVEN = {"a": 0.5, "b": 0.25, "c": 0.25}


def mixture(shares: Mapping[str, float], *, name: str) -> dict[str, Any]:
    sources = {
        source: {"inputs": [f"raw/{source}/*.txt"], "format": "text", "share": share} for source, share in shares.items()
    }
    return {"name": name, "sources": sources}


@cache
def base_tree() -> str:
    """Of a tiny run, as text: validating it is quick, making it is not."""
    return json.dumps(dump_run(run_config(Path("tiny"))))


def build(
    root: Path,
    name: str,
    rows: Mapping[int, Mapping[str, float]],
    *,
    shares: Mapping[str, float] = EVEN,
    seed: int = 1,
    evaluated: int = EVALUATED,
    mixture_name: str | None = None,
    **changes: Any,
) -> RunDir:
    """A frozen run with validations: losses by source at tokens of the stage. `changes` by section."""
    sections = {key: changes.pop(key) for key in ("stage", "optim") if key in changes}
    tree = json.loads(base_tree())
    tree["stages"] = [stage_config(mixture=mixture(shares, name=mixture_name or name), **sections)]
    who = {"name": name, "seed": seed, "data_dir": "data", "runs_dir": str(root / "runs")}
    for section, values in {"run": who, **changes}.items():
        tree[section] |= values
    run = open_run(validate_run(tree), prepared=Prepared())
    for tokens, losses in rows.items():
        write_row(run, tokens, losses, shares=shares, evaluated=evaluated)
    return run


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., RunDir]:
    return partial(build, tmp_path)


def write_row(run: RunDir, tokens: int, losses: Mapping[str, float], *, shares: Mapping[str, float], evaluated: int) -> None:
    weights = {name: shares.get(name, 0.0) for name in losses}
    own = sum(losses[name] * weight for name, weight in weights.items()) / sum(weights.values())
    counts = dict.fromkeys(losses, evaluated)
    where = {"stage": "pretrain", "step": tokens // 256, "samples": tokens // SEQ_LENGTH, "tokens": tokens}
    append_record(run.metrics, "validation", **where, loss=own, loss_by_source=dict(losses), tokens_by_source=counts)


def flat(loss: float) -> dict[str, float]:
    return dict.fromkeys(NAMES, loss)


def by_label(comparison: Comparison) -> dict[str, Measured]:
    return {each.label: each for each in comparison.groups}


def refusal(runs: list[RunDir], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        compare_runs(runs, **options)
    return str(caught.value)


# Equal tokens


def test_losses_are_read_at_the_tokens_all_runs_reached_and_on_the_line_between_validations(make: Any) -> None:
    first = make("first", {512: {"a": 3.0, "b": 4.0, "c": 5.0}, 1024: {"a": 2.0, "b": 3.5, "c": 4.0}})
    second = make("second", {768: flat(3.5), 1280: flat(1.5)}, shares={"a": 0.25, "b": 0.5, "c": 0.25})
    found = by_label(comparison := compare_runs([first, second]))
    assert comparison.tokens == 1024
    assert found["first"].losses() == {"a": 2.0, "b": 3.5, "c": 4.0}
    assert mean_of(found["first"].shared) == pytest.approx(9.5 / 3)
    assert found["first"].readings[0].own == pytest.approx(0.5 * 2.0 + 0.25 * 3.5 + 0.25 * 4.0)
    assert found["second"].losses() == flat(2.5)  # half way between 768 and 1280
    rows = {row["name"]: row["runs"][0] for row in document(comparison)["groups"]}
    assert [rows[name]["is_interpolated"] for name in ("first", "second")] == [False, True]
    at = by_label(compare_runs([first, second], at_tokens=832))
    assert at["first"].losses()["a"] == pytest.approx(3.0 - 320 / 512)
    assert at["second"].losses()["a"] == pytest.approx(3.5 - 2.0 * 64 / 512)


@pytest.mark.parametrize("tokens", [640, 1200])
def test_nothing_is_extrapolated(make: Any, tokens: int) -> None:
    runs = [make("first", {512: flat(3.0), 1024: flat(2.0)}), make("second", {768: flat(3.0), 1280: flat(2.0)}, seed=2)]
    said = refusal(runs, at_tokens=tokens)
    assert "nothing is extrapolated" in said
    assert "at_tokens=768 to 1024" in said


def test_runs_that_never_stood_at_the_same_tokens_are_refused(make: Any) -> None:
    runs = [make("first", {256: flat(3.0)}), make("second", {768: flat(3.0)}, seed=2)]
    assert "leave out the runs that are far behind" in refusal(runs)


def test_an_unfinished_run_says_how_far_it_is(make: Any) -> None:
    comparison = compare_runs([make("first", {768: flat(2.0)}), make("second", {768: flat(2.0), END: flat(1.0)}, seed=2)])
    assert comparison.notes == ("first is not finished: validated up to 768 of 1,536 tokens (50%)",)


def test_at_equal_flops_a_cheaper_token_is_read_later(make: Any) -> None:
    small = {"num_layers": 2, "name": "small"}
    rows = {512: flat(4.0), 1024: flat(3.0), END: flat(2.0)}
    comparison = compare_runs([make("large", rows), make("half", rows, model=small)])
    assert comparison.tokens == END
    assert comparison.flops is not None
    found = {each.label: each.readings[0] for each in comparison.at_flops}
    per_token = {label: reading.curve.flops_per_token for label, reading in found.items()}
    assert per_token["half"] < per_token["large"]
    assert comparison.flops == END * per_token["half"]  # the cheaper run ends first
    assert found["half"].shared == 2.0
    assert found["large"].tokens == pytest.approx(comparison.flops / per_token["large"])
    assert found["large"].shared == pytest.approx(np.interp(found["large"].tokens, [512, 1024], [4.0, 3.0]))
    assert comparison.flops_verdict is not None
    assert comparison.flops_verdict.best == "half"
    assert comparison.verdict.differences[0].mean == 0.0
    assert "differ in model.num_layers" in str(comparison.fit)


# Groups


def test_seeds_names_and_places_make_one_group(make: Any, tmp_path: Path) -> None:
    losses = {1: 2.0, 2: 2.2, 3: 2.4}
    runs = [make(f"base-{seed}", {END: flat(loss)}, seed=seed) for seed, loss in losses.items()]
    other = make("other", {END: flat(2.0)}, optim={"lr": 1e-3}, cluster={"timeout_s": 7})
    found = by_label(comparison := compare_runs([*runs, other]))
    assert set(found) == {"base-1", "other"}
    assert found["base-1"].shared == pytest.approx(losses)
    assert mean_of(found["base-1"].shared) == pytest.approx(2.2)
    assert spread_of(found["base-1"].shared) == pytest.approx(0.2)
    assert spread_of(found["other"].shared) is None
    assert document(comparison)["differences"] == {"stages.pretrain.optim.lr": {"other": 1e-3, "base-1": 3e-3}}


def test_a_run_repeated_with_its_seed_is_not_another_seed(make: Any) -> None:
    twice = [make("one", {END: flat(2.0)}), make("again", {END: flat(2.2)})]
    found = by_label(compare_runs([*twice, make("other", {END: flat(3.0)}, optim={"lr": 1e-3})]))
    assert found["one"].shared == pytest.approx({1: 2.1})


def test_a_mixture_that_changed_on_the_way_is_another_group_with_the_shares_it_read(make: Any) -> None:
    stayed, changed = make("stayed", {END: flat(2.0)}), make("changed", {END: flat(2.0)}, seed=2)
    order = read_json(changed.order)
    half = END // SEQ_LENGTH // 2
    rows = [PhaseRow(0, {"a": SLOTS // 2, "b": SLOTS // 2}, {"start": 0}), PhaseRow(half, {"c": SLOTS}, {"start": 0})]
    write_json(changed.order, {**order, "stages": {"pretrain": rows_to_json(rows)}})
    found = by_label(compare_runs([stayed, changed]))
    assert found["stayed"].group.shares == pytest.approx(EVEN)
    assert found["changed"].group.shares == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})


def test_only_sources_that_all_runs_measured_alike_are_shared(make: Any) -> None:
    first = make("first", {END: {"a": 1.0, "b": 2.0, "c": 9.0}})
    second = make("second", {END: {"a": 2.0, "b": 3.0}}, shares={"a": 0.5, "b": 0.5})
    comparison = compare_runs([first, second])
    assert comparison.sources == ("a", "b")
    assert [mean_of(each.shared) for each in comparison.groups] == [1.5, 2.5]
    assert comparison.notes == ("c is not in the shared mean: second did not measure it",)
    assert document(comparison)["differences"]["stages.pretrain.mixture.sources.c"] == {"first": "present", "second": "absent"}


def test_crashes_and_resumes_leave_the_losses_that_the_report_shows(make: Any) -> None:
    def train(step: int, stage: str) -> None:
        where = {"stage": stage, "step": step, "samples": step * 8, "tokens": step * 256}
        append_record(run.metrics, "train", **where, loss=2.0, loss_by_source=flat(2.0))

    def validate(step: int, loss: float) -> None:
        write_row(run, step * 256, flat(loss), shares=EVEN, evaluated=EVALUATED)

    run = make("run", {})
    train(3, "before")
    for step in range(1, 5):
        train(step, "pretrain")
        validate(step, 5.0 - step)
    with run.metrics.open("a") as file:
        file.write('{"time": 1.0, "kind": "train", "stage": "pretrain", "step": 1, "samples": 8, "tokens": 256, "lo')
    train(3, "pretrain")  # takes back the validation of step 4
    validate(3, 1.5)
    train(4, "pretrain")
    found, shown = read_losses(run), read_history(run)
    assert [(name, stage.tokens) for name, stage in found.items()] == [(stage.name, stage.tokens) for stage in shown.stages]
    validation = shown.stages[1].validation
    assert found["pretrain"].column("tokens").tolist() == validation["tokens"].tolist() == [256, 512, 768]
    assert found["pretrain"].by_source("loss_by_source")["a"].tolist() == validation.loss_by_source["a"].tolist()
    assert found["pretrain"].column("loss").tolist() == [4.0, 3.0, 1.5]


# How sure a difference is


@pytest.mark.parametrize(
    ("level", "freedom", "table"),
    [(0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.99, 5, 4.0321), (0.95, 30, 2.0423), (0.999, 2, 31.599), (0.95, 2.5, 3.5747)],
)
def test_quantiles_of_t_are_those_of_the_tables(level: float, freedom: float, table: float) -> None:
    assert t_quantile(level, freedom=freedom) == pytest.approx(table, rel=2e-4)


def test_two_groups_of_the_same_seeds_are_a_paired_t_test() -> None:
    verdict = judge({"low": {1: 2.0, 2: 2.5, 3: 3.0}, "high": {1: 2.11, 2: 2.60, 3: 3.09}})
    (found,) = verdict.differences
    half = 4.30265 * 0.01 / math.sqrt(3)  # differences 0.11, 0.10, 0.09
    assert (found.mean, found.low, found.high) == pytest.approx((0.10, 0.10 - half, 0.10 + half), rel=1e-3)
    assert (verdict.kind, verdict.best) == ("winner", "low")
    assert "paired by 3 seeds" in verdict.text


def test_seeds_that_do_not_match_are_compared_by_welch() -> None:
    verdict = judge({"low": {1: 1.0, 2: 1.2}, "high": {3: 2.0, 4: 2.4}})
    (found,) = verdict.differences
    freedom = (0.01 + 0.04) ** 2 / (0.01**2 + 0.04**2)
    assert found.high is not None
    assert found.high - found.mean == pytest.approx(t_quantile(0.95, freedom=freedom) * math.sqrt(0.05), rel=1e-6)
    assert "Welch" in found.method


def test_noise_is_pooled_over_groups_and_intervals_hold_for_all_pairs() -> None:
    groups = {"one": {1: 1.0, 2: 1.1}, "two": {1: 2.0, 2: 2.14}, "three": {1: 3.0, 2: 3.06}}
    found = {each.label: each for each in judge(groups).differences}
    # Each pair of seeds differs by 0.1 + 0, 0.04, -0.04: residuals of half that, four in all, with two degrees of freedom.
    error = math.sqrt(4 * 0.02**2 / 2 * 2 / 2)
    assert found["two"].high is not None
    assert found["two"].high - found["two"].mean == pytest.approx(t_quantile(1 - 0.05 / 3, freedom=2) * error, rel=1e-6)


def test_a_tie_is_a_tie_and_one_seed_proves_nothing() -> None:
    noisy = judge({"x": {1: 2.0, 2: 2.3}, "y": {1: 2.2, 2: 2.1}})
    assert (noisy.kind, noisy.ties) == ("tie", ("y",))
    assert "x and y tie" in noisy.text or "y and x tie" in noisy.text
    same = judge({"x": {1: 2.0, 2: 2.3}, "y": {1: 2.0, 2: 2.3}})
    assert (same.kind, same.differences[0].low, same.differences[0].high) == ("tie", 0.0, 0.0)
    single = judge({"x": {1: 2.0}, "y": {1: 2.1}})
    assert single.kind == "unknown"
    assert (single.differences[0].low, single.differences[0].high) == (None, None)
    assert "not known" in single.text
    assert judge({"x": {1: 2.0}, "y": {1: 2.0}}).kind == "tie"
    assert judge({"x": {1: 2.0, 2: 2.0}}).kind == "alone"


# Loss over mixtures: L_i = c_i + exp(t_i . r)

FLOORS = np.array([2.0, 1.0, 2.5])
SLOPES = np.array([[-1.2, -0.1, -0.3], [-0.2, -2.0, -0.1], [-0.6, -0.2, -1.5]])
NOISE = 0.001


def law(shares: Any) -> Any:
    return FLOORS + np.exp(np.asarray(shares) @ SLOPES.T)


def best_by_law(low: Any, high: Any) -> Any:
    """On a grid of the simplex, within the box that was tried."""
    steps = np.linspace(0.0, 1.0, 201)
    first, second = (axis.ravel() for axis in np.meshgrid(steps, steps))
    grid = np.stack([first, second, 1.0 - first - second], axis=1)
    inside = grid[((grid >= low - 1e-9) & (grid <= high + 1e-9)).all(axis=1)]
    return inside[law(inside).mean(axis=1).argmin()]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunDir], Any]:
    """Twelve runs, one a mixture, and their shares [12, 3]."""
    rng, root, runs = np.random.default_rng(3), tmp_path_factory.mktemp("sweep"), []
    mixtures = rng.dirichlet([2.0, 2.0, 2.0], 12).round(4)
    mixtures[:, 2] = (1.0 - mixtures[:, 0] - mixtures[:, 1]).round(4)
    for index, row in enumerate(mixtures):
        losses = law(row) + NOISE * rng.standard_normal(3)
        shares = dict(zip(NAMES, row.tolist(), strict=True))
        rows = {768: flat(5.0), END: dict(zip(NAMES, losses.tolist(), strict=True))}
        runs.append(build(root, f"ablation-{index:02}", rows, shares=shares, mixture_name=f"mix{index}"))
    return runs, mixtures


def test_the_best_mixture_of_a_known_law_is_found_written_and_planned(
    sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, *_), mixtures = sweep
    folder = tmp_path / "mine"
    words = [
        "compare",
        "ablation-*",
        f"runs_dir={first.root.parent}",
        "out=json",
        "write_mixture=proposed",
        f"config_dir={folder}",
    ]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    fit, proposal = told["fit"], told["fit"]["proposal"]
    assert fit["errors"][fit["model"]] < 3 * NOISE
    assert fit["errors"][fit["model"]] < fit["baseline"] / 3
    assert fit["rank"] > 0.9
    low, high = mixtures.min(axis=0), mixtures.max(axis=0)
    shares = np.array([proposal["shares"][name] for name in NAMES])
    assert np.abs(shares - best_by_law(low, high)).sum() / 2 < 0.05  # of the tokens
    assert (shares >= low - 1e-4).all()
    assert (shares <= high + 1e-4).all()
    assert proposal["predicted"] == pytest.approx(law(shares).mean(), abs=2 * NOISE)
    written = yaml.safe_load((folder / "mixture" / "proposed.yaml").read_text())
    assert {name: source["share"] for name, source in written["sources"].items()} == proposal["shares"]
    assert written["sources"]["a"]["inputs"] == ["raw/a/*.txt"]
    assert main(words) == 2  # nothing is overwritten
    assert "exists; nothing is overwritten" in capsys.readouterr().err
    plan = ["plan", "run=demo", "stage=demo_pretrain", "mixture=proposed", f"--config-dir={folder}", "out=json"]
    assert main(plan) == 0
    assert json.loads(capsys.readouterr().out)[0]["sources"] == pytest.approx(proposal["shares"], abs=1e-6)


def test_the_page_holds_what_was_found_and_needs_no_network(sweep: Any) -> None:
    runs, _ = sweep
    comparison = compare_runs(runs)
    page = render_page(comparison)
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    figures = json.loads(found[1])
    assert figures["groups"] == [each.label for each in comparison.groups]
    assert len(figures["curves"]) == len(runs)
    assert figures["fit"]["observed"] == pytest.approx([mean_of(each.shared) for each in comparison.groups])
    assert not re.search(r'(src|href)="https?:', page)
    assert len(page) < 5e6


def test_nothing_is_proposed_where_losses_do_not_follow_the_mixture() -> None:
    rng = np.random.default_rng(5)
    mixtures = {f"m{index}": dict(zip(NAMES, row, strict=True)) for index, row in enumerate(rng.dirichlet([2.0] * 3, 12))}
    losses = {label: {name: 2.0 + 0.01 * rng.standard_normal() for name in NAMES} for label in mixtures}
    fit = fit_mixtures(mixtures, losses=losses)
    assert isinstance(fit, MixtureFit)
    assert fit.error >= fit.baseline
    assert fit.proposal is None


def test_too_few_mixtures_are_not_fitted() -> None:
    rng = np.random.default_rng(5)
    mixtures = {f"m{index}": dict(zip(NAMES, row, strict=True)) for index, row in enumerate(rng.dirichlet([2.0] * 3, 5))}
    said = fit_mixtures(mixtures, losses={label: flat(2.0) for label in mixtures})
    assert said == (
        "no model is fitted: found 5 mixtures of 3 sources whose shares differ; it takes 6 (2 for each of those sources, and 3 "
        "more than sources at least)"
    )


# What is refused


def test_one_run_and_runs_without_validation_are_refused(make: Any) -> None:
    run, empty = make("run", {END: flat(2.0)}), make("empty", {}, seed=2)
    assert "found one run, run" in refusal([run])
    assert "no validation row in metrics.jsonl of empty" in refusal([run, empty])


def test_other_tokens_other_lengths_and_other_text_are_refused(make: Any) -> None:
    run = make("run", {END: flat(2.0)})
    tokenizer = make("tokenizer", {END: flat(2.0)}, tokenizer={"eod": "<end>"})
    assert "tokenizer.eod: found '<|endoftext|>' in run and '<end>' in tokenizer" in refusal([run, tokenizer])
    longer = make("longer", {END: flat(2.0)}, stage={"seq_length": 64})
    assert "stage.seq_length: found 32 in run and 64 in longer" in refusal([run, longer])
    text = make("text", {END: flat(2.0)}, seed=2, evaluated=128)
    assert "a is not in the shared mean: its held-out text differs: 256 tokens in run, 128 tokens in text" in refusal(
        [run, text]
    )
    others = make("others", {END: {"d": 2.0}}, shares={"d": 1.0})
    assert "compare runs with a source in common" in refusal([run, others])


def test_shards_prepared_anew_are_other_held_out_text(make: Any) -> None:
    runs = [make("first", {END: flat(2.0)}), make("second", {END: flat(3.0)}, seed=2)]
    for run, size in zip(runs, (100, 120), strict=True):
        order = read_json(run.order)
        write_json(run.order, {**order, "shards": {"a": {"shard_00000.bin": [size, "v"]}}})
    comparison = compare_runs(runs)
    assert comparison.sources == ("b", "c")
    assert comparison.notes[0].startswith("a is not in the shared mean: it was prepared anew between first and second")


def test_held_out_text_is_told_from_other_text_of_the_same_size(make: Any) -> None:
    runs = [make("first", {END: flat(2.0)}), make("second", {END: flat(3.0)}, seed=2), make("third", {END: flat(3.0)}, seed=3)]
    for run, digest in zip(runs, ("0a", "0b", "0a"), strict=True):
        write_json(run.order, {**read_json(run.order), "held_out": {"a": digest, "b": "11"}})
    comparison = compare_runs(runs)
    assert comparison.sources == ("b", "c")
    told = "a is not in the shared mean: its held-out text differs: it was prepared in another way for"
    assert comparison.notes[0].startswith(told)
    assert compare_runs([runs[0], runs[2]]).sources == ("a", "b", "c")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["at_tokens=many"], "it is a number of tokens above 0"),
        (["out=page.pdf"], "out=json or out=compare.html"),
        (["write_mixture=best"], "config_dir=my_configs"),
        (["write_mixture=../best", "config_dir=x"], "a mixture is named by letters"),
        (["write_mixture=phi4_pretrain", "config_dir=x"], "exists; nothing is overwritten"),
        (["write_mixture=best", "config_dir=x"], "no model is fitted"),
        (["stage=midtrain"], "no validation row of it in one, two"),
    ],
)
def test_wrong_words_are_refused(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    make("one", {END: flat(2.0)})
    make("two", {END: flat(3.0)}, optim={"lr": 1e-3})
    assert main(["compare", "one", "two", f"runs_dir={tmp_path / 'runs'}", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_table_says_winner_differences_and_why_nothing_is_fitted(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2):
        make(f"base-{seed}", {END: flat(2.5 + seed / 100)}, seed=seed)
        make(f"fast-{seed}", {END: flat(2.4 + seed / 100)}, seed=seed, optim={"lr": 1e-3})
    page = tmp_path / "compare.html"
    assert main(["compare", "*-1", "*-2", f"runs_dir={tmp_path / 'runs'}", f"out={page}"]) == 0
    out = capsys.readouterr().out
    assert "4 runs in 2 groups, stage pretrain, at 1,536 tokens (validations of all runs lie there)" in out
    assert "fast-1 wins: base-1 lies 0.1000 above it (95% interval 0.1000 to 0.1000; t, paired by 2 seeds)." in out
    assert "configs differ in stages.pretrain.optim.*" in out
    assert "no model is fitted: groups differ in stages.pretrain.optim.lr too" in out
    assert "fast-1 wins" in page.read_text()
