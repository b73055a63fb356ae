"""`python -m tests.endtoend.logits <run dir> <stage> <export dir>`: the largest difference between the logits of the checkpoint
in Megatron's model (one rank) and of the exported folder in transformers, as JSON."""

import dataclasses
import json
import os
import sys
from pathlib import Path

from training import cpu

cpu.install()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from launcher.config.schema import Layout  # noqa: E402
from launcher.rundir.checkpoints import newest_checkpoint  # noqa: E402
from launcher.rundir.freeze import read_config  # noqa: E402
from launcher.rundir.paths import RunDir  # noqa: E402
from tests.training.tiny import LAYOUT  # noqa: E402
from training.checkpoint import Checkpointer  # noqa: E402
from training.model import build_model  # noqa: E402
from training.optimizer import build_optimizer  # noqa: E402
from training.parallel import initialize_parallel, join_world, leave_world  # noqa: E402


def megatron_logits(run: RunDir, stage_name: str, tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, V] of the newest checkpoint, whatever layout wrote it, on one rank."""
    config = read_config(run)
    stage = dataclasses.replace(config.stage(stage_name), layout=Layout(**LAYOUT))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
    initialize_parallel(stage.layout, seed=0, device=join_world(timeout_s=60), timeout_s=60)
    chunks = build_model(stage, model=config.model, seed=0)
    saved, _ = newest_checkpoint(run, stage_name)
    assert saved is not None
    optimizer = build_optimizer(stage, chunks=chunks)
    Checkpointer(run, stage=stage_name, layout=stage.layout, chunks=chunks, optimizer=optimizer).load_weights(saved)
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    chunks[0].eval()
    with torch.no_grad():
        logits = chunks[0](input_ids=tokens_BS, position_ids=positions, attention_mask=None)
    leave_world()
    return logits


def main() -> None:
    run, stage, folder = RunDir(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
    settings = read_config(run).stage(stage).stage
    tokens = torch.randint(0, 300, (2, settings.seq_length), generator=torch.Generator().manual_seed(1))
    expected = megatron_logits(run, stage, tokens)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(input_ids=tokens).logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    result = {
        "difference": float((found - expected).abs().max()),
        "scale": float(expected.abs().max()),
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "architecture": type(model).__name__,
        "chat": chat,
        "ids": tokenizer("the loop")["input_ids"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
