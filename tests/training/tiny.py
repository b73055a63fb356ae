"""A tiny run for tests of training: config, synthetic shards and ways to run ranks. Small enough that a rank steps in 50 ms."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from launcher.config.schema import RunConfig

MODEL = dict(
    name="tiny", family="phi3", num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    ffn_hidden_size=96, activation="swiglu", normalization="rmsnorm", vocab_size=250, padded_vocab_size=256,
    tied_embeddings=False, layernorm_epsilon=1e-5, init_method_std=0.05, hidden_dropout=0.0, attention_dropout=0.0,
    attention_bias=False, mlp_bias=False,
)  # fmt: skip
LAYOUT = dict(
    tp=1, pp=1, vpp=1, num_layers_in_first_pipeline_stage=None, num_layers_in_last_pipeline_stage=None,
    account_for_embedding_in_pipeline_split=False, account_for_loss_in_pipeline_split=False, cp=1, cp_comm_type="p2p",
    sequence_parallel=False, micro_batch_size=1, recompute="none", recompute_modules=["core_attn"],
    tp_comm_overlap=False, distributed_optimizer=True,
    overlap_grad_reduce=False, overlap_param_gather=False,
    cuda_graph_impl="none", cpu_offloading_num_layers=0, cross_entropy_fusion_impl="te",
)  # fmt: skip
PRECISION = dict(
    name="fp32", params_dtype="fp32", grad_reduce_in_fp32=True, fp8=None, fp8_format=None, fp8_param_gather=False,
    fp8_amax_history_len=16, num_layers_at_start_in_bf16=0, num_layers_at_end_in_bf16=0, moments_dtype="fp32",
)  # fmt: skip
OPTIM = dict(
    lr=3e-3,
    min_lr=3e-4,
    warmup_tokens=512.0,
    schedule="linear",
    weight_decay=0.1,
    betas=[0.9, 0.95],
    eps=1e-8,
    clip_grad=1.0,
    keep_moments=False,
)
STAGE = dict(
    name="pretrain", seq_length=32, global_batch_size=8, tokens=256 * 6.0, rotary_base=10000, rope_scaling=None, init_from=None,
    rampup_batch_size=None, replay_from_tokens=None, reset_attention_mask=False, reset_position_ids=False, eod_mask_loss=False,
    deterministic=False,
    validation=dict(interval_tokens=1e9, max_tokens=256),
    checkpoint=dict(interval_tokens=1e9, keep_last=2, keep_every_tokens=None, keep_best=0, asynchronous=True),
)  # fmt: skip
HEALTH = dict(
    window_steps=16, skip_before_steps=0,
    non_finite=dict(action="skip", budget=2),
    loss_spike=dict(z=1e6, patience_steps=1, action="note", budget=9),
    grad_norm=dict(z=1e6, patience_steps=1, action="note", budget=9),
    straggler=dict(factor=100.0, rows=3, action="note", budget=9),
    corruption=dict(interval_steps=None, tolerance=0.0, action="restart", budget=1),
    data_stall=dict(limit_s=60.0, action="note"), checkpoint=dict(action="restart", budget=1),
    disk_low=dict(free_gib=0.0, action="note"), device_error=dict(interval_s=60.0, action="note", budget=9),
)  # fmt: skip
SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}


def mixture() -> dict[str, Any]:
    return dict(name="tiny", sources={n: dict(inputs=["unused"], format="text", share=s) for n, s in SHARES.items()})


def stage_config(**changes: dict[str, Any]) -> dict[str, Any]:
    """One stage as a dict; `changes` per section: stage_config(layout={"tp": 2}, stage={"tokens": 1e4})."""
    base = dict(stage=STAGE, layout=LAYOUT, precision=PRECISION, optim=OPTIM, mixture=mixture())
    return {name: {**section, **changes.get(name, {})} for name, section in base.items()}


def run_config(root: Path, *, ranks: int = 1, stages: list[dict[str, Any]] | None = None, **changes: Any) -> RunConfig:
    """A frozen config under `root` with one CPU rank per `ranks`."""
    stages = stages or [stage_config()]
    config = dict(
        schema_version=7,
        run=dict(
            name="tiny", seed=7, runs_dir=str(root / "runs"), data_dir=str(root / "data"),
            stages=[stage["stage"]["name"] for stage in stages], after=[], after_stages=[],
            evaluation=dict(tasks=[], task_dir=None, num_fewshot=None, limit=None),
        ),
        model=MODEL,
        tokenizer=dict(kind="huggingface", ranks_file=None, file=str(root / "tokenizer.json"), eod="<|endoftext|>"),
        cluster=dict(
            name="local", kind="local", num_nodes=1, gpus_per_node=ranks, gpu=None, master_port=None, timeout_s=120, restarts=0,
            partition=None, cpu_partition=None, account=None, time_limit=None, sbatch_options=[], spare_nodes=0, checks=None,
            container=None, setup=[], env={}, network=None, operations=None,
        ),
        hardware=None,
        monitor=dict(log_interval=1, console="plain", tensorboard=False,
                     hang=dict(factor=20.0, least_s=120.0, start_s=600.0, pause_s=600.0), health=HEALTH,
                     wandb=dict(mode="disabled", key_file=None, project="phidias", entity=None, group=None)),
        data=dict(
            held_out_fraction=0.1, shard_tokens=4000, chunk_tokens=256, group_tokens=2048, num_workers=1, max_rejected_rows=0,
            num_machines=1, max_row_mib=32, shuffle_mib=32, oracle_fraction=0.0, dropped_samples=0,
            length_buckets=[], reader="mmap", cache_dir=None, cache_gib=1.0, prefetch_batches=2, trace=False,
        ),
        stages=stages,
    )  # fmt: skip
    config = {
        name: {**section, **changes.get(name, {})} if isinstance(section, dict) else section for name, section in config.items()
    }
    return TypeAdapter(RunConfig).validate_python(config)
