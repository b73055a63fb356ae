"""From the config to Megatron's model: its TransformerConfig with every field that matters set, layer specs, chunks, DDP."""

import re
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from launcher.config.hardware import Hardware
from launcher.config.schema import Layout, ModelConfig, Precision, StageConfig
from launcher.plan.overlap import overlaps_tensor_parallel
from training import wgrad
from training.errors import PrecisionError
from training.initialize import initialize_parameters, leave_uninitialised
from training.modules import CausalAttention, LayerNorm, RMSNorm
from training.packing import is_packed
from training.rope import inverse_frequencies, softmax_scale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Megatron splits the first linear layer of a gated MLP in two; SwiGLU is SiLU on the gate.
ACTIVATIONS = {"swiglu": (True, F.silu), "gelu": (False, F.gelu), "squared_relu": (False, lambda x: torch.square(F.relu(x)))}
NORMS = {"rmsnorm": ("RMSNorm", RMSNorm), "layernorm": ("LayerNorm", LayerNorm)}
# Of transformer-engine, that megatron-core 0.16.1 was made for: from the first one to before the second.
TE_VERSIONS = ((2, 9), (2, 12))
# Whose loss kernel takes gradients of tokens as Megatron gives them, transposed (its pull request 2402).
TE_LOSS = (2, 11)


def have_transformer_engine() -> bool:
    """Whether megatron-core found transformer-engine in this process."""
    from megatron.core.extensions import transformer_engine

    return bool(transformer_engine.HAVE_TE) and torch.cuda.is_available()


def refuse_undeliverable(precision: Precision) -> None:
    """megatron-core without transformer-engine trains in bf16 where FP8 was asked for, and says nothing. Refuse instead, and
    where transformer-engine is another one or cannot compute the recipe on this device."""
    if torch.cuda.is_available() and not have_transformer_engine():
        raise PrecisionError(
            "found a GPU without transformer-engine; the layers and the optimizer of GPU ranks come from it. "
            "Fix: pip install 'phidias[gpu]', or cluster.gpu=null to train on the CPU"
        )
    if precision.fp8 and not have_transformer_engine():
        raise PrecisionError(
            f"precision.fp8: found {precision.fp8!r} on a machine without transformer-engine or CUDA; FP8 would silently "
            "become bf16. Fix: precision=bf16, or run on Hopper GPUs with pip install 'phidias[gpu]'"
        )
    if have_transformer_engine():
        refuse_unfit_engine(precision)


def refuse_unfit_engine(precision: Precision) -> None:
    found, first, end = engine_version(), *(".".join(map(str, bound)) for bound in TE_VERSIONS)
    if not TE_VERSIONS[0] <= release(found) < TE_VERSIONS[1]:
        raise PrecisionError(
            f"found transformer-engine {found}; megatron-core 0.16.1 is made for {first} up to, not including, {end}. "
            "Fix: pip install 'phidias[gpu]'"
        )
    if precision.fp8 and (reason := unavailable(precision.fp8)):
        raise PrecisionError(
            f"precision.fp8: found {precision.fp8!r}, which transformer-engine {found} does not compute here: {reason} "
            "Fix: another recipe (precision=fp8_tensorwise), or precision=bf16"
        )


