"""What a GPU holds: states counted by hand, activations by what is in flight, the fullest stage by looking at all."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.compose import compose_run
from launcher.plan.document import plan_document
from launcher.plan.memory import COMMUNICATOR_BYTES, CONTEXT_BYTES, GIB, SLACK, Memory
from launcher.plan.parameters import count_by_stage, count_parameters, layer_matrices
from launcher.plan.planner import nearest_words
from launcher.plan.rehearsed import FOLDER

PRETRAIN = compose_run(["run=phi4", "stage=pretrain"])
MIDTRAIN = compose_run(["run=phi4", "stage=midtrain"])
LLAMA = compose_run(
    ["run=phi4", "stage=pretrain", "model=llama3_8b", "layout=dp", "cluster.num_nodes=4", "stage.global_batch_size=256"]
)
DEMO = compose_run(["run=demo", "stage=demo_pretrain"])
PRECISIONS = {
    name: compose_run(["run=phi4", "stage=pretrain", f"precision={name}"]).stages[0].precision
    for name in ("fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise")
}
STATES = {"weights", "FP8 weights", "gradients", "main weights", "optimizer states", "moments in fp32"}
LIBRARIES = {"communication buffers", "CUDA context", "allocator slack"}


def memory(config=LLAMA, *, precision="bf16", precision_fields=None, num_nodes=None, batch=None, **layout):
    stage = config.stages[0]
    stage = replace(
        stage,
        stage=replace(stage.stage, global_batch_size=batch or stage.stage.global_batch_size),
        precision=replace(PRECISIONS[precision], **(precision_fields or {})),
        layout=replace(stage.layout, **layout),
    )
    cluster = replace(config.cluster, num_nodes=num_nodes or config.cluster.num_nodes)
    return Memory(stage, model=config.model, cluster=cluster, hardware=config.hardware)


def activations(components):
    return sum(size for name, size in components.items() if name not in STATES | LIBRARIES)


# States

P = count_parameters(LLAMA.model).total
MATRICES = 32 * layer_matrices(LLAMA.model)


@pytest.mark.parametrize(
    ("precision", "fields", "wanted"),
    [
        ("bf16", {}, {"weights": 2 * P, "gradients": 4 * P, "main weights": 4 * P / 32, "optimizer states": 8 * P / 32}),
        (
            "bf16",
            {"grad_reduce_in_fp32": False},
            {"weights": 2 * P, "gradients": 2 * P, "main weights": 4 * P / 32, "optimizer states": 8 * P / 32},
        ),
        (
            "bf16",
            {"moments_dtype": "bf16"},
            {"weights": 2 * P, "gradients": 4 * P, "main weights": 4 * P / 32, "optimizer states": 4 * P / 32},
        ),
        ("fp32", {}, {"weights": 4 * P, "gradients": 4 * P, "optimizer states": 8 * P / 32}),
        (
            "fp8_delayed",
            {},
            {
                "weights": 2 * P,
                "FP8 weights": 2 * MATRICES,
                "gradients": 4 * P,
                "main weights": 4 * P / 32,
                "optimizer states": 8 * P / 32,
            },
        ),
        (
            "fp8_delayed",
            {"fp8_param_gather": True},
            {
                "weights": 2 * (P - MATRICES),
                "FP8 weights": 2 * MATRICES,
                "gradients": 4 * P,
                "main weights": 4 * P / 32,
                "optimizer states": 8 * P / 32,
            },
        ),
    ],
    ids=["bf16", "bf16 gradients", "bf16 moments", "fp32", "fp8", "fp8 gathered"],
)
def test_states_by_hand(precision, fields, wanted):
    (stage,) = memory(precision=precision, precision_fields=fields).stages
    assert {name: size for name, size in stage.by_component.items() if name in STATES} == pytest.approx(wanted)


def test_states_without_a_distributed_optimizer_are_whole():
    (stage,) = memory(distributed_optimizer=False).stages
    assert stage.by_component["main weights"] == 4 * P and stage.by_component["optimizer states"] == 8 * P


def test_context_parallel_ranks_share_the_optimizer():
    (stage,) = memory(cp=2).stages
    assert stage.by_component["optimizer states"] == 8 * P / 32


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_states_follow_the_parameters_of_each_stage(pp):
    found = memory(tp=2, pp=pp)
    counts = [count.total for count in count_by_stage(LLAMA.model, layout=found.layout)]
    assert [stage.by_component["weights"] for stage in found.stages] == [2 * count for count in counts]
    dp = 32 // (2 * pp)
    assert [stage.by_component["optimizer states"] for stage in found.stages] == pytest.approx([8 * n / dp for n in counts])
    assert sum(counts) * 2 >= P  # norms are on both ranks


# Activations


def test_a_layer_in_bf16_by_hand():
    """Two norms' inputs (2 bytes) and 1/rms (4), QKV's, fc1's and fc2's inputs, fc1's output, q, k, v, the attention's output,
    the logarithms of its sums; llama3_8b, 4,096 tokens."""
    tokens, hidden, ffn = 4096, 4096, 14336
    norms = 2 * (2 * hidden + 4)
    attention = 2 * hidden + 2 * 4096 + 2 * 2 * 1024 + 4 * 32 + 2 * 4096
    mlp = 2 * hidden + 2 * 2 * ffn + 2 * ffn
    by_kind = memory().activations.layer
    assert by_kind == pytest.approx(
        {"residual and norms": norms * tokens, "attention": attention * tokens, "mlp": mlp * tokens}
    )


def test_logits_by_hand():
    """Of the last stage: input of the output matrix and, of transformer-engine's loss, the logits, in place of which their
    gradient comes, with three fp32 numbers a token; of Megatron's own, fp32 softmax, labels, and bf16 logits beside it for a
    moment."""
    tokens, vocabulary = 4096, LLAMA.model.padded_vocab_size
    found = {
        impl: memory(cross_entropy_fusion_impl=impl).stages[0].by_component["logits and loss"] for impl in ("te", "native")
    }
    assert found["te"] == tokens * (2 * 4096 + 2 * vocabulary + 12)
    assert found["native"] == tokens * (2 * 4096 + 4 * vocabulary + 9 + 2 * vocabulary)
    first, last = memory(pp=2, batch=512).stages
    assert "logits and loss" not in first.by_component and "logits and loss" in last.by_component


def test_moments_in_bf16_are_in_fp32_at_the_update():
    """transformer-engine's optimizer casts all of them: it counts where activations, gone by then, have taken less."""
    layout = dict(num_nodes=1, recompute="full")
    in_bf16 = memory(precision_fields=dict(moments_dtype="bf16"), **layout).stages[0].by_component
    assert in_bf16["moments in fp32"] == pytest.approx(8 * P / 8 - activations(in_bf16))
    assert "moments in fp32" not in memory(**layout).stages[0].by_component
    assert "moments in fp32" not in memory(precision_fields=dict(moments_dtype="bf16")).stages[0].by_component


