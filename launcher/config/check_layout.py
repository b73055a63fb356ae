"""Layout rules: a layout must divide the cluster, the batch, the sequence and the model, and Megatron must accept it."""

from collections.abc import Callable, Iterator

from launcher.config.errors import Problem
from launcher.config.schema import Layout, ModelConfig, RunConfig, StageConfig

# Tokens of one of the two chunks that a context-parallel rank computes: fewer leave the attention kernel's tile empty.
MIN_CHUNK = 128


def check_world(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    layout, world = stage.layout, config.cluster.world_size
    if world % layout.model_parallel_size:
        rule = f"tp * pp * cp ({layout.model_parallel_size}) must divide the {world} ranks of cluster {config.cluster.name}"
        yield Problem(
            "layout.tp", f"tp {layout.tp}, pp {layout.pp}, cp {layout.cp}", rule, f"a product out of {_divisors(world)}"
        )


def check_batch(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    layout, batch = stage.layout, stage.stage.global_batch_size
    if config.cluster.world_size % layout.model_parallel_size:
        return
    dp = config.cluster.world_size // layout.model_parallel_size
    if batch % (layout.micro_batch_size * dp):
        rule = f"it must be a multiple of micro_batch_size * dp ({layout.micro_batch_size} * {dp})"
        unit = layout.micro_batch_size * dp
        fix = f"stage.global_batch_size={max(1, round(batch / unit)) * unit}, or another layout.micro_batch_size"
        yield Problem("stage.global_batch_size", str(batch), rule, fix)
    elif unfit := unfit_ramp(stage, unit=layout.micro_batch_size * dp * (layout.pp if layout.vpp > 1 else 1)):
        unit = layout.micro_batch_size * dp * (layout.pp if layout.vpp > 1 else 1)
        rule = f"every batch on the way must be a multiple of {unit} (micro_batch_size * dp, * pp with virtual stages)"
        fix = f"start and increment that are multiples of {unit}"
        yield Problem("stage.rampup_batch_size", f"a batch of {unfit}", rule, fix)
    elif layout.vpp > 1 and batch // (layout.micro_batch_size * dp) % layout.pp:
        num_microbatches = batch // (layout.micro_batch_size * dp)
        rule = f"the interleaved schedule runs microbatches in groups of pp: {num_microbatches} is no multiple of {layout.pp}"
        yield Problem("layout.vpp", str(layout.vpp), rule, "layout.vpp=1, or a batch that gives a multiple")


def unfit_ramp(stage: StageConfig, *, unit: int) -> int | None:
    """The first batch of a ramp that is no multiple of the unit."""
    ramp, batch = stage.stage.rampup_batch_size, stage.stage.global_batch_size
    sizes = range(ramp.start, batch, ramp.increment) if ramp else range(0)
    return next((size for size in sizes if size % unit), None)


def check_pipeline(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    layout = stage.layout
    if layout.vpp > 1 and layout.pp == 1:
        yield Problem("layout.vpp", str(layout.vpp), "virtual stages interleave a pipeline: layout.pp is 1", "layout.vpp=1")
        return
    own = [layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage]
    counted = layout.account_for_embedding_in_pipeline_split + layout.account_for_loss_in_pipeline_split
    if layout.pp == 1 and (any(own) or counted):
        rule = "there is one pipeline stage, which has all layers"
        yield Problem("layout.pp", "1 with layers placed by hand", rule, "leave them out, or layout.pp of 2 or more")
    elif any(own) and counted:
        rule = "Megatron places layers by their number in the first and last stage, or by counting the embedding or the loss"
        yield Problem("layout.num_layers_in_first_pipeline_stage", "both", rule, "one of the two ways")
    elif any(own):
        yield from uneven_stages(stage, num_layers=config.model.num_layers)
    elif (config.model.num_layers + counted) % (layout.pp * layout.vpp):
        yield undivided_layers(stage, num_layers=config.model.num_layers, counted=counted)


def uneven_stages(stage: StageConfig, *, num_layers: int) -> Iterator[Problem]:
    """The first and last stage have their own number of layers; the others share the rest, every one in vpp equal chunks."""
    layout = stage.layout
    own = {
        f"num_layers_in_{at}_pipeline_stage": getattr(layout, f"num_layers_in_{at}_pipeline_stage") for at in ("first", "last")
    }
    set_ones = {name: count for name, count in own.items() if count is not None}
    rest, between = num_layers - sum(set_ones.values()), layout.pp - len(set_ones)
    for name, count in set_ones.items():
        if count % layout.vpp:
            yield Problem(
                f"layout.{name}", str(count), f"layout.vpp ({layout.vpp}) must divide it", "a multiple, or layout.vpp=1"
            )
    found = " and ".join(str(count) for count in set_ones.values())
    if rest < between * layout.vpp or (between == 0 and rest) or (between and rest % (between * layout.vpp)):
        rule = f"the other {between} stages share the {rest} layers left of {num_layers}, in {layout.vpp} chunks each, evenly"
        yield Problem(f"layout.{next(iter(set_ones))}", found, rule, "other numbers, or null for an even split")


def undivided_layers(stage: StageConfig, *, num_layers: int, counted: int) -> Problem:
    layout = stage.layout
    chunks = layout.pp * layout.vpp
    layers = f"model.num_layers ({num_layers})" + (f" and the {counted} counted as layers" if counted else "")
    fix = f"a product out of {_divisors(num_layers)}"
    if not counted and (num_layers + 2) % chunks == 0:
        fix += ", or layout.account_for_embedding_in_pipeline_split=true and layout.account_for_loss_in_pipeline_split=true"
    elif not counted and layout.pp > 2 and num_layers > layout.pp:
        # A last stage with fewer layers makes room for the LM head; the others share the rest evenly.
        last = next(
            (n for n in range(layout.vpp, num_layers, layout.vpp) if (num_layers - n) % ((layout.pp - 1) * layout.vpp) == 0), 0
        )
        if last and last <= (num_layers - last) // (layout.pp - 1):
            fix += f", or layout.num_layers_in_last_pipeline_stage={last}"
    rule = f"pp * vpp ({chunks}) must divide {layers}"
    return Problem("layout.pp", f"pp {layout.pp}, vpp {layout.vpp}", rule, fix)


def check_tensor(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    tp, model = stage.layout.tp, config.model
    split = ("num_attention_heads", "ffn_hidden_size", "padded_vocab_size")
    undivided = [f"model.{name} ({getattr(model, name)})" for name in split if getattr(model, name) % tp]
    # Fewer groups than ranks: Megatron gives several ranks the same group, which must come out even.
    if model.num_query_groups % tp and tp % model.num_query_groups:
        undivided.append(f"model.num_query_groups ({model.num_query_groups})")
    if undivided:
        sizes = [n for n in range(1, model.num_attention_heads + 1) if all(getattr(model, name) % n == 0 for name in split)]
        good = [n for n in sizes if model.num_query_groups % n == 0 or n % model.num_query_groups == 0]
        yield Problem("layout.tp", str(tp), f"it must divide {', '.join(undivided)}", f"one of {', '.join(map(str, good))}")


def check_sequence(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    layout, seq_length = stage.layout, stage.stage.seq_length
    if layout.sequence_parallel and layout.tp == 1:
        rule = "sequence parallelism splits the sequence over tensor-parallel ranks: layout.tp is 1"
        yield Problem("layout.sequence_parallel", "true", rule, "layout.sequence_parallel=false, or layout.tp of 2 or more")
    if layout.sequence_parallel and seq_length % (layout.tp * layout.cp):
        rule = f"with sequence parallelism tp * cp ({layout.tp * layout.cp}) must divide it"
        yield Problem("stage.seq_length", str(seq_length), rule, "another seq_length, or layout.sequence_parallel=false")
    if layout.cp > 1 and seq_length % (2 * layout.cp):
        rule = f"context parallelism gives each rank two chunks: 2 * cp ({2 * layout.cp}) must divide it"
        yield Problem("stage.seq_length", str(seq_length), rule, "another seq_length or a smaller layout.cp")
    elif layout.cp > 1 and config.cluster.gpu and seq_length // (2 * layout.cp) < MIN_CHUNK:
        rule = f"a chunk of {seq_length // (2 * layout.cp)} tokens is less than one tile ({MIN_CHUNK}) of the attention kernel"
        yield Problem("layout.cp", str(layout.cp), rule, f"at most {max(1, seq_length // (2 * MIN_CHUNK))}")


def check_all_to_all(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """a2a gives each context-parallel rank whole heads of a tensor-parallel rank."""
    layout, model = stage.layout, config.model
    if layout.cp_comm_type != "a2a" or layout.cp == 1:
        return
    for name in ("num_attention_heads", "num_query_groups"):
        held = max(1, getattr(model, name) // layout.tp)
        if held % layout.cp:
            rule = f"layout.cp ({layout.cp}) must divide the {held} of model.{name} that a rank of tp {layout.tp} holds"
            yield Problem("layout.cp_comm_type", "a2a", rule, "layout.cp_comm_type=p2p, or a smaller layout.cp")


def check_recompute(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    layout = stage.layout
    if layout.recompute != "selective":
        return
    if not layout.recompute_modules:
        yield Problem(
            "layout.recompute_modules", "none", "recompute selective computes some again", "[mlp], or layout.recompute=none"
        )
    if "mlp" in layout.recompute_modules and config.model.mlp_bias:
        rule = "megatron-core 0.16.1 never ends the backward pass of a recomputed MLP with biases (model.mlp_bias)"
        yield Problem("layout.recompute_modules", "mlp", rule, "[core_attn], or layout.recompute=full")


def check_overlap(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    layout = stage.layout
    for needed in ("distributed_optimizer", "overlap_grad_reduce"):
        if layout.overlap_param_gather and not getattr(layout, needed):
            rule = f"gathering parameters in the forward pass needs layout.{needed}"
            yield Problem("layout.overlap_param_gather", "true", rule, f"layout.{needed}=true, or overlap_param_gather=false")


def check_graphs(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """A CUDA graph of a layer replays the same kernels on tensors of the same shapes."""
    layout, fix = stage.layout, "layout.cuda_graph_impl=none"
    if layout.cuda_graph_impl == "none":
        return
    refused = {
        f"cluster {config.cluster.name} is CPU ranks": config.cluster.gpu is None,
        "Megatron captures no layer whose activations are kept on the host (cpu_offloading_num_layers)": bool(
            layout.cpu_offloading_num_layers
        ),
        "Megatron captures no layer that is wholly computed again (recompute full)": layout.recompute == "full",
        "rows of documents kept apart (reset_attention_mask) differ from one micro batch to the next": bool(
            stage.stage.reset_attention_mask
        ),
        "what a graph computes again draws no random numbers (recompute selective with dropout)": draws_again(
            layout, model=config.model
        ),
        "a pipeline captures each microbatch of its own, and the batch grows (stage.rampup_batch_size)": bool(
            layout.pp > 1 and stage.stage.rampup_batch_size
        ),
    }
    for rule, applies in refused.items():
        if applies:
            yield Problem("layout.cuda_graph_impl", layout.cuda_graph_impl, rule, fix)


def draws_again(layout: Layout, *, model: ModelConfig) -> bool:
    modules = layout.recompute_modules if layout.recompute == "selective" else ()
    return ("core_attn" in modules and model.attention_dropout > 0) or ("mlp" in modules and model.hidden_dropout > 0)


def check_offloading(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """transformer-engine copies activations of a rank's first layers to host memory and back (Megatron's cpu_offloading)."""
    layout = stage.layout
    if not layout.cpu_offloading_num_layers:
        return
    found, fix = str(layout.cpu_offloading_num_layers), "layout.cpu_offloading_num_layers=0"
    refused = {
        f"cluster {config.cluster.name} is CPU ranks": config.cluster.gpu is None,
        f"it must be less than model.num_layers ({config.model.num_layers})": (
            layout.cpu_offloading_num_layers >= config.model.num_layers
        ),
        "Megatron offloads without a pipeline only (layout.pp)": layout.pp > 1,
        "Megatron offloads or computes again, not both (layout.recompute)": layout.recompute != "none",
    }
    for rule, applies in refused.items():
        if applies:
            yield Problem("layout.cpu_offloading_num_layers", found, rule, fix)


def _divisors(number: int) -> str:
    found = [str(n) for n in range(1, number + 1) if number % n == 0]
    return ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")


LAYOUT_RULES: tuple[Callable[..., Iterator[Problem]], ...] = (
    check_world,
    check_batch,
    check_pipeline,
    check_tensor,
    check_sequence,
    check_all_to_all,
    check_recompute,
    check_overlap,
    check_graphs,
    check_offloading,
)
