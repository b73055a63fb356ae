"""Measured runs to calibrate with, from a table (CSV) whose columns are named as the config's fields are.

Columns: model, num_layers, hidden_size, num_attention_heads, num_query_groups, ffn_hidden_size, gated (yes | no), vocab_size,
gpu (a name of model_configs/hardware), num_gpus, global_batch_size (sequences), micro_batch_size, seq_length, tp, pp, cp, vpp,
precision (a name of model_configs/precision), tokens_per_s_per_gpu; optionally recompute (none | full), kv_channels and weight;
others are passed over. Rows are taken as well-run ones on eight GPUs a node, each with a 400 Gb/s port: sequence parallelism
with tensor parallelism, everything overlapped.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launcher.config.auto import KERNELS, LAYOUT_PLACEHOLDER
from launcher.config.check_layout import LAYOUT_RULES
from launcher.config.check_precision import PRECISION_RULES
from launcher.config.errors import ConfigError, Problem
from launcher.config.files import read_file
from launcher.config.hardware import Hardware, read_hardware
from launcher.config.schema import Cluster, Layout, ModelConfig, Precision, StageConfig
from launcher.plan.calibrate import Measurement
from launcher.plan.search import counts_ends

# What a table of speeds does not say and a prediction does not depend on.
OPTIM = dict(
    lr=1e-4,
    min_lr=0.0,
    warmup_tokens=0.0,
    schedule="linear",
    weight_decay=0.1,
    betas=(0.9, 0.95),
    eps=1e-8,
    clip_grad=1.0,
    keep_moments=False,
)
MIXTURE = {"name": "measured", "sources": {"text": {"inputs": ["measured"], "format": "text", "share": 1.0}}}
GPUS_PER_NODE, PORT_GB_PER_S, TABLE_MULTIPLE = 8, 50.0, 128
MODELS, STAGES, CLUSTERS = TypeAdapter(ModelConfig), TypeAdapter(StageConfig), TypeAdapter(Cluster)
DEVICES = TypeAdapter(Hardware)

Row = Mapping[str, str]


def read_table(path: Path, *, folders: Sequence[Path] = ()) -> list[Measurement]:
    """A measurement a row. ConfigError with every row that cannot be read, by its line, and where there is no table."""
    found, problems = [], []
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            Problem("rows", f"{path} ({error})", "it is a CSV table in UTF-8", "correct the path or file")
        ) from error
    rule = "a row has the columns that launcher/plan/measurements.py lists"
    for line, row in enumerate(rows, start=2):
        try:
            found.append(measurement(row, folders=folders))
        except (KeyError, TypeError, ValueError, ValidationError, ConfigError, ZeroDivisionError) as error:
            said = f"no column {error}" if isinstance(error, KeyError) else describe_error(error)
            problems.append(Problem(f"{path}, line {line}", said, rule, "correct the row, or leave it out"))
    if problems:
        raise ConfigError(*problems)
    if not found:
        raise ConfigError(Problem("rows", f"{path} without rows", rule, "measured runs, one a row"))
    return found


def describe_error(error: Exception) -> str:
    problems = error.problems if isinstance(error, ConfigError) else ()
    return (
        "; ".join(f"{problem.path}: found {problem.found}; {problem.rule}" for problem in problems)
        or str(error).splitlines()[0]
    )


def measurement(row: Row, *, folders: Sequence[Path] = ()) -> Measurement:
    """What the row measured. ValueError, TypeError or ConfigError where it is not a run that Megatron could run."""
    speed, weight = float(row["tokens_per_s_per_gpu"]), float(row.get("weight") or 1.0)
    if not (math.isfinite(speed) and speed > 0 and math.isfinite(weight) and weight > 0):
        raise ValueError(f"tokens_per_s_per_gpu {speed:g} of weight {weight:g}: both are positive numbers")
    precision = Precision(**read_file("precision", row["precision"], folders=folders, path="precision"))
    settings = stage_settings(int(row["seq_length"]), batch=int(row["global_batch_size"]))
    stage = STAGES.validate_python(
        dict(stage=settings, layout=layout_of(row), precision=precision, optim=OPTIM, mixture=MIXTURE)
    )
    found = Measurement(
        name=describe_row(row),
        stage=stage,
        model=MODELS.validate_python(model_of(row)),
        cluster=CLUSTERS.validate_python(cluster_of(row["gpu"], world=int(row["num_gpus"]))),
        hardware=DEVICES.validate_python(read_hardware(row["gpu"], folders=folders)),
        tokens_per_s_per_gpu=speed,
        weight=weight,
    )
    refuse_impossible(found)
    return found


def refuse_impossible(found: Measurement) -> None:
    """ConfigError with every rule of layout and precision that the row breaks."""
    config = SimpleNamespace(model=found.model, cluster=found.cluster, hardware=found.hardware)
    rules = (*LAYOUT_RULES, *PRECISION_RULES)
    if problems := [problem for rule in rules for problem in rule(found.stage, config=config)]:
        raise ConfigError(*problems)


def describe_row(row: Row) -> str:
    parallel = " ".join(f"{name}{row[name]}" for name in ("tp", "pp", "cp", "vpp") if row[name] not in ("", "1"))
    return f"{row['model']} {row['precision']} {row['num_gpus']} {row['gpu']} {row['seq_length']} {parallel}".strip()


def model_of(row: Row) -> dict[str, Any]:
    hidden, heads = int(row["hidden_size"]), int(row["num_attention_heads"])
    vocabulary = int(row["vocab_size"])
    squared = "nemotron" in row["model"].lower()
    padded = -(-vocabulary // (TABLE_MULTIPLE * int(row["tp"]))) * TABLE_MULTIPLE * int(row["tp"])
    return dict(
        name="measured", family=None, num_layers=int(row["num_layers"]), hidden_size=hidden, num_attention_heads=heads,
        num_query_groups=int(row["num_query_groups"]), kv_channels=int(row.get("kv_channels") or hidden // heads),
        ffn_hidden_size=int(row["ffn_hidden_size"]),
        activation="swiglu" if row["gated"] == "yes" else "squared_relu" if squared else "gelu",
        normalization="rmsnorm", vocab_size=vocabulary, padded_vocab_size=padded, tied_embeddings=False,
        layernorm_epsilon=1e-5, init_method_std=0.02, hidden_dropout=0.0, attention_dropout=0.0, attention_bias=False,
        mlp_bias=False,
    )  # fmt: skip


def layout_of(row: Row) -> Layout:
    tp, pp, vpp, layers = int(row["tp"]), int(row["pp"]), int(row["vpp"] or 1), int(row["num_layers"])
    counted = counts_ends(layers, pp=pp, vpp=vpp)
    if layers % (pp * vpp) and not counted:
        raise ValueError(f"{layers} layers over pp {pp} x vpp {vpp}")
    changes = dict(
        tp=tp, pp=pp, vpp=vpp, cp=int(row["cp"] or 1), micro_batch_size=int(row["micro_batch_size"]), sequence_parallel=tp > 1,
        recompute=row.get("recompute") or "none", account_for_embedding_in_pipeline_split=counted,
        account_for_loss_in_pipeline_split=counted, recompute_modules=("mlp",),
        num_layers_in_first_pipeline_stage=None, num_layers_in_last_pipeline_stage=None,
    )  # fmt: skip
    return Layout(**{**LAYOUT_PLACEHOLDER, **KERNELS, **changes})


def stage_settings(seq_length: int, *, batch: int) -> dict[str, Any]:
    return dict(
        name="measured", seq_length=seq_length, global_batch_size=batch, rampup_batch_size=None,
        tokens=float(seq_length * batch), rotary_base=10000, rope_scaling=None, init_from=None, replay_from_tokens=None,
        reset_attention_mask=False, reset_position_ids=False, eod_mask_loss=False, deterministic=False,
        validation=dict(interval_tokens=1e9, max_tokens=seq_length),
        checkpoint=dict(interval_tokens=1e9, keep_last=1, keep_every_tokens=None, keep_best=0, asynchronous=True),
    )  # fmt: skip


def cluster_of(gpu: str, *, world: int) -> dict[str, Any]:
    """A DGX-like cluster: eight GPUs a node where they come out even, one 400 Gb/s port each, rails."""
    per_node = next(size for size in range(GPUS_PER_NODE, 0, -1) if world % size == 0)
    network = dict(
        intra_node_gb_per_s=None, inter_node_gb_per_s=PORT_GB_PER_S, rail_optimized=True, nodes_per_pod=32, oversubscription=1.0
    )
    return dict(
        name="measured", kind="slurm", num_nodes=world // per_node, gpus_per_node=per_node, gpu=gpu,
        master_port=None, timeout_s=600, restarts=0, partition=None, cpu_partition=None, account=None, time_limit=None,
        sbatch_options=(), spare_nodes=0, checks=None, container=None, setup=(), env={},
        network=network, operations=None,
    )  # fmt: skip
