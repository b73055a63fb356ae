"""layout=auto: nothing is lost against looking at every layout, set fields stay, and what is chosen keeps every rule."""

import os
import random
import time
from dataclasses import fields, replace

import pytest

from launcher.config.auto import LAYOUT_PLACEHOLDER, PRECISION_PLACEHOLDER, Free
from launcher.config.check import check_run
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError, LayoutError
from launcher.plan.document import plan_document
from launcher.plan.estimate import Estimator
from launcher.plan.memory import SAFETY_MARGIN
from launcher.plan.planner import Planner, nearest_words
from launcher.plan.search import (
    RECOMPUTATION,
    SEARCHED,
    bound,
    candidates,
    describe,
    distance,
    search,
    why_slower,
    without_recomputation,
)
from launcher.plan.timing import StepTime

AUTO_PRECISION = frozenset(PRECISION_PLACEHOLDER) | {"fp8", "fp8_format"}
ONE = ["run=phi4", "stage=pretrain"]
SMALL = [*ONE, "cluster.num_nodes=1", "stage.global_batch_size=32"]
SIXTEEN = [*ONE, "cluster.num_nodes=2", "stage.global_batch_size=64"]
TINY = [
    "model.family=null", "model.num_layers=6", "model.hidden_size=512", "model.num_attention_heads=4",
    "model.num_query_groups=4", "model.ffn_hidden_size=1408",
]  # fmt: skip
# A problem each: overrides, whether precision is free too.
PROBLEMS = {
    "phi4, a node": (SMALL, False),
    "phi4, two nodes": (SIXTEEN, False),
    "phi4, any precision": ([*SMALL, "stage.global_batch_size=4", "cluster.gpus_per_node=4"], True),
    "phi4 at 16K": (["run=phi4", "stage=midtrain", "cluster.num_nodes=4", "stage.global_batch_size=16"], False),
    "llama3_8b, H200": ([*SMALL, "model=llama3_8b", "cluster=slurm_h200"], False),
    "38 layers": ([*SMALL, "model.num_layers=38"], False),
    "few layers": ([*SMALL, *TINY], False),
    "a slow network": (
        [*SIXTEEN, "stage.global_batch_size=16", "cluster.network.inter_node_gb_per_s=2", "cluster.network.oversubscription=4"],
        False,
    ),
    "L40S": ([*SIXTEEN, "cluster.gpu=l40s", "stage.global_batch_size=16"], False),
}


def problem(name):
    words, any_precision = PROBLEMS[name]
    config = compose_run([*words, "layout=auto"], planner=Planner())
    free = Free(SEARCHED, AUTO_PRECISION) if any_precision else Free(SEARCHED)
    stage = config.stages[0]
    if any_precision:
        stage = replace(stage, precision=replace(stage.precision, fp8=None, fp8_format=None))
    return config, stage, free


def auto(*words, base=SMALL):
    planner = Planner()
    config = compose_run([*base, "layout=auto", *words], planner=planner)
    return config.stages[0], planner


def weight(layout):
    return [kind for kind, _ in RECOMPUTATION].index(layout.recompute)


@pytest.mark.parametrize("name", list(PROBLEMS)[: None if os.environ.get("PHIDIAS_SLOW") else 4])  # all: make test-slow
def test_nothing_is_lost_against_looking_at_all(name):
    config, stage, free = problem(name)
    estimator = Estimator(stage, config.model, config.cluster, config.hardware)
    capacity = config.hardware.memory_gib * (1 - SAFETY_MARGIN)
    pairs = list(candidates(stage, config=config, hardware=config.hardware, free=free))
    fitting = [pair for pair in pairs if estimator.memory(*pair).peak.total / 2**30 <= capacity]
    least = {}
    for layout, precision in fitting:
        key = without_recomputation(layout), precision
        least[key] = min(least.get(key, 9), weight(layout))
    seconds = {
        (layout, precision): estimator.timing(layout, precision).step.total
        for layout, precision in fitting
        if weight(layout) == least[without_recomputation(layout), precision]
    }
    found = search(stage, config=config, hardware=config.hardware, free=free)
    assert found.num_candidates == len(pairs) == len(set(pairs))
    assert [candidate.seconds for candidate in found.best] == pytest.approx(sorted(seconds.values())[:10])
    for candidate in found.best:
        assert seconds[candidate.layout, candidate.precision] == candidate.seconds == candidate.step.total
        assert candidate.memory_gib <= capacity


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bound_is_below_the_step(name):
    config, stage, free = problem(name)
    estimator = Estimator(stage, config.model, config.cluster, config.hardware)
    pairs = list(candidates(stage, config=config, hardware=config.hardware, free=free))
    for layout, precision in random.Random(1).sample(pairs, min(300, len(pairs))):
        lower, step = bound(layout, precision, estimator=estimator), estimator.timing(layout, precision).step
        assert lower <= step.total * (1 + 1e-9), describe(layout)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_candidate_keeps_every_rule(name):
    config, stage, free = problem(name)
    pairs = list(candidates(stage, config=config, hardware=config.hardware, free=free))
    for layout, precision in random.Random(0).sample(pairs, min(150, len(pairs))):
        settings = replace(stage.stage, init_from=None, replay_from_tokens=None)
        changed = replace(stage, stage=settings, layout=layout, precision=precision)
        check_run(replace(config, stages=(changed,), run=replace(config.run, stages=(settings.name,))))


