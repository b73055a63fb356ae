"""`python -m training.interop.export <run directory> --stage NAME [--prompt TEXT]`: a stage's newest checkpoint, whatever its
layout, as a Hugging Face folder under export/<stage>. The folder appears whole or not at all."""

import argparse
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.errors import DataError
from launcher.config.schema import ModelConfig, RunConfig
from launcher.rundir.checkpoints import CheckpointError, Saved, damages, newest_checkpoint
from launcher.rundir.exits import ExitClass, RunStateError
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, replace_folder
from training.errors import exit_class
from training.interop.families import FAMILIES, hf_config
from training.interop.tokenizer import write_tokenizer
from training.interop.weights import CheckpointWeights

SHARD_BYTES = 4 << 30


def export(run: RunDir, config: RunConfig, *, stage: str) -> Path:
    """Writes the folder and returns it. An earlier export of the stage is replaced once the new one is whole.

    Raises CheckpointError where the stage has no valid checkpoint."""
    began, saved = time.monotonic(), checkpoint_of(run, stage)
    final = run.export(stage)
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    settings = config.stage(stage).stage
    tokenizer = write_tokenizer(config.tokenizer, partial, max_length=settings.seq_length)
    weights = CheckpointWeights(saved.path)
    num_bytes, dtype = write_weights(hf_tensors(weights, model=config.model), partial)
    if weights.unread:
        raise CheckpointError(
            f"{saved.path} holds tensors that family {config.model.family} has no place for: {weights.unread}"
        )
    fields = hf_config(config.model, stage=settings, ids=tokenizer.ids, dtype=str(dtype).removeprefix("torch."))
    write_json_file(partial / "config.json", fields)
    ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json_file(partial / "generation_config.json", {"_from_model_config": True, **ids})
    source = {"run": run.name, "stage": stage, "step": saved.meta.step, "tokens": saved.meta.tokens}
    write_json_file(partial / "phidias.json", source)
    replace_folder(partial, final)
    append_record(run.events, "export", **source, path=str(final), bytes=num_bytes, seconds=round(time.monotonic() - began, 3))
    return final


def checkpoint_of(run: RunDir, stage: str) -> Saved:
    saved, refused = newest_checkpoint(run, stage)
    if saved is None:
        reason = "; ".join(refused) or "none was written"
        raise CheckpointError(f"stage {stage} of run {run.name} has no valid checkpoint ({reason}). Fix: train the stage first")
    if found := damages(saved):
        raise CheckpointError(
            f"{'; '.join(found[:3])}. Fix: restore it, or train the stage again from the checkpoint before it"
        )
    return saved


def hf_tensors(weights: CheckpointWeights, *, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors, embedding first, layer by layer."""
    family = FAMILIES[model.family]
    yield "model.embed_tokens.weight", weights.read("embedding.word_embeddings.weight")
    layers = weights.read_layers()
    for index in range(model.num_layers):
        layer = {name: stacked[index] for name, stacked in layers.items()}
        for name, tensor in family.layer(layer, model).items():
            yield f"model.layers.{index}.{name}", tensor
    yield "model.norm.weight", weights.read("decoder.final_layernorm.weight")
    if not model.tied_embeddings:
        yield "lm_head.weight", weights.read("output_layer.weight")


def write_weights(tensors: Iterator[tuple[str, Tensor]], directory: Path) -> tuple[int, torch.dtype]:
    """safetensors shards of at most 4 GiB and their index. Returns bytes of weights and their dtype."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if size and size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size, total, dtype = size + num_bytes, total + num_bytes, tensor.dtype
    if len(shards) == 1:
        write_shard(shards[0], directory / "model.safetensors")
        return total, dtype
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_shard(shard, directory / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_file(directory / "model.safetensors.index.json", index)
    return total, dtype


def caveats(run: RunDir, stage: str) -> list[str]:
    """What a user must know of an exported checkpoint that is not the stage's end, or not its newest."""
    saved, refused = newest_checkpoint(run, stage)
    lines = [f"passed over: {reason}" for reason in refused]
    if saved and not saved.meta.finished:
        lines.append(f"this is step {saved.meta.step} ({saved.meta.tokens} tokens) of the stage, NOT its end")
    return lines


def write_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """save_file, readable as the user's other files are: safetensors makes its files readable by the owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod((path.parent.stat().st_mode & 0o666) | 0o600)


def write_json_file(path: Path, fields: dict[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")


def generate(directory: Path, prompt: str, *, num_tokens: int = 60) -> str:
    """A sample from the exported folder through transformers: the proof that it loads, and something to look at."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=True, temperature=0.8, top_p=0.95, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def main() -> ExitClass:
    parser = argparse.ArgumentParser(prog="python -m training.interop.export", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--prompt")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads the checkpoint
    run = RunDir(arguments.run_dir)
    try:
        directory = export(run, read_config(run), stage=arguments.stage)
    except (CheckpointError, DataError, RunStateError, OSError) as error:
        print(f"phidias: {error}", file=sys.stderr)
        return exit_class(error)
    print(f"exported {arguments.stage} to {directory}")
    for line in caveats(run, arguments.stage):
        print(line)
    if arguments.prompt is not None:
        print(f"\nsample:\n{generate(directory, arguments.prompt)}")
    return ExitClass.DONE


if __name__ == "__main__":
    sys.exit(main())
