"""Support for running megatron-core 0.16.1 on CPU ranks over gloo. `install()` before anything of megatron is built.

megatron-core asks for CUDA in a few places even where the work is device-neutral. Nothing of the model, the schedules, the
optimizer or the checkpoints is replaced: these are the six seams, and tests/training/test_cpu_support.py fails when a new
release moves one.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class CudaToCpu(TorchFunctionMode):
    """Reads `cuda` as `cpu` in factory calls, `.to`, `.cuda()` and `.type()`. Costs about 1.5 us an op."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Gradient clipping sorts tensors by their CUDA type name.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class CpuAdam(torch.optim.Optimizer):
    """AdamW with the state layout of TE's and apex's FusedAdam: `step` in the parameter group, moments in the state.

    Megatron's distributed optimizer saves and loads that layout; with torch's own AdamW it shares one `step` tensor between
    all parameters after a load, and the loss diverges."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ):
        if not (adam_w_mode and bias_correction):
            raise ValueError("CpuAdam is AdamW with bias correction only")
        super().__init__(params, dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state, grad, (beta1, beta2), step = self.state[param], param.grad, group["betas"], group["step"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))


def install() -> None:
    """Installs the six seams, once. Only where CUDA is absent: on a GPU machine megatron runs untouched."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU support is for machines without CUDA")
    if torch.cuda.current_device is _current_device:
        return
    if not any(name.startswith("megatron.core") for name in sys.modules):
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # where it is installed: its kernels are CUDA's
    _import_megatron()
    torch.cuda.current_device = _current_device
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
    CudaToCpu().__enter__()
    _install_rng_tracker()
    _install_adam()


def _import_megatron() -> None:
    """Imports megatron-core without what it loads for others: it hands fused functions to torch.compile, which loads Inductor,
    and looks for wandb, for its inference engine. CPU ranks call neither, and start 2.9 s of a core earlier; another second is
    Dynamo, which optimizers load to say that they are not to be compiled."""
    compile_, hidden = torch.compile, "wandb" not in sys.modules
    torch.compile = _uncompiled
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        import megatron.core.models.gpt
        import megatron.core.optimizer  # noqa: F401
    finally:
        torch.compile = compile_
        if hidden:
            del sys.modules["wandb"]
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name).__wrapped__
        method.__dynamo_disable = method  # where torch._compile keeps what it made of it


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return _uncompiled if function is None else function


def _current_device() -> torch.device:
    return CPU


def _install_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random

    class CpuRngStatesTracker(random.CudaRNGStatesTracker):
        """Named states of the one CPU generator, so that dropout differs between tensor-parallel ranks."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"RNG state {name!r} or seed {seed} is already tracked")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside, outside_name = torch.get_rng_state(), self._current_state_name
            if outside_name != "default-rng":
                self.states_[outside_name] = outside
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_[outside_name] if outside_name != "default-rng" else outside)
                self._current_state_name = outside_name

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    random._CUDA_RNG_STATE_TRACKER = CpuRngStatesTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _install_adam() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = CpuAdam, False
    distrib_optimizer.Adam = CpuAdam
    distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_APEX_OPTIMIZER = True, True
