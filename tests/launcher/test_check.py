"""Rules between fields: each breach with the message expected, all at once; what passes divides."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.check import check_run
from launcher.config.check_mixture import check_amounts, check_caps
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError, LayoutError
from launcher.config.reading import SourceSize, assumed_sizes
from launcher.plan.stage import plan_stage

DEMO = compose_run(["run=demo"])
PHI4 = compose_run(["run=phi4"])
ONE = "stage=demo_pretrain"
GRAPHS = ["run=phi4", "stage=pretrain", "layout.cuda_graph_impl=local"]
OFFLOADED = ["run=phi4", "stage=pretrain", "layout.cpu_offloading_num_layers=4"]


MIDTRAIN, LLAMA = "stage=demo_midtrain", "model.family=llama"


def scaled(kind, factor, *, original=128, beta_fast="null", beta_slow="null"):
    """An override that scales rotary angles."""
    lengths = f"factor: {factor}, original_max_position_embeddings: {original}"
    return f"stage.rope_scaling={{rope_type: {kind}, {lengths}, beta_fast: {beta_fast}, beta_slow: {beta_slow}}}"


def problems(overrides):
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    return caught.value


def with_stage(config, index, **sections):
    """The config with sections of one stage changed field by field."""
    stage = config.stages[index]
    changed = replace(stage, **{name: replace(getattr(stage, name), **fields) for name, fields in sections.items()})
    return replace(config, stages=(*config.stages[:index], changed, *config.stages[index + 1 :]))


# overrides, path, parts of the message
LAYOUTS = [
    ([ONE, "layout.pp=2", "layout.cp=2"], "layout.tp", ["tp * pp * cp (4) must divide the 2 ranks of cluster local"]),
    ([ONE, "stage.global_batch_size=20"], "stage.global_batch_size", ["micro_batch_size * dp (8 * 2)", "global_batch_size=16"]),
    ([ONE, "layout.vpp=2"], "layout.vpp", ["layout.pp is 1"]),
    (["stage=demo_midtrain", "layout.vpp=2", "stage.global_batch_size=6"], "layout.vpp", ["3 is no multiple of 2"]),
    (["stage=demo_midtrain", "model.num_layers=3"], "layout.pp", ["pp * vpp (2) must divide model.num_layers (3)"]),
    ([ONE, "layout.tp=2", "model.ffn_hidden_size=351"], "layout.tp", ["model.ffn_hidden_size (351)"]),
    (
        [ONE, "layout.tp=2", "model.num_query_groups=1", "model.padded_vocab_size=4097"],
        "layout.tp",
        ["padded_vocab_size (4097)"],
    ),
    (
        [
            ONE,
            "layout.tp=6",
            "model.num_attention_heads=12",
            "model.num_query_groups=4",
            "model.hidden_size=384",
            "model.ffn_hidden_size=384",
            "model.padded_vocab_size=4098",
            "cluster.gpus_per_node=6",
            "stage.global_batch_size=8",
        ],
        "layout.tp",
        ["model.num_query_groups (4)", "one of 1, 2"],
    ),
    ([ONE, "layout.sequence_parallel=true"], "layout.sequence_parallel", ["layout.tp is 1"]),
    (
        [ONE, "layout.sequence_parallel=true", "layout.tp=2", "stage.seq_length=1", "stage.global_batch_size=8"],
        "stage.seq_length",
        ["tp * cp (2) must divide it"],
    ),
    ([ONE, "layout.cp=2", "stage.seq_length=2"], "stage.seq_length", ["2 * cp (4) must divide it"]),
    (
        [ONE, "layout.cp=2", "layout.cp_comm_type=a2a", "model.num_query_groups=1"],
        "layout.cp_comm_type",
        ["must divide the 1 of model.num_query_groups", "layout.cp_comm_type=p2p"],
    ),
    ([ONE, "layout.cuda_graph_impl=local"], "layout.cuda_graph_impl", ["is CPU ranks", "layout.cuda_graph_impl=none"]),
    ([*GRAPHS, "layout.recompute=full"], "layout.cuda_graph_impl", ["wholly computed again"]),
    ([*GRAPHS, "stage.reset_attention_mask=true"], "layout.cuda_graph_impl", ["differ from one micro batch to the next"]),
    (
        [*GRAPHS, "layout.recompute=selective", "model.hidden_dropout=0.1"],
        "layout.cuda_graph_impl",
        ["draws no random numbers"],
    ),
    (
        [*GRAPHS, "stage.rampup_batch_size={start: 2880, increment: 2880, tokens: 1e9}", "layout.vpp=1"],
        "layout.cuda_graph_impl",
        ["and the batch grows"],
    ),
    ([ONE, "layout.cpu_offloading_num_layers=1"], "layout.cpu_offloading_num_layers", ["is CPU ranks"]),
    ([*OFFLOADED, "layout.pp=2"], "layout.cpu_offloading_num_layers", ["without a pipeline"]),
    ([*OFFLOADED, "layout.pp=1", "layout.vpp=1", "layout.recompute=full"], "layout.cpu_offloading_num_layers", ["not both"]),
    (
        [ONE, "layout.overlap_param_gather=true", "layout.overlap_grad_reduce=true", "layout.distributed_optimizer=false"],
        "layout.overlap_param_gather",
        ["needs layout.distributed_optimizer"],
    ),
    ([ONE, "layout.overlap_param_gather=true"], "layout.overlap_param_gather", ["needs layout.overlap_grad_reduce"]),
    (
        [ONE, "stage.rampup_batch_size={start: 8, increment: 8, tokens: 1e5}"],
        "stage.rampup_batch_size",
        ["a batch of 8", "a multiple of 16", "start and increment that are multiples of 16"],
    ),
    (
        [ONE, "stage.rampup_batch_size={start: 16, increment: 8, tokens: 1e5}"],
        "stage.rampup_batch_size",
        ["a batch of 24", "a multiple of 16"],
    ),
    (
        ["stage=demo_midtrain", "layout.vpp=2", "stage.rampup_batch_size={start: 2, increment: 2, tokens: 1e5}"],
        "stage.rampup_batch_size",
        ["a batch of 2", "a multiple of 4", "* pp with virtual stages"],
    ),
]
LONG = "+mixture.sources.code_long="
CONFIGS = [
    ([ONE, "mixture.sources.code.inputs=[]"], "mixture.sources.code.inputs", ["a source is made from files", "or a parent"]),
    ([ONE, "mixture.sources.code.format=null"], "mixture.sources.code.format", ["found nothing", "jsonl, parquet, text"]),
    (
        [ONE, "+mixture.sources.code.parent=prose", "+mixture.sources.code.min_document_tokens=8192"],
        "mixture.sources.code.inputs",
        ["it is the long documents of prose, which has the inputs", "leave inputs and format out"],
    ),
    ([ONE, LONG + "{parent: code, share: 0.0}"], "mixture.sources.code_long.parent", ["found code", "set both, or neither"]),
    (
        [ONE, "+mixture.sources.code.min_document_tokens=8192"],
        "mixture.sources.code.min_document_tokens",
        ["found 8192", "parent names it", "set both, or neither"],
    ),
    (
        [ONE, LONG + "{parent: nowhere, min_document_tokens: 8192, share: 0.0}"],
        "mixture.sources.code_long.parent",
        ["found nowhere", "another source of the run", "code, prose, reference"],
    ),
    (
        [ONE, LONG + "{parent: code_long, min_document_tokens: 8192, share: 0.0}"],
        "mixture.sources.code_long.parent",
        ["found code_long", "with inputs of its own"],
    ),
    (
        [ONE, LONG + "{parent: code, min_document_tokens: 1000, share: 0.0}"],
        "mixture.sources.code_long.min_document_tokens",
        ["found 1000", "from 8192, 16384 tokens up"],
    ),
    (
        [ONE, "+mixture.sources.more={inputs: [x], format: text}"],
        "mixture.sources.more",
        ["found no amount", "in the mixture or in one of its phases", "mixture.sources.more.share=0.1 (0: not read)"],
    ),
    ([ONE, "+mixture.sources.code.tokens=5e4"], "mixture.sources.code", ["share 0.5 and tokens 50000", "keep one of them"]),
    (
        [ONE, "+mixture.phases=[{start_tokens: 1e6, sources: {novels: {share: 1.0}}}]"],
        "mixture.phases.0.sources.novels",
        ["a phase reads sources of the mixture (code, reference, prose)", "describe it under mixture.sources"],
    ),
    (
        [ONE, "+mixture.phases=[{start_tokens: 1e9, sources: {code: {share: 1.0}}}]"],
        "mixture.phases.0.start_tokens",
        ["found 1e+09", "it would never start", "raise stage.tokens"],
    ),
    (
        [ONE, "+mixture.phases=[{start_tokens: 1e6, sources: {code: {share: 0.5}}}]"],
        "mixture.phases.0.sources",
        ["in sum 0.5", "must sum to 1"],
    ),
    ([ONE, "stage.replay_from_tokens=0"], "stage.replay_from_tokens", ["it starts from none", "replay_from_tokens=null"]),
    (["stage.replay_from_tokens=2.5e6"], "stage.replay_from_tokens", ["stage demo_pretrain ends at 2.5e+06 tokens"]),
    ([ONE, "data.length_buckets=[16384,8192]"], "data.length_buckets", ["longer than the one before", "[8192,16384]"]),
    ([ONE, "data.length_buckets=[8192,8192]"], "data.length_buckets", ["[8192, 8192]", "data.length_buckets=[8192]"]),
    ([ONE, "stage.reset_position_ids=true"], "stage.reset_position_ids", ["no effect", "reset_attention_mask=true as well"]),
    (
        ["run=phi4", "stage=pretrain", "stage.reset_attention_mask=true", "layout.micro_batch_size=2"],
        "layout.micro_batch_size",
        ["which take one row", "stage.reset_attention_mask=false"],
    ),
    (
        ["run=phi4", "stage=pretrain", "stage.reset_attention_mask=true", "layout.cp=2", "layout.cp_comm_type=all_gather"],
        "layout.cp_comm_type",
        ["do not go with it", "p2p, or stage.reset_attention_mask=false"],
    ),
    (
        [ONE, "stage.rampup_batch_size={start: 64, increment: 8, tokens: 1e5}"],
        "stage.rampup_batch_size",
        ["64 in steps of 8", "must reach stage.global_batch_size (32)"],
    ),
    (
        [ONE, "layout.micro_batch_size=1", "stage.rampup_batch_size={start: 8, increment: 16, tokens: 1e5}"],
        "stage.rampup_batch_size",
        ["8 in steps of 16", "start=16, or an increment that divides the difference"],
    ),
    ([ONE, "mixture.sources.code.share=0.6"], "mixture.sources", ["in sum 1.1", "must sum to 1", "code 0.545455"]),
    ([ONE, "stage.seq_length=100"], "stage.seq_length", ["chunks of data.chunk_tokens (4096)", "data.chunk_tokens=4100"]),
    ([ONE, "stage.tokens=100"], "stage.tokens", ["one global batch of 4096 tokens"]),
    ([ONE, "stage.validation.max_tokens=100"], "stage.validation.max_tokens", ["one window of stage.seq_length (128)"]),
    (["stage.init_from=demo_midtrain"], "stage.init_from", ["must name a stage before"]),
    ([ONE, "stage.init_from=elsewhere"], "stage.init_from", ["there is none", "stage.init_from=null"]),
    (["run.stages=[demo_pretrain,demo_pretrain]"], "run.stages", ["demo_pretrain twice"]),
    ([ONE, "optim.warmup_tokens=3e6"], "optim.warmup_tokens", ["warm-up must end before the stage does", "2.5e+06"]),
    ([ONE, "optim.min_lr=1"], "optim.min_lr", ["falls from optim.lr (0.003)"]),
    ([ONE, "optim.keep_moments=true"], "optim.keep_moments", ["stage.init_from names nothing", "Fix: false"]),
    ([ONE, LLAMA, scaled("linear", 2.0, beta_fast=32)], "stage.rope_scaling.beta_fast", ["all frequencies alike"]),
    ([ONE, LLAMA, scaled("yarn", 2.0)], "stage.rope_scaling.beta_fast", ["beta_fast is the larger", "32 beta_slow=1"]),
    ([ONE, LLAMA, scaled("yarn", 2.0, beta_fast=1, beta_slow=32)], "stage.rope_scaling.beta_fast", ["is the larger"]),
    ([ONE, LLAMA, scaled("linear", 1.5, original=64)], "stage.rope_scaling.factor", ["reaches 96 positions", "Fix: factor=2"]),
    ([ONE, scaled("linear", 2.0)], "stage.rope_scaling", ["found linear", "could not be exported", "model.family=llama"]),
    ([ONE, LLAMA, scaled("longrope", 2.0)], "stage.rope_scaling.rope_type", ["'linear' or 'yarn'"]),
    ([ONE, LLAMA, scaled("linear", 1.0)], "stage.rope_scaling.factor", ["greater than 1"]),
    (["model.vocab_size=5000"], "model.padded_vocab_size", ["must hold model.vocab_size (5000)", "5120"]),
    (["model.num_query_groups=3"], "model.num_query_groups", ["must divide model.num_attention_heads (4)"]),
    (["model.kv_channels=31", "model.hidden_size=124"], "model.kv_channels", ["even"]),
    (["model.hidden_size=256"], "model.hidden_size", ["num_attention_heads * kv_channels (128)", "model.family=null"]),
    (["model.activation=gelu"], "model.activation", ["family phi3", "model.activation=swiglu"]),
    (["model.normalization=layernorm"], "model.normalization", ["family phi3"]),
    (["model.attention_bias=true"], "model.attention_bias", ["family phi3"]),
    (["model.family=llama", "model.mlp_bias=true"], "model.mlp_bias", ["family llama"]),
    (["tokenizer.kind=cl100k"], "tokenizer.ranks_file", ["kind cl100k reads it"]),
    (["tokenizer.file=null"], "tokenizer.file", ["kind huggingface reads it"]),
    (["cluster.num_nodes=2"], "cluster.num_nodes", ["this machine alone"]),
    (["data.group_tokens=10000"], "data.group_tokens", ["whole chunks", "data.group_tokens=8192"]),
    (["precision=fp8_delayed"], "precision.fp8", ["CPU ranks", "silently train in higher precision", "precision=bf16"]),
    (["run=phi4", "precision=fp8_delayed", "precision.params_dtype=fp32"], "precision.params_dtype", ["bf16"]),
    (["run=phi4", "precision=fp8_delayed", "precision.fp8_format=null"], "precision.fp8_format", ["e4m3 or hybrid"]),
    (["precision.fp8_param_gather=true"], "precision.fp8_param_gather", ["precision.fp8 is null"]),
    (
        [
            "run=phi4",
            "stage=pretrain",
            "precision=fp8_tensorwise",
            "precision.fp8_param_gather=true",
            "layout.distributed_optimizer=false",
            "layout.overlap_param_gather=false",
        ],
        "precision.fp8_param_gather",
        ["by the distributed optimizer"],
    ),
    (["precision.moments_dtype=bf16"], "precision.moments_dtype", ["is CPU ranks", "precision.moments_dtype=fp32"]),
    (
        [
            "run=phi4",
            "stage=pretrain",
            "precision.moments_dtype=bf16",
            "layout.distributed_optimizer=false",
            "layout.overlap_param_gather=false",
        ],
        "precision.moments_dtype",
        ["is a distributed optimizer"],
    ),
    (
        ["run=phi4", "precision=fp8_delayed", "precision.fp8_param_gather=true", "precision.moments_dtype=bf16"],
        "precision.moments_dtype",
        ["inside transformer-engine's optimizer", "precision=fp8_tensorwise"],
    ),
    (["run.name=../x"], "run.name", ["letters, digits"]),
    (["precision.fp8_format=e4m3"], "precision.fp8_format", ["precision.fp8 is null"]),
    (
        ["run=phi4", "precision=fp8_tensorwise", "precision.num_layers_at_end_in_bf16=40"],
        "precision.num_layers_at_end_in_bf16",
        ["40", "Megatron allows num_layers / pp, 20"],
    ),
    (
        ["run=phi4", "precision=fp8_delayed", "precision.num_layers_at_start_in_bf16=1"],
        "precision.num_layers_at_start_in_bf16",
        ["delayed scaling keeps no layers in bf16"],
    ),
    (["run=phi4", "precision=fp8_delayed", "model.ffn_hidden_size=17944"], "precision.fp8", ["multiples of 16", "8972"]),
    (["run=phi4", "precision=fp8_blockwise", "model.ffn_hidden_size=17952"], "precision.fp8", ["multiples of 128", "8976"]),
]


def expect(error, path, parts):
    found = {problem.path: str(problem) for problem in error.problems}
    ours = next(
        (text for name, text in found.items() if name.split(" (")[0] == path and all(part in text for part in parts)), None
    )
    assert ours is not None, str(error)


@pytest.mark.parametrize(("overrides", "path", "parts"), LAYOUTS, ids=[" ".join(bad[0][1:3]) for bad in LAYOUTS])
def test_layout_that_does_not_fit(overrides, path, parts):
    expect(problems(overrides), path, parts)


@pytest.mark.parametrize(("overrides", "path", "parts"), CONFIGS, ids=[" ".join(bad[0])[-60:] for bad in CONFIGS])
def test_config_that_cannot_be_run(overrides, path, parts):
    error = problems(overrides)
    expect(error, path, parts)
    assert not isinstance(error, LayoutError)


def test_layout_problems_alone_are_a_layout_error():
    assert isinstance(problems([ONE, "layout.vpp=3"]), LayoutError)
    assert not isinstance(problems([ONE, "layout.vpp=3", "optim.min_lr=1"]), LayoutError)


def test_all_problems_are_reported_together():
    words = [ONE, "layout.vpp=3", "optim.min_lr=1", "model.kv_channels=31", "cluster.num_nodes=2", "stage.tokens=1"]
    words += ["layout.cp=3"]
    paths = {problem.path for problem in problems(words).problems}
    wanted = {"layout.vpp", "layout.tp", "optim.min_lr", "model.kv_channels", "cluster.num_nodes", "stage.tokens"}
    assert wanted <= paths


def test_a_problem_of_one_stage_names_it_and_of_all_stages_does_not():
    found = problems(["stage.global_batch_size=12"]).problems
    assert [problem.path for problem in found] == ["stage.global_batch_size (stage demo_pretrain)"]
    assert [problem.path for problem in problems(["precision=fp8_delayed"]).problems] == ["precision.fp8"]


def test_sequences_may_not_become_shorter():
    with pytest.raises(ConfigError, match="must not be shorter than in demo_pretrain"):
        check_run(with_stage(DEMO, 1, stage={"seq_length": 64}))


def test_moments_are_kept_of_an_optimizer_of_the_same_form():
    check_run(with_stage(DEMO, 1, optim={"keep_moments": True}))
    with pytest.raises(ConfigError, match=r"found false; .*that of stage demo_pretrain, which has true.*keep_moments=false"):
        check_run(with_stage(DEMO, 1, optim={"keep_moments": True}, layout={"distributed_optimizer": False}))


def test_a_stage_is_where_rotary_angles_may_change():
    """Base and scaling, also where sequences stay as long as they were."""
    check_run(with_stage(DEMO, 1, stage={"seq_length": 128, "rotary_base": 5000}))
    config = compose_run([MIDTRAIN, LLAMA, scaled("yarn", 4.0, beta_fast=32, beta_slow=1), "stage.rotary_base=10000"])
    assert config.stages[0].stage.rope_scaling.factor == 4.0


def test_one_name_is_one_source_for_the_whole_run():
    code = replace(DEMO.stages[1].mixture.sources["code"], inputs=("elsewhere/*",))
    sources = {**DEMO.stages[1].mixture.sources, "code": code}
    with pytest.raises(ConfigError, match="one name is one source") as caught:
        check_run(with_stage(DEMO, 1, mixture={"sources": sources}))
    assert caught.value.problems[0].path == "mixture.sources.code.inputs (stage demo_midtrain)"


def test_masks_on_cpu_ranks_take_any_micro_batch():
    check_run(with_stage(DEMO, 0, stage={"reset_attention_mask": True}, layout={"micro_batch_size": 8}))


def test_a_bucket_may_be_read_beside_a_parent_that_is_not():
    words = ["mixture.sources.code.share=0", LONG + "{parent: code, min_document_tokens: 8192, share: 0.5}"]
    assert compose_run(["run=demo", ONE, *words]).stages[0].mixture.sources["code_long"].parent == "code"


def test_epochs_of_a_source_of_unknown_size_wait_for_its_manifest():
    words = ["run=demo", ONE, "mixture.sources.code.share=null", "+mixture.sources.code.epochs=2"]
    with pytest.raises(ConfigError, match="shares of what tokens and epochs leave must sum to 1"):
        compose_run([*words, "+mixture.sources.code.unique_tokens=1e5"])
    config = compose_run(words)
    found = list(check_amounts(config, sizes={}, prepared=True))
    assert [(stage, problem.path) for stage, problem in found] == [("demo_pretrain", "mixture.sources.code.epochs")]


def test_family_null_trains_what_cannot_be_exported():
    model = compose_run(["model.family=null", "model.activation=squared_relu", "model.normalization=layernorm"]).model
    assert model.family is None


def test_phi4_keeps_its_caps_at_its_horizon_and_no_longer():
    check_run(PHI4)
    with pytest.raises(ConfigError) as caught:
        check_run(with_stage(PHI4, 0, stage={"tokens": 1.1e13}))
    paths = [problem.path for problem in caught.value.problems]
    assert "mixture.sources.synthetic.max_epochs (stage pretrain)" in paths
    assert "epochs by the end of it" in str(caught.value)


def test_caps_count_what_earlier_stages_read():
    """synthetic: 13.517 epochs in pretraining, 13.759 with midtraining."""
    source = replace(PHI4.stages[0].mixture.sources["synthetic"], max_epochs=13.6)
    capped = PHI4
    for index, stage in enumerate(PHI4.stages):
        capped = with_stage(capped, index, mixture={"sources": {**stage.mixture.sources, "synthetic": source}})
    shares = [stage.mixture.sources["synthetic"].share for stage in PHI4.stages]
    capped = with_stage(
        capped, 1, mixture={"sources": {**capped.stages[1].mixture.sources, "synthetic": replace(source, share=shares[1])}}
    )
    assert [stage for stage, _ in check_caps(capped, sizes=assumed_sizes(capped))] == ["midtrain"]
    assert "13.76 epochs" in str(next(iter(check_caps(capped, sizes=assumed_sizes(capped))))[1])


def test_caps_use_the_counted_tokens_where_there_are_some():
    found = list(check_caps(PHI4, sizes={**assumed_sizes(PHI4), "web": SourceSize(10**9)}))
    assert {stage for stage, _ in found} == {"pretrain", "midtrain"}
    assert all(problem.path == "mixture.sources.web.max_epochs" for _, problem in found)


@given(parts=st.lists(st.integers(1, 10**6), min_size=3, max_size=3))
def test_shares_in_proportion_pass_whatever_the_rounding(parts):
    total = sum(parts)
    sources = DEMO.stages[0].mixture.sources
    shared = {name: replace(source, share=part / total) for (name, source), part in zip(sources.items(), parts, strict=True)}
    check_run(with_stage(replace(DEMO, stages=DEMO.stages[:1]), 0, mixture={"sources": shared}))


sizes = st.sampled_from([1, 2, 3, 4, 5, 8, 10])


@given(tp=sizes, pp=sizes, vpp=sizes, cp=st.sampled_from([1, 2, 4]), mbs=sizes, nodes=st.sampled_from([1, 30, 240]))
def test_a_layout_that_passes_divides_everything(tp, pp, vpp, cp, mbs, nodes):
    fields = {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "micro_batch_size": mbs, "sequence_parallel": tp > 1}
    pretrain = replace(PHI4, stages=PHI4.stages[:1], cluster=replace(PHI4.cluster, num_nodes=nodes))
    config = with_stage(pretrain, 0, layout=fields)
    world, model = config.cluster.world_size, config.model
    try:
        check_run(config)
    except LayoutError:
        pp_divides = model.num_layers % (pp * vpp) == 0 and (vpp == 1 or pp > 1)
        tp_divides = all(size % tp == 0 for size in (40, 17920, 100352)) and (10 % tp == 0 or tp % 10 == 0)
        dp = world // (tp * pp * cp) if world % (tp * pp * cp) == 0 else 0
        batch_divides = dp > 0 and 5760 % (mbs * dp) == 0 and (vpp == 1 or 5760 // (mbs * dp) % pp == 0)
        assert not (pp_divides and tp_divides and batch_divides)
        return
    plan = plan_stage(config.stages[0], cluster=config.cluster)
    assert plan.data_parallel_size * tp * pp * cp == world
    assert plan.num_microbatches * mbs * plan.data_parallel_size == 5760
    assert math.prod((plan.tokens_per_step, plan.num_steps)) >= 9.8e12 > plan.tokens_per_step * (plan.num_steps - 1)
