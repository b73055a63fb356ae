"""What of the kernels that GPU ranks choose can be seen without a GPU."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord

from launcher.rundir.paths import RunDir
from tests.training.test_step import batch_of
from tests.training.world import cpu_seams, model, one_rank, stage
from training import model as training_model
from training import wgrad
from training.checkpoint import Checkpointer
from training.errors import PrecisionError
from training.initialize import set_weight
from training.model import _kernel_fields, build_model, refuse_unfit_engine
from training.optimizer import build_optimizer
from training.step import Flags, Stepper, eagerly

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def seams() -> Iterator[None]:
    with cpu_seams():
        yield


# Weight gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_to_what_is_there(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs, gradients = (torch.randn(6, 4, size, generator=generator).to(dtype) for size in (24, 16))
    before = torch.randn(16, 24, generator=generator)
    total = before.clone()
    wgrad.accumulate(inputs, gradients, total)
    exact = before.double() + gradients.double().flatten(0, 1).t() @ inputs.double().flatten(0, 1)
    assert torch.allclose(total.double(), exact, rtol=0, atol=1e-5)  # in fp32, also where the factors are bf16


def gradients_of(monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> tuple[dict[str, torch.Tensor], float]:
    """Of two microbatches, and the loss."""
    kernels = _kernel_fields
    monkeypatch.setattr(
        training_model, "_kernel_fields", lambda layout: kernels(layout) | {"gradient_accumulation_fusion": fused}
    )
    config = stage(layout=dict(micro_batch_size=2))
    with one_rank(config.layout) as rank:
        chunks = build_model(config, model=model(), seed=7)
        stepper = Stepper(config, chunks=chunks, optimizer=build_optimizer(config, chunks=chunks), rank=rank)
        batches = [batch_of([0, 1], seed=seed) for seed in range(2)]
        result = stepper.gradients(batches, num_microbatches=2, flags=Flags())
        return {name: one.main_grad.clone() for name, one in chunks[0].named_parameters()}, result.sums.loss


def test_a_model_whose_gradients_are_fused_has_the_same(seams: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core calls the stand-in for apex's kernel; every one of its linear layers does, on the CPU."""
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    plain, loss = gradients_of(monkeypatch, fused=False)
    calls: list[torch.Size] = []

    def counted(*tensors: torch.Tensor) -> None:
        calls.append(tensors[2].shape)
        real(*tensors)

    real = wgrad.accumulate
    monkeypatch.setattr(wgrad, "accumulate", counted)
    fused, same = gradients_of(monkeypatch, fused=True)
    assert same == loss
    assert len(calls) == 2 * (4 * 4 + 1), "two microbatches of four matrices in four layers, and the head"
    for name, gradient in plain.items():
        assert torch.allclose(fused[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())), name


def test_apex_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    apex = SimpleNamespace()
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", apex, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    wgrad.install()
    assert layers.fused_weight_gradient_mlp_cuda is apex


# What reaches Megatron


@pytest.mark.parametrize(
    ("impl", "on_gpu", "expected"),
    [
        ("te", True, (True, "te")),
        ("native", True, (True, "native")),
        ("none", True, (False, "native")),
        ("te", False, (False, "native")),
    ],
)
def test_the_kernel_of_the_loss(impl: str, on_gpu: bool, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(training_model, "engine_version", lambda: "2.11.0")
    found = _kernel_fields(stage(layout=dict(cross_entropy_fusion_impl=impl)).layout)
    assert (found["cross_entropy_loss_fusion"], found["cross_entropy_fusion_impl"]) == expected
    assert found["gradient_accumulation_fusion"] == on_gpu


def test_a_loss_kernel_that_mixes_tokens_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training_model, "engine_version", lambda: "2.10.0")
    assert _kernel_fields(stage(layout=dict(cross_entropy_fusion_impl="native")).layout)["cross_entropy_loss_fusion"]
    with pytest.raises(
        PrecisionError, match=r"found te with transformer-engine 2\.10\.0.*Fix: layout\.cross_entropy_fusion_impl=n"
    ):
        _kernel_fields(stage(layout=dict(cross_entropy_fusion_impl="te")).layout)


