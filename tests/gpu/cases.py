"""What a case of tests/gpu/test_smoke.py does, in a process of its own: the tiny model trains in one precision and layout, is
saved and loaded. `python -m tests.gpu.cases NAME [--cpu]` prints the results as JSON.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS = 20
# Every dimension of a linear layer, and the tokens of a micro batch, are multiples of 128: blockwise FP8 needs that. The wide
# initial weights move the first loss well away from ln(vocabulary), so that it says something about them.
MODEL = dict(
    hidden_size=256, num_attention_heads=4, num_query_groups=2, kv_channels=64, ffn_hidden_size=512, num_layers=4,
    init_method_std=0.1,
)  # fmt: skip
SEQ_LENGTH, LONG, MICRO_BATCH = 128, 1024, 2
EOD = 249


@dataclass(frozen=True)
class Case:
    """Beside the tiny run's own values. `documents`: kept apart, on a GPU as packed rows, on the CPU by a mask (context
    parallelism needs more GPUs than one). `length`: of a row, on GPUs; activations of LONG ones show in the memory."""

    precision: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    documents: bool = False
    length: int = SEQ_LENGTH


# As in model_configs/precision.
BF16 = dict(name="bf16", params_dtype="bf16")
DELAYED = dict(BF16, fp8="delayed", fp8_format="hybrid", fp8_amax_history_len=1024)
TENSORWISE = dict(BF16, fp8="tensorwise", fp8_format="hybrid", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1)
BLOCKWISE = dict(BF16, fp8="blockwise", fp8_format="e4m3")
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {}, "bf16": BF16, "fp8_delayed": DELAYED, "fp8_tensorwise": TENSORWISE, "fp8_blockwise": BLOCKWISE
}  # fmt: skip
CASES: dict[str, Case] = {
    **{name: Case(precision) for name, precision in PRECISIONS.items()},
    "fp32_documents": Case(documents=True),
    "bf16_documents": Case(BF16, documents=True),
    "graphs": Case(BF16, dict(cuda_graph_impl="local")),
    "graphs_fp8": Case(TENSORWISE, dict(cuda_graph_impl="local")),
    "native_loss": Case(BF16, dict(cross_entropy_fusion_impl="native")),
    "unfused_loss": Case(BF16, dict(cross_entropy_fusion_impl="none")),
    "bf16_moments": Case(dict(BF16, moments_dtype="bf16")),
    "fp8_bf16_moments": Case(dict(DELAYED, moments_dtype="bf16")),
    "tensorwise_gather": Case(dict(TENSORWISE, fp8_param_gather=True)),
    "blockwise_gather": Case(dict(BLOCKWISE, fp8_param_gather=True)),
    "long": Case(BF16, length=LONG),
    "offloading": Case(BF16, dict(cpu_offloading_num_layers=2), length=LONG),
    "recompute_mlp": Case(BF16, dict(recompute="selective", recompute_modules=["mlp"]), length=LONG),
    "recompute_full": Case(BF16, dict(recompute="full"), length=LONG),
}


def train_case(name: str, *, on_cpu: bool) -> dict[str, Any]:
    """Trains STEPS steps on one batch, saves, goes on, loads, goes on again."""
    if on_cpu:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # megatron then takes its local layers
        from training import cpu

        cpu.install()
    from pydantic import TypeAdapter

    from launcher.config.schema import ModelConfig, StageConfig
    from launcher.plan.stage import plan_stage
    from tests.training import tiny
    from training.model import build_model
    from training.optimizer import build_optimizer, build_schedule, set_schedule
    from training.parallel import initialize_parallel, join_world, leave_world
    from training.step import Stepper

    stage = TypeAdapter(StageConfig).validate_python(stage_dict(name, on_cpu=on_cpu))
    model = TypeAdapter(ModelConfig).validate_python({**tiny.MODEL, **MODEL})
    device = join_world(timeout_s=120)
    rank = initialize_parallel(stage.layout, seed=7, device=device, timeout_s=120)
    chunks = build_model(stage, model=model, seed=7)
    optimizer = build_optimizer(stage, chunks=chunks)
    drawn = compare_main_weights(chunks, optimizer=optimizer, model=model)
    plan = plan_stage(stage, cluster=tiny.run_config(Path("unused")).cluster)
    schedule = build_schedule(stage, plan=plan, optimizer=optimizer)
    stepper, batches = Stepper(stage, chunks=chunks, optimizer=optimizer, rank=rank), repeated_batches(stage, device=device)

    def step(index: int) -> tuple[float, float, float]:
        began = time.perf_counter()
        set_schedule(schedule, samples=(index + 1) * MICRO_BATCH)
        sums, norm = stepper.train(batches, num_microbatches=len(batches))
        return sums.loss, norm, time.perf_counter() - began

    losses, norms, seconds = zip(*(step(index) for index in range(STEPS)), strict=True)
    layers = chunks[0].module.module.decoder.layers if "fp32" not in name else None
    result = dict(
        losses=losses,
        norms=norms,
        step_ms=round(1e3 * sorted(seconds)[STEPS // 2], 2),
        layer=type(layers[0].mlp.linear_fc1).__name__ if layers else None,
        packed=batches[0].packed is not None,
        device=str(chunks[0].buffers[0].grad_data.device),
        graphs=sum(len(getattr(layer, "cudagraph_manager", Nothing).cudagraph_runners) for layer in layers or ()),
        moments=moment_types(optimizer),
        step_mib=step_mib(lambda: step(STEPS - 1)) if not on_cpu else None,
        **drawn,
    )
    with tempfile.TemporaryDirectory() as folder:
        result |= check_checkpoint(Path(folder), stage=stage, chunks=chunks, optimizer=optimizer, step=step)
    leave_world()
    return result


class Nothing:
    """A layer that is not captured."""

    cudagraph_runners: tuple[Any, ...] = ()


def stage_dict(name: str, *, on_cpu: bool) -> dict[str, Any]:
    from tests.training import tiny

    case = CASES[name]
    length = SEQ_LENGTH if on_cpu else case.length
    return tiny.stage_config(
        precision=case.precision,
        layout=dict(micro_batch_size=1 if case.documents else MICRO_BATCH, **case.layout),
        stage=dict(
            seq_length=length, global_batch_size=MICRO_BATCH, tokens=2.0 * STEPS * length * MICRO_BATCH,
            reset_attention_mask=case.documents, reset_position_ids=case.documents,
        ),
        optim=dict(lr=2e-4, min_lr=1e-4, warmup_tokens=0.0),
    )  # fmt: skip


def repeated_batches(stage: Any, *, device: torch.device) -> list[Any]:
    """Two rows, each a micro batch where documents are apart. They also end at a row's beginning and at its end."""
    from training.batch import micro_batches, stream_rows

    shape = (MICRO_BATCH, stage.stage.seq_length + 1)
    tokens = torch.randint(EOD, shape, generator=torch.Generator().manual_seed(3)).int().numpy()
    tokens[0, [20, 21, 45, 70, 100]] = tokens[1, [0, 33, 66, 99, SEQ_LENGTH - 1]] = EOD
    # Every label counts in all cases: what the masks change is what attention sees.
    masks = dict(reset_attention_mask=stage.stage.reset_attention_mask, eod_mask_loss=False)
    rows = stream_rows(tokens, source=np.arange(MICRO_BATCH, dtype=np.int32), eod_id=EOD, **masks)
    return micro_batches(rows, stage=stage, device=device)