def test_candidates_are_many_and_different():
    config, stage, free = problem("phi4, any precision")
    pairs = list(candidates(stage, config=config, hardware=config.hardware, free=free))
    for name, wanted in {
        "tp": {1, 2},
        "cp": {1, 2, 4},
        "pp": {1, 2, 4},
        "micro_batch_size": {1, 2, 4},
        "recompute": {"none", "selective", "full"},
        "cp_comm_type": {"p2p"},
        "account_for_loss_in_pipeline_split": {False, True},
    }.items():
        assert {getattr(layout, name) for layout, _ in pairs} >= wanted, name
    assert {precision.fp8 for _, precision in pairs} == {None, "delayed", "tensorwise", "blockwise"}
    assert {precision.fp8_param_gather for _, precision in pairs} == {False, True}
    assert len({layout.vpp for layout, _ in pairs}) > 2
    assert all(layout.sequence_parallel == (layout.tp > 1) for layout, _ in pairs)


# What is set stays


@pytest.mark.parametrize(
    "words",
    [
        ["layout.tp=1"],
        ["layout.pp=4"],
        ["layout.cp=2"],
        ["layout.vpp=2"],
        ["layout.vpp=2", "layout.pp=4"],
        ["layout.micro_batch_size=2"],
        ["layout.recompute=full"],
        ["layout.recompute=selective", "layout.recompute_modules=[mlp,core_attn]"],
        ["layout.sequence_parallel=false"],
        ["layout.sequence_parallel=true"],
        ["layout.cp_comm_type=a2a", "layout.cp=2", "layout.tp=1"],
        ["layout.tp_comm_overlap=false"],
        ["layout.distributed_optimizer=false", "layout.recompute=full"],
        ["layout.overlap_grad_reduce=false"],
        ["layout.overlap_param_gather=false"],
        ["layout.num_layers_in_last_pipeline_stage=8"],
        ["layout.num_layers_in_first_pipeline_stage=19", "layout.num_layers_in_last_pipeline_stage=21", "layout.pp=2"],
        ["layout.account_for_loss_in_pipeline_split=true", "layout.account_for_embedding_in_pipeline_split=true"],
        ["layout.account_for_embedding_in_pipeline_split=false"],
    ],
    ids=" ".join,
)
def test_what_is_set_stays_and_the_rest_goes_with_it(words):
    stage, _ = auto(*words, base=[*ONE, "cluster=slurm_h200", "cluster.num_nodes=2", "stage.global_batch_size=64"])
    for word in words:
        name, _, value = word.removeprefix("layout.").partition("=")
        held = getattr(stage.layout, name)
        shown = (
            "[" + ",".join(held) + "]"
            if isinstance(held, tuple)
            else str(held).lower()
            if isinstance(held, bool)
            else str(held)
        )
        assert shown == value


def test_a_first_stage_of_its_own_number_is_not_also_counted():
    """36 GPUs: 40 layers by 6 with 5 on the first are 35 by 5; 42 by 6 would come out even too."""
    base = [*ONE, "cluster.num_nodes=6", "stage.global_batch_size=48"]
    stage, _ = auto("layout.pp=6", "layout.num_layers_in_first_pipeline_stage=5", base=base)
    assert not stage.layout.account_for_embedding_in_pipeline_split


def test_tp4_stays_for_a_model_that_it_divides():
    stage, planner = auto("layout.tp=4", "model=llama3_8b")
    assert stage.layout.tp == 4
    assert all(candidate.layout.tp == 4 for candidate in planner.found["pretrain"].best)


