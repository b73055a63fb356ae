"""A Hugging Face folder into a rank, a checkpoint into a folder: `python -m benchmarks.interop [--model phi_1b] [--work DIR]`.

Random weights of the model are written as bf16 safetensors, in files of about `--shard-gib`; a process then fills the model of
rank 0 of tp 2 from them (reading and mapping alone: no optimizer, no other rank), beside a plain read and `cp` of the same
files. Of the same weights a checkpoint of one rank is written, by megatron-core as training does, and a process exports it
(weights alone: no digests, tokenizer or card). GB (10^9 bytes) a second; resident memory of the process before and at most
during it, and what of that is the model. `cold`: after the files were dropped from the page cache, as far as the system does
that; `warm`: after a plain read. `projected`: seconds for the 14B's weights at the median rate, no more than an extrapolation.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result
from launcher.config.compose import compose_run
from launcher.config.schema import RunConfig
from launcher.plan.parameters import count_parameters

BLOCK_BYTES = 32 << 20
BF16_BYTES = 2


def config_of(model: str, folder: Path, *words: str) -> RunConfig:
    plain = [f"model={model}", "layout.tp=2", "precision=bf16", "stage.rotary_base=250000", f"stage.init_from={folder}"]
    return compose_run(["run=demo", "stage=demo_pretrain", *plain, *words])


def write_folder(config: RunConfig, folder: Path, *, shard_bytes: int) -> int:
    """Weights and config.json, a file at a time. Returns bytes of weights."""
    import torch
    from safetensors.torch import save_file

    from launcher.plan.foreign import FAMILY_NAMES, Shape, expected_tensors
    from training.interop.families import TokenIds, hf_config

    fields = hf_config(config.model, stage=config.stages[0].stage, ids=TokenIds(0, 0, 0), dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(fields))
    values = {name: getattr(config.model, name) for name in Shape.__dataclass_fields__}
    shape = Shape(**values | {"vocab_size": fields["vocab_size"]})
    where: dict[str, str] = {}
    held: dict[str, Any] = {}
    total = size = count = 0

    def write() -> None:
        name = f"model-{count:05d}.safetensors"
        save_file(held, folder / name)
        where.update(dict.fromkeys(held, name))

    for name, rows in expected_tensors(FAMILY_NAMES[str(config.model.family)], shape).items():
        held[name] = torch.randn(rows).mul_(0.02).bfloat16()
        size, total = size + held[name].nbytes, total + held[name].nbytes
        if size >= shard_bytes:
            write()
            held, size, count = {}, 0, count + 1
    if held:
        write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return total


def resident_gb(kind: str) -> float:
    """VmRSS: now; VmHWM: at most, since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024 / 1e9, 3)


def reset_peak() -> float:
    """Resident memory now, from where its peak is counted."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return resident_gb("VmRSS")


def build(config: RunConfig, *, world_size: int) -> Any:
    """The chunk of rank 0; nothing of it is written yet."""
    from training import cpu

    cpu.install()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from training.model import build_chunk, transformer_config

    torch.set_num_threads(1)
    if world_size == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size, create_gloo_process_groups=False)
    stage = config.stages[0]
    return build_chunk(stage, model=config.model, config=transformer_config(stage, model=config.model), vp_stage=None)


def checkpoint_once(model: str, folder: Path) -> dict[str, Any]:
    """The folder's weights as one rank saves them, beside it."""
    config = config_of(model, folder, "layout.tp=1")
    chunk = build(config, world_size=1)
    from megatron.core import dist_checkpointing

    from training.interop.importing import import_weights, sound_folder

    import_weights([chunk], sound_folder(config.stages[0], config=config), model=config.model)
    checkpoint_of(folder).mkdir()
    dist_checkpointing.save({"model": chunk.sharded_state_dict()}, str(checkpoint_of(folder)))
    return {}


def checkpoint_of(folder: Path) -> Path:
    return folder.with_name("checkpoint")


