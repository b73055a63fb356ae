"""The weight gradients of megatron-core's own linear layers, added to their sums over microbatches by the product that computes
them. On GPUs that is the LM head alone: transformer-engine's layers do it themselves. Apex has a kernel for it; this stands in
where apex is absent.

Shapes: T tokens (any number of dimensions), O outputs, I inputs.
"""

from functools import cache
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers


def accumulate(inputs_TI: torch.Tensor, gradients_TO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
    """main_grad += gradients^T @ inputs, summed in main_grad's type. A product of bf16 is added in fp32 without a rounding, or
    a tensor, in between, where torch can."""
    inputs, gradients = inputs_TI.flatten(0, -2), gradients_TO.flatten(0, -2)
    if not inputs.is_cuda or inputs.dtype == main_grad_OI.dtype:
        main_grad_OI.addmm_(gradients.t().to(main_grad_OI.dtype), inputs.to(main_grad_OI.dtype))
    elif adds_to_fp32():
        torch.ops.aten.addmm.dtype_out(main_grad_OI, gradients.t(), inputs, main_grad_OI.dtype, out=main_grad_OI)
    else:  # as megatron-core without fusion
        main_grad_OI.add_(gradients.t() @ inputs)


@cache
def adds_to_fp32() -> bool:
    """Whether this torch multiplies in bf16 and adds to fp32: older ones lack the operation, or want one type."""
    one, total = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16), torch.zeros(16, 16, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(total, one, one, torch.float32, out=total)
    except (AttributeError, RuntimeError):
        return False
    return True


def install() -> None:
    """Where megatron-core has found no apex. It looks the functions up by apex's names."""
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
        )
        layers._grad_accum_fusion_available = True
