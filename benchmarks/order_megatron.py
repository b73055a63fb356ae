"""Megatron's side of benchmarks.data_order: its index files, in a process of its own."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers, helpers_cpp
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from benchmarks import data_order

CPP = ("build_sample_idx_int32", "build_sample_idx_int64", "build_blending_indices")
HELD = ("tokens", "labels", "loss_mask")  # what is a sample's own; position ids are shared


class Tokenizer:
    """What GPTDataset asks of one."""

    vocab_size, eod, pad = data_order.VOCAB_SIZE, data_order.VOCAB_SIZE - 1, -1
    unique_identifiers = {"class": "Tokenizer"}  # noqa: RUF012


def open_group() -> None:
    """BlendedDataset asks for the rank wherever it caches."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def build(case: data_order.Case) -> Any:
    prefixes = [f"{case['folder']}/{name}/shard" for name in case["names"]]
    config = GPTDatasetConfig(
        random_seed=data_order.SEED,
        sequence_length=data_order.SEQ_LENGTH,
        blend=(prefixes, case["weights"]),
        split="100,0,0",
        num_dataset_builder_threads=case.get("threads", 1),
        path_to_cache=case["cache"],
        mmap_bin_files=case.get("mmap", False),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [case["samples"], 0, 0], lambda: True, config).build()[0]


def count_calls() -> dict[str, dict[str, float]]:
    """Has each C++ helper note its calls and seconds, so that the result shows that they were used."""
    found = {name: {"calls": 0.0, "seconds": 0.0} for name in CPP}
    for name in CPP:
        setattr(helpers, name, counting(getattr(helpers_cpp, name), found[name]))
    return found


def counting(function: Callable[..., Any], into: dict[str, float]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        into["calls"] += 1
        into["seconds"] += time.perf_counter() - began
        return result

    return counted


def read_tokens(dataset: Any, first: int, count: int) -> list[Any]:
    """The tokens of consecutive samples alone, [S + 1] each, by the method that GPTDataset reads them with."""
    samples = zip(
        dataset.dataset_index[first : first + count], dataset.dataset_sample_index[first : first + count], strict=True
    )
    return [dataset.datasets[source]._query_document_sample_shuffle_indices(index)[0] for source, index in samples]


def start(case: data_order.Case) -> data_order.Figures:
    count = case["batch"]
    setup_s = data_order.seconds(open_group)
    calls, before = count_calls(), data_order.Reading.now()
    dataset = build(case)
    ready = data_order.Reading.now()
    batch = [dataset[sample] for sample in range(count)]
    done = data_order.Reading.now()
    held = sum(sample[key].nbytes for sample in batch for key in HELD)
    figures = data_order.start_figures(before, ready, done, batch_bytes=held)
    second = min(count, len(dataset) - count)
    figures["second_batch_tokens_s"] = round(data_order.seconds(lambda: read_tokens(dataset, count, second)), 4)
    counts = np.bincount(dataset.dataset_index, minlength=len(case["names"]))
    figures |= data_order.share_figures(counts, weights=case["weights"], samples=len(dataset))
    figures |= {"samples_asked": case["samples"], "process_group_s": round(setup_s, 3)}
    return {
        **figures,
        "helpers": Path(helpers_cpp.__file__).name,
        "cpp_helpers": {name: used for name, used in calls.items() if used["calls"]},
    }


def work(case_path: str, import_s: float) -> None:
    data_order.work(case_path, import_s, {"start": start})