def test_tp4_is_refused_for_phi4():
    with pytest.raises(ConfigError, match=r"must divide model.num_query_groups \(10\)"):
        auto("layout.tp=4")


# What is chosen


CHOSEN = {
    "1,920 H100": ["run=phi4"],
    "1,920 H200": ["run=phi4", "cluster=slurm_h200"],
    "a node": ["run=phi4", "cluster.num_nodes=1", "stage.global_batch_size=64"],
    "16,384 GPUs": ["run=phi4", "cluster.num_nodes=2048", "stage.global_batch_size=16384"],
    "llama3_8b": ["run=phi4", "model=llama3_8b", "cluster.num_nodes=16", "stage.global_batch_size=512"],
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_whole_run_is_settled(name):
    planner = Planner()
    config = compose_run([*CHOSEN[name], "layout=auto"], planner=planner)
    check_run(config)
    assert set(planner.found) == {"pretrain", "midtrain"}
    documents = plan_document(config)
    for document in documents:
        best = planner.found[document["stage"]].best[0]
        assert document["refusals"] == []
        assert document["memory_gib"]["peak"] <= 0.95 * document["memory_gib"]["capacity"]
        assert document["step_time_s"] == pytest.approx(best.seconds)
        assert document["memory_gib"]["peak"] == pytest.approx(best.memory_gib)
    # Four times the sequence: four times the activations, or another layout.
    assert config.stages[0].layout != config.stages[1].layout


def test_what_is_chosen_is_no_slower_than_what_was_set_by_hand():
    by_hand = plan_document(compose_run(["run=phi4"]))
    chosen = plan_document(compose_run(["run=phi4", "layout=auto"], planner=Planner()))
    for hand, choice in zip(by_hand, chosen, strict=True):
        if hand["memory_gib"]["peak"] <= 0.95 * 79.1:
            assert choice["step_time_s"] <= hand["step_time_s"]


def test_128k_gets_context_parallelism():
    words = ["data.chunk_tokens=131072", "data.group_tokens=1048576", "stage.seq_length=131072", "stage.global_batch_size=180"]
    stage, planner = auto(*words, base=["run=phi4", "stage=midtrain"])
    assert stage.layout.cp >= 4
    assert planner.found["midtrain"].best[0].memory_gib < 75.2


def test_tensor_parallelism_stays_inside_a_node():
    base = [*ONE, "model=llama3_8b", "cluster.gpus_per_node=2", "cluster.num_nodes=16", "stage.global_batch_size=64"]
    config = compose_run([*base, "layout=auto"], planner=Planner())
    pairs = candidates(config.stages[0], config=config, hardware=config.hardware, free=Free(SEARCHED))
    assert {layout.tp for layout, _ in pairs} == {1, 2}


def test_the_network_counts():
    """With a hundredth of the bandwidth between nodes another layout is best, which speaks less over it."""
    slow = [*SIXTEEN, "cluster.network.inter_node_gb_per_s=0.5"]
    (fast_stage, _), (slow_stage, planner) = auto(base=SIXTEEN), auto(base=slow)
    assert fast_stage.layout != slow_stage.layout
    config = compose_run([*slow, "layout=dp", *describe(fast_stage.layout).split()])
    assert plan_document(config)[0]["step_time_s"] > planner.found["pretrain"].best[0].seconds


@pytest.mark.parametrize(("gpu", "wanted"), [("a100_sxm", {None}), ("b200", {None, "delayed", "tensorwise"})])
def test_precision_is_chosen_among_the_devices_recipes(gpu, wanted):
    stage, planner = auto("precision=auto", f"cluster.gpu={gpu}", "model=llama3_8b")
    assert {candidate.precision.fp8 for candidate in planner.found["pretrain"].best} <= wanted
    assert stage.precision.fp8 == (None if gpu == "a100_sxm" else "delayed")
    assert stage.precision.name == ("bf16" if gpu == "a100_sxm" else "fp8_delayed")


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("precision.fp8=blockwise", "fp8", "blockwise"),
        ("precision.fp8_param_gather=true", "fp8_param_gather", True),
        ("precision.grad_reduce_in_fp32=false", "grad_reduce_in_fp32", False),
        ("precision.num_layers_at_start_in_bf16=1", "num_layers_at_start_in_bf16", 1),
    ],
)
def test_what_is_set_of_a_precision_stays(word, name, value):
    stage, _ = auto("precision=auto", word, "model=llama3_8b")
    assert getattr(stage.precision, name) == value


