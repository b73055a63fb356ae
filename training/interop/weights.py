"""A checkpoint's weights, a tensor at a time, of stacked ones a layer at a time, without building the model or its layout."""

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from launcher.rundir.checkpoints import CheckpointError

LAYERS = "decoder.layers."


class Weights(Protocol):
    """Tensors by their global names. Megatron stacks the layers: `decoder.layers.mlp.linear_fc1.weight` is [L, 2F, H], and of
    `layer` 7 of it [2F, H]. `layer_names` are those inside a layer."""

    @property
    def layer_names(self) -> list[str]: ...

    def blank(self, name: str, *, layer: int | None = None) -> Tensor:
        """Its shape and type alone, on the device `meta`."""

    def read(self, name: str, *, layer: int | None = None) -> Tensor: ...


class CheckpointWeights:
    """Reads what is asked for, and so holds one tensor, and one stored piece of it. `unread`: what was not asked for yet."""

    def __init__(self, path: Path):
        self.path, self.reader = path, FileSystemReader(str(path))
        metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self.unread = set(self.tensors)

    @property
    def layer_names(self) -> list[str]:
        return [name.removeprefix(LAYERS) for name in self.tensors if name.startswith(LAYERS)]

    def blank(self, name: str, *, layer: int | None = None) -> Tensor:
        entry = self.tensors[name]
        return torch.empty(entry.size if layer is None else entry.size[1:], dtype=entry.properties.dtype, device="meta")

    def read(self, name: str, *, layer: int | None = None) -> Tensor:
        """CheckpointError where the checkpoint has not all of it."""
        self.unread.discard(name)
        entry, out = self.tensors[name], torch.empty_like(self.blank(name, layer=layer), device="cpu")
        sizes = entry.size if layer is None else torch.Size([1, *entry.size[1:]])
        offsets = torch.Size([layer or 0, *(0 for _ in sizes[1:])])
        items = create_read_items_for_chunk_list(name, entry, [ChunkStorageMetadata(offsets, sizes)])
        if sum(math.prod(item.lengths) for item in items) != out.numel():
            raise CheckpointError(f"{self.path} lacks parts of {name}; the checkpoint is torn. Fix: restore it")
        self.reader.read_data(LoadPlan(items), Into(out.view(sizes))).wait()
        return out


class Into(DefaultLoadPlanner):
    """Puts pieces of one tensor where they belong."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        spans = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.out[tuple(slice(first, first + count) for first, count in spans)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It lies where it belongs."""
