"""`python -m training.interop.export <run directory> --stage NAME [--step N] [--prompt TEXT]`: a stage's newest checkpoint, or
that of a step, whatever its layout, as a Hugging Face folder under export/. The folder appears whole or not at all.

Weights go from the checkpoint to the files a tensor at a time: a process holds the largest tensor, and what is stored in one
piece of it.
"""

import argparse
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import DataError
from launcher.config.schema import ModelConfig, RunConfig
from launcher.rundir.checkpoints import CheckpointError, Saved, checkpoint_at, damages, file_digest, newest_checkpoint
from launcher.rundir.code import installed
from launcher.rundir.exits import ExitClass, RunStateError
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir, at_step
from launcher.rundir.records import append_record, replace_folder
from training.errors import exit_class
from training.interop.card import model_card
from training.interop.families import FAMILIES, hf_config
from training.interop.tokenizer import ExportedTokenizer, is_misread, load_tokenizer, write_tokenizer
from training.interop.weights import LAYERS, CheckpointWeights, Weights

SHARD_BYTES = 4 << 30
# safetensors' names of what checkpoints hold.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNMENT = 8  # bytes, of where elements begin in a file

Tensors = dict[str, Tensor]


def export(run: RunDir, config: RunConfig, *, stage: str, step: int | None = None) -> Path:
    """Writes the folder and returns it. An earlier export of the same is replaced once the new one is whole. `step`: of a
    checkpoint that is still there; without one it is the newest.

    Raises CheckpointError where the stage has no such checkpoint, or it is damaged."""
    began, saved = time.monotonic(), checkpoint_of(run, stage, step=step)
    final = run.export(at_step(stage, step))
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    settings = config.stage(stage).stage
    tokenizer = write_tokenizer(config.tokenizer, partial, max_length=settings.seq_length, family=config.model.family)
    weights = CheckpointWeights(saved.path)
    num_bytes, dtype = write_weights(weights, partial, model=config.model)
    if weights.unread:
        raise CheckpointError(
            f"{saved.path} holds tensors that family {config.model.family} has no place for: {weights.unread}"
        )
    fields = hf_config(config.model, stage=settings, ids=tokenizer.ids, dtype=str(dtype).removeprefix("torch."))
    write_json_file(partial / "config.json", fields)
    write_json_file(partial / "generation_config.json", generation_config(tokenizer))
    source = {"run": run.name, "stage": stage, "step": saved.meta.step, "tokens": saved.meta.tokens}
    write_json_file(partial / "phidias.json", {**source, "checkpoint": file_digest(saved.path / "meta.json")})
    (partial / "README.md").write_text(model_card(run, config, saved=saved, has_chat=tokenizer.chat_end is not None))
    replace_folder(partial, final)
    append_record(run.events, "export", **source, path=str(final), bytes=num_bytes, seconds=round(time.monotonic() - began, 3))
    return final


def checkpoint_of(run: RunDir, stage: str, *, step: int | None = None) -> Saved:
    saved = newest_of(run, stage) if step is None else checkpoint_at(run, stage, step=step)
    if found := damages(saved):
        raise CheckpointError(
            f"{'; '.join(found[:3])}. Fix: restore it, or train the stage again from the checkpoint before it"
        )
    return saved


def newest_of(run: RunDir, stage: str) -> Saved:
    saved, refused = newest_checkpoint(run, stage)
    if saved is None:
        reason = "; ".join(refused) or "none was written"
        raise CheckpointError(f"stage {stage} of run {run.name} has no valid checkpoint ({reason}). Fix: train the stage first")
    return saved