def release(found: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", found)[:2])


def engine_version() -> str:
    return version("transformer-engine")


def unavailable(recipe: str) -> str:
    """Why transformer-engine cannot compute an FP8 recipe on this device; empty where it can."""
    from transformer_engine.pytorch import quantization

    is_available = {"blockwise": quantization.is_fp8_block_scaling_available}.get(recipe, quantization.is_fp8_available)
    return str(is_available(return_reason=True)[1])


def transformer_config(stage: StageConfig, *, model: ModelConfig, hardware: Hardware | None = None) -> TransformerConfig:
    """Megatron's config, for a device or, without one, for CPU ranks. What it leaves at megatron-core's default is listed, with
    a reason, in tests/training/test_model.py."""
    refuse_undeliverable(stage.precision)
    gated, activation = ACTIVATIONS[model.activation]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization=NORMS[model.normalization][0],
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=gated,
        activation_func=activation,
        add_bias_linear=model.mlp_bias,
        add_qkv_bias=model.attention_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        attention_softmax_in_fp32=True,
        softmax_scale=softmax_scale(stage.stage, kv_channels=model.kv_channels),
        apply_query_key_layer_scaling=False,
        # Loss is a sum over tokens divided once by their number, whatever the micro batch or the layout.
        calculate_per_token_loss=True,
        # initialize_parameters draws the weights, the same in every layout. (perform_initialization=False would also leave
        # the tensor-parallel marks unset by which gradient clipping counts every weight once.)
        perform_initialization=True,
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        embedding_init_method=leave_uninitialised,
        use_cpu_initialization=not torch.cuda.is_available(),
        # On GPUs the activation, the rotary embedding and the loss are one kernel each, as the planner counts them, and keep
        # less; weight gradients are summed by the product that computes them. None changes the arithmetic asked for. Others
        # have nothing to fuse: a bias or dropout behind attention and MLP, a softmax apart from the attention kernel.
        bias_activation_fusion=fuses_activation(model),
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=torch.cuda.is_available(),
        persist_layer_norm=False,
        deterministic_mode=stage.stage.deterministic,
        tp_comm_overlap=overlaps_tensor_parallel(stage, hardware=hardware) and have_transformer_engine(),
        **_layout_fields(stage.layout, has_variable_lengths=is_packed(stage) and stage.layout.cp > 1),
        **_kernel_fields(stage.layout),
        **_precision_fields(stage.precision),
    )


def _kernel_fields(layout: Layout) -> dict[str, Any]:
    """What of the layout concerns GPUs alone."""
    on_gpu = torch.cuda.is_available()
    impl = layout.cross_entropy_fusion_impl if on_gpu else "none"
    if impl == "te" and release(engine_version()) < TE_LOSS:
        raise PrecisionError(
            f"layout.cross_entropy_fusion_impl: found te with transformer-engine {engine_version()}, whose kernel before 2.11 "
            "scales the gradient of a token by another one's mask. Fix: layout.cross_entropy_fusion_impl=native, or 2.11"
        )
    return dict(
        gradient_accumulation_fusion=on_gpu,
        cross_entropy_loss_fusion=impl != "none",
        cross_entropy_fusion_impl="native" if impl == "none" else impl,
        cuda_graph_impl=layout.cuda_graph_impl,
        cuda_graph_scope=[],  # a whole layer
        cpu_offloading=layout.cpu_offloading_num_layers > 0,
        cpu_offloading_num_layers=layout.cpu_offloading_num_layers,
        cpu_offloading_activations=True,
        cpu_offloading_weights=False,
    )


def fuses_activation(model: ModelConfig) -> bool:
    """Megatron's fused kernels are for GPUs, and for these: SwiGLU, and GELU with a bias."""
    return torch.cuda.is_available() and (model.activation == "swiglu" or (model.activation == "gelu" and model.mlp_bias))


