"""layout=auto: every layout that a stage could have on a cluster, and the fastest ones that fit.

Branch and bound: candidates are ordered by a lower bound of their step (the layers' work alone), and looked at in that order
until the bound passes the tenth best. Memory must leave a margin. Recomputation is only tried where nothing less fits.
"""

from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from heapq import heapify, heappop

from launcher.config.auto import KERNELS, LAYOUT_PLACEHOLDER, PRECISION_PLACEHOLDER, Free
from launcher.config.check_layout import LAYOUT_RULES
from launcher.config.check_precision import check_bf16_layers, check_fp8_shapes
from launcher.config.errors import ConfigError, LayoutError, Problem
from launcher.config.files import read_file
from launcher.config.hardware import Hardware
from launcher.config.schema import Layout, ModelConfig, Precision, RunConfig, StageConfig
from launcher.plan.estimate import Estimator
from launcher.plan.memory import SAFETY_MARGIN
from launcher.plan.parameters import layers_by_chunk
from launcher.plan.timing import StepTime

SHOWN = 10
MICRO_BATCHES = (1, 2, 4, 8)
CONTEXT_PARALLEL = (1, 2, 4, 8, 16, 32, 64)
# Wider than that, products are too narrow to be worth their communication.
MAX_TENSOR_PARALLEL = 16
# Virtual stages of a pipeline in all, and of one rank: more are never the fastest.
MAX_CHUNKS, MAX_VIRTUAL = 128, 20
# Tokens of the shortest chunk of context parallelism worth its communication.
WORTHWHILE_CHUNK = 512
# From what costs nothing to what costs most; recomputing "core_attn" beside flash attention saves nothing (activations.py).
RECOMPUTATION: tuple[tuple[str, tuple[str, ...]], ...] = (("none", ("mlp",)), ("selective", ("mlp",)), ("full", ("mlp",)))
SEARCHED = frozenset(LAYOUT_PLACEHOLDER)
PRECISIONS = ("bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise")


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, with its step and the GiB of its fullest GPU."""

    layout: Layout
    precision: Precision
    step: StepTime
    seconds: float
    memory_gib: float


@dataclass(frozen=True)
class Found:
    """The best ones, first the fastest; how many there were, and how many of those looked at did not fit. `least`: the one that
    needs the least memory, of those looked at, and its GiB."""

    best: tuple[Candidate, ...]
    num_candidates: int
    num_too_large: int
    least: tuple[Layout, float] | None


Pair = tuple[Layout, Precision]


def search(stage: StageConfig, *, config: RunConfig, hardware: Hardware, free: Free, shown: int = SHOWN) -> Found:
    """The fastest layouts of a stage, `shown` of them, with the fields that are not free as they are."""
    estimator = Estimator(stage, config.model, config.cluster, hardware)
    capacity = hardware.memory_gib * (1 - SAFETY_MARGIN)
    queue = [
        (bound(layout, precision, estimator=estimator), index, layout, precision)
        for index, (layout, precision) in enumerate(candidates(stage, config=config, hardware=hardware, free=free))
    ]
    heapify(queue)
    count, too_large = len(queue), 0
    best: list[Candidate] = []
    least: tuple[Layout, float] | None = None
    fitted: set[tuple[object, ...]] = set()
    while queue:
        lower, _, layout, precision = heappop(queue)
        if len(best) == shown and lower > best[-1].seconds:
            break
        same = (without_recomputation(layout), precision)
        if layout.recompute != "none" and same in fitted and "recompute" in free.layout:
            continue  # it fits without computing as much again
        memory = estimator.memory(layout, precision).peak_gib
        if least is None or memory < least[1]:
            least = (layout, memory)
        if memory > capacity:
            too_large += 1
            continue
        if not keeps_rules(layout, stage=stage, config=config):
            continue  # a net: choices are made by rules of their own
        fitted.add(same)
        step = estimator.timing(layout, precision).step
        insort(best, Candidate(layout, precision, step, step.total, memory), key=lambda candidate: candidate.seconds)
        del best[shown:]
    return Found(tuple(best), count, too_large, least)


NOT_RECOMPUTATION = [field.name for field in fields(Layout) if not field.name.startswith("recompute")]


def without_recomputation(layout: Layout) -> tuple[object, ...]:
    return tuple(getattr(layout, name) for name in NOT_RECOMPUTATION)


def bound(layout: Layout, precision: Precision, *, estimator: Estimator) -> float:
    """Seconds that a step takes at least: the layers of the largest pipeline stage, and the filling and draining of the
    pipeline by the smallest one."""
    dp = estimator.cluster.world_size // layout.model_parallel_size
    num_microbatches = estimator.stage.stage.global_batch_size // (layout.micro_batch_size * dp)
    chunks = layers_by_chunk(estimator.model.num_layers, layout=layout)
    filling = (layout.pp - 1) * min(map(min, chunks))
    return (num_microbatches * max(map(sum, chunks)) + filling) * estimator.layer_s(layout, precision)


def candidates(stage: StageConfig, *, config: RunConfig, hardware: Hardware, free: Free) -> Iterator[Pair]:
    """Every layout and precision that Megatron and the device accept."""
    precisions = list(precision_choices(stage, hardware=hardware, free=free))
    for layout in layout_choices(stage, config=config, free=free):
        for precision in precisions:
            if fp8_fits(layout, precision, stage=stage, config=config):
                yield layout, precision


def layout_choices(stage: StageConfig, *, config: RunConfig, free: Free) -> Iterator[Layout]:
    """Nested choices, each of those that divide what is left. Where some fields are set, or kernels have rules of their own,
    the config's rules have the last word on what goes with them."""
    kernels = any(getattr(stage.layout, name) != KERNELS[name] for name in ("cuda_graph_impl", "cpu_offloading_num_layers"))
    is_open = free.layout >= SEARCHED and not kernels
    for layout in every_layout(stage, config=config, free=free):
        if is_open or keeps_rules(layout, stage=stage, config=config):
            yield layout


