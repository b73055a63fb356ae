"""The weight gradients of megatron-core's own linear layers, added to their sums over microbatches by the product that computes
them. On GPUs that is the LM head alone: transformer-engine's layers do it themselves. Apex has a kernel for it; this stands in
where apex is absent.

Shapes: T tokens (any number of dimensions), O outputs, I inputs.
"""

from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers


def accumulate(inputs_TI: torch.Tensor, gradients_TO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
    """main_grad += gradients^T @ inputs, summed in main_grad's type. A product of bf16 is added in fp32 without a rounding, or
    a tensor, in between."""
    inputs, gradients = inputs_TI.flatten(0, -2), gradients_TO.flatten(0, -2)
    if inputs.is_cuda and inputs.dtype != main_grad_OI.dtype:
        torch.ops.aten.addmm.dtype_out(main_grad_OI, gradients.t(), inputs, main_grad_OI.dtype, out=main_grad_OI)
    else:
        main_grad_OI.addmm_(gradients.t().to(main_grad_OI.dtype), inputs.to(main_grad_OI.dtype))


def install() -> None:
    """Where megatron-core has found no apex. It looks the functions up by apex's names."""
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
        )
        layers._grad_accum_fusion_available = True
