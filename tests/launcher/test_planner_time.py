"""How long a step takes: kernels, rings and pipelines against arithmetic by hand, and a published run."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.compose import compose_run
from launcher.config.hardware import read_hardware
from launcher.config.validate import dump_run, validate_run
from launcher.plan.device import BYTES, Device
from launcher.plan.document import plan_document
from launcher.plan.estimate import Estimator
from launcher.plan.goodput import daly_interval, goodput, plan_goodput
from launcher.plan.layer import Parts
from launcher.plan.network import NETWORK_HOP_S, NVLINK_HOP_S, Fabric
from launcher.plan.overlap import overlaps_tensor_parallel
from launcher.plan.schedule import simulate
from launcher.plan.timing import StepTime

PRETRAIN = compose_run(["run=phi4", "stage=pretrain"])
MIDTRAIN = compose_run(["run=phi4", "stage=midtrain"])
H200 = compose_run(["run=phi4", "stage=pretrain", "cluster=slurm_h200"])
STAGE, MODEL, CLUSTER, H100 = PRETRAIN.stages[0], PRETRAIN.model, PRETRAIN.cluster, PRETRAIN.hardware
DEVICE = Device(H100)
PRECISIONS = {
    name: compose_run(["run=phi4", "stage=pretrain", f"precision={name}"]).stages[0].precision
    for name in ("bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise")
}
LLAMA2_7B = [
    "run=phi4", "stage=pretrain", "layout=dp", "precision=fp8_delayed", "tokenizer=huggingface", "cluster.num_nodes=1",
    "stage.global_batch_size=128", "stage.seq_length=4096", "model.family=null", "model.num_layers=32",
    "model.hidden_size=4096",
    "model.num_attention_heads=32", "model.num_query_groups=32",
    "model.kv_channels=128", "model.ffn_hidden_size=11008",
    "model.vocab_size=32000", "model.padded_vocab_size=32000",
]  # fmt: skip

# tp, pp, vpp, cp, micro batch, nodes, batch
LAYOUTS = [
    (1, 1, 1, 1, 1, 1, 64),
    (2, 1, 1, 1, 2, 1, 64),
    (8, 1, 1, 1, 1, 4, 32),
    (2, 2, 2, 1, 1, 240, 5760),
    (2, 4, 1, 1, 1, 8, 128),
    (2, 4, 5, 2, 1, 8, 128),
    (4, 8, 5, 1, 2, 16, 256),
    (1, 5, 4, 1, 1, 5, 80),
]


def timing(*, config=PRETRAIN, precision="bf16", num_nodes=None, batch=None, hardware=None, **layout):
    """Of the config's only stage, with fields of its layout changed."""
    stage = config.stages[0]
    cluster = replace(config.cluster, num_nodes=num_nodes or config.cluster.num_nodes)
    stage = replace(
        stage,
        stage=replace(stage.stage, global_batch_size=batch or stage.stage.global_batch_size),
        precision=PRECISIONS[precision],
        layout=replace(stage.layout, **layout),
    )
    return Estimator(stage, config.model, cluster, hardware or config.hardware).timing(stage.layout, stage.precision)


def of_layout(row, **changes):
    tp, pp, vpp, cp, micro, num_nodes, batch = row
    chosen = dict(
        tp=tp, pp=pp, vpp=vpp, cp=cp, micro_batch_size=micro, sequence_parallel=tp > 1, num_nodes=num_nodes, batch=batch
    )
    return timing(**{**chosen, **changes})


# The step and the document


@pytest.mark.parametrize("row", LAYOUTS)
def test_components_add_up_and_none_is_negative(row):
    step = of_layout(row).step
    parts = {field.name: getattr(step, field.name) for field in fields(StepTime)}
    assert sum(parts.values()) == pytest.approx(step.total)
    assert {name: seconds for name, seconds in parts.items() if seconds < -1e-9} == {}
    assert parts["gemm"] > 0 and parts["attention"] > 0 and parts["memory"] > 0