def keeps_rules(layout: Layout, *, stage: StageConfig, config: RunConfig) -> bool:
    return not rules_broken(replace(stage, layout=layout), config=config)


def rules_broken(stage: StageConfig, *, config: RunConfig) -> list[Problem]:
    return [problem for rule in LAYOUT_RULES for problem in rule(stage, config=config)]


def every_layout(stage: StageConfig, *, config: RunConfig, free: Free) -> Iterator[Layout]:
    given, model, settings, world = stage.layout, config.model, stage.stage, config.cluster.world_size

    def choices(name: str, values: Sequence[int]) -> Sequence[int]:
        return values if name in free.layout else (getattr(given, name),)

    for tp in choices("tp", tensor_sizes(model, node=domain(config))):
        for cp in choices("cp", context_sizes(settings.seq_length, tp=tp)):
            for pp in choices("pp", [n for n in range(1, model.num_layers + 1) if world % (tp * cp * n) == 0]):
                if world % (tp * cp * pp):
                    continue
                dp = world // (tp * cp * pp)
                for micro in choices("micro_batch_size", MICRO_BATCHES):
                    if settings.global_batch_size % (micro * dp) or packed_too_wide(stage, micro=micro):
                        continue
                    num_microbatches = settings.global_batch_size // (micro * dp)
                    for vpp in choices("vpp", virtual_sizes(pp=pp, num_microbatches=num_microbatches)):
                        ends = split_ends(model.num_layers, pp=pp, vpp=vpp, given=given, free=free)
                        if ends is None or (vpp > 1 and num_microbatches % pp):
                            continue
                        if ramp_fits(stage, unit=micro * dp * (pp if vpp > 1 else 1)):
                            sizes = dict(tp=tp, cp=cp, pp=pp, vpp=vpp, micro_batch_size=micro)
                            yield from variants(given, free=free, sizes=sizes, ends=ends, model=model)