def hf_tensors(weights: Weights, *, model: ModelConfig, blank: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors, embedding first, layer by layer; `blank`: nothing but their shapes and types."""
    family, read = FAMILIES[model.family], weights.blank if blank else weights.read
    yield "model.embed_tokens.weight", read("embedding.word_embeddings.weight")
    for index in range(model.num_layers):
        layer = {name: read(LAYERS + name, layer=index) for name in weights.layer_names}
        for name, tensor in family.layer(layer, model).items():
            yield f"model.layers.{index}.{name}", tensor
    yield "model.norm.weight", read("decoder.final_layernorm.weight")
    if not model.tied_embeddings:
        yield "lm_head.weight", read("output_layer.weight")


def write_weights(weights: Weights, directory: Path, *, model: ModelConfig) -> tuple[int, torch.dtype]:
    """safetensors files of at most SHARD_BYTES, but for larger tensors, and where there are several their index. Returns bytes
    of weights and their dtype."""
    shards = list(in_shards(hf_tensors(weights, model=model, blank=True)))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    tensors = hf_tensors(weights, model=model)
    for name, shard in zip(names, shards, strict=True):
        write_shard(directory / name, shard, tensors=tensors)
    every = [tensor for shard in shards for tensor in shard.values()]
    total = sum(tensor.nbytes for tensor in every)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json_file(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return total, every[-1].dtype


def in_shards(blank: Iterable[tuple[str, Tensor]]) -> Iterator[Tensors]:
    """What each file is to hold, in order."""
    shard, size = Tensors(), 0
    for name, tensor in blank:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def write_shard(path: Path, shard: Mapping[str, Tensor], *, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """A safetensors file of the next tensors, which `shard` has the shapes of: its header comes first, so that each can be
    written when it is read."""
    header = header_of(shard)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, (_, tensor) in zip(shard, tensors, strict=False):  # in this order: it takes none too many
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def header_of(shard: Mapping[str, Tensor]) -> bytes:
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shard.items():
        begin, end = end, end + tensor.nbytes
        rows[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(rows, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNMENT)


def generation_config(tokenizer: ExportedTokenizer) -> dict[str, Any]:
    """Text ends with a document and, where the tokenizer has chats, with a turn of one."""
    ends = [tokenizer.ids.eos, *([] if tokenizer.chat_end is None else [tokenizer.chat_end])]
    return {"bos_token_id": tokenizer.ids.bos, "eos_token_id": ends, "pad_token_id": tokenizer.ids.pad}


def caveats(run: RunDir, stage: str, *, directory: Path) -> list[str]:
    """What a user must know of an exported checkpoint that is not the stage's end, or not its newest; and of its tokenizer."""
    saved, refused = newest_checkpoint(run, stage)
    lines = [f"passed over: {reason}" for reason in refused] if directory == run.export(stage) else []
    if directory == run.export(stage) and saved and not saved.meta.finished:
        lines.append(f"this is step {saved.meta.step} ({saved.meta.tokens} tokens) of the stage, NOT its end")
    if installed("transformers") and is_misread(directory):
        lines.append(
            "transformers' AutoTokenizer makes other tokens of this folder than the run did, by its model_type: load "
            "PreTrainedTokenizerFast, or export as llama where the model has no biases"
        )
    return lines


def write_json_file(path: Path, fields: dict[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")


def generate(directory: Path, prompt: str, *, num_tokens: int = 60) -> str:
    """A sample from the exported folder through transformers: the proof that it loads, and something to look at."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(directory)
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
    parser.add_argument("--step", type=int, help="the newest")
    parser.add_argument("--prompt")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads the checkpoint
    run = RunDir(arguments.run_dir)
    try:
        directory = export(run, read_config(run), stage=arguments.stage, step=arguments.step)
    except (CheckpointError, DataError, RunStateError, OSError) as error:
        print(f"phidias: {error}", file=sys.stderr)
        return exit_class(error)
    print(f"exported {at_step(arguments.stage, arguments.step)} to {directory}")
    for line in caveats(run, arguments.stage, directory=directory):
        print(line)
    if arguments.prompt is not None:
        print(f"\nsample:\n{generate(directory, arguments.prompt)}")
    return ExitClass.DONE


if __name__ == "__main__":
    sys.exit(main())
