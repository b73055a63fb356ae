"""From the config to megatron's: what is set, what is left at megatron-core's default and why, and the models that come out."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import TypeAdapter

from launcher.config.schema import ModelConfig
from launcher.plan.parameters import ParameterCount, count_by_stage, count_parameters
from tests.training.world import cpu_seams, model, one_rank, stage
from training import model as training_model
from training import optimizer as training_optimizer
from training.errors import PrecisionError, exit_class
from training.model import _layout_fields, build_chunk, build_model, transformer_config
from training.optimizer import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MODELS = Path(__file__).resolve().parents[2] / "model_configs" / "model"

# Every field of megatron-core's dataclasses that Phidias leaves at its default, by the reason. The tests below fail where a
# release adds a field, where a listed one is now set, and where an unlisted one is left: read what it does, then decide.
TRANSFORMER_DEFAULTS = {
    "no mixture of experts": """
        num_moe_experts expert_model_parallel_size expert_tensor_parallel_size moe_extended_tp moe_layer_freq
        moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap
        moe_router_load_balancing_type moe_router_topk moe_enable_routing_replay moe_router_topk_limited_devices
        moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_num_groups moe_router_group_topk
        moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype
        moe_router_enable_expert_bias moe_router_bias_update_rate moe_router_force_load_balancing moe_grouped_gemm
        moe_use_legacy_grouped_gemm moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_token_dropping
        moe_enable_deepep moe_flex_dispatcher_backend moe_per_layer_logging
        moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy moe_layer_recompute
        moe_permute_fusion moe_router_fusion moe_apply_probs_on_input moe_latent_size moe_deepep_num_sms moe_hybridep_num_sms
        overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release
        use_fused_weighted_squared_relu""",
    "plain causal softmax attention with rotary positions in every layer": """
        multi_latent_attention softmax_type window_size window_attn_skip_freq qk_layernorm qk_l2_norm qk_clip
        qk_clip_alpha qk_clip_threshold log_max_attention_logit attention_output_gate no_rope_freq rotary_interleaved
        fused_single_qkv_rope mrope_section experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim
        dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_attention_freq linear_conv_kernel_dim
        linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads""",
    "pre-norm layers as phi and llama have them: residual in the compute type, norm weights around one, plain activations": """
        apply_residual_connection_post_layernorm fp32_residual_connection layernorm_zero_centered_gamma glu_linear_offset
        activation_func_clamp_value""",
    "no multi-token prediction": "mtp_num_layers mtp_loss_scaling_factor mtp_standalone",
    "no Mamba or other hybrid blocks": """
        is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path
        heterogeneous_block_specs hetereogenous_dist_checkpoint""",
    "training.initialize draws the weights": "embedding_init_method_std init_model_with_meta_device",
    "stages as four numbers of the layout say, in Megatron's depth-first order": """
        pipeline_model_parallel_layout microbatch_group_size_per_vp_stage""",
    "transport of pipelines: torch's own send and receive, NCCL, the synchronisation that megatron holds necessary": """
        pipeline_model_parallel_comm_backend use_ring_exchange_p2p batch_p2p_sync overlap_p2p_comm_warmup_flush""",
    "one level of context parallelism over sequences of equal length": """
        hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel""",
    "how tensor-parallel communication overlaps, where it does, is transformer-engine's usual way": """
        tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
        tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv
        tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend symmetric_ar_type""",
    "deprecated, ignored by megatron": "async_tensor_model_parallel_allreduce fp8_interval",
    "training.step.connect sets it on the built model": """
        finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func""",
    "Phidias measures steps itself": "timers barrier_with_L1_time config_logger_dir",
    "weights and activations are in params_dtype; no autocast": "enable_autocast disable_bf16_reduced_precision_matmul",
    "modes for inference and tests": "batch_invariant_mode test_mode",
    "the spec chooses the layers; transformer-engine chooses its attention kernel; its activations are not used": """
        transformer_impl attention_backend use_te_activation_func activation_func_fp8_input_store memory_efficient_layer_norm
        use_te_rng_tracker""",
    "of transformer-engine's recipes the usual form: GEMMs only, amax reduced over every rank that shares a tensor": """
        fp8_quantizer_factory fp8_margin fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red
        disable_parameter_transpose_cache""",
    "no FP4, no other quantisation library": """
        fp4 fp4_recipe fp4_param fp4_quantizer_factory quant_recipe use_kitchen use_kitchen_attention
        kitchen_attention_backend""",
    "recomputation is for every micro batch alike, and saved activations stay where they are": """
        num_microbatches_with_partial_activation_checkpoints distribute_saved_activations""",
    "whole layers are offloaded; Megatron sets the context itself": """
        _cpu_offloading_context cpu_offloading_double_buffering fine_grained_activation_offloading offload_modules
        min_offloaded_tensor_size""",
    "the embedding's gradients are computed with the others": "defer_embedding_wgrad_compute wgrad_deferral_limit",
    "the clone lets the embedding's input be freed": "clone_scatter_output_in_embedding",
    "CUDA graphs as Megatron captures them; deprecated names": """
        enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
        external_cuda_graph""",
    "inference only": """
        flash_decode inference_rng_tracker inference_sampling_seed use_inference_optimized_layers
        inference_fuse_tp_communication mlp_chunks_for_prefill""",
}
# Set where the stage asks for it; its default is right elsewhere.
TRANSFORMER_CONDITIONAL = {
    "recompute": "recompute_method recompute_num_layers recompute_modules",
    "fp8": """
        fp8_recipe fp8_param fp8_amax_history_len fp8_amax_compute_algo first_last_layers_bf16 num_layers_at_start_in_bf16
        num_layers_at_end_in_bf16""",
}
DDP_DEFAULTS = {
    "one distributed optimizer over all data-parallel ranks": "num_distributed_optimizer_instances",
    "Megatron's bucket size and schedule; to be measured on a cluster before it is changed": """
        pad_buckets_for_high_nccl_busbw align_param_gather""",
    "gradients are reduced in fp32 already": "reduce_scatter_with_fp32_accumulation",
    "the loop judges loss and gradient norm itself (training/health.py)": "check_for_large_grads",
    "MXFP8 is for Blackwell": "reuse_grad_buf_for_mxfp8_param_ag",
    "no FSDP": """
        use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy outer_dp_sharding_strategy
        gradient_reduce_div_fusion suggested_communication_unit_size preserve_fp32_weights keep_fp8_transpose_cache
        fsdp_double_buffer fsdp_manual_registration""",
    "no NCCL user buffers": "nccl_ub disable_symmetric_registration",
    "no mixture of experts": "delay_wgrad_compute",
}
OPTIMIZER_DEFAULTS = {
    "one learning rate for every parameter": "decoupled_lr decoupled_min_lr",
    "no norms on queries and keys": "apply_wd_to_qk_layernorm",
    "main weights and gradients in fp32": "store_param_remainders main_grads_dtype main_params_dtype",
    "fp16 only: bf16 needs no loss scaling": "loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    "other optimizers": """
        sgd_momentum muon_momentum muon_split_qkv muon_use_nesterov muon_scale_mode muon_fp32_matmul_prec muon_num_ns_steps
        muon_tp_mode muon_extra_scale_factor""",
    "MXFP8 is for Blackwell": "reuse_grad_buf_for_mxfp8_param_ag",
    "experimental in megatron; the gather overlaps with the forward pass instead": "overlap_param_gather_with_optimizer_step",
    "no offloading to the host": """
        optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d
        pin_cpu_grads pin_cpu_params""",
    "Phidias measures steps itself": "log_num_zeros_in_grad barrier_with_L1_time timers config_logger_dir",
}

Capture = Callable[..., dict[str, Any]]

FP8 = dict(params_dtype="bf16", fp8="tensorwise", fp8_format="hybrid", num_layers_at_start_in_bf16=1)
STAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "selective": dict(layout=dict(recompute="selective")),
    "full": dict(layout=dict(recompute="full")),
    "fp8": dict(precision=FP8),
    "pipeline": dict(layout=dict(pp=2, vpp=2)),
}


@pytest.fixture(autouse=True)
def seams() -> Iterator[None]:
    with cpu_seams():
        yield


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """The arguments that a stage gives megatron's TransformerConfig, as on a machine where FP8 can be had."""
    monkeypatch.setattr(training_model, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(training_model, "engine_version", lambda: "2.11.0")
    monkeypatch.setattr(training_model, "unavailable", lambda recipe: "")
    monkeypatch.setattr(training_model, "TransformerConfig", lambda **arguments: arguments)
    return lambda **changes: transformer_config(stage(**changes), model=model())


def names(table: dict[str, str]) -> set[str]:
    found = [name for row in table.values() for name in row.split()]
    assert len(found) == len(set(found)), "a field stands under two reasons"
    return set(found)


def fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def test_every_default_of_the_transformer_config_is_known(capture: Capture) -> None:
    from megatron.core.transformer import TransformerConfig

    given = [set(capture(**changes)) for changes in STAGES.values()]
    assert fields(TransformerConfig) - set.union(*given) == names(TRANSFORMER_DEFAULTS)
    assert set.union(*given) - set.intersection(*given) == names(TRANSFORMER_CONDITIONAL)


def test_every_default_of_ddp_and_optimizer_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, set[str]] = {}

    def record(module: Any, name: str) -> type:
        real: type = getattr(module, name)

        def build(**arguments: Any) -> Any:
            given[name] = set(arguments)
            return real(**arguments)

        monkeypatch.setattr(module, name, build)
        return real

    ddp = record(training_model, "DistributedDataParallelConfig")
    optimizer = record(training_optimizer, "OptimizerConfig")
    with one_rank(stage().layout):
        build_optimizer(stage(), chunks=build_model(stage(), model=model(), seed=7))
    assert fields(ddp) - given["DistributedDataParallelConfig"] == names(DDP_DEFAULTS)
    assert fields(optimizer) - given["OptimizerConfig"] == names(OPTIMIZER_DEFAULTS)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_without_transformer_engine_is_refused(recipe: str) -> None:
    wanted = stage(precision={**FP8, "fp8": recipe})
    with pytest.raises(
        PrecisionError, match="precision=bf16, or run on Hopper GPUs with pip install 'phidias\\[gpu\\]'"
    ) as caught:
        transformer_config(wanted, model=model())
    assert repr(recipe) in str(caught.value)
    assert exit_class(caught.value).name == "REFUSED"
    with one_rank(wanted.layout), pytest.raises(PrecisionError):
        build_model(wanted, model=model(), seed=7)


