"""What a GPU rank waits for on its host: the next batch of data, and a checkpoint that begins."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_configs import compose, single_words
from benchmarks.gpu_device import Figures, Keep, seconds, settle
from benchmarks.reading import write_source
from launcher.config.schema import RunConfig, StageConfig
from launcher.rundir.checkpoints import FORMAT_VERSION, Meta
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records
from training.checkpoint import Checkpointer, layout_key
from training.data import StageData, TrainingFeed
from training.model import build_model
from training.optimizer import build_optimizer
from training.parallel import Rank, initialize_parallel, join_world, leave_world
from training.rehearse import pretended_rank, random_batches
from training.step import Stepper

# Data


STEPS, COMPUTED_S = 20, 0.25  # a step of the job computes some 2 s
SHARDS, SHARD_TOKENS = 2, 1 << 24  # of each source: 128 MB


def measure_data(keep: Keep, *, tiny: bool) -> None:
    """A rank's slices of the job's global batches over synthetic shards: as they are read ahead while a step computes (here it
    sleeps), and read one after another."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*job_words(tiny=tiny), f"run.data_dir={folder}"])
        stage = config.stages[0]
        for name in stage.mixture.sources:
            write_source(Path(folder) / name, shards=1 if tiny else SHARDS, tokens=1 << 20 if tiny else SHARD_TOKENS)
        with pretended_rank(config, stage=stage, rank=0) as (rank, _):
            for name, depth in (("read ahead", config.data.prefetch_batches), ("not read ahead", 0)):
                keep(name, waits(config, stage=stage, rank=rank, depth=depth, steps=5 if tiny else STEPS))


def job_words(*, tiny: bool) -> list[str]:
    """Of the 1,920-GPU job; in a rehearsal of the demo's, whose vocabulary the synthetic shards go beyond."""
    if tiny:
        return ["run=demo", "stage=demo_pretrain", "model.vocab_size=100352", "model.padded_vocab_size=100352"]
    return ["run=phi4", "stage=pretrain", "cluster.gpu=h200_sxm"]


def waits(config: RunConfig, *, stage: StageConfig, rank: Rank, depth: int, steps: int) -> Figures:
    """Milliseconds that a step waits for its micro batches, on the device too; of a rank's slice."""
    config = replace(config, data=replace(config.data, prefetch_batches=depth))
    began = time.perf_counter()
    feed = TrainingFeed(StageData(config, stage, ledger={}), stage, rank=rank)
    opened = time.perf_counter() - began
    waited = []
    for step in range(steps):
        began = time.perf_counter()
        batches = feed.batch(step * stage.stage.global_batch_size)
        settle()
        waited.append(1e3 * (time.perf_counter() - began))
        time.sleep(COMPUTED_S if depth else 0.0)
    feed.close()
    assert batches is not None
    return {
        "sequences": sum(len(batch.tokens_BS) for batch in batches),
        "opened, s": round(opened, 3),
        "first, ms": round(waited[0], 2),
        "median, ms": round(statistics.median(waited[1:]), 3),
        "largest, ms": round(max(waited[1:]), 3),
    }


# Checkpoints


SAVES = 3
# A rank of 1,920 holds 107 MB of the 14B (14 bytes a parameter, shared out over all); a rank of 128, 1.6 GB.
MODELS = {
    "a rank of 1,920": [
        "model.hidden_size=384", "model.num_attention_heads=3", "model.num_query_groups=1", "model.ffn_hidden_size=1344",
        "model.vocab_size=2048", "model.padded_vocab_size=2048",
    ],
    "a rank of 128": [
        "model.hidden_size=1536", "model.num_attention_heads=12", "model.num_query_groups=4", "model.ffn_hidden_size=5376",
        "model.vocab_size=8192", "model.padded_vocab_size=8192",
    ],
}  # fmt: skip


def measure_checkpoints(keep: Keep, *, tiny: bool) -> None:
    """How long an asynchronous save of what a rank holds keeps training from its next step. The first plans who writes what."""
    for name, words in MODELS.items():
        plain = single_words(tiny=tiny, precision="bf16", length=32 if tiny else 1024, layers=2 if tiny else 3)
        config = compose([*plain, *([] if tiny else words)])
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder, one_rank(config) as rank:
            keep(name, stalls(config, rank=rank, run=RunDir(Path(folder) / "run"), saves=2 if tiny else SAVES))


@contextmanager
def one_rank(config: RunConfig) -> Iterator[Rank]:
    """A world of one, with NCCL and gloo where training has them."""
    os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = join_world(timeout_s=120)
    try:
        yield initialize_parallel(config.stages[0].layout, seed=7, device=device, timeout_s=120)
    finally:
        leave_world()


def stalls(config: RunConfig, *, rank: Rank, run: RunDir, saves: int) -> Figures:
    stage = config.stages[0]
    chunks = build_model(stage, model=config.model, seed=7, hardware=config.hardware, quick=True)
    optimizer = build_optimizer(stage, chunks=chunks)
    stepper = Stepper(stage, chunks=chunks, optimizer=optimizer, rank=rank)
    batches = random_batches(config, stage=stage, rank=rank, num_microbatches=1)(0)
    checkpointer = Checkpointer(run, stage="pretrain", layout=stage.layout, chunks=chunks, optimizer=optimizer)
    run.root.mkdir(parents=True)
    step = lambda: stepper.train(batches, num_microbatches=1)  # noqa: E731
    alone = [seconds(step) for _ in range(8)][3:]
    rows = [one_save(checkpointer, stage=stage, number=number, step=step) for number in range(1, saves + 1)]
    written = [row for row in read_records(run.events) if row["kind"] == "checkpoint"]
    return {
        "bytes": written[-1]["bytes"],
        "stall, s": {"first": rows[0][0], "median of the others": statistics.median(row[0] for row in rows[1:])},
        "written after, s": [row["seconds"] for row in written],
        "publishing it, s": [row[1] for row in rows],
        "a step, ms": round(1e3 * statistics.median(alone), 2),
        "a step while it is written, ms": [row[2] for row in rows],
    }


def one_save(checkpointer: Checkpointer, *, stage: StageConfig, number: int, step: Callable[[], object]) -> tuple[Any, ...]:
    """Seconds until training goes on, seconds of publishing, and milliseconds of a step in between (null: it was written before
    a step had ended)."""
    policy = replace(stage.stage.checkpoint, asynchronous=True, keep_last=1)
    settle()
    began = time.perf_counter()
    checkpointer.save(meta_of(stage, number=number), policy=policy, any_layout=False, wait=False)
    stall, beside = time.perf_counter() - began, []
    while checkpointer.writer.is_busy and len(beside) < 2000:
        beside.append(seconds(step))
    began = time.perf_counter()
    checkpointer.writer.finish()
    publishing = time.perf_counter() - began
    return round(stall, 3), round(publishing, 3), round(1e3 * statistics.median(beside), 2) if beside else None


def meta_of(stage: StageConfig, *, number: int) -> Meta:
    return Meta(
        format_version=FORMAT_VERSION, stage="pretrain", step=number, samples=number, tokens=0, finished=False,
        layout=layout_key(stage.layout), ledger={}, start_ledger={}, tokens_by_source={}, files={},
    )  # fmt: skip
