"""What types cannot say: rules between fields. Each rule is a small generator of problems; all are reported together."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from launcher.config.check_layout import LAYOUT_RULES
from launcher.config.check_mixture import check_mixtures
from launcher.config.check_precision import PRECISION_RULES
from launcher.config.check_secrets import refuse_secrets
from launcher.config.errors import ConfigError, LayoutError, Problem
from launcher.config.schema import ModelConfig, RunConfig, StageConfig
from launcher.config.validate import merge_over_stages, shown

Found = tuple[str | None, Problem]  # the stage it is wrong in; None where it is the run's


def check_run(config: RunConfig) -> None:
    """Raises LayoutError where only layouts are wrong, otherwise ConfigError, with all problems; secrets first and alone."""
    refuse_secrets(config)
    layout = list(over_stages(config, rules=LAYOUT_RULES))
    rest = list(other_problems(config))
    problems = list(merge_over_stages([*rest, *layout], names=config.stage_names))
    if problems:
        raise (ConfigError if rest else LayoutError)(*problems)


def other_problems(config: RunConfig) -> Iterator[Found]:
    for problem in (*check_model(config.model), *check_tokenizer(config), *check_cluster(config), *check_data(config)):
        yield None, problem
    for problem in (*check_family(config.model), *check_after(config), *check_stage_list(config)):
        yield None, problem
    yield from over_stages(config, rules=(check_stage, check_start, check_masks, check_rope, check_optim, *PRECISION_RULES))
    yield from check_mixtures(config)


def over_stages(config: RunConfig, *, rules: Iterable[Callable[..., Iterable[Problem]]]) -> Iterator[Found]:
    for rule in rules:
        for stage in config.stages:
            for problem in rule(stage, config=config):
                yield stage.stage.name, problem


def check_model(model: ModelConfig) -> Iterator[Problem]:
    if model.padded_vocab_size < model.vocab_size:
        rule = f"the padded vocabulary must hold model.vocab_size ({model.vocab_size})"
        yield Problem("model.padded_vocab_size", str(model.padded_vocab_size), rule, f"use {-(-model.vocab_size // 128) * 128}")
    if model.num_attention_heads % model.num_query_groups:
        rule = f"it must divide model.num_attention_heads ({model.num_attention_heads})"
        fix = f"use one of {divisors(model.num_attention_heads)}"
        yield Problem("model.num_query_groups", str(model.num_query_groups), rule, fix)
    if model.kv_channels % 2:
        yield Problem(
            "model.kv_channels", str(model.kv_channels), "rotary embedding turns pairs: it must be even", "use an even one"
        )


def check_after(config: RunConfig) -> Iterator[Problem]:
    for name in config.run.after_stages:
        if name not in config.run.stages:
            rule = f"run.after follows stages of the run ({', '.join(config.run.stages)})"
            yield Problem("run.after_stages", name, rule, "one of them, or [] for the last")
    if "eval" in config.run.after and "export" not in config.run.after:
        yield Problem("run.after", "[eval]", "eval reads what export wrote", "run.after=[export,eval]")


def check_family(model: ModelConfig) -> Iterator[Problem]:
    """What the Hugging Face class can represent. Found out now, not when a trained model is to be exported."""
    if model.family is None:
        return
    wanted = {"activation": "swiglu", "normalization": "rmsnorm", "mlp_bias": False, "attention_bias": model.family == "qwen2"}
    for field, value in wanted.items():
        if getattr(model, field) != value:
            rule = f"family {model.family} exports models with {field}={str(value).lower()}"
            found = str(getattr(model, field)).lower()
            other = "qwen2, which has them on Q, K and V" if field == "attention_bias" and not value else "null: no export"
            yield Problem(f"model.{field}", found, rule, f"model.{field}={str(value).lower()}, or model.family={other}")
    if model.hidden_size != model.num_attention_heads * model.kv_channels:
        product = model.num_attention_heads * model.kv_channels
        rule = f"family {model.family} exports num_attention_heads * kv_channels ({product}) = hidden_size"
        yield Problem("model.hidden_size", str(model.hidden_size), rule, f"model.hidden_size={product}, or model.family=null")


def check_tokenizer(config: RunConfig) -> Iterator[Problem]:
    field = {"cl100k": "ranks_file", "huggingface": "file"}[config.tokenizer.kind]
    if not getattr(config.tokenizer, field):
        rule = f"tokenizer kind {config.tokenizer.kind} reads it"
        yield Problem(f"tokenizer.{field}", "nothing", rule, f"tokenizer.{field}=<path>")


def check_cluster(config: RunConfig) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.kind == "local" and cluster.num_nodes > 1:
        yield Problem(
            "cluster.num_nodes", str(cluster.num_nodes), "kind local is this machine alone", "1, or cluster.kind=slurm"
        )
    if cluster.gpu and cluster.num_nodes > 1 and cluster.network is None:
        rule = f"{cluster.num_nodes} nodes speak over a network, whose bandwidth the plan needs"
        yield Problem("cluster.network", "null", rule, "its figures; model_configs/cluster/slurm_h100.yaml has an example")


def check_data(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if list(data.length_buckets) != sorted(set(data.length_buckets)):
        fix = f"data.length_buckets={sorted(set(data.length_buckets))}".replace(" ", "")
        yield Problem("data.length_buckets", str(list(data.length_buckets)), "each is longer than the one before", fix)
    if data.group_tokens % data.chunk_tokens:
        rule = f"a group is whole chunks of data.chunk_tokens ({data.chunk_tokens})"
        near = max(1, round(data.group_tokens / data.chunk_tokens)) * data.chunk_tokens
        yield Problem("data.group_tokens", str(data.group_tokens), rule, f"data.group_tokens={near}")


def check_stage_list(config: RunConfig) -> Iterator[Problem]:
    names = config.run.stages
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        rule = "a run trains a stage once; checkpoints lie under its name"
        yield Problem("run.stages", f"{', '.join(twice)} twice", rule, "give the second one a stage file of its own")
    for name in config.stage_names:
        if name not in names:
            rule = f"stage.name is the name that run.stages lists ({', '.join(names)})"
            yield Problem("stage.name", repr(name), rule, "name the stage as its file is named")


def check_stage(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    settings, chunk = stage.stage, config.data.chunk_tokens
    if chunk % settings.seq_length:
        rule = f"chunks of data.chunk_tokens ({chunk}) are cut into whole windows"
        fix = f"a divisor of {chunk}, or data.chunk_tokens={max(1, round(chunk / settings.seq_length)) * settings.seq_length}"
        yield Problem("stage.seq_length", str(settings.seq_length), rule, fix)
    batch_tokens = settings.global_batch_size * settings.seq_length
    if settings.tokens < batch_tokens:
        rule = f"a stage is at least one global batch of {batch_tokens} tokens"
        yield Problem("stage.tokens", f"{settings.tokens:g}", rule, f"raise it to {batch_tokens} or more, or shrink the batch")
    ramp = settings.rampup_batch_size
    if ramp is not None and (
        ramp.start > settings.global_batch_size or (settings.global_batch_size - ramp.start) % ramp.increment
    ):
        found = f"{ramp.start} in steps of {ramp.increment}"
        rule = f"it must reach stage.global_batch_size ({settings.global_batch_size})"
        start = settings.global_batch_size % ramp.increment or ramp.increment
        fix = f"start={start}, or an increment that divides the difference"
        yield Problem("stage.rampup_batch_size", found, rule, fix)
    if ramp is not None and ramp.tokens >= settings.tokens:
        rule = f"the stage ends at {settings.tokens:g} tokens: it would never have its batch"
        yield Problem("stage.rampup_batch_size.tokens", f"{ramp.tokens:g}", rule, "fewer, or more stage.tokens")
    if settings.validation.max_tokens < settings.seq_length:
        rule = f"it must hold one window of stage.seq_length ({settings.seq_length})"
        fix = f"stage.validation.max_tokens={settings.seq_length}"
        yield Problem("stage.validation.max_tokens", str(settings.validation.max_tokens), rule, fix)


def check_start(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """`init_from`: an earlier stage, of no longer sequences; or a folder, which is looked into when the run is launched
    (launcher/plan/foreign.py, launcher/rundir/ancestor.py): a stage that has begun has no use for it any more. The RoPE base
    and scaling may be others than in the stage it starts from: a stage is where they may change."""
    settings, names = stage.stage, config.run.stages
    if settings.folder and not Path(settings.folder).is_absolute():
        rule = "a run is gone on with from other folders and on other machines: the path is an absolute one"
        fix = f"stage.init_from={Path(settings.folder).expanduser().resolve()}"
        yield Problem("stage.init_from", repr(settings.folder), rule, fix)
    if settings.parent is None or settings.name not in names:
        return
    earlier = names[: names.index(settings.name)]
    if settings.parent not in earlier:
        rule = f"it must name a stage before {settings.name} in run.stages ({', '.join(earlier) or 'there is none'})"
        fix = f"stage.init_from={earlier[-1] if earlier else 'null'}, or the path of a folder"
        yield Problem("stage.init_from", repr(settings.parent), rule, fix)
    elif settings.parent in config.stage_names:
        before = config.stage(settings.parent).stage.seq_length
        if settings.seq_length < before:
            rule = f"it must not be shorter than in {settings.parent} ({before}), which it starts from"
            yield Problem("stage.seq_length", str(settings.seq_length), rule, f"use {before} or more")


def check_masks(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """What attention across documents can be switched off with."""
    settings, layout = stage.stage, stage.layout
    if settings.reset_position_ids and not settings.reset_attention_mask:
        rule = "it has no effect: Megatron's rotary embedding ignores position ids, and scores depend on distances alone"
        yield Problem("stage.reset_position_ids", "true", rule, "false, or stage.reset_attention_mask=true as well")
    if not settings.reset_attention_mask or config.cluster.gpu is None:
        return
    if layout.micro_batch_size > 1:
        rule = "on GPUs documents are kept apart by transformer-engine's packed sequences (thd), which take one row"
        yield Problem("layout.micro_batch_size", str(layout.micro_batch_size), rule, "1, or stage.reset_attention_mask=false")
    if layout.cp > 1 and layout.cp_comm_type == "all_gather":
        rule = "transformer-engine's packed sequences (thd) do not go with it"
        yield Problem("layout.cp_comm_type", "all_gather", rule, "p2p, or stage.reset_attention_mask=false")


def check_rope(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    scaling, model, length = stage.stage.rope_scaling, config.model, stage.stage.seq_length
    if scaling is None:
        return
    betas = (scaling.beta_fast, scaling.beta_slow)
    if scaling.rope_type == "linear" and any(beta is not None for beta in betas):
        rule = "position interpolation treats all frequencies alike"
        yield Problem("stage.rope_scaling.beta_fast", str(betas), rule, "beta_fast=null beta_slow=null")
    if scaling.rope_type == "yarn" and not (scaling.beta_fast or 0.0) > (scaling.beta_slow or math.inf):
        rule = "YaRN goes from one to the other: beta_fast is the larger"
        yield Problem("stage.rope_scaling.beta_fast", str(betas), rule, "beta_fast=32 beta_slow=1, the paper's")
    reach = scaling.factor * scaling.original_max_position_embeddings
    if length > reach:
        rule = f"factor * original_max_position_embeddings reaches {reach:g} positions, less than stage.seq_length"
        fix = f"factor={math.ceil(length / scaling.original_max_position_embeddings)}"
        yield Problem("stage.rope_scaling.factor", f"{scaling.factor:g}", rule, fix)
    if model.family == "phi3":
        rule = "transformers' Phi3 knows only the default rotary embedding and longrope: the run could not be exported as it"
        yield Problem("stage.rope_scaling", scaling.rope_type, rule, "model.family=llama, which has the same layers, or null")


def check_optim(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    optim = stage.optim
    seq_length = stage.stage.seq_length
    if math.ceil(optim.warmup_tokens / seq_length) >= math.ceil(stage.stage.tokens / seq_length):
        rule = f"warm-up must end before the stage does, stage.tokens ({stage.stage.tokens:g})"
        yield Problem("optim.warmup_tokens", f"{optim.warmup_tokens:g}", rule, "shorten the warm-up or lengthen the stage")
    if optim.min_lr > optim.lr:
        rule = f"the schedule falls from optim.lr ({optim.lr:g}) to it"
        yield Problem("optim.min_lr", f"{optim.min_lr:g}", rule, f"use at most {optim.lr:g}")
    if optim.keep_moments:
        yield from check_moments(stage, config=config)


def check_moments(stage: StageConfig, *, config: RunConfig) -> Iterator[Problem]:
    """Whether a stage can have the optimizer of the one it starts from. What a path names is looked into when the run is
    launched."""
    parent = stage.stage.parent
    if stage.stage.init_from is None:
        rule = "moments are kept of what a stage starts from, and stage.init_from names nothing"
        yield Problem("optim.keep_moments", "true", rule, "false")
    before = config.stage(parent) if parent in config.stage_names else stage
    for path, (old, new) in unlike_optimizers(before, after=stage).items():
        rule = f"with optim.keep_moments the optimizer is that of stage {parent}, which has {shown(old)}"
        yield Problem(path, shown(new), rule, f"{path}={shown(old)}, or optim.keep_moments=false")


def unlike_optimizers(before: StageConfig, *, after: StageConfig) -> dict[str, tuple[object, object]]:
    """What keeps one stage from reading the optimizer of another, whatever their layouts: Megatron keeps it in another form.
    Values of both by path; empty where nothing does."""
    pairs: dict[str, tuple[object, object]] = {
        "layout.distributed_optimizer": (before.layout.distributed_optimizer, after.layout.distributed_optimizer),
        "precision.moments_dtype": (before.precision.moments_dtype, after.precision.moments_dtype),
    }
    if not before.layout.distributed_optimizer:  # which has fp32 weights of its own in any case
        pairs["precision.params_dtype"] = before.precision.params_dtype, after.precision.params_dtype
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