def compare_main_weights(chunks: Any, *, optimizer: Any, model: Any) -> dict[str, Any]:
    """The fp32 main weights of parameters in bf16 or FP8: how many there are, and those that did not begin as what the seed
    draws, rounded to bf16."""
    from megatron.core.utils import unwrap_model

    from training.initialize import draw, full_shape, global_parameters

    mains = main_weights(optimizer)
    wrong = []
    for name, parameter in (named for chunk in unwrap_model(chunks) for named in global_parameters(chunk)):
        if id(parameter) not in mains:
            continue
        ones = torch.ones(parameter.shape)
        drawn = ones if parameter.dim() == 1 else draw(name, shape=full_shape(parameter), model=model, seed=7).bfloat16()
        if not torch.equal(mains[id(parameter)].detach().cpu().flatten(), drawn.float().flatten()):
            wrong.append(name)
    return dict(main_weights=len(mains), wrong_main_weights=wrong)


def main_weights(optimizer: Any) -> dict[int, torch.Tensor]:
    """By the parameter's id. On one rank the distributed optimizer's shards are whole parameters."""
    return {
        id(parameter): main
        for inner in optimizer.chained_optimizers
        for parameters, mains in zip(inner.model_float16_groups, inner.shard_fp32_from_float16_groups, strict=True)
        for parameter, main in zip(parameters, mains, strict=True)
    }