@pytest.mark.parametrize("config", [PRETRAIN, MIDTRAIN, H200], ids=["pretrain", "midtrain", "h200"])
def test_figures_of_the_document_follow_from_the_step(config):
    (found,) = plan_document(config)
    step_s, world = found["step_time_s"], found["world_size"]
    assert sum(found["time_s"].values()) == pytest.approx(step_s)
    tokens_per_s = found["global_batch_size"] * found["seq_length"] / step_s
    assert found["tokens_per_s"] == pytest.approx(tokens_per_s)
    assert found["tokens_per_s_per_gpu"] == pytest.approx(tokens_per_s / world)
    for convention, flops in found["flops_per_token"].items():
        assert found["model_tflops_per_gpu"][convention] == pytest.approx(flops * tokens_per_s / world / 1e12)
    assert found["mfu_peak_tflops"] == 989.4
    assert found["mfu"] == pytest.approx(found["model_tflops_per_gpu"]["causal"] / 989.4)
    assert 0.2 < found["mfu"] < 0.7
    days = found["num_steps"] * step_s / found["goodput"]["goodput"] / 86400
    assert found["days"] == pytest.approx(days)
    assert found["gpu_hours"] == pytest.approx(days * 24 * world)
    assert found["cost_usd"] == pytest.approx(2.0 * found["gpu_hours"])


def test_mfu_of_fp8_is_of_the_fp8_peak():
    (found,) = plan_document(compose_run(LLAMA2_7B))
    assert found["mfu_peak_tflops"] == 1978.9


def test_llama2_7b_is_as_published():
    """16,934 tokens/s/GPU: NeMo 24.09's performance summary, 8 H100, FP8, sequences of 4,096, batch 128."""
    (found,) = plan_document(compose_run(LLAMA2_7B))
    assert found["tokens_per_s_per_gpu"] == pytest.approx(16934, rel=0.09)
    assert found["num_params"] == 6_738_415_616


