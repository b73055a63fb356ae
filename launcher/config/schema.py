"""The frozen config: one typed, immutable tree a run is built from. YAML owns the values, these types own the constraints.

Names are Megatron's. Units stand in the name (`_tokens`, `_s`). A run is one model, tokenizer, cluster and data order, and a
list of stages, each with its own layout, precision, optimizer and mixture.
"""

import math
from dataclasses import KW_ONLY
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.spec import STRICT, DataSettings, Float, Int, Mixture, Positive, PositiveInt, TokenizerSpec
from launcher.config.hardware import Hardware, Name, NonNegative
from launcher.config.monitoring import Monitor

SCHEMA_VERSION = 7

# A stage's name, or a path: a value with a slash in it, or that begins with one of "~" and ".".
Start = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,99}|[~.].*|[^\n]*/[^\n]*)$")]
Probability = Annotated[Float, Field(ge=0.0, lt=1.0)]


@dataclass(config=STRICT, frozen=True)
class Evaluation:
    """What `phidias eval` scores beside held-out loss: tasks of lm-evaluation-harness by name, its own or those of the YAML
    files in `task_dir`. `num_fewshot` and `limit` (documents a task): null takes each task's own number, and all."""

    _: KW_ONLY
    tasks: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]*$")], ...]
    task_dir: str | None
    num_fewshot: Annotated[Int, Field(ge=0)] | None
    limit: PositiveInt | None


@dataclass(config=STRICT, frozen=True)
class RunSettings:
    """Who the run is. `stages` are stage file names, in the order they are trained; `after`: what `phidias submit` queues
    behind the stages of `after_stages`, or where there are none behind the last."""

    _: KW_ONLY
    name: Name
    seed: Annotated[Int, Field(ge=0, lt=2**31)]
    runs_dir: str
    data_dir: str
    stages: Annotated[tuple[Name, ...], Field(min_length=1)]
    after: tuple[Literal["export", "eval"], ...]
    after_stages: tuple[Name, ...]
    evaluation: Evaluation


@dataclass(config=STRICT, frozen=True)
class ModelConfig:
    """A decoder-only transformer. `attention_bias` is a bias on Q, K and V; `mlp_bias` on every other linear layer but the
    LM head (Megatron's add_qkv_bias and add_bias_linear). `family` names the Hugging Face class it exports to; null: it is
    trained and planned, not exported."""

    _: KW_ONLY
    name: Name
    family: Literal["phi3", "llama", "qwen2"] | None
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    kv_channels: PositiveInt
    ffn_hidden_size: PositiveInt
    activation: Literal["swiglu", "gelu", "squared_relu"]
    normalization: Literal["rmsnorm", "layernorm"]
    vocab_size: PositiveInt
    padded_vocab_size: PositiveInt
    tied_embeddings: bool
    layernorm_epsilon: Positive
    init_method_std: Positive
    hidden_dropout: Probability
    attention_dropout: Probability
    attention_bias: bool
    mlp_bias: bool

    @property
    def qkv_size(self) -> int:
        """Outputs of the query-key-value product. Its tensor-parallel parts are even, also with fewer groups than ranks."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels


@dataclass(config=STRICT, frozen=True)
class Validation:
    """Held-out loss per source, every `interval_tokens` and at the stage's end, on at most `max_tokens` of each source."""

    _: KW_ONLY
    interval_tokens: Positive
    max_tokens: PositiveInt


@dataclass(config=STRICT, frozen=True)
class CheckpointPolicy:
    """A checkpoint every `interval_tokens` and at the stage's end. The `keep_last` newest stay, the first one past every
    `keep_every_tokens` (null: none), the `keep_best` of lowest held-out loss, and stage ends. `asynchronous`: training goes on
    while it is written."""

    _: KW_ONLY
    interval_tokens: Positive
    keep_last: PositiveInt
    keep_every_tokens: Positive | None
    keep_best: Annotated[Int, Field(ge=0)]
    asynchronous: bool


@dataclass(config=STRICT, frozen=True)
class RampupBatchSize:
    """The batch begins at `start` sequences and grows in steps of `increment` to the stage's over its first `tokens`."""

    _: KW_ONLY
    start: PositiveInt
    increment: PositiveInt
    tokens: Positive


@dataclass(config=STRICT, frozen=True)
class RopeScaling:
    """How rotary angles are made to reach `factor` times as far as `original_max_position_embeddings`. "linear": every position
    is divided by the factor (position interpolation, Chen et al. 2023). "yarn": frequencies of fewer than `beta_slow` turns
    over the original length are, those of more than `beta_fast` are not, and attention is sharpened (Peng et al. 2023, section
    3). Names are those of transformers; the betas are null where it is linear."""

    _: KW_ONLY
    rope_type: Literal["linear", "yarn"]
    factor: Annotated[Float, Field(gt=1.0, allow_inf_nan=False)]
    original_max_position_embeddings: PositiveInt
    beta_fast: Positive | None
    beta_slow: Positive | None