def moment_types(optimizer: Any) -> list[str]:
    """Of Adam's moments on the device."""
    states = [state for inner in optimizer.chained_optimizers for state in inner.optimizer.state.values()]
    return sorted({str(state[key].dtype) for state in states for key in ("exp_avg", "exp_avg_sq")})


def step_mib(step: Any) -> float:
    """What a step takes at its peak, beside all that stays."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)


def check_checkpoint(folder: Path, *, stage: Any, chunks: Any, optimizer: Any, step: Any) -> dict[str, Any]:
    """Save, two steps, load in place: every weight and moment as at the save, and the next loss the same again."""
    from launcher.rundir.checkpoints import FORMAT_VERSION, Meta, newest_checkpoint
    from launcher.rundir.paths import RunDir
    from training.checkpoint import Checkpointer, layout_key

    run = RunDir(folder / "run")
    checkpointer = Checkpointer(run, stage="pretrain", layout=stage.layout, chunks=chunks, optimizer=optimizer)
    meta = Meta(
        format_version=FORMAT_VERSION, stage="pretrain", step=STEPS, samples=STEPS * MICRO_BATCH, tokens=0, finished=False,
        layout=layout_key(stage.layout), ledger={}, start_ledger={}, tokens_by_source={}, files={},
    )  # fmt: skip
    saved_state = snapshot(chunks, optimizer=optimizer)
    checkpointer.save(meta, policy=stage.stage.checkpoint)
    first = [step(STEPS + index)[0] for index in range(2)]
    moved_state = snapshot(chunks, optimizer=optimizer)
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved is not None, refused
    checkpointer.load(saved, stage.optim)
    loaded_state = snapshot(chunks, optimizer=optimizer)
    second = [step(STEPS + index)[0] for index in range(2)]
    return dict(
        tensors=len(saved_state),
        moved=sum(not torch.equal(saved_state[key], moved_state[key]) for key in saved_state),
        differing=[key for key in saved_state if not torch.equal(saved_state[key], loaded_state[key])],
        after_save=first,
        after_load=second,
    )


def snapshot(chunks: Any, *, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights as they are computed with, the fp32 master weights and the moments; copies."""
    found = {f"weight {i} {name}": p for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    for i, inner in enumerate(optimizer.chained_optimizers):
        for j, group in enumerate(inner.optimizer.param_groups):
            for k, parameter in enumerate(group["params"]):
                found[f"master {i} {j} {k}"] = parameter
                for key, value in inner.optimizer.state[parameter].items():
                    if isinstance(value, torch.Tensor):
                        found[f"{key} {i} {j} {k}"] = value
    return {key: value.detach().float().cpu().clone() for key, value in found.items()}


if __name__ == "__main__":
    print(json.dumps(train_case(sys.argv[1], on_cpu="--cpu" in sys.argv)))
