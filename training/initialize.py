"""Initial weights as a function of the seed and the parameter's name alone.

Each parameter is drawn whole, on the CPU in fp32, from a generator keyed by (seed, global name); the rank keeps its shard. So a
model starts from the same weights in every layout and on every device, and a layer's weights do not change with the depth.
Linear weights and embeddings are normal with init_method_std; the two projections that write into the residual stream are
scaled by 1/sqrt(2 * num_layers) (GPT-2's rule, Megatron's default). Norm weights are one, biases zero.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from launcher.config.schema import ModelConfig

RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")


def leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    """Megatron's init_method while the model is built: initialize_parameters draws every value afterwards."""
    return weight


@torch.no_grad()
def initialize_parameters(chunks: Sequence[GPTModel], *, model: ModelConfig, seed: int, quick: bool = False) -> None:
    """Fills every parameter of this rank's chunks. `quick`: drawn on the device from the same distribution, other values in
    each layout, where nobody trains on them."""
    for name, parameter in (named for chunk in chunks for named in global_parameters(chunk)):
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        elif quick:
            set_weight(parameter, torch.randn(parameter.shape, device=parameter.device) * deviation(name, model))
        else:
            full = draw(name, shape=full_shape(parameter), model=model, seed=seed)
            set_weight(parameter, local_shard(full, parameter, gated=is_gated(name, model)))


@torch.no_grad()
def set_weight(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Also what the optimizer's main weight begins as, where the parameter itself is kept in FP8: transformer-engine keeps a
    value in bf16 beside it until the optimizer has taken it."""
    parameter.copy_(value)
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter._high_precision_init_val = value.to("cpu", parameter.dtype)  # type: ignore[attr-defined]


def global_parameters(chunk: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters under the names they have in the whole model: layers counted from its bottom, a tied head named as the
    embedding it is a copy of."""
    numbers = {f"decoder.layers.{index}": layer.layer_number - 1 for index, layer in enumerate(chunk.decoder.layers)}
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        local = ".".join(parts[:3])
        if local in numbers:
            name = ".".join(["decoder.layers", str(numbers[local]), *parts[3:]])
        if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield name, parameter


def draw(name: str, *, shape: tuple[int, ...], model: ModelConfig, seed: int) -> torch.Tensor:
    """The whole parameter, fp32, on the CPU."""
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "little"))
    return torch.randn(shape, generator=generator, device="cpu") * deviation(name, model)


def deviation(name: str, model: ModelConfig) -> float:
    """Standard deviation of a parameter's initial values."""
    return model.init_method_std * (1 / math.sqrt(2 * model.num_layers) if name.endswith(RESIDUAL_WRITERS) else 1.0)


def is_gated(name: str, model: ModelConfig) -> bool:
    """Whether rows are [gate; up], of which a tensor-parallel rank holds a part of each."""
    return model.activation == "swiglu" and name.endswith("linear_fc1.weight")


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def local_shard(full: torch.Tensor, parameter: torch.nn.Parameter, *, gated: bool) -> torch.Tensor:
    """This tensor-parallel rank's part of the whole parameter."""
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    if gated:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim=parameter.partition_dim)[rank]