def test_precision_alone_can_be_chosen():
    config = compose_run([*ONE, "precision=auto"], planner=Planner())
    assert config.stages[0].layout == compose_run(ONE).stages[0].layout
    assert config.stages[0].precision.name == "fp8_delayed"


# Nothing to choose from


def test_cpu_ranks_have_no_figures_to_choose_by():
    with pytest.raises(
        ConfigError, match=r"layout \(stage demo_pretrain\): found auto; the planner chooses by the device's figures"
    ):
        compose_run(["run=demo", "stage=demo_pretrain", "layout=auto"], planner=Planner())


def test_without_a_planner_a_free_field_is_refused():
    with pytest.raises(ConfigError, match="the planner chooses them, and is not asked here"):
        compose_run([*ONE, "layout=auto"])


def test_nothing_fits():
    with pytest.raises(LayoutError) as caught:
        auto("cluster.gpu=l40s", "model.num_layers=160")
    (found,) = caught.value.problems
    text = str(found)
    assert "found none that fits l40s" in text and "44.4 GiB less 5%" in text and "more GPUs or larger ones" in text
    assert "layout.recompute=full" in text


def test_nothing_divides():
    with pytest.raises(LayoutError) as caught:
        auto(base=[*ONE, "cluster.num_nodes=1", "stage.global_batch_size=1", "cluster.gpus_per_node=7", "model.num_layers=41"])
    assert "found no layout; tp * cp * pp must divide the 7 GPUs" in str(caught.value)


# What is told


def test_why_each_lost():
    _, planner = auto()
    best, *others = planner.found["pretrain"].best
    assert len(others) == 9
    for candidate in others:
        losses = {f.name: getattr(candidate.step, f.name) - getattr(best.step, f.name) for f in fields(StepTime)}
        largest = max(losses.values())
        assert f"+{largest * 1e3:.0f} ms" in why_slower(candidate, best=best)
    assert why_slower(best, best=best) == "as fast"


def test_a_layout_is_told_as_overrides_that_make_it():
    _, planner = auto()
    for candidate in planner.found["pretrain"].best[:3]:
        words = describe(candidate.layout).split()
        assert compose_run([*SMALL, "layout=dp", *words]).stages[0].layout == candidate.layout


def test_nearest_changes_as_little_as_possible():
    config = compose_run([*ONE, "layout=dp"])
    stage = config.stages[0]
    words = nearest_words(stage, config=config).split()
    mended = compose_run([*ONE, "layout=dp", *words])
    assert plan_document(mended)[0]["refusals"] == []
    changed, _ = distance(mended.stages[0].layout, stage.layout)
    assert changed == len(words)
    pairs = candidates(stage, config=config, hardware=config.hardware, free=Free(SEARCHED))
    estimator = Estimator(stage, config.model, config.cluster, config.hardware)
    fitting = [layout for layout, precision in pairs if estimator.memory(layout, precision).peak_gib <= 0.95 * 79.1]
    assert changed == min(distance(layout, stage.layout)[0] for layout in fitting)


def test_placeholders_are_fields():
    stage = compose_run(ONE).stages[0]
    assert set(LAYOUT_PLACEHOLDER) < {field.name for field in fields(stage.layout)}
    assert set(PRECISION_PLACEHOLDER) < {field.name for field in fields(stage.precision)}


def test_a_search_is_quick():
    """The goals are 1 s for 1,920 GPUs and 10 s for 16,384 (benchmarks/planner.py); a slow machine gets twice that."""
    for words, limit in (([], 2.0), (["cluster.num_nodes=2048", "stage.global_batch_size=16384"], 20.0)):
        config = compose_run([*ONE, *words])
        start = time.perf_counter()
        search(config.stages[0], config=config, hardware=config.hardware, free=Free(SEARCHED))
        assert time.perf_counter() - start < limit


# Kernels


def test_kernels_are_not_searched_and_keep_their_rules():
    """Activations are offloaded without a pipeline and without recomputation."""
    stage, _ = auto("layout.cpu_offloading_num_layers=8", base=[*SMALL, *TINY, "model.num_layers=12"])
    layout = stage.layout
    assert (layout.cpu_offloading_num_layers, layout.pp, layout.recompute) == (8, 1, "none")
    assert layout.cross_entropy_fusion_impl == "te"