@dataclass(config=STRICT, frozen=True)
class StageSettings:
    """What is trained: sequence length, batch (in sequences), token horizon, RoPE base and scaling, and what it starts from: a
    stage by its name, a Hugging Face folder or a checkpoint of another run by its path, or nothing.

    Sources that the stage `init_from` read go on where it stopped or, with `replay_from_tokens`, where they stood at that
    token of it. `reset_attention_mask`: no attention across documents; `reset_position_ids` goes with it; `eod_mask_loss`:
    what follows a document's end is not predicted (Megatron's names). `deterministic`: the same bits each time, on GPUs too,
    where the kernels for it are slower."""

    _: KW_ONLY
    name: Name
    seq_length: PositiveInt
    global_batch_size: PositiveInt
    rampup_batch_size: RampupBatchSize | None
    tokens: Positive
    rotary_base: PositiveInt
    rope_scaling: RopeScaling | None
    init_from: Start | None
    replay_from_tokens: NonNegative | None
    reset_attention_mask: bool
    reset_position_ids: bool
    eod_mask_loss: bool
    deterministic: bool
    validation: Validation
    checkpoint: CheckpointPolicy

    @property
    def num_samples(self) -> int:
        """Sequences the stage lasts: the token horizon, rounded up to a whole one."""
        return math.ceil(self.tokens / self.seq_length)

    @property
    def parent(self) -> str | None:
        """The stage it starts from, where it starts from one."""
        return None if self.folder else self.init_from

    @property
    def folder(self) -> str | None:
        """The path it starts from, where it starts from one: a Hugging Face folder, or a checkpoint of another run."""
        return self.init_from if self.init_from and ("/" in self.init_from or self.init_from[0] in "~.") else None


@dataclass(config=STRICT, frozen=True)
class Layout:
    """How a step is spread over the ranks. The data-parallel size is derived: world size / (tp * pp * cp).

    Layers lie evenly over the pipeline, but for a first and a last stage with a number of their own, or with the embedding or
    the loss counted as a layer (`account_for_..._in_pipeline_split`), which makes room for them. `recompute_modules` are what
    `recompute: selective` computes again (not "layernorm": without transformer-engine megatron-core 0.16.1 fails on it, with it
    nothing is gained). `tp_comm_overlap` hides tensor-parallel communication behind GEMMs (transformer-engine's user buffers);
    it takes effect on GPUs with sequence parallelism. The last three are of GPUs alone: each layer's kernels launched as one
    CUDA graph; so many layers' activations kept in host memory; and whose fused kernel computes the loss."""

    _: KW_ONLY
    tp: PositiveInt
    pp: PositiveInt
    vpp: PositiveInt
    num_layers_in_first_pipeline_stage: PositiveInt | None
    num_layers_in_last_pipeline_stage: PositiveInt | None
    account_for_embedding_in_pipeline_split: bool
    account_for_loss_in_pipeline_split: bool
    cp: PositiveInt
    cp_comm_type: Literal["p2p", "a2a", "all_gather"]
    sequence_parallel: bool
    micro_batch_size: PositiveInt
    recompute: Literal["none", "selective", "full"]
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...]
    tp_comm_overlap: bool
    distributed_optimizer: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    cuda_graph_impl: Literal["none", "local"]
    cpu_offloading_num_layers: Annotated[Int, Field(ge=0)]
    cross_entropy_fusion_impl: Literal["none", "native", "te"]

    @property
    def model_parallel_size(self) -> int:
        return self.tp * self.pp * self.cp


@dataclass(config=STRICT, frozen=True)
class Precision:
    """Compute precision. `fp8` names transformer-engine's recipe; it needs a Hopper GPU and is refused elsewhere.
    `moments_dtype` is of both of Adam's moments: bf16 through Megatron's precision-aware optimizer, on GPUs."""

    _: KW_ONLY
    name: Name
    params_dtype: Literal["fp32", "bf16"]
    grad_reduce_in_fp32: bool
    fp8: Literal["delayed", "tensorwise", "blockwise"] | None
    fp8_format: Literal["e4m3", "hybrid"] | None
    fp8_param_gather: bool
    fp8_amax_history_len: PositiveInt
    num_layers_at_start_in_bf16: Annotated[Int, Field(ge=0)]
    num_layers_at_end_in_bf16: Annotated[Int, Field(ge=0)]
    moments_dtype: Literal["fp32", "bf16"]


@dataclass(config=STRICT, frozen=True)
class Optim:
    """AdamW. Learning rate rises linearly over `warmup_tokens`, then follows `schedule` to `min_lr` at the stage's end.
    `keep_moments`: those of the stage it starts from, in place of new ones."""

    _: KW_ONLY
    lr: Positive
    min_lr: NonNegative
    warmup_tokens: NonNegative
    schedule: Literal["linear", "cosine", "constant"]
    weight_decay: NonNegative
    betas: tuple[Probability, Probability]
    eps: Positive
    clip_grad: NonNegative
    keep_moments: bool


