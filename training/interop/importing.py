"""A stage's first weights out of a Hugging Face folder, in any layout. Each rank reads the rows and columns that it holds of
each parameter, straight from the safetensors files: no checkpoint is written in between, and a process holds one parameter at a
time.

Plain reads, not a memory map: mapped pages of every file would count as the process's memory, and columns would fault them in
one by one.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from launcher.config.schema import ModelConfig, RunConfig, StageConfig
from launcher.plan.foreign import Folder, check_folder
from launcher.rundir.checkpoints import CheckpointError
from training.initialize import full_shape, global_parameters, is_gated, local_shard, set_weight
from training.interop.families import FAMILIES

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK_BYTES = 32 << 20  # read at once where what is read is not what is kept


class Run(NamedTuple):
    """Rows of a parameter from `to` on: `count` of a tensor's, from `first` on."""

    tensor: str
    first: int
    count: int
    to: int


def sound_folder(stage: StageConfig, *, config: RunConfig) -> Folder:
    """The folder as it is now. CheckpointError where it is no longer what the launch found."""
    folder, problems = check_folder(stage, config=config)
    if problems:
        raise CheckpointError("; ".join(str(problem) for problem in problems))
    return folder


@torch.no_grad()
def import_weights(chunks: Sequence[Any], folder: Folder, *, model: ModelConfig) -> int:
    """Fills every parameter of this rank's chunks; rows of the vocabulary's padding keep their initial values. Returns
    the bytes that were read."""
    with FolderReader(folder) as reader:
        for chunk in unwrap_model(list(chunks)):
            for name, parameter in global_parameters(chunk):
                set_weight(parameter, read_parameter(reader, name, parameter, model=model))
        return reader.num_bytes


def read_parameter(reader: "FolderReader", name: str, parameter: torch.nn.Parameter, *, model: ModelConfig) -> Tensor:
    """This rank's part of a parameter, on the CPU, in its type."""
    shape, family = full_shape(parameter), FAMILIES[str(reader.folder.config["model_type"])]
    tensors, rows = family.rows(name, num_rows=shape[0], model=model)
    columns = slice(None)
    if getattr(parameter, "tensor_model_parallel", False):  # numbers are cut as the weights are when they are drawn
        if parameter.partition_dim == 0:
            rows = local_shard(rows[:, None], parameter, gated=is_gated(name, model))[:, 0]
        else:
            held = local_shard(torch.arange(shape[1])[None], parameter, gated=False)[0]
            columns = slice(int(held[0]), int(held[-1]) + 1)
    runs = list(find_runs(rows, [(tensor, reader.folder.tensors[tensor].shape[0]) for tensor in tensors]))
    is_whole = sum(run.count for run in runs) == len(rows)
    part = torch.empty(parameter.shape, dtype=parameter.dtype) if is_whole else parameter.detach().cpu().clone()
    for run in runs:
        reader.read(run, part[run.to : run.to + run.count], columns=columns)
    return part


def find_runs(rows: Tensor, tensors: Sequence[tuple[str, int]]) -> Iterator[Run]:
    """`rows` of the tensors laid end to end (with their numbers of rows), as stretches of one tensor. Rows behind the last one
    are left out."""
    breaks = (torch.nonzero(rows.diff() != 1).flatten() + 1).tolist()
    for to, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        begin, last, base = int(rows[to]), int(rows[to]) + end - to, 0
        for tensor, size in tensors:
            first, stop = max(begin, base), min(last, base + size)
            if first < stop:
                yield Run(tensor, first - base, stop - first, to + first - begin)
            base += size


class FolderReader:
    """Reads rows of tensors, with each file opened once. `num_bytes`: read so far."""

    def __init__(self, folder: Folder):
        self.folder, self.num_bytes = folder, 0
        self.stack, self.files = ExitStack(), dict[str, int]()

    def __enter__(self) -> "FolderReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def read(self, run: Run, out: Tensor, *, columns: slice) -> None:
        """Fills `out` [rows, ...] with the columns of a run, in its own type."""
        at = self.folder.tensors[run.tensor]
        dtype, inner = DTYPES[at.dtype], at.shape[1:]
        row_bytes = dtype.itemsize * math.prod(inner)
        if out.dtype == dtype and columns == slice(None) and out.is_contiguous():
            self.fill(out, run.tensor, start=at.start + run.first * row_bytes)
            return
        for first in range(0, run.count, step := max(1, BLOCK_BYTES // row_bytes)):
            block = torch.empty((min(step, run.count - first), *inner), dtype=dtype)
            self.fill(block, run.tensor, start=at.start + (run.first + first) * row_bytes)
            out[first : first + len(block)] = block[:, columns] if inner else block

    def fill(self, out: Tensor, tensor: str, *, start: int) -> None:
        """Fills a contiguous tensor with bytes of a file. CheckpointError where it has become shorter."""
        name = self.folder.tensors[tensor].file
        view, done = memoryview(out.reshape(-1).view(torch.uint8).numpy()), 0
        while done < len(view):
            count = os.preadv(self.open(name), [view[done:]], start + done)
            if not count:
                raise CheckpointError(
                    f"{self.folder.path}/{name} has become shorter: {tensor} ends behind it. Fix: fetch it again"
                )
            done += count
        self.num_bytes += done

    def open(self, name: str) -> int:
        if name not in self.files:
            self.files[name] = self.stack.enter_context((Path(self.folder.path) / name).open("rb")).fileno()
        return self.files[name]
