"""Data order as a user meets it: the windows that ranks read, whatever kills, resumes, layouts and batches come between;
phases, recall, buckets, masks; and what is refused."""

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.endtoend.workspace import Workspace
from tests.slow import slow

Read = dict[int, list[Any]]
SEED = 20_261_121  # of the moments at which runs are killed

CURRICULUM = """name: curriculum
sources:
  prose: {{inputs: ["{root}/raw/prose/*.jsonl"], format: jsonl, share: 1.0, max_epochs: 4.0}}
  notes: {{inputs: ["{root}/raw/notes/*.txt"], format: text, tokens: 4096.0}}
  long_notes: {{parent: notes, min_document_tokens: 256, windows: best_fit}}
phases:
  - start_tokens: 12288
    sources: {{prose: {{share: 0.5}}, notes: {{share: 0.5}}, long_notes: {{epochs: 0.125}}}}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    workspace = Workspace(tmp_path_factory.mktemp("order"))
    (workspace.root / "yaml" / "mixture" / "curriculum.yaml").write_text(CURRICULUM.format(root=workspace.root))
    workspace.config("data", "data.length_buckets=[256]")
    workspace.config("data", "data.length_buckets=[256]", "stage=small", "mixture=curriculum")
    yield workspace


def traced(workspace: Workspace, *, stage: str = "small") -> Read:
    """(source, epoch, offset) of each sample that a step took; a sample read twice must have been the same."""
    read: Read = {}
    for row in workspace.rows("windows.jsonl"):
        if row["stage"] == stage:
            for sample, window in enumerate(row["windows"], start=row["first_sample"]):
                assert read.setdefault(sample, window) == window, f"sample {sample} was {read[sample]}, then {window}"
    return read


def train(workspace: Workspace, *words: str, code: int = 0) -> str:
    return workspace.config("train", "data.length_buckets=[256]", "data.trace=true", *words, code=code)


def kill_all(run: Workspace, process: Any) -> None:
    """SIGKILL to the launcher and all it started: the power went."""
    process.kill()  # ranks are in sessions of their own, and go on while the launcher is away
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().split(b"\0")
            if b"training" in command and str(run.run_dir).encode() in command:
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def straight(prepared: Workspace) -> Workspace:
    """40 steps without interruption."""
    workspace = prepared.named("straight")
    train(workspace, "stage=small")
    return workspace


@slow  # CI has kills in tests/chaos, layouts and batches in tests/training/test_ranks.py
def test_a_kill_another_layout_and_another_batch_read_the_same_windows(prepared: Workspace, straight: Workspace) -> None:
    """Killed at random steps, taken up with PP2, another batch, one rank: the multiset and the order of what was read are those
    of the run that nothing happened to."""
    moments = random.Random(SEED)
    run = prepared.named("killed")
    resumes = [
        ("stage=small",),
        ("stage=small", "layout=demo_pp", "layout.micro_batch_size=2", "stage.global_batch_size=4"),
        ("stage=small", "stage.global_batch_size=16", "cluster.gpus_per_node=1"),
    ]
    step, often = 0, ("stage.checkpoint.interval_tokens=2048", "stage.checkpoint.asynchronous=false")
    for words in resumes[:2]:
        process = run.start_training("data.length_buckets=[256]", "data.trace=true", *often, *words)
        step += moments.randint(5, 12)
        run.wait_for_step(step, stage="small", process=process)
        kill_all(run, process)
        run.phidias("checkpoint", run.run, "action=convert", "runs_dir=runs")  # for the next layout
    train(run, *resumes[2])
    assert len(run.events("resume")) >= 2
    assert traced(run) == traced(straight)
    assert sorted(traced(run)) == list(range(320))


@slow
def test_a_mixture_changed_on_resume_is_a_phase_from_there_on(prepared: Workspace, straight: Workspace) -> None:
    run = prepared.named("changed")
    train(run, "stage=small", "stage.tokens=10240")
    words = ("stage=small", "mixture.sources.prose.share=0.2", "mixture.sources.notes.share=0.8")
    said = train(run, *words)
    assert "phase: stage small from 10,240 tokens on: prose 0.2, notes 0.8" in said
    (event,) = run.events("phase")
    assert event["start_sample"] == 160
    read, before = traced(run), traced(straight)
    assert [read[sample] for sample in range(160)] == [before[sample] for sample in range(160)]
    later = [read[sample][0] for sample in range(160, 320)]
    assert abs(later.count("notes") - 128) <= 4
    windows = [tuple(window) for window in read.values()]
    assert len(set(windows)) == len(windows)
    (row,) = [row for row in json.loads(exposure(run, *words)) if row["source"] == "notes"]
    assert abs(row["tokens_read"] - 64 * (48 + 128)) <= 64 * 8
    assert row["tokens"] == row["tokens_read"] and row["epochs_read"] == row["epochs"]


def exposure(run: Workspace, *words: str) -> str:
    return run.config("exposure", "out=json", "data.length_buckets=[256]", *words)


@slow
def test_a_longer_horizon_moves_nothing(prepared: Workspace, straight: Workspace) -> None:
    run = prepared.named("extended")
    train(run, "stage=small", "stage.tokens=10240")
    train(run, "stage=small", "stage.tokens=15360")
    read, before = traced(run), traced(straight)
    assert len(read) == 240 and all(before[sample] == window for sample, window in read.items())
    assert not run.events("phase")


@slow
def test_a_source_that_was_read_stays_described(prepared: Workspace) -> None:
    run = prepared.named("extended")
    said = train(run, "stage=small", "~mixture.sources.notes", "mixture.sources.prose.share=1.0", code=3)
    assert "reads notes, which the mixture no longer describes" in said and "mixture.sources.notes.share=0" in said


@slow
def test_a_curriculum_with_tokens_epochs_and_a_bucket(prepared: Workspace) -> None:
    """Phases of YAML, kept through a stop; amounts come out to the sample; the bucket is packed, and masks hold under PP2."""
    run = prepared.named("curriculum")
    words = ("stage=small", "mixture=curriculum", "stage.reset_attention_mask=true", "stage.eod_mask_loss=true")
    process = run.start_training("data.length_buckets=[256]", "data.trace=true", *words)
    run.wait_for_step(12, stage="small", process=process)
    run.phidias("stop", run.run, "layout=any", "runs_dir=runs")
    assert process.wait(timeout=120) == 130
    train(run, *words, "layout=demo_pp", "layout.micro_batch_size=2")
    sources = {sample: window[0] for sample, window in traced(run).items()}
    first, second = ([sources[sample] for sample in span] for span in (range(192), range(192, 320)))
    assert abs(first.count("notes") - 64) <= 4 and "long_notes" not in first
    rows = {row["source"]: row for row in json.loads(exposure(run, *words))}
    bucket = rows["long_notes"]["tokens"] / (320 * 64)
    assert bucket and abs(second.count("prose") - second.count("notes")) <= 8
    counted = run.rows("metrics.jsonl")[-2]["tokens_by_source"]
    assert 0 < sum(counted.values()) < 320 * 64, "labels after a document's end do not count"
    assert rows["notes"]["epochs"] == pytest.approx(rows["long_notes"]["epochs"]), "of the documents in both"


@slow
def test_a_phase_in_the_past_is_refused(prepared: Workspace) -> None:
    run = prepared.named("curriculum")
    text = CURRICULUM.replace("start_tokens: 12288", "start_tokens: 6144").format(root=prepared.root)
    (prepared.root / "yaml" / "mixture" / "late.yaml").write_text(text)
    words = ("stage=small", "mixture=late", "stage.reset_attention_mask=true", "stage.eod_mask_loss=true")
    before = (run.run_dir / "order.json").read_bytes()
    said = train(run, *words, code=3)
    assert "a phase that starts at 6144 tokens, in the past" in said and "what was read stays" in said
    assert (run.run_dir / "order.json").read_bytes() == before


@slow
def test_midtraining_replays_from_a_stated_token(prepared: Workspace, straight: Workspace) -> None:
    """Recall from token 4,096 of pretraining on: at another length from the first group border after that point. The same run
    without it would go on where pretraining stopped."""
    words = ("stage=long", "stage.replay_from_tokens=4096")
    train(straight, *words)
    meta = json.loads(max(straight.run_dir.glob("checkpoints/long/*/meta.json")).read_text())
    replayed = meta["start_ledger"]
    assert sum(row["position"] for row in replayed.values()) == 4096 // 64
    end = json.loads(max(straight.run_dir.glob("checkpoints/small/*/meta.json")).read_text())["ledger"]
    assert all(replayed[name]["position"] < end[name]["position"] for name in replayed)
    (skipped,) = [row["tokens_by_source"] for row in straight.events("ledger_skip")]
    rows = {row["source"]: row for row in json.loads(straight.config("exposure", "out=json", "data.length_buckets=[256]"))}
    assert set(skipped) <= set(rows) and all(row["tokens_read"] == row["tokens"] for row in rows.values())


@slow
def test_a_ramp_grows_the_batch_and_reads_the_same(prepared: Workspace, straight: Workspace) -> None:
    run = prepared.named("ramp")
    train(run, "stage=small", "++stage.rampup_batch_size={start: 4, increment: 4, tokens: 4096}")
    samples = [row["samples"] for row in run.rows("metrics.jsonl") if row["kind"] == "train"]
    assert samples[:3] == [4, 8, 12] and samples[-1] - samples[-2] == 8 and len(samples) == 48
    assert traced(run) == traced(straight)


@slow
def test_object_storage_with_a_cache_reads_the_same(prepared: Workspace, straight: Workspace) -> None:
    run = prepared.named("remote")
    url = f"run.data_dir=file://{prepared.root / 'data'}"
    cache = f"data.cache_dir={prepared.root / 'cache'}"
    tokenizer = f"tokenizer.file={prepared.root / 'data' / 'tokenizer.json'}"
    train(run, "stage=small", url, cache, tokenizer)
    assert traced(run) == traced(straight)
    assert any((prepared.root / "cache").iterdir())


@slow
def test_plain_reads_read_the_same(prepared: Workspace, straight: Workspace) -> None:
    run = prepared.named("pread")
    train(run, "stage=small", "data.reader=pread", "data.prefetch_batches=0", "stage.tokens=5120")
    read, before = traced(run), traced(straight)
    assert len(read) == 80 and all(before[sample] == window for sample, window in read.items())


@slow
def test_a_shard_replaced_since_the_launch_is_refused_until_it_is_verified(prepared: Workspace) -> None:
    run = prepared.named("shard")
    train(run, "stage=small", "stage.tokens=5120")
    shard = next((prepared.root / "data" / "prose").glob("shard_*.bin"))
    original = shard.read_bytes()
    shard.write_bytes(bytes([original[0] ^ 1]) + original[1:])
    said = train(run, "stage=small", code=3)
    assert f"source prose: {shard} was" in said and "action=verify" in said
    assert "bin_xxh3" in prepared.config("data", "data.length_buckets=[256]", "action=verify", code=3)
    train(run, "stage=small", code=3)
    shard.write_bytes(original)
    train(run, "stage=small", code=3)
    prepared.config("data", "data.length_buckets=[256]", "action=verify")
    train(run, "stage=small", "stage.tokens=6144")


def test_a_truncated_shard_is_refused(prepared: Workspace, tmp_path: Path) -> None:
    shutil.copytree(prepared.root / "data", tmp_path / "data")
    shard = next((tmp_path / "data" / "notes").glob("shard_*.bin"))
    os.truncate(shard, shard.stat().st_size - 2)
    run = prepared.named("truncated")
    said = train(run, f"run.data_dir={tmp_path / 'data'}", code=2)
    assert str(shard) in said and not run.run_dir.exists()