def test_layers_on_the_host():
    """All but the two that are on their way."""
    (kept,), (away,) = memory().stages, memory(cpu_offloading_num_layers=20).stages
    for name in ("activations: attention", "activations: mlp"):
        assert away.by_component[name] == pytest.approx(kept.by_component[name] * 14 / 32)


def test_microbatches_in_flight():
    """1F1B: stage i of 4 holds 4 - i microbatches."""
    found = memory(pp=4, tp=2)
    one = found.activations.layer["mlp"]
    assert [stage.by_component["activations: mlp"] / one for stage in found.stages] == pytest.approx([4 * 8, 3 * 8, 2 * 8, 8])


def test_no_more_microbatches_are_in_flight_than_there_are():
    found = memory(pp=4, tp=1, batch=16)
    assert found.num_microbatches == 2
    one = found.activations.layer["mlp"]
    assert [stage.by_component["activations: mlp"] / one for stage in found.stages] == pytest.approx([16, 16, 16, 8])


def test_interleaving_holds_more():
    """Narayanan et al. 2021: up to 1 + (pp - 1) / (pp vpp) times as much on the first stage."""
    plain, interleaved = memory(pp=4, tp=2), memory(pp=4, tp=2, vpp=2)
    parts = [found.stages[0].by_component["activations: mlp"] for found in (plain, interleaved)]
    assert parts[1] / parts[0] == pytest.approx(1 + 3 / 8)