def variants(
    given: Layout, *, free: Free, sizes: Mapping[str, int], ends: tuple[bool, bool], model: ModelConfig
) -> Iterator[Layout]:
    """What is left to choose: sequence parallelism wherever it is possible, the way of context parallelism, recomputation;
    every overlap that goes with what is set."""
    kept = {name: getattr(given, name) for name in LAYOUT_PLACEHOLDER if name not in free.layout}
    tp, cp = sizes["tp"], sizes["cp"]
    heads = max(1, model.num_query_groups // tp), model.num_attention_heads // tp
    ways = ["p2p"] if cp == 1 or any(count % cp for count in heads) else ["p2p", "a2a"]
    recomputations = [choice for choice in RECOMPUTATION if not (choice[0] == "selective" and model.mlp_bias)]
    if "recompute" not in free.layout:
        recomputations = [(given.recompute, given.recompute_modules)]
    gathers = kept.get("distributed_optimizer", True) and kept.get("overlap_grad_reduce", True)
    for way in ways if "cp_comm_type" in free.layout else [given.cp_comm_type]:
        for recompute, modules in recomputations:
            changes = {
                **LAYOUT_PLACEHOLDER,
                "recompute": recompute,
                "recompute_modules": modules,
                "cp_comm_type": way,
                "account_for_embedding_in_pipeline_split": ends[0],
                "account_for_loss_in_pipeline_split": ends[1],
                "sequence_parallel": tp > 1,
                "overlap_param_gather": gathers,
                **sizes,
                **kept,
            }
            yield replace(given, **changes)


def tensor_sizes(model: ModelConfig, *, node: int) -> list[int]:
    """Inside a node, none across two: what divides heads, FFN and vocabulary, and comes out even with the groups."""
    split = (model.num_attention_heads, model.ffn_hidden_size, model.padded_vocab_size)
    groups = model.num_query_groups
    inside = [n for n in range(1, min(node, MAX_TENSOR_PARALLEL) + 1) if node % n == 0]
    return [n for n in inside if all(size % n == 0 for size in split) and (groups % n == 0 or n % groups == 0)]


def context_sizes(seq_length: int, *, tp: int) -> list[int]:
    if seq_length % tp:
        return []  # sequence parallelism splits it
    split = [cp for cp in CONTEXT_PARALLEL if cp > 1 and seq_length % (2 * cp * tp) == 0]
    return [1, *(cp for cp in split if seq_length // (2 * cp) >= WORTHWHILE_CHUNK)]


def virtual_sizes(*, pp: int, num_microbatches: int) -> Sequence[int]:
    if pp == 1 or num_microbatches % pp:
        return (1,)
    return range(1, min(MAX_VIRTUAL, MAX_CHUNKS // pp) + 1)


def split_ends(num_layers: int, *, pp: int, vpp: int, given: Layout, free: Free) -> tuple[bool, bool] | None:
    """Whether the embedding and the loss count as layers, so that the pipeline comes out even; None where it does not."""
    own = [n for n in (given.num_layers_in_first_pipeline_stage, given.num_layers_in_last_pipeline_stage) if n]
    if pp == 1:
        return (False, False) if vpp == 1 and not own else None
    if own:
        rest, between = num_layers - sum(own), pp - len(own)
        even = rest % (between * vpp) == 0 and rest >= between * vpp if between else rest == 0
        return (False, False) if even and all(count % vpp == 0 for count in own) else None
    names = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    for ends in ((False, False), (True, True)):
        embedding, loss = (end if name in free.layout else getattr(given, name) for name, end in zip(names, ends, strict=True))
        if (num_layers + embedding + loss) % (pp * vpp) == 0:
            return embedding, loss
    return None


def counts_ends(num_layers: int, *, pp: int, vpp: int) -> bool:
    """Whether layers come out even with the embedding and the loss counted as layers, and not without."""
    return pp > 1 and num_layers % (pp * vpp) != 0 and (num_layers + 2) % (pp * vpp) == 0


def packed_too_wide(stage: StageConfig, *, micro: int) -> bool:
    """Packed sequences of GPUs take one row (launcher.config.check.check_masks)."""
    return stage.stage.reset_attention_mask and micro > 1


def ramp_fits(stage: StageConfig, *, unit: int) -> bool:
    ramp = stage.stage.rampup_batch_size
    return ramp is None or (ramp.start % unit == 0 and ramp.increment % unit == 0)


def domain(config: RunConfig) -> int:
    """GPUs that speak over NVLink: tensor parallelism stays among them."""
    hardware = config.hardware
    return (hardware.nvlink_domain if hardware else None) or config.cluster.gpus_per_node


def precision_choices(stage: StageConfig, *, hardware: Hardware, free: Free) -> Iterator[Precision]:
    """With precision=auto bf16 and each FP8 recipe that the device has, as their files are but for what is set. FP8 weights are
    gathered as they are: never slower, never larger."""
    if not free.precision:
        yield stage.precision
        return
    kept = {name: getattr(stage.precision, name) for name in PRECISION_PLACEHOLDER if name not in free.precision}
    kept |= {name: value for name in ("fp8", "fp8_format") if (value := getattr(stage.precision, name)) is not None}
    in_bf16 = kept.get("num_layers_at_start_in_bf16") or kept.get("num_layers_at_end_in_bf16")
    for file in PRECISIONS:
        tree = read_file("precision", file, path="precision")
        unlike = any(tree[name] != kept[name] for name in ("fp8", "params_dtype") if name in kept)
        if unlike or (tree["fp8"] and tree["fp8"] not in hardware.fp8) or (tree["fp8"] == "delayed" and in_bf16):
            continue
        moments = stage.precision.moments_dtype
        gathers = tree["fp8"] is not None and not (tree["fp8"] == "delayed" and moments == "bf16")  # check_moments
        yield Precision(**{**tree, "fp8_param_gather": gathers, "moments_dtype": moments, **kept})


def fp8_fits(layout: Layout, precision: Precision, *, stage: StageConfig, config: RunConfig) -> bool:
    """Whether transformer-engine takes a rank's dimensions, and Megatron the layers left in bf16."""
    if not precision.fp8:
        return True
    changed = replace(stage, layout=layout, precision=precision)
    rules = (check_fp8_shapes, check_bf16_layers)
    return not any(problem for rule in rules for problem in rule(changed, config=config))


def why_slower(candidate: Candidate, *, best: Candidate) -> str:
    """Where the time went that the best layout does not take, the largest parts first."""
    losses = {field.name: getattr(candidate.step, field.name) - getattr(best.step, field.name) for field in fields(StepTime)}
    worst = sorted(losses.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{COMPONENTS[name]} +{seconds * 1e3:.0f} ms" for name, seconds in worst if seconds > 0.0005) or "as fast"


COMPONENTS = {
    "gemm": "GEMM",
    "attention": "attention",
    "memory": "memory-bound",
    "host": "waiting for the host",
    "tp": "TP exposed",
    "cp": "CP exposed",
    "pp": "PP exposed",
    "contention": "slowed by hidden communication",
    "bubble": "bubble",
    "dp": "DP exposed",
    "optimizer": "optimizer",
    "other": "other",
    "slowest_gpu": "slowest GPU",
}


# Choosing for a whole run.


def choose_layouts(
    config: RunConfig, free: Mapping[str, Free], *, on_found: Callable[[str, Found], None] | None = None
) -> RunConfig:
    """The run with every free field of its stages settled. LayoutError where no layout fits."""
    stages = []
    for stage in config.stages:
        left = free.get(stage.stage.name, Free())
        stages.append(choose_stage(stage, config=config, free=left, on_found=on_found) if left else stage)
    return replace(config, stages=tuple(stages))


def choose_stage(
    stage: StageConfig, *, config: RunConfig, free: Free, on_found: Callable[[str, Found], None] | None
) -> StageConfig:
    name = stage.stage.name
    if config.hardware is None:
        rule = f"the planner chooses by the device's figures, and cluster {config.cluster.name} has CPU ranks"
        raise ConfigError(Problem(f"layout (stage {name})", "auto", rule, "name a layout, or a cluster with GPUs"))
    if not list(precision_choices(stage, hardware=config.hardware, free=free)):
        rule = f"it is chosen among {', '.join(PRECISIONS)} as {config.hardware.name} computes them, with what is set kept"
        raise ConfigError(
            Problem(f"precision (stage {name})", "none with what is set", rule, "leave precision.* to precision=auto")
        )
    found = search(stage, config=config, hardware=config.hardware, free=free)
    if not found.num_candidates and free.layout < SEARCHED and (broken := rules_broken(stage, config=config)):
        raise LayoutError(*broken)
    if not found.best:
        raise LayoutError(nothing_fits(found, stage=stage, config=config, hardware=config.hardware))
    if on_found:
        on_found(name, found)
    return replace(stage, layout=found.best[0].layout, precision=found.best[0].precision)


def nothing_fits(found: Found, *, stage: StageConfig, config: RunConfig, hardware: Hardware) -> Problem:
    path = f"layout (stage {stage.stage.name})"
    if found.least is None:
        cluster, batch = config.cluster, stage.stage.global_batch_size
        rule = (
            f"tp * cp * pp must divide the {cluster.world_size} GPUs of {cluster.name}, what is left the batch of {batch}, "
            "and tp the model's heads, FFN and vocabulary, pp its layers"
        )
        return Problem(path, "no layout", rule, "another stage.global_batch_size or cluster.num_nodes, or fewer fields set")
    layout, memory = found.least
    room = f"{hardware.memory_gib:.1f} GiB less {SAFETY_MARGIN:.0%}"
    rule = f"a layout must fit {room}; the least of {found.num_candidates} needs {memory:.1f} ({describe(layout)})"
    return Problem(path, f"none that fits {hardware.name}", rule, "more GPUs or larger ones, or a shorter sequence")


# What an engineer assumes of a layout unless told otherwise.
USUAL = {**LAYOUT_PLACEHOLDER, **KERNELS, "recompute_modules": ("mlp",)}


def describe(layout: Layout, *, than: Layout | None = None) -> str:
    """The overrides that make a layout, of what differs from another one."""
    words = []
    for field in fields(layout):
        value = getattr(layout, field.name)
        if value != (USUAL.get(field.name) if than is None else getattr(than, field.name)):
            text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
            text = text or ("[" + ",".join(value) + "]" if isinstance(value, tuple) else str(value))
            words.append(f"layout.{field.name}={text}")
    return " ".join(words)


SIZES = ("tp", "pp", "cp", "vpp", "micro_batch_size")


def nearest_layout(stage: StageConfig, *, config: RunConfig) -> Layout | None:
    """The layout that fits and differs the least from the stage's: fewest fields, then the nearest sizes."""
    if config.hardware is None:
        return None
    estimator = Estimator(stage, config.model, config.cluster, config.hardware)
    capacity = config.hardware.memory_gib * (1 - SAFETY_MARGIN)
    found = candidates(stage, config=config, hardware=config.hardware, free=Free(SEARCHED))
    for layout, precision in sorted(found, key=lambda pair: distance(pair[0], stage.layout)):
        if estimator.memory(layout, precision).peak_gib <= capacity:
            return layout
    return None


def distance(layout: Layout, other: Layout) -> tuple[int, float]:
    changed = sum(getattr(layout, field.name) != getattr(other, field.name) for field in fields(layout))
    ratios = [max(a, b) / min(a, b) for a, b in ((getattr(layout, name), getattr(other, name)) for name in SIZES)]
    return changed, sum(ratios)