def test_graphs_and_offloading_reach_megatron() -> None:
    plain, asked = (_kernel_fields(stage(layout=layout).layout) for layout in ({}, dict(cuda_graph_impl="local")))
    assert (plain["cuda_graph_impl"], asked["cuda_graph_impl"], asked["cuda_graph_scope"]) == ("none", "local", [])
    away = _kernel_fields(stage(layout=dict(cpu_offloading_num_layers=3)).layout)
    assert (plain["cpu_offloading"], away["cpu_offloading"], away["cpu_offloading_num_layers"]) == (False, True, 3)


def test_evaluation_replays_no_graph_and_training_does_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_CudagraphGlobalRecord, "cudagraph_created", True)
    with pytest.raises(RuntimeError), eagerly():
        assert not _CudagraphGlobalRecord.cudagraph_created
        raise RuntimeError
    assert _CudagraphGlobalRecord.cudagraph_created


# transformer-engine


@pytest.mark.parametrize("found", ["2.8.0", "2.12.0", "1.14.0+abc", "3.0"])
def test_another_engine_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_model, "engine_version", lambda: found)
    with pytest.raises(PrecisionError, match=f"found transformer-engine {found.split('+')[0]}.*2.9 up to, not including, 2.12"):
        refuse_unfit_engine(stage().precision)


def test_a_recipe_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_model, "engine_version", lambda: "2.11.0")
    monkeypatch.setattr(training_model, "unavailable", lambda recipe: "CUDA 12.9 needed." if recipe == "blockwise" else "")
    refuse_unfit_engine(stage(precision=dict(params_dtype="bf16", fp8="delayed", fp8_format="hybrid")).precision)
    with pytest.raises(PrecisionError, match=r"'blockwise', which transformer-engine 2\.11\.0 does not compute here: CUDA 12"):
        refuse_unfit_engine(stage(precision=dict(params_dtype="bf16", fp8="blockwise", fp8_format="e4m3")).precision)


def as_in_fp8(parameter: Any) -> None:
    """With what transformer-engine gives a parameter that it keeps in FP8: a value from before it was drawn."""
    parameter._high_precision_init_val = torch.full_like(parameter, 9.0, requires_grad=False)
    parameter.get_high_precision_init_val = lambda: parameter._high_precision_init_val
    parameter.clear_high_precision_init_val = lambda: delattr(parameter, "_high_precision_init_val")


def test_a_weight_in_fp8_gives_its_main_weight_the_value_that_was_drawn() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    as_in_fp8(parameter)
    value = torch.arange(4.0)
    set_weight(parameter, value)
    assert torch.equal(parameter._high_precision_init_val, value.bfloat16())  # type: ignore[attr-defined]
    plain = torch.nn.Parameter(torch.zeros(4))
    set_weight(plain, value)
    assert torch.equal(plain, value) and not hasattr(plain, "_high_precision_init_val")


def test_imported_weights_in_fp8_reach_the_optimizer_unrounded(seams: None, tmp_path: Path) -> None:
    """Pretended: the parameter holds something else than the value that was written, as one rounded to FP8 does."""
    config = stage(precision=dict(params_dtype="bf16"), layout=dict(distributed_optimizer=True))
    with one_rank(config.layout):
        chunks = build_model(config, model=model(), seed=7)
        optimizer = build_optimizer(config, chunks=chunks)
        checkpointer = Checkpointer(RunDir(tmp_path), stage="a", layout=config.layout, chunks=chunks, optimizer=optimizer)
        rounded, other = (chunks[0].module.module.decoder.layers[index].mlp.linear_fc1.weight for index in (0, 1))
        as_in_fp8(rounded)
        values = [torch.randn(rounded.shape, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (1, 2)]
        with torch.no_grad():
            for parameter, value in zip((rounded, other), values, strict=True):
                set_weight(parameter, value)
            rounded.fill_(0.25)
        checkpointer.take_main_weights()
        found = [parameter.main_param.view(rounded.shape) for parameter in (rounded, other)]
        assert all(torch.equal(main, value.float()) for main, value in zip(found, values, strict=True))
        assert not hasattr(rounded, "_high_precision_init_val")