@pytest.mark.parametrize("changes", [{"tp": 2, "sequence_parallel": True}, {"cp": 2}])
def test_activations_are_split(changes):
    whole, split = memory().activations.layer, memory(**changes).activations.layer
    assert split == pytest.approx({name: size / 2 for name, size in whole.items()})


def test_a_micro_batch_of_two_holds_twice_as_much():
    one, two = memory().stages[0].by_component, memory(micro_batch_size=2).stages[0].by_component
    assert activations(two) == pytest.approx(2 * activations(one))
    assert {name: two[name] for name in STATES & set(two)} == {name: one[name] for name in STATES & set(one)}


def test_recomputation_keeps_less():
    none, mlp, full = memory(), memory(recompute="selective"), memory(recompute="full")
    totals = [found.peak.total for found in (none, mlp, full)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 3
    # Whole layers keep their input, and one of them is there in full while it is computed again.
    parts = full.stages[0].by_component
    assert parts["activations: residual and norms"] == pytest.approx(32 * 2 * 4096 * 4096 + 4096 * (2 * 4096 + 4))
    layer = sum(none.activations.layer.values())
    assert parts["activations: recomputed"] == pytest.approx(layer - 2 * 4096 * 4096)


def test_fp8_keeps_smaller_activations_of_linear_layers():
    plain, fp8 = memory().activations.layer["mlp"], memory(precision="fp8_tensorwise").activations.layer["mlp"]
    assert plain - fp8 == 4096 * (4096 + 14336)  # a byte less of both inputs


# Libraries, sums and the fullest stage


def test_what_libraries_hold():
    (stage,) = memory().stages
    parts = stage.by_component
    assert parts["CUDA context"] == CONTEXT_BYTES
    assert parts["communication buffers"] == 2 * COMMUNICATOR_BYTES  # data parallel, and the world
    assert parts["allocator slack"] == pytest.approx(SLACK * activations(parts))
    assert not LIBRARIES & set(memory(DEMO, precision="fp32").stages[0].by_component)


LAYOUTS = st.fixed_dictionaries(
    {
        "pp": st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
        "vpp": st.integers(1, 6),
        "tp": st.sampled_from([1, 2, 8]),
        "micro_batch_size": st.sampled_from([1, 2]),
        "recompute": st.sampled_from(["none", "selective", "full"]),
        "distributed_optimizer": st.booleans(),
    }
)


@settings(deadline=None, max_examples=150)
@given(
    changes=LAYOUTS,
    per_chunk=st.integers(1, 4),
    groups=st.integers(1, 5),
    split=st.sampled_from(["even", "counted", "first", "last", "both"]),
    ends=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    precision=st.sampled_from(["bf16", "fp8_tensorwise"]),
    vocabulary=st.sampled_from([1024, 262144]),
)
def test_the_peak_is_that_of_all_stages(changes, per_chunk, groups, split, ends, precision, vocabulary):
    """`peak_gib` looks at a few stages: brute force over all of them."""
    pp = changes["pp"]
    vpp = changes["vpp"] if pp > 1 else 1
    first, last = ends[0] * vpp, ends[1] * vpp
    layers, extra = pp * vpp * per_chunk, {}
    if pp > 1 and split == "counted" and per_chunk > 1:
        layers -= 2
        extra = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    elif pp > 2 and split != "even" and split != "counted":
        own = {"first": {"first": first}, "last": {"last": last}, "both": {"first": first, "last": last}}[split]
        layers = (pp - len(own)) * vpp * per_chunk + sum(own.values())
        extra = {f"num_layers_in_{end}_pipeline_stage": count for end, count in own.items()}
    config = replace(LLAMA, model=replace(LLAMA.model, num_layers=layers, padded_vocab_size=vocabulary))
    dp = 4
    changes = {**changes, **extra, "vpp": vpp, "sequence_parallel": changes["tp"] > 1}
    world = changes["tp"] * pp * dp
    config = replace(config, cluster=replace(config.cluster, num_nodes=world, gpus_per_node=1))
    batch = dp * changes["micro_batch_size"] * (pp * groups if vpp > 1 else groups)
    found = memory(config, precision=precision, batch=batch, **changes)
    totals = [stage.total for stage in found.stages]
    assert found.peak_gib == pytest.approx(max(totals) / GIB)
    assert found.peak.total == max(totals)


@pytest.mark.parametrize("config", [PRETRAIN, MIDTRAIN, LLAMA, DEMO], ids=["pretrain", "midtrain", "llama", "cpu"])
def test_the_document_adds_up(config):
    (found,) = plan_document(config)
    sizes = found["memory_gib"]
    for stage in sizes["by_stage"]:
        assert stage["total"] == pytest.approx(sum(stage["by_component"].values()))
    fullest = max(sizes["by_stage"], key=lambda stage: stage["total"])
    assert (sizes["peak"], sizes["by_component"]) == (fullest["total"], fullest["by_component"])
    assert [stage["stage"] for stage in sizes["by_stage"]] == list(range(found["layout"]["pp"]))
    assert sizes["capacity"] == (79.1 if config is not DEMO else None)


def test_cpu_ranks_have_memory_and_no_time():
    (found,) = plan_document(DEMO)
    assert found["memory_gib"]["peak"] > 0
    assert (found["step_time_s"], found["mfu"], found["days"], found["refusals"]) == (None, None, None, [])


def test_what_does_not_fit_says_so_and_what_would():
    config = compose_run(["run=phi4", "stage=pretrain", "layout=dp"])
    (found,) = plan_document(config)
    (line,) = found["refusals"]
    peak = found["memory_gib"]["peak"]
    assert peak > 79.1 and f"needs {peak:.1f} GiB" in line and "a GPU has 79.1" in line
    words = nearest_words(config.stages[0], config=config)
    (mended,) = plan_document(compose_run(["run=phi4", "stage=pretrain", "layout=dp", *words.split()]))
    assert mended["refusals"] == [] and mended["memory_gib"]["peak"] < 79.1


# Rehearsals


def test_rehearsals_of_the_same_layout_are_read(tmp_path):
    config = replace(PRETRAIN, run=replace(PRETRAIN.run, runs_dir=str(tmp_path)))
    stage = config.stages[0]
    row = {
        "stage": "pretrain", "hardware": "h100_sxm", "layout": asdict(stage.layout), "precision": "bf16", "seq_length": 4096,
        "pipeline_stage": 0, "microbatch_s": 0.15, "peak_gib": 41.5, "date": "2026-11-21",
    }  # fmt: skip
    folder = tmp_path / "phi4" / FOLDER
    folder.mkdir(parents=True)
    others = [row | {"hardware": "h200_sxm"}, row | {"precision": "fp8"}, row | {"layout": {}}, {"stage": "pretrain"}, [], 3]
    for index, content in enumerate([row | {"pipeline_stage": 1}, row, *others]):
        (folder / f"{index}.json").write_text(json.dumps(content))
    (folder / "torn.json").write_text("{")
    (found,) = plan_document(config)
    assert [(row["pipeline_stage"], row["microbatch_s"], row["peak_gib"]) for row in found["rehearsals"]] == [
        (0, 0.15, 41.5),
        (1, 0.15, 41.5),
    ]
    assert found["step_time_s"] == plan_document(PRETRAIN)[0]["step_time_s"]