def _layout_fields(layout: Layout, *, has_variable_lengths: bool) -> dict[str, Any]:
    recompute: dict[str, Any] = {
        "none": {"recompute_granularity": None},
        "selective": {"recompute_granularity": "selective", "recompute_modules": list(layout.recompute_modules)},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[layout.recompute]
    overlaps_sends = torch.cuda.is_available() and layout.vpp > 1
    return dict(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=layout.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=layout.num_layers_in_last_pipeline_stage,
        account_for_embedding_in_pipeline_split=layout.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=layout.account_for_loss_in_pipeline_split,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        cp_comm_type=layout.cp_comm_type if layout.cp > 1 else None,
        # gloo has no batched send and receive; with NCCL it is Megatron's default outside interleaving.
        batch_p2p_comm=torch.cuda.is_available() and layout.vpp == 1,
        overlap_p2p_comm=overlaps_sends,
        # The interleaved schedule with overlapped sends would free an output before its send is waited for
        # (schedules.py:1600 and 1634): over gloo, losses were off by up to 2%.
        deallocate_pipeline_outputs=not overlaps_sends,
        # A packed row padded for context parallelism is as long as its documents make it. Interleaving must then overlap: else
        # shapes of both directions go in one batch (p2p_communication.py:212) and cross at pp = 2, between the same two ranks.
        variable_seq_lengths=has_variable_lengths,
        # Without experts it dispatches nothing, but its default refuses variable lengths (transformer_config.py:1827).
        moe_token_dispatcher_type="alltoall",
        **recompute,
    )


def initialize_user_buffers(stage: StageConfig, *, model: ModelConfig) -> None:
    """transformer-engine's buffers, shared by the GPUs of a tensor-parallel group, for communication that hides behind GEMMs:
    of each kind of layer, where FP8 leaves some in bf16. Before the model is built."""
    from transformer_engine.pytorch.module.base import UserBufferQuantizationMode, initialize_ub

    layout, precision = stage.layout, stage.precision
    tokens = stage.stage.seq_length * layout.micro_batch_size // layout.cp
    modes = [UserBufferQuantizationMode.FP8 if precision.fp8 else UserBufferQuantizationMode.NONE]
    if precision.fp8 and (precision.num_layers_at_start_in_bf16 or precision.num_layers_at_end_in_bf16):
        modes.append(UserBufferQuantizationMode.NONE)
    shape = [tokens, model.hidden_size]
    initialize_ub(shape=shape, tp_size=layout.tp, quantization_modes=modes, bootstrap_backend="nccl")


def _precision_fields(precision: Precision) -> dict[str, Any]:
    dtype = DTYPES[precision.params_dtype]
    fields: dict[str, Any] = dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=precision.params_dtype == "bf16",
        fp16=False,
        fp8=None,
    )
    if precision.fp8:
        fields |= dict(
            fp8=precision.fp8_format,
            fp8_recipe=precision.fp8,
            fp8_param=precision.fp8_param_gather,
            fp8_amax_history_len=precision.fp8_amax_history_len,
            fp8_amax_compute_algo="max",
            first_last_layers_bf16=precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16 > 0,
            num_layers_at_start_in_bf16=precision.num_layers_at_start_in_bf16,
            num_layers_at_end_in_bf16=precision.num_layers_at_end_in_bf16,
        )
    return fields


def block_spec(config: TransformerConfig, *, normalization: str, vp_stage: int | None) -> TransformerBlockSubmodules | Any:
    """The layer spec: transformer-engine's on GPUs, otherwise megatron's local one with our norm and core attention."""
    if have_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec()
    norm_name, norm = NORMS[normalization]
    layer = get_gpt_layer_local_spec(normalization=norm_name)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def build_chunk(stage: StageConfig, *, model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> GPTModel:
    """The part of the model this rank holds in one virtual pipeline stage, with memory not yet initialised."""
    chunk = GPTModel(
        config,
        block_spec(config, normalization=model.normalization, vp_stage=vp_stage),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=stage.stage.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        fp16_lm_cross_entropy=False,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=stage.stage.rotary_base,
        rope_scaling=False,  # of Llama 3
        vp_stage=vp_stage,
    )
    if stage.stage.rope_scaling is not None:
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(stage.stage, kv_channels=model.kv_channels)
    return chunk


def build_model(
    stage: StageConfig,
    *,
    model: ModelConfig,
    seed: int,
    hardware: Hardware | None = None,
    bucket_size: int | None = None,
    quick: bool = False,
) -> list[DistributedDataParallel]:
    """This rank's model chunks, initialised from the seed alone and wrapped for data-parallel training. `bucket_size` in
    elements, where it is not Megatron's own for this data-parallel size. `quick`: initialize_parameters says."""
    config, layout = transformer_config(stage, model=model, hardware=hardware), stage.layout
    if config.tp_comm_overlap:
        initialize_user_buffers(stage, model=model)
    if config.gradient_accumulation_fusion:
        wgrad.install()
    stages = range(layout.vpp) if layout.vpp > 1 else [None]
    chunks = [build_chunk(stage, model=model, config=config, vp_stage=vp_stage) for vp_stage in stages]
    initialize_parameters(chunks, model=model, seed=seed, quick=quick)
    if torch.cuda.is_available():
        chunks = [chunk.cuda() for chunk in chunks]
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=stage.precision.grad_reduce_in_fp32,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        bucket_size=bucket_size,
        check_for_nan_in_grad=False,  # the loop judges loss and norm of all ranks, before the weights are touched
        average_in_collective=False,
        fp8_param_gather=bool(stage.precision.fp8 and stage.precision.fp8_param_gather),
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped
