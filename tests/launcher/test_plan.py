"""The plan against published figures, and the arithmetic of exposure."""

import io
import json
import math
from dataclasses import asdict, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from launcher.config.compose import compose_run
from launcher.config.reading import SourceSize
from launcher.config.schema import RampupBatchSize
from launcher.plan.document import plan_document
from launcher.plan.exposure import plan_exposure
from launcher.plan.page import print_exposure, print_plan, short
from launcher.plan.parameters import count_by_stage, count_parameters, flops_per_token, layer_parameters
from launcher.plan.stage import Batches, bubble_fraction, plan_batches, plan_stage

PHI4 = compose_run(["run=phi4"])
PRETRAIN = compose_run(["run=phi4", "stage=pretrain"])
DEMO = compose_run(["run=demo"])
DEMO_PRETRAIN = compose_run(["run=demo", "stage=demo_pretrain"])


def test_phi4_is_as_published():
    model, pretrain, midtrain = PHI4.model, PHI4.stage("pretrain"), PHI4.stage("midtrain")
    shape = (model.num_layers, model.hidden_size, model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    assert shape == (40, 5120, 40, 10, 17920)
    assert (model.padded_vocab_size, model.layernorm_epsilon, model.tied_embeddings) == (100352, 1e-5, False)
    assert (pretrain.stage.seq_length, pretrain.stage.global_batch_size, pretrain.stage.tokens) == (4096, 5760, 9.8e12)
    assert (pretrain.optim.lr, pretrain.optim.schedule, pretrain.optim.weight_decay) == (3e-4, "linear", 0.1)
    assert (midtrain.stage.seq_length, midtrain.stage.rotary_base, midtrain.stage.tokens) == (16384, 250000, 250e9)
    assert midtrain.optim.lr == pytest.approx(pretrain.optim.lr / 10)
    assert midtrain.stage.init_from == "pretrain"
    assert PHI4.cluster.world_size == 1920


@pytest.mark.parametrize(
    ("model", "count"),
    [("phi4_14b", 14_659_507_200), ("llama3_8b", 8_030_261_248), ("phi_7b", 7_197_691_904), ("demo", 1_787_008)],
)
def test_parameter_counts(model, count):
    assert count_parameters(compose_run([f"model={model}"]).model).total == count


def test_parameters_of_one_rank_are_megatrons():
    """1.961e9 on rank 0 of TP2 x PP4: megatron-core 0.16.1 built it, see the facts on CPU runs."""
    layout = replace(PHI4.stages[0].layout, tp=2, pp=4, vpp=1)
    counts = count_by_stage(PHI4.model, layout=layout)
    assert counts[0].total == 1_960_939_520
    assert [count.layers for count in counts] == [10 * layer_parameters(PHI4.model, tp=2)] * 4
    assert (counts[0].head, counts[-1].embedding) == (0, 0)


@given(pp=st.sampled_from([1, 2, 4, 5, 8, 10]))
def test_pipeline_stages_add_up_to_the_model(pp):
    counts = count_by_stage(PHI4.model, layout=replace(PHI4.stages[0].layout, tp=1, pp=pp, vpp=1))
    assert sum(count.total for count in counts) == count_parameters(PHI4.model).total


def test_biases_and_layernorm_are_counted():
    model = replace(PHI4.model, attention_bias=True)
    assert count_parameters(model).layers - count_parameters(PHI4.model).layers == 40 * (40 + 2 * 10) * 128
    model = replace(PHI4.model, mlp_bias=True)
    per_layer = (40 + 2 * 10) * 128 + 5120 + 2 * 17920 + 5120
    assert count_parameters(model).layers - count_parameters(PHI4.model).layers == 40 * per_layer
    model = replace(PHI4.model, normalization="layernorm")
    assert count_parameters(model).total - count_parameters(PHI4.model).total == (2 * 40 + 1) * 5120
    model = replace(PHI4.model, tied_embeddings=True)
    assert count_parameters(PHI4.model).total - count_parameters(model).total == 100352 * 5120


def test_flops_per_token_in_three_conventions():
    """88.0, 89.9 and 94.9 GFLOP at 4K; causal about 105 at 16K."""
    at_4k = flops_per_token(PHI4.model, seq_length=4096)
    assert {name: round(value / 1e9, 1) for name, value in at_4k.items()} == {"sixn": 88.0, "causal": 89.9, "full": 94.9}
    assert round(flops_per_token(PHI4.model, seq_length=16384)["causal"] / 1e9) == 105


def test_steps_and_microbatches_of_phi4():
    pretrain, midtrain = (plan_stage(stage, cluster=PHI4.cluster) for stage in PHI4.stages)
    assert (pretrain.num_steps, pretrain.tokens_per_step) == (415_379, 23_592_960)
    assert midtrain.tokens_per_step == pretrain.tokens_per_step
    assert (pretrain.data_parallel_size, pretrain.num_microbatches) == (480, 12)
    assert (midtrain.data_parallel_size, midtrain.num_microbatches) == (240, 6)
    assert pretrain.warmup_steps == 2000


def test_bubble_fraction():
    layout = replace(PHI4.stages[0].layout, pp=4, vpp=2)
    assert bubble_fraction(layout, num_microbatches=12) == pytest.approx(3 / 24)
    assert bubble_fraction(replace(layout, pp=1, vpp=1), num_microbatches=12) == 0


def with_ramp(*, batch, start, increment, tokens, stage_tokens=1e6, seq_length=128, micro_batch_size=1, ranks=1):
    """The demo's first stage with a ramp, on so many ranks, and its plan."""
    stage = DEMO_PRETRAIN.stages[0]
    settings = replace(
        stage.stage,
        global_batch_size=batch,
        seq_length=seq_length,
        tokens=float(stage_tokens),
        rampup_batch_size=RampupBatchSize(start=start, increment=increment, tokens=float(tokens)),
    )
    stage = replace(stage, stage=settings, layout=replace(stage.layout, micro_batch_size=micro_batch_size))
    return settings, plan_stage(stage, cluster=replace(DEMO_PRETRAIN.cluster, num_nodes=1, gpus_per_node=ranks))


def steps_taken(*, batch, start, increment, ramp_samples, num_samples):
    """(first sample, size) of every step to the stage's end: equally many samples at each size, and a size stays for the batch
    that it began."""
    levels = (batch - start) // increment
    samples = 0
    while samples < num_samples:
        grown = sum(samples >= Fraction(ramp_samples * level, levels) for level in range(1, levels + 1))
        size = start + grown * increment
        yield samples, size
        samples += size


@settings(deadline=None, max_examples=150)
@given(
    unit=st.integers(1, 4),
    start=st.integers(1, 12),
    increment=st.integers(1, 6),
    levels=st.integers(0, 12),
    ramp_samples=st.integers(1, 3000),
    num_samples=st.integers(200, 4000),
)
def test_a_ramp_is_the_steps_it_comes_to(unit, start, increment, levels, ramp_samples, num_samples):
    start, increment = start * unit, increment * unit
    batch = start + levels * increment
    _, plan = with_ramp(
        batch=batch, start=start, increment=increment, tokens=ramp_samples * 128, stage_tokens=num_samples * 128, ranks=unit
    )
    steps = list(steps_taken(batch=batch, start=start, increment=increment, ramp_samples=ramp_samples, num_samples=num_samples))
    assert plan.num_steps == len(steps)
    assert plan.num_samples == num_samples
    for step, (samples, size) in enumerate(steps):
        assert plan.batch_size_at(samples) == size
        assert plan.steps_at(samples) == step
        assert plan.steps_at(samples + 1) == plan.steps_at(samples + size) == step + 1
        assert plan.microbatches_at(samples) * unit == size
    assert [row.size for row in plan.batches] == [*range(start, batch, increment), batch]


def test_a_ramp_by_hand():
    """8 samples or more at each of 2 and 4: four batches of 2; two of 4; then 6 to the end."""
    settings, plan = with_ramp(batch=6, start=2, increment=2, tokens=16 * 128, stage_tokens=40 * 128)
    assert plan_batches(settings) == (Batches(0, 0, 2), Batches(8, 4, 4), Batches(16, 6, 6))
    assert [plan.batch_size_at(samples) for samples in (0, 7, 8, 15, 16, 1000)] == [2, 2, 4, 4, 6, 6]
    assert plan.num_steps == 6 + 4


def test_a_size_that_the_one_before_ran_past_is_left_out():
    """A batch of 100 is 9 tenths past the border of the next three sizes."""
    settings, plan = with_ramp(batch=104, start=100, increment=1, tokens=40 * 128, stage_tokens=1000 * 128)
    assert [plan.batch_size_at(samples) for samples in (0, 100)] == [100, 104]
    assert plan_batches(settings)[-1] == Batches(100, 1, 104)


def test_without_a_ramp_every_batch_is_the_same():
    settings = PRETRAIN.stages[0].stage
    assert plan_batches(settings) == (Batches(0, 0, 5760),)
    assert plan_batches(replace(settings, rampup_batch_size=RampupBatchSize(start=5760, increment=1, tokens=1e9))) == (
        Batches(0, 0, 5760),
    )


def test_warmup_is_counted_in_the_steps_of_a_ramp():
    stage = DEMO_PRETRAIN.stages[0]
    ramp = RampupBatchSize(start=16, increment=16, tokens=128.0 * 160)
    ramped = replace(
        stage, stage=replace(stage.stage, rampup_batch_size=ramp), optim=replace(stage.optim, warmup_tokens=128.0 * 200)
    )
    assert plan_stage(ramped, cluster=DEMO_PRETRAIN.cluster).warmup_steps == 10 + 2  # 160 samples by 16, 40 by 32


def test_document_holds_what_scripts_read():
    documents = plan_document(PHI4)
    assert [document["stage"] for document in documents] == ["pretrain", "midtrain"]
    layout = documents[0]["layout"]
    assert [layout[name] for name in ("tp", "pp", "vpp", "cp", "dp")] == [2, 2, 2, 1, 480]
    # What else the config says of it, by the same names: a program can make overrides of it.
    assert layout.items() >= asdict(PHI4.stages[0].layout).items()
    for key in ("num_params", "num_microbatches", "num_steps", "tokens", "refusals"):
        assert key in documents[0]
    assert json.loads(json.dumps(documents)) == json.loads(json.dumps(plan_document(PHI4)))


def test_exposure_of_phi4_is_the_reports():
    rows = {row.source: row for row in plan_exposure(PRETRAIN)}
    epochs = {name: round(row.epochs, 2) for name, row in rows.items()}
    assert epochs == {"web": 1.13, "web_rewrites": 5.07, "synthetic": 13.52, "code": 2.39, "acquired": 1.69}
    assert rows["synthetic"].share == pytest.approx(0.4)
    assert rows["synthetic"].first_repeat_token == pytest.approx(290e9 / 0.4)
    assert rows["synthetic"].first_repeat_step == math.ceil((rows["synthetic"].first_repeat_token + 4096) / 23_592_960)
    assert list(asdict(rows["web"])) == [
        "source", "share", "tokens", "unique_tokens", "epochs", "max_epochs", "first_repeat_token", "first_repeat_stage",
        "first_repeat_step", "tokens_read", "epochs_read",
    ]  # fmt: skip


def test_exposure_accumulates_over_stages():
    rows = {row.source: row for row in plan_exposure(PHI4)}
    assert rows["synthetic"].tokens == pytest.approx(0.4 * 9.8e12 + 0.28 * 250e9)
    assert sum(row.tokens for row in rows.values()) == pytest.approx(9.8e12 + 250e9)
    assert sum(row.share for row in rows.values()) == pytest.approx(1)
    # long is read in midtraining alone: 50B unique at 30% last 166.7B tokens of it
    assert rows["long"].first_repeat_token == pytest.approx(9.8e12 + 50e9 / 0.3, rel=1e-9)


def test_counted_tokens_take_the_place_of_the_mixtures_guess():
    rows = {row.source: row for row in plan_exposure(PRETRAIN, sizes={"web": SourceSize(10**12)})}
    assert (rows["web"].unique_tokens, round(rows["web"].epochs, 2), rows["code"].unique_tokens) == (1e12, 1.47, 820e9)


def test_sources_of_unknown_size_have_no_epochs():
    row = plan_exposure(DEMO)[0]
    assert (row.unique_tokens, row.epochs, row.first_repeat_token) == (None, None, None)


@given(unique=st.integers(10**9, 10**14))
def test_a_source_repeats_exactly_when_it_is_read_more_than_once(unique):
    (row,) = [row for row in plan_exposure(PHI4, sizes={"code": SourceSize(unique)}) if row.source == "code"]
    assert (row.first_repeat_token is not None) == (row.epochs > 1)
    if row.first_repeat_token is not None:
        assert 0 < row.first_repeat_token <= 9.8e12 + 250e9


def printed(show, *arguments, **options):
    console = Console(file=io.StringIO(), width=120, highlight=False)
    show(*arguments, **options, console=console)
    return console.file.getvalue()


def test_plan_page_says_what_matters():
    page = printed(print_plan, PHI4, stages=plan_document(PHI4))
    for words in ("14,659,507,200 parameters", "415,379", "tp2 pp2 vpp2 cp1 dp480", "12 of 1", "4.2%", "9.8T", "1,920 ranks"):
        assert words in page, words


def test_exposure_page():
    page = printed(print_exposure, PHI4, rows=plan_exposure(PHI4))
    assert "synthetic" in page and "13.76" in page and "725B" in page
    assert "–" in printed(print_exposure, DEMO, rows=plan_exposure(DEMO))


def test_short_numbers():
    assert [short(value) for value in (None, 999, 4096, 23_592_960, 9.8e12)] == ["–", "999", "4.096k", "23.59M", "9.8T"]
    assert short(89.9e9, flop=True) == "89.9G"