def export_once(model: str, folder: Path) -> dict[str, Any]:
    from training.interop.export import write_weights
    from training.interop.weights import CheckpointWeights

    before_gb, began = reset_peak(), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent) as other:
        num_bytes, _ = write_weights(
            CheckpointWeights(checkpoint_of(folder)), Path(other), model=config_of(model, folder).model
        )
        seconds = time.perf_counter() - began
        files = len(files_of(Path(other)))
    return {
        "seconds": round(seconds, 3), "written_gb": round(num_bytes / 1e9, 3), "gb_per_s": round(num_bytes / 1e9 / seconds, 3),
        "files": files, "resident_before_gb": before_gb, "resident_peak_gb": resident_gb("VmHWM"),
    }  # fmt: skip


def import_once(model: str, folder: Path) -> dict[str, Any]:
    """In this process, as rank 0 of two."""
    config = config_of(model, folder)
    stage, chunk = config.stages[0], build(config, world_size=2)
    from training.interop.importing import import_weights, sound_folder

    before_gb, began = reset_peak(), time.perf_counter()
    found = sound_folder(stage, config=config)
    headers_s = time.perf_counter() - began
    num_bytes = import_weights([chunk], found, model=config.model)
    seconds = time.perf_counter() - began
    held = sum(parameter.nbytes for parameter in chunk.parameters())
    return {
        "seconds": round(seconds, 3), "headers_s": round(headers_s, 3), "read_gb": round(num_bytes / 1e9, 3),
        "gb_per_s": round(num_bytes / 1e9 / seconds, 3), "model_gb": round(held / 1e9, 3),
        "resident_before_gb": before_gb, "resident_peak_gb": resident_gb("VmHWM"),
    }  # fmt: skip


def files_of(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.distcp")])


def drop_cache(folder: Path) -> None:
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plain(folder: Path) -> None:
    buffer = bytearray(BLOCK_BYTES)
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def copy(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as other:
        subprocess.run(["cp", *map(str, files_of(folder)), other], check=True)


def rate(work: Callable[[Path], None], folder: Path, *, size: int) -> float:
    began = time.perf_counter()
    work(folder)
    return round(size / 1e9 / (time.perf_counter() - began), 3)


def measure(model: str, folder: Path, *, shard_bytes: int, rounds: int) -> dict[str, Any]:
    size = write_folder(config_of(model, folder), folder, shard_bytes=shard_bytes)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.interop", "--model", model, "--folder", str(folder)]

    def apart(what: str) -> dict[str, Any]:
        done = subprocess.run([*command, "--do", what], check=True, capture_output=True, text=True)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    apart("checkpoint")

    def states() -> Iterator[tuple[str, Callable[[Path], None]]]:
        yield "cold", drop_cache
        yield "warm", read_plain

    rows: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for state, prepare in states():
            row: dict[str, Any] = {}
            for name, work in {"plain_read_gb_per_s": read_plain, "cp_gb_per_s": copy}.items():
                prepare(folder)
                row[name] = rate(work, folder, size=size)
            prepare(folder)
            row["import"] = apart("import")
            prepare(checkpoint_of(folder))
            rows.setdefault(state, []).append(row | {"export": apart("export")})
    largest = max(path.stat().st_size for path in files_of(folder))
    files = {"files": len(files_of(folder)), "largest_file_gb": largest / 1e9}
    return {"model": model, "weights_gb": size / 1e9, **files, **rows, "projected": projected(rows["cold"])}


def projected(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the 14B's weights, from files that are not in memory."""
    model = compose_run(["run=phi4"]).model
    size_gb = count_parameters(model).total * BF16_BYTES / 1e9
    rates = {way: statistics.median(row[way]["gb_per_s"] for row in rows) for way in ("import", "export")}
    return {"weights_gb": round(size_gb, 1), **{f"{way}_s": round(size_gb / rate, 1) for way, rate in rates.items()}}


STEPS = {"checkpoint": checkpoint_once, "import": import_once, "export": export_once}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="phi_1b")
    parser.add_argument("--work", type=Path, help="where the weights are written, and removed in the end")
    parser.add_argument("--shard-gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--do", choices=STEPS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.do:
        print(json.dumps(STEPS[words.do](words.model, words.folder)))
        return
    folder = Path(tempfile.mkdtemp(dir=words.work)) / "folder"
    try:
        folder.mkdir()
        figures = measure(words.model, folder, shard_bytes=int(words.shard_gib * 2**30), rounds=words.rounds)
    finally:
        shutil.rmtree(folder.parent)
    write_result("interop", figures)


if __name__ == "__main__":
    main()
