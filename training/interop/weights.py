"""A checkpoint's weights, whole, one tensor at a time, without building the model or its layout."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

LAYERS = "decoder.layers."


class CheckpointWeights:
    """Reads tensors by their global names. Megatron stacks the layers: `decoder.layers.mlp.linear_fc1.weight` is [L, 2F, H]."""

    def __init__(self, path: Path):
        self.path = path
        entries = FileSystemReader(str(path)).read_metadata().state_dict_metadata
        self.tensors = {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self.unread = set(self.tensors)

    def read(self, name: str) -> Tensor:
        entry = self.tensors[name]
        self.unread.discard(name)
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        load(state, checkpoint_id=str(self.path), no_dist=True)
        return state[name]

    @property
    def layer_names(self) -> list[str]:
        """Names inside a layer."""
        return [name.removeprefix(LAYERS) for name in self.tensors if name.startswith(LAYERS)]

    def read_layers(self) -> dict[str, Tensor]:
        """All layers' tensors, each [L, ...], by their names inside a layer."""
        return {name: self.read(LAYERS + name) for name in self.layer_names}