def test_each_gemm_of_the_document_is_its_shape():
    (found,) = plan_document(PRETRAIN)
    shapes = {row["name"]: (row["m"], row["n"], row["k"]) for row in found["gemms"]}
    assert shapes["qkv"] == (4096, (40 + 2 * 10) * 128 // 2, 5120)
    assert shapes["fc1"] == (4096, 2 * 17920 // 2, 5120)
    assert shapes["fc2 dgrad"] == (4096, 17920 // 2, 5120)
    assert shapes["fc2 wgrad"] == (5120, 17920 // 2, 4096)
    assert shapes["logits"] == (4096, 100352 // 2, 5120)
    # Layers' products make up the step's GEMM time, on the stage with the LM head.
    layers = sum(row["seconds"] for row in found["gemms"] if not row["name"].startswith("logits"))
    logits = sum(row["seconds"] for row in found["gemms"] if row["name"].startswith("logits"))
    assert found["time_s"]["GEMM"] == pytest.approx(12 * (20 * layers + logits))


# Kernels

SIZES = st.integers(1, 128).map(lambda tiles: 256 * tiles)


@settings(deadline=None, max_examples=300)
@given(m=st.integers(1, 40000), n=st.integers(1, 40000), k=st.integers(16, 40000), compute=st.sampled_from(["bf16", "fp8"]))
def test_no_product_beats_the_roofline(m, n, k, compute):
    peak = {"bf16": 989.4e12 * H100.efficiency.gemm_bf16, "fp8": 1978.9e12 * H100.efficiency.gemm_fp8}[compute]
    traffic = (BYTES[compute] * k * (m + n) + 2 * m * n) / (3352e9 * H100.efficiency.memory)
    seconds = DEVICE.gemm_s(m, n, k, compute=compute)
    assert seconds >= 2 * m * n * k / peak
    assert seconds >= traffic
    assert DEVICE.gemm_s(m, n, k, compute=compute, output_bytes=8.0) >= seconds


@settings(deadline=None, max_examples=300)
@given(m=SIZES, n=SIZES, k=SIZES, more=SIZES, compute=st.sampled_from(["bf16", "fp8"]))
def test_a_larger_product_takes_longer(m, n, k, more, compute):
    """In whole tiles, as the shapes of models are."""
    one = DEVICE.gemm_s(m, n, k, compute=compute)
    assert DEVICE.gemm_s(m + more, n, k, compute=compute) > one
    assert DEVICE.gemm_s(m, n + more, k, compute=compute) > one
    assert DEVICE.gemm_s(m, n, k + more, compute=compute) > one


def test_large_products_come_near_the_part_of_the_peak_that_is_attained():
    rate = 2 * 65536**2 * 16384 / DEVICE.gemm_s(65536, 65536, 16384, compute="bf16")
    assert rate == pytest.approx(989.4e12 * H100.efficiency.gemm_bf16, rel=0.04)
    assert DEVICE.gemm_s(1024, 1024, 1024, compute="bf16") > 1.2 * 2 * 1024**3 / (989.4e12 * H100.efficiency.gemm_bf16)


def test_attention_by_hand():
    """Scores and weighted values of the half that the mask keeps: 2 products of 2 b h d s^2 / 2; backward 2.5 times."""
    layer = timing(tp=2, cp=1, micro_batch_size=1).layer.layer()
    flops = 2 * (2 * (40 // 2) * 128 * 4096**2 / 2)
    rate = 989.4e12 * H100.efficiency.attention * 4096 / (4096 + 2000)
    assert layer.forward.attention == pytest.approx(flops / rate)
    assert layer.backward.attention == pytest.approx(2.5 / 0.8 * flops / rate)


def test_attention_is_quadratic_and_split():
    one = timing(config=MIDTRAIN, tp=2, cp=1).layer.layer().forward.attention
    assert timing(config=MIDTRAIN, tp=4, cp=1).layer.layer().forward.attention == pytest.approx(one / 2)
    assert timing(config=MIDTRAIN, tp=2, cp=2, cp_comm_type="a2a").layer.layer().forward.attention == pytest.approx(one / 2)
    short = timing(tp=2, cp=1).layer.layer().forward.attention
    # 16 times the work, in longer kernels.
    assert 16 * short * (4096 / 6096) / (16384 / 18384) == pytest.approx(one)


def test_small_heads_are_slower():
    assert DEVICE.attention_s(1e12, seq_length=4096, channels=64) == pytest.approx(
        2**0.4 * DEVICE.attention_s(1e12, seq_length=4096, channels=128)
    )
    assert DEVICE.attention_s(1e12, seq_length=4096, channels=256) == DEVICE.attention_s(1e12, seq_length=4096, channels=128)


# Rings


def fabric(**network):
    return Fabric(replace(CLUSTER, network=replace(CLUSTER.network, **network)), hardware=H100)


NVLINK, PORT = 450e9 * H100.efficiency.nvlink, 50e9 * H100.efficiency.network


def test_a_ring_inside_a_node():
    links = fabric()
    link = links.link(8, stride=1)
    assert (link.bytes_per_s, link.hop_s, link.crosses_nodes) == (pytest.approx(NVLINK), NVLINK_HOP_S, False)
    assert links.ring_s(1e9, size=8, link=link) == pytest.approx(7 / 8 * 1e9 / NVLINK + 7 * NVLINK_HOP_S)
    assert links.ring_s(1e9, size=8, link=link, messages=3) == pytest.approx(7 / 8 * 1e9 / NVLINK + 21 * NVLINK_HOP_S)
    assert links.ring_s(1e9, size=1, link=link) == 0


@pytest.mark.parametrize(("stride", "ports"), [(1, 8), (2, 4), (4, 2), (8, 1), (64, 1)])
def test_a_ring_across_nodes_has_a_port_for_each_rank_in_a_node(stride, ports):
    links = fabric()
    link = links.link(16, stride=stride)
    assert link.crosses_nodes
    assert link.bytes_per_s == pytest.approx(min(NVLINK, ports * PORT))
    seconds = 15 / 16 * 1e9 / min(NVLINK, ports * PORT) + 15 * NETWORK_HOP_S
    assert links.ring_s(1e9, size=16, link=link) == pytest.approx(seconds)
    # One message has one port.
    assert links.send_s(1e9, link=link) == pytest.approx(1e9 / PORT + NETWORK_HOP_S)


def test_oversubscription_slows_what_leaves_a_pod():
    links = fabric(oversubscription=4.0, nodes_per_pod=32)
    assert links.link(32 * 8, stride=1).bytes_per_s == pytest.approx(8 * PORT)
    assert links.link(33 * 8, stride=1).bytes_per_s == pytest.approx(8 * PORT / 4)
    assert links.link(8, stride=1).bytes_per_s == pytest.approx(NVLINK)


def test_without_rails_all_traffic_between_nodes_crosses_the_core():
    links = fabric(oversubscription=4.0, nodes_per_pod=32, rail_optimized=False)
    assert links.link(16, stride=1).bytes_per_s == pytest.approx(8 * PORT / 4)


def test_neighbours_in_distant_pods_cross_the_core():
    """Two pipeline stages 120 nodes apart are two nodes, in two pods."""
    links = fabric(oversubscription=4.0, nodes_per_pod=32)
    assert links.link(2, stride=960).bytes_per_s == pytest.approx(PORT / 4)


def test_a_rack_is_one_node():
    hardware = validate_hardware("gb200")
    links = Fabric(replace(CLUSTER, gpus_per_node=4, num_nodes=36), hardware=hardware)
    assert not links.link(18, stride=4).crosses_nodes
    assert not links.link(6, stride=4).crosses_nodes
    assert links.link(32, stride=4).crosses_nodes
    assert links.link(16, stride=4).crosses_nodes  # 64 of 72: the second such group begins in one rack and ends in the next


def validate_hardware(name):
    return validate_run({**dump_run(PRETRAIN), "hardware": read_hardware(name)}).hardware


# Data parallelism and what else surrounds the pipeline


def test_one_replica_has_nobody_to_reduce_with():
    assert timing(tp=8, pp=1, vpp=1, num_nodes=1, batch=8).exposed_dp_s == 0
    assert timing(tp=4, pp=1, vpp=1, num_nodes=1, batch=8).exposed_dp_s > 0


def test_without_overlap_all_communication_is_exposed():
    row = (2, 1, 1, 1, 1, 16, 512)
    hidden = of_layout(row)
    shown = of_layout(row, overlap_param_gather=False)
    both = of_layout(row, overlap_param_gather=False, overlap_grad_reduce=False)
    assert hidden.step.dp < shown.step.dp < both.step.dp
    assert hidden.step.total < shown.step.total < both.step.total
    count = max(held.parameters for held in both._held)
    # Gradients in fp32, weights in bf16, over the 64 replicas at four ports a node.
    seconds = 63 / 64 * 6 * count / (4 * PORT) + 2 * 63 * NETWORK_HOP_S
    assert both.exposed_dp_s == pytest.approx(seconds)


def test_more_gpus_with_the_same_batch_each_are_not_faster():
    """But for the optimizer, of which each replica has less to do: a thousandth."""
    rates = []
    for num_nodes in (1, 2, 4, 8, 16, 32, 64, 240, 1024):
        found = of_layout((2, 1, 1, 1, 1, num_nodes, 32 * num_nodes))
        rates.append(32 * 4096 / 8 / found.step.total)
    assert all(later < 1.001 * earlier for place, earlier in enumerate(rates) for later in rates[place + 1 :])
    assert rates[-1] < 0.995 * rates[0] and rates[-1] > 0.8 * rates[0]


def test_h200_is_faster_in_memory_bound_work_alone():
    h100, h200 = timing(), timing(config=H200)
    for name in ("gemm", "attention", "tp", "cp", "other"):
        assert getattr(h200.step, name) == pytest.approx(getattr(h100.step, name)), name
    assert h200.step.memory == pytest.approx(h100.step.memory * 3352 / 4800)
    assert h200.step.optimizer == pytest.approx(h100.step.optimizer * 3352 / 4800)
    assert h200.step.total < h100.step.total
    assert h200.step.dp >= h100.step.dp  # there is less to hide behind


@pytest.mark.parametrize("name", ["fp8_delayed", "fp8_tensorwise", "fp8_blockwise"])
def test_fp8_is_faster_than_bf16(name):
    for row in LAYOUTS:
        if row[0] < 8 and row[1] < 8:
            fp8, bf16 = of_layout(row, precision=name).step, of_layout(row).step
            assert fp8.gemm < 0.75 * bf16.gemm and fp8.total < bf16.total, row
            assert fp8.attention == pytest.approx(bf16.attention)


def test_full_recomputation_adds_one_forward_of_each_layer():
    none, full = timing(recompute="none").layer.layer(), timing(recompute="full").layer.layer()
    assert full.forward == none.forward
    assert full.backward.total == pytest.approx(none.backward.total + none.forward.total)
    step = timing(recompute="full").step
    added = 12 * 20 * none.forward.gemm
    assert step.gemm - timing().step.gemm == pytest.approx(added)


def test_selective_recomputation_adds_what_it_names():
    def seconds(**changes):
        return timing(**changes).layer.layer().backward

    none = seconds()
    mlp = seconds(recompute="selective", recompute_modules=("mlp",))
    core = seconds(recompute="selective", recompute_modules=("core_attn",))
    both = seconds(recompute="selective", recompute_modules=("mlp", "core_attn"))
    assert mlp.attention == none.attention and core.gemm == none.gemm
    assert core.attention - none.attention == pytest.approx(timing().layer.layer().forward.attention)
    assert both.total - none.total == pytest.approx(mlp.total + core.total - 2 * none.total)
    assert none.total < core.total < mlp.total < seconds(recompute="full").total


@pytest.mark.parametrize("row", LAYOUTS)
def test_bubble_is_the_simulations(row):
    found = of_layout(row)
    pipeline = found.pipeline
    times = dict(forward_s=pipeline.forward_s, backward_s=pipeline.backward_s)
    spans = simulate(pp=row[1], vpp=row[2], num_microbatches=found.num_microbatches, **times)
    makespan = max(span.end_s for span in spans)
    work = found.num_microbatches * max(parts.total for parts in found.work)
    assert found.step.bubble == pytest.approx(makespan - work, rel=0.02, abs=1e-4 * makespan)
    if row[1] == 1:
        assert found.step.bubble == pytest.approx(0, abs=1e-9)


def test_bubble_of_phi4_is_near_the_formula():
    found = timing()
    ideal = found.step.total - found.step.bubble
    assert found.step.bubble / ideal == pytest.approx(1 / 24, abs=0.02)


def test_parts_add_and_scale():
    parts = Parts(gemm=1, attention=2, memory=3, host=4, tp=5, cp=6, contention=7)
    assert parts.total == 28
    assert (parts + parts).total == parts.times(2).total == 56


# Failures and checkpoints

MINUTES = st.floats(1, 3600)


@settings(deadline=None, max_examples=200)
@given(checkpoint_s=MINUTES, failure_s=st.floats(1800, 1e6), restart_s=st.floats(0, 1800), interval_s=st.floats(1, 1e6))
def test_goodput_is_a_part_of_the_time(checkpoint_s, failure_s, restart_s, interval_s):
    found = goodput(interval_s, checkpoint_s=checkpoint_s, restart_s=restart_s, failure_s=failure_s)
    assert 0 <= found <= 1
    assert found <= interval_s / (interval_s + checkpoint_s)


@pytest.mark.parametrize(("checkpoint_s", "failure_s"), [(1, 1e5), (10, 1e5), (60, 3e4), (60, 1e4), (300, 1e4), (600, 7200)])
def test_dalys_interval_is_the_best_of_all(checkpoint_s, failure_s):
    found = daly_interval(checkpoint_s, failure_s=failure_s)
    intervals = [found * 10 ** (exponent / 200) for exponent in range(-200, 201)]
    values = {t: goodput(t, checkpoint_s=checkpoint_s, restart_s=60, failure_s=failure_s) for t in intervals}
    best = max(values, key=values.get)
    assert best == pytest.approx(found, rel=0.03)
    assert values[best] == pytest.approx(goodput(found, checkpoint_s=checkpoint_s, restart_s=60, failure_s=failure_s), rel=1e-4)


def test_daly_becomes_youngs_rule_and_gives_up():
    for failure_s in (1e5, 1e6, 1e7):
        assert daly_interval(1, failure_s=failure_s) == pytest.approx(math.sqrt(2 * failure_s), rel=0.05)
    assert daly_interval(1000, failure_s=400) == 400


def test_goodput_of_phi4_by_hand():
    (found,) = plan_document(PRETRAIN)
    figures = found["goodput"]
    assert figures["failure_interval_s"] == pytest.approx(50700 * 3600 / 1920)
    assert figures["checkpoint_s"] == pytest.approx(14_659_507_200 * 14 / 100e9)  # bf16 weights, fp32 ones and two moments
    assert figures["interval_s"] == pytest.approx(5_760_000 * 4096 / found["tokens_per_s"])
    assert 0.9 < figures["goodput"] <= figures["optimum_goodput"] < 1
    assert plan_goodput(replace(CLUSTER, operations=None), checkpoint_bytes=1e9, interval_s=100) is None


# What a review with fresh eyes found


def test_a_group_that_straddles_nodes_crosses_them():
    links = Fabric(CLUSTER, hardware=PRETRAIN.hardware)
    assert links.link(5, stride=1).crosses_nodes
    assert not links.link(4, stride=1).crosses_nodes
    alone = Fabric(replace(CLUSTER, num_nodes=1), hardware=PRETRAIN.hardware)
    assert not alone.link(5, stride=1).crosses_nodes


@pytest.mark.parametrize(
    ("changes", "overlaps"),
    [
        ({}, True),
        ({"precision": {"fp8": "blockwise", "fp8_format": "e4m3"}}, False),
        ({"layout": {"sequence_parallel": False}}, False),
        ({"layout": {"tp": 1}}, False),
        ({"hardware": {"multicast": False}}, False),
        ({"stage": {"reset_attention_mask": True}, "layout": {"cp": 2}}, False),
        ({"stage": {"reset_attention_mask": True}}, True),
    ],
)
def test_where_tensor_parallel_communication_overlaps(changes, overlaps):
    """What transformer-engine's user buffers take."""
    stage = PRETRAIN.stages[0]
    sections = ("stage", "layout", "precision")
    stage = replace(stage, **{name: replace(getattr(stage, name), **changes.get(name, {})) for name in sections})
    hardware = replace(PRETRAIN.hardware, **changes.get("hardware", {}))
    assert overlaps_tensor_parallel(stage, hardware=hardware) is overlaps
    assert not overlaps_tensor_parallel(stage, hardware=None)


def test_a_ramp_takes_longer():
    """Smaller batches have larger bubbles."""
    ramp = "stage.rampup_batch_size={start: 480, increment: 480, tokens: 2.0e12}"
    words = ["run=phi4", "stage=pretrain", "layout.vpp=1"]
    plain, ramped = (plan_document(compose_run([*words, *more]))[0] for more in ([], [ramp]))
    assert ramped["step_time_s"] == plain["step_time_s"]
    assert 1.02 < ramped["days"] / plain["days"] < 1.06


def test_a_run_that_never_ends_is_not_cheap():
    words = ["run=phi4", "stage=pretrain", "cluster.operations.gpu_hours_between_failures=1"]
    found = plan_document(compose_run(words))[0]
    assert (found["days"], found["gpu_hours"], found["cost_usd"]) == (None, None, None)
    assert "never get from one checkpoint to the next" in found["refusals"][0]
    slow = [*words[:2], "cluster.operations.restart_s=1e6", "cluster.operations.gpu_hours_between_failures=200"]
    assert plan_document(compose_run(slow))[0]["goodput"]["goodput"] == 0


def test_fewer_groups_than_ranks():
    """Their products are split evenly all the same: 8 heads and one group over 8 ranks are 80 outputs a rank, not 192."""
    model = replace(PRETRAIN.model, num_attention_heads=8, num_query_groups=1, kv_channels=64)
    assert model.qkv_size // 8 == 80
