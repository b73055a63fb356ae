"""A folder that `phidias export` wrote, found in the run and loaded as any user would load it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from launcher.rundir.exits import RunStateError
from launcher.rundir.paths import RunDir, at_step
from launcher.rundir.records import read_json
from training.interop.tokenizer import load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Exported:
    """A folder that `phidias export` wrote: of which step, and which files they are (`written`: the newest, Unix seconds).
    `name`: what it and its figures are called, `<stage>` or `<stage>@<step>`; `checkpoint`: the digest of the meta.json that it
    was made of, None of folders that do not say it."""

    path: Path
    name: str
    stage: str
    step: int
    tokens: int
    bytes: int
    written: float
    checkpoint: str | None = None


def folder_of(exported: Exported) -> dict[str, Any]:
    return {"path": str(exported.path), "bytes": exported.bytes, "written": exported.written}


def read_export(run: RunDir, *, stage: str, step: int | None = None) -> Exported:
    """What lies in a stage's folder of the run. RunStateError: nothing, or nothing that says what it is."""
    name = at_step(stage, step)
    folder, fix = run.export(name), f"Fix: phidias export {run.name} stage={stage}{'' if step is None else f' step={step}'}"
    if not folder.is_dir():
        raise RunStateError(f"{folder} is missing: stage {stage} has no export, and eval reads what export wrote. {fix}")
    try:
        source = read_json(folder / "phidias.json")
        found_step, tokens = int(source["step"]), int(source["tokens"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        found = f"{folder / 'phidias.json'} is missing or unreadable ({error}); it says which checkpoint was exported"
        raise RunStateError(f"{found}. {fix}") from error
    files = [file.stat() for file in folder.iterdir()]
    size, written = sum(file.st_size for file in files), max(file.st_mtime for file in files)
    return Exported(folder, name, stage, found_step, tokens, size, round(written, 3), source.get("checkpoint"))


class Loaded:
    """The model, in memory once it is asked for: what can be refused without it comes first."""

    def __init__(self, exported: Exported, run: RunDir):
        self.exported, self.run = exported, run
        self.device = torch.device("cuda") if torch.cuda.is_available() else CPU
        self.dtype = "fp32" if self.device.type == "cpu" else "bf16"

    @cached_property
    def model(self) -> Any:
        return load_model(self.exported, dtype=self.dtype, device=self.device, run=self.run)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.exported.path)


def load_model(exported: Exported, *, dtype: str, device: torch.device, run: RunDir) -> Any:
    """The model as any user would load it, from this folder alone. RunStateError where that fails, or leaves a weight out."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    fix = f"Fix: phidias export {run.name} stage={exported.stage}"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            exported.path,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunStateError(f"{exported.path} does not load through transformers ({error}). {fix}") from error
    wrong = [f"{kind} {', '.join(sorted(map(str, keys))[:3])}" for kind, keys in report.items() if keys]
    if wrong:
        raise RunStateError(
            f"{exported.path} loads with {'; '.join(wrong)}; transformers would draw these anew or drop them, and every weight "
            f"must come from the folder. {fix}"
        )
    return model.eval().to(device)