@dataclass(config=STRICT, frozen=True)
class Network:
    """What a GPU sees of it, one direction, in GB/s: inside the node (null: what the device has) and between nodes.

    `rail_optimized`: GPUs of the same place in their nodes share a switch, so that only groups of more than `nodes_per_pod`
    nodes cross the core, where `oversubscription` ports share one; otherwise all traffic between nodes crosses it."""

    _: KW_ONLY
    intra_node_gb_per_s: Positive | None
    inter_node_gb_per_s: Positive
    rail_optimized: bool
    nodes_per_pod: PositiveInt
    oversubscription: Annotated[Float, Field(ge=1.0, allow_inf_nan=False)]


@dataclass(config=STRICT, frozen=True)
class Operations:
    """What running there costs and how often it breaks: what a plan makes of step times. `gpu_hours_between_failures` is of one
    GPU with its share of everything that can stop a job; `restart_s` from a failure to the next step, the lost steps apart;
    `checkpoint_gb_per_s` of the whole file system while the job writes."""

    _: KW_ONLY
    usd_per_gpu_hour: NonNegative | None
    gpu_hours_between_failures: Positive
    restart_s: NonNegative
    checkpoint_gb_per_s: Positive


@dataclass(config=STRICT, frozen=True)
class Container:
    """What ranks run in. `image` is a file or an address that `runtime` knows; `mounts` are `outside:inside`, beside the
    folders of the run, its data and its code, which are mounted under their own names; `python` is the interpreter inside."""

    _: KW_ONLY
    runtime: Literal["pyxis", "apptainer"]
    image: Annotated[str, Field(min_length=1)]
    mounts: tuple[Annotated[str, Field(pattern=r"^/[^:]*:/[^:]*(:(ro|rw))?$")], ...]
    python: Annotated[str, Field(min_length=1)]


@dataclass(config=STRICT, frozen=True)
class NodeChecks:
    """What nodes must show before ranks start on them; null: not looked at. `gpu_memory_free_gib` of every GPU, `disk_free_gib`
    where the run is written, `infiniband_ports` that are active. The last three are measured, in at most `max_s`: BF16 products
    on every GPU, all-reduce (bus bandwidth) among the GPUs of a node and between nodes."""

    _: KW_ONLY
    gpu_memory_free_gib: Positive | None
    disk_free_gib: Positive | None
    infiniband_ports: PositiveInt | None
    clock_skew_s: Positive | None
    gemm_tflops: Positive | None
    node_all_reduce_gb_per_s: Positive | None
    all_reduce_gb_per_s: Positive | None
    max_s: PositiveInt


@dataclass(config=STRICT, frozen=True)
class Cluster:
    """Where ranks run. `gpu` names a file of model_configs/hardware; null means CPU ranks over gloo, `gpus_per_node` of them,
    of which no time is predicted. `master_port: null` takes a free one.

    `restarts`: how many starts in a row may follow a fault without one more checkpoint, before a person has to look.
    Slurm's own fields are passed to sbatch as they are, `sbatch_options` too (`--qos=high`); `cpu_partition` is where jobs
    without GPUs go. Jobs ask for `spare_nodes` more than they train on. `setup` are shell lines, run before anything else on
    every node of a job (`module load ...`)."""

    _: KW_ONLY
    name: Name
    kind: Literal["local", "slurm"]
    num_nodes: PositiveInt
    gpus_per_node: PositiveInt
    gpu: Name | None
    master_port: Annotated[Int, Field(ge=1024, lt=65536)] | None
    timeout_s: PositiveInt
    restarts: Annotated[Int, Field(ge=0)]
    partition: str | None
    cpu_partition: str | None
    account: str | None
    time_limit: str | None
    sbatch_options: tuple[Annotated[str, Field(pattern=r"^--[a-z]")], ...]
    spare_nodes: Annotated[Int, Field(ge=0)]
    checks: NodeChecks | None
    container: Container | None
    setup: tuple[str, ...]
    env: dict[str, str]
    network: Network | None
    operations: Operations | None

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


@dataclass(config=STRICT, frozen=True)
class StageConfig:
    """One stage of the run, with everything that may differ between stages."""

    _: KW_ONLY
    stage: StageSettings
    layout: Layout
    precision: Precision
    optim: Optim
    mixture: Mixture


@dataclass(config=STRICT, frozen=True)
class RunConfig:
    """The whole frozen config, as `config.yaml` of the run directory holds it. `hardware` is what `cluster.gpu` names."""

    _: KW_ONLY
    schema_version: Literal[7]
    run: RunSettings
    model: ModelConfig
    tokenizer: TokenizerSpec
    cluster: Cluster
    hardware: Hardware | None
    monitor: Monitor
    data: DataSettings
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]

    def stage(self, name: str) -> StageConfig:
        """The stage of that name; KeyError where the run has none."""
        return {stage.stage.name: stage for stage in self.stages}[name]

    @property
    def stage_names(self) -> tuple[str, ...]:
        return tuple(stage.stage.name for stage in self.stages)