def test_fp8_reaches_megatron(capture: Capture) -> None:
    precision = dict(FP8, fp8="blockwise", fp8_format="e4m3", fp8_param_gather=True, num_layers_at_end_in_bf16=2)
    found = capture(precision=precision)
    assert {name: value for name, value in found.items() if name.startswith(("fp8", "first", "num_layers_at"))} == dict(
        fp8="e4m3",
        fp8_recipe="blockwise",
        fp8_param=True,
        fp8_amax_history_len=16,
        fp8_amax_compute_algo="max",
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=2,
    )
    assert capture(precision=dict(FP8, num_layers_at_start_in_bf16=0))["first_last_layers_bf16"] is False


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(dtype: str, expected: torch.dtype) -> None:
    config = transformer_config(stage(precision=dict(params_dtype=dtype)), model=model())
    assert (config.params_dtype, config.pipeline_dtype, config.autocast_dtype) == (expected,) * 3
    assert (config.bf16, config.fp16, config.fp8) == (dtype == "bf16", False, None)
    assert config.attention_softmax_in_fp32
    assert config.calculate_per_token_loss


RECOMPUTE = {
    "none": (None, None, None, ["core_attn"]),  # megatron fills in the modules; without granularity they say nothing
    "selective": ("selective", None, None, ["core_attn"]),
    "full": ("full", "uniform", 1, ["core_attn"]),
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute(recompute: str) -> None:
    config = transformer_config(stage(layout=dict(recompute=recompute)), model=model())
    found = config.recompute_granularity, config.recompute_method, config.recompute_num_layers, config.recompute_modules
    assert found == RECOMPUTE[recompute]


@pytest.mark.parametrize("vpp", [1, 2])
def test_outputs_are_not_freed_while_they_are_sent(vpp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPU ranks, whose interleaved stages overlap what they send with what they compute."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fields = _layout_fields(stage(layout=dict(pp=2, vpp=vpp)).layout, has_variable_lengths=False)
    assert fields["overlap_p2p_comm"] == (vpp == 2)
    assert fields["deallocate_pipeline_outputs"] == (vpp == 1)


def test_layout() -> None:
    layout = dict(tp=2, pp=2, vpp=2, cp=2, sequence_parallel=True)
    config = transformer_config(stage(layout=layout), model=model())
    assert config.tensor_model_parallel_size == 2
    assert config.pipeline_model_parallel_size == 2
    assert config.virtual_pipeline_model_parallel_size == 2
    assert config.context_parallel_size == 2
    assert config.sequence_parallel
    assert config.cp_comm_type == "p2p"
    assert config.deallocate_pipeline_outputs
    for cp_comm_type in ("p2p", "a2a", "all_gather"):
        found = transformer_config(stage(layout=dict(layout, cp_comm_type=cp_comm_type)), model=model())
        assert found.cp_comm_type == cp_comm_type
    alone = transformer_config(stage(), model=model())
    assert alone.virtual_pipeline_model_parallel_size is None
    assert alone.cp_comm_type is None
    assert not alone.sequence_parallel


@pytest.mark.parametrize(("cuda", "vpp", "batched", "overlapped"), [
    (False, 1, False, False), (False, 2, False, False), (True, 1, True, False), (True, 2, False, True),
])  # fmt: skip
def test_pipeline_transport(
    cuda: bool,
    vpp: int,
    batched: bool,
    overlapped: bool,
    capture: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    found = capture(layout=dict(pp=2, vpp=vpp))
    assert (found["batch_p2p_comm"], found["overlap_p2p_comm"]) == (batched, overlapped)


@pytest.mark.parametrize(("masked", "cp", "variable"), [(True, 2, True), (True, 1, False), (False, 2, False)])
def test_packed_rows_vary_in_length_under_context_parallelism(
    masked: bool, cp: int, variable: bool, capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = capture(layout=dict(pp=2, vpp=2, cp=cp), stage=dict(reset_attention_mask=masked))
    assert found["variable_seq_lengths"] == variable


def test_activations_and_norms() -> None:
    x = torch.linspace(-2, 2, 9)
    expected = {"swiglu": (True, F.silu(x)), "gelu": (False, F.gelu(x)), "squared_relu": (False, x.clamp(min=0) ** 2)}
    for activation, (gated, values) in expected.items():
        config = transformer_config(stage(), model=model(activation=activation))
        assert config.gated_linear_unit == gated
        assert torch.allclose(config.activation_func(x), values)
    assert transformer_config(stage(), model=model()).normalization == "RMSNorm"
    assert transformer_config(stage(), model=model(normalization="layernorm")).normalization == "LayerNorm"


@pytest.mark.parametrize(("overlap", "distributed"), [(True, True), (False, True), (False, False)])
def test_ddp(overlap: bool, distributed: bool) -> None:
    layout = dict(overlap_grad_reduce=overlap, overlap_param_gather=overlap, distributed_optimizer=distributed)
    wanted = stage(layout=layout, precision=dict(params_dtype="bf16"))
    with one_rank(wanted.layout):
        (chunk,) = build_model(wanted, model=model(), seed=7)
    config = chunk.ddp_config
    assert (config.overlap_grad_reduce, config.overlap_param_gather) == (overlap, overlap)
    assert config.use_distributed_optimizer == distributed
    assert config.grad_reduce_in_fp32
    assert not config.check_for_nan_in_grad  # the loop judges, on all ranks alike
    assert {p.dtype for p in chunk.parameters()} == {torch.bfloat16}
    assert {p.main_grad.dtype for p in chunk.parameters()} == {torch.float32}


# phi4_14b: 40 heads of 128, 4 heads a group, ffn 3.5 times hidden; here 8 heads of 16.
PHI4_SMALL = dict(
    num_layers=5, hidden_size=128, num_attention_heads=8, num_query_groups=2, kv_channels=16, ffn_hidden_size=448,
    vocab_size=1003, padded_vocab_size=1024,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "phi4 scaled down": PHI4_SMALL,
    "phi4 scaled down, tied": dict(PHI4_SMALL, tied_embeddings=True),
    "gelu": dict(activation="gelu"),
    "squared relu": dict(activation="squared_relu"),
    "layernorm": dict(normalization="layernorm"),
    "attention bias": dict(attention_bias=True),
    "mlp bias": dict(mlp_bias=True),
    "both biases, gated": dict(attention_bias=True, mlp_bias=True),
    "GPT-2 like": dict(activation="gelu", normalization="layernorm", mlp_bias=True, tied_embeddings=True, num_query_groups=4),
    "heads wider than hidden": dict(kv_channels=24),
    "one group": dict(num_query_groups=1),
}


def sizes(chunk: torch.nn.Module) -> ParameterCount:
    """Parameters of a built chunk: embedding, layers, and the last norm with the head."""
    counts = dict.fromkeys(("embedding", "layers", "head"), 0)
    for name, parameter in chunk.named_parameters():
        part = "embedding" if name.startswith("embedding.") else "layers" if ".layers." in name else "head"
        counts[part] += parameter.numel()
    return ParameterCount(**counts)


def built(wanted: ModelConfig, **layout: Any) -> ParameterCount:
    config = stage(layout=layout)
    return sizes(build_chunk(config, model=wanted, config=transformer_config(config, model=wanted), vp_stage=None))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_of_the_built_model(name: str) -> None:
    wanted = model(**VARIANTS[name])
    with one_rank(stage().layout):
        assert built(wanted) == count_parameters(wanted)


@pytest.mark.parametrize(("name", "total"), [("phi4_14b", 14_659_507_200), ("llama3_8b", 8_030_261_248)])
def test_parameter_count_of_released_models(name: str, total: int) -> None:
    """The real model, on the meta device: shapes without memory."""
    wanted = TypeAdapter(ModelConfig).validate_python(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))
    with one_rank(stage().layout), torch.device("meta"):
        assert built(wanted) == count_parameters(wanted)
    assert count_parameters(wanted).total == total


@pytest.mark.parametrize("name", ["tiny", "GPT-2 like", "both biases, gated"])
@pytest.mark.parametrize("layout", [dict(tp=2), dict(pp=2), dict(tp=2, pp=2, sequence_parallel=True)], ids=str)
def test_parameter_count_by_rank(layout: dict[str, Any], name: str) -> None:
    """What each rank of a pipeline builds is what the plan says it holds."""
    wanted, config = model(**VARIANTS[name]), stage(layout=layout)
    world_size = config.layout.model_parallel_size
    for rank in range(world_size):
        with one_rank(config.layout, rank=rank, world_size=world_size) as place:
            assert built(wanted, **layout) == count_by_stage(wanted, layout=config.layout)[place.pp_rank]


def test_rotary_base_is_the_stages() -> None:
    config = stage(stage=dict(rotary_base=250_000))
    with one_rank(config.layout):
        chunk = build_chunk(config, model=model(), config=transformer_config(config, model=model()), vp_stage=None)
    expected = 250_000.0 ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(chunk.rotary_pos_emb.inv_freq, expected)
