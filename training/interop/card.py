"""README.md of an exported folder: the model card, filled from what the run recorded. The licence is the owner's to name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig, StageConfig
from launcher.plan.foreign import FAMILY_NAMES
from launcher.plan.parameters import count_parameters, flops_per_token
from launcher.rundir.checkpoints import Meta, Saved, newest_checkpoint
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, read_records
from launcher.rundir.speed import read_plan

FILL_IN = "FILL-IN"
PACKAGES = ("megatron-core", "torch", "transformer-engine")
HEAD = f"""---
library_name: transformers
pipeline_tag: text-generation
license: other
license_name: {FILL_IN}
---
"""
LOADING = """```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

model = AutoModelForCausalLM.from_pretrained("<this folder>")
tokenizer = PreTrainedTokenizerFast.from_pretrained("<this folder>")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""
CHAT = """The tokenizer has a chat template (`<|im_start|>`, `<|im_sep|>`, `<|im_end|>`) for those who fine-tune; the model
itself has seen no chats but those of its data."""

Row = Mapping[str, Any]


def model_card(run: RunDir, config: RunConfig, *, saved: Saved, has_chat: bool) -> str:
    """Markdown. Of the stages, those that led to the checkpoint."""
    stages = lineage(config, stage=saved.meta.stage)
    metas = {stage.stage.name: meta for stage in stages if (meta := meta_of(run, stage, saved=saved))}
    sections = {
        "Licence": f"{FILL_IN}: the owner of the weights names it here and above (`license`, `license_name`).",
        "Use": "\n\n".join([LOADING, *([CHAT] if has_chat else [])]),
        "Model": model_table(config, stages=stages),
        "Stages": stages_table(stages, metas=metas),
        "Data": data_table(run, stages, metas=metas),
        "Compute": compute_table(run, config, stages=stages, metas=metas),
        "Held-out loss": losses_table(run, stages, saved=saved),
        "Code": code_line(run),
    }
    title = f"# {run.name}\n\n{lead(config, saved=saved)}\n"
    return "\n".join([HEAD + title, *(f"## {name}\n\n{text}\n" for name, text in sections.items())])


def lineage(config: RunConfig, *, stage: str) -> list[StageConfig]:
    """The stage, and before it those that it goes back to."""
    found = [config.stage(stage)]
    while found[0].stage.parent in config.stage_names:
        found.insert(0, config.stage(str(found[0].stage.parent)))
    return found


def meta_of(run: RunDir, stage: StageConfig, *, saved: Saved) -> Meta | None:
    """Of the checkpoint that is exported; of stages before it, of their ends."""
    if stage.stage.name == saved.meta.stage:
        return saved.meta
    end, _ = newest_checkpoint(run, stage.stage.name)
    return end.meta if end else None


def lead(config: RunConfig, *, saved: Saved) -> str:
    meta, count = saved.meta, count_parameters(config.model).total
    part = "the end" if meta.finished else f"step {meta.step:,}, not the end,"
    return (
        f"A base model of {count:,} parameters, trained with Phidias on megatron-core and exported as "
        f"{FAMILY_NAMES[str(config.model.family)].architecture}: {part} of stage {meta.stage}."
    )


def model_table(config: RunConfig, *, stages: Sequence[StageConfig]) -> str:
    model, last = config.model, stages[-1]
    rows = {
        "layers": model.num_layers,
        "hidden size": model.hidden_size,
        "attention heads, in groups": f"{model.num_attention_heads}, {model.num_query_groups}",
        "FFN size": model.ffn_hidden_size,
        "vocabulary, padded": f"{model.vocab_size:,}, {model.padded_vocab_size:,}",
        "embeddings": "tied" if model.tied_embeddings else "untied",
        "context": f"{last.stage.seq_length:,} tokens",
        "weights": last.precision.params_dtype,
        "tokenizer": config.tokenizer.kind,
    }
    return markdown(("", config.model.name), rows=([name, str(value)] for name, value in rows.items()))


def stages_table(stages: Iterable[StageConfig], *, metas: Mapping[str, Meta]) -> str:
    heads = (
        "stage",
        "from",
        "tokens",
        "steps",
        "sequence length",
        "batch",
        "RoPE base",
        "RoPE scaling",
        "peak LR",
        "precision",
    )
    rows = []
    for stage in stages:
        settings, meta = stage.stage, metas.get(stage.stage.name)
        done = (f"{meta.tokens:,}", f"{meta.step:,}") if meta else ("", "")
        scaling = f"{settings.rope_scaling.rope_type} x {settings.rope_scaling.factor:g}" if settings.rope_scaling else ""
        origin = Path(settings.folder).name if settings.folder else settings.init_from or "scratch"
        start = (settings.name, origin, *done, f"{settings.seq_length:,}")
        rest = (f"{settings.global_batch_size:,}", f"{settings.rotary_base:,}", scaling, f"{stage.optim.lr:g}")
        rows.append((*start, *rest, stage.precision.name))
    return markdown(heads, rows=rows)


def data_table(run: RunDir, stages: Iterable[StageConfig], *, metas: Mapping[str, Meta]) -> str:
    """Tokens that were read, and the shares that were planned, by source and stage."""
    plans = read_plan(run.plan)
    rows = []
    for stage in stages:
        name = stage.stage.name
        planned, meta = plans.get(name, {}).get("sources") or {}, metas.get(name)
        read = meta.tokens_by_source if meta else {}
        for source in dict.fromkeys([*planned, *read]):
            share = f"{planned[source]:.1%}" if source in planned else ""
            rows.append((name, source, share, f"{read.get(source, 0):,}"))
    return markdown(("stage", "source", "share", "tokens"), rows=rows)


def compute_table(run: RunDir, config: RunConfig, *, stages: Iterable[StageConfig], metas: Mapping[str, Meta]) -> str:
    """FLOPs of the tokens trained, by the causal count."""
    plans, kind = read_plan(run.plan), config.cluster.gpu or "CPU rank"
    rows = []
    for stage in stages:
        name, layout, meta = stage.stage.name, stage.layout, metas.get(stage.stage.name)
        dp = (plans.get(name, {}).get("layout") or {}).get("dp", "?")
        ranks = f"{plans.get(name, {}).get('world_size', config.cluster.world_size):,} x {kind}"
        cost = flops_per_token(config.model, seq_length=stage.stage.seq_length)["causal"]
        flops = f"{cost * meta.tokens:.3g}" if meta else ""
        rows.append((name, ranks, f"TP{layout.tp} PP{layout.pp} CP{layout.cp} DP{dp}", flops))
    return markdown(("stage", "ranks", "layout", "FLOPs"), rows=rows)


def losses_table(run: RunDir, stages: Sequence[StageConfig], *, saved: Saved) -> str:
    """Of each stage its last validation, of the exported one that at the checkpoint or before it."""
    last: dict[str, Row] = {}
    for row in read_records(run.metrics):
        later = row.get("stage") == saved.meta.stage and row.get("samples", 0) > saved.meta.samples
        if row["kind"] == "validation" and not later:
            last[row["stage"]] = row
    rows = [row for stage in stages if stage.stage.name in last for row in loss_rows(last[stage.stage.name])]
    lead = "Nats per token of text that was kept apart; the mixture weighs the sources by their shares."
    return f"{lead}\n\n{markdown(('stage', 'step', 'source', 'loss'), rows=rows)}" if rows else "None was measured."


def loss_rows(row: Row) -> Iterator[tuple[str, ...]]:
    for source, loss in {"mixture": row["loss"], **row["loss_by_source"]}.items():
        yield row["stage"], f"{row['step']:,}", source, "" if loss is None else f"{loss:.4f}"


def code_line(run: RunDir) -> str:
    code = read_json(run.code) if run.code.exists() else {}
    packages = code.get("packages") or {}
    commit = f", commit {code['commit']}" + " with changes" * bool(code.get("dirty")) if code.get("commit") else ""
    used = "".join(f", {name} {packages[name]}" for name in PACKAGES if packages.get(name))
    return f"Phidias {code.get('version', 'of unknown version')}{commit}{used}."


def markdown(heads: Sequence[str], *, rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
