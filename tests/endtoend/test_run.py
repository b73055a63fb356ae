"""The whole way as a user goes it: data, training stopped by Ctrl-C and taken up again, midtraining, export, and everything
that must be refused or survived on the way."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.rundir.lock import is_live
from launcher.rundir.paths import RunDir
from tests.endtoend.workspace import REPOSITORY, Workspace
from tests.slow import slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("prepared"))
    workspace.config("data")
    return workspace


@pytest.fixture(scope="module")
def trained(prepared: Workspace) -> Iterator[Workspace]:
    """The run stopped by Ctrl-C after a few steps, with a second launch tried meanwhile, then trained to its end."""
    process = prepared.start_training()
    while not (prepared.run_dir / "logs").exists() and process.poll() is None:
        time.sleep(0.1)  # its ranks are being started
    second = prepared.config("train", code=3)
    assert "run small is live" in second
    prepared.wait_for_step(3, stage="small", process=process)
    assert prepared.interrupt(process) == 130
    prepared.config("train")
    yield prepared


def losses(workspace: Workspace, run: str, stage: str) -> dict[int, float]:
    """Loss by step; a step logged twice must have been the same."""
    rows = [json.loads(line) for line in (workspace.root / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train" and row["stage"] == stage}


def test_ctrl_c_saves_and_the_resume_is_bitwise_equal(trained: Workspace) -> None:
    stops, resumes = trained.events("stop"), trained.events("resume")
    assert [row["exit"] for row in stops] == ["INTERRUPTED"]
    assert [row["step"] for row in resumes] == [stops[0]["step"]]
    trained.named("straight").config("train", "stage=small")
    assert losses(trained, "small", "small") == losses(trained, "straight", "small")


def test_midtraining_starts_from_the_pretrained_weights(trained: Workspace) -> None:
    start = next(row for row in trained.events("stage_start") if row["stage"] == "long")
    assert start["init_from"] == "small" and start["path"] == "step_00000040"
    assert losses(trained, "small", "long")[1] < 3.0 < losses(trained, "small", "small")[1]
    ends = [row for row in trained.events("checkpoint") if row["stage"] == "long" and row["finished"]]
    assert len(ends) == 1
    meta = json.loads((trained.run_dir / "checkpoints" / "long" / ends[0]["path"] / "meta.json").read_text())
    consumed = meta["start_ledger"]
    assert {name: row["seq_length"] for name, row in consumed.items()} == {"prose": 64, "notes": 64}
    assert sum(row["position"] for row in consumed.values()) == 40 * 8


def test_held_out_loss_falls_below_the_unigram_entropy(trained: Workspace) -> None:
    report = trained.phidias("report", "small", "runs_dir=runs")
    assert "below the unigram entropy" in report
    page = (trained.run_dir / "report.html").read_text()
    assert "unigram" in page and "prose" in page


def test_training_again_does_nothing(trained: Workspace) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.run_dir.glob("checkpoints/*/*")}
    assert "done already" in trained.config("train")
    assert before == {path: path.stat().st_mtime_ns for path in trained.run_dir.glob("checkpoints/*/*")}


@pytest.mark.parametrize("stage", [pytest.param("small", marks=slow), "long"])
def test_exported_logits_are_megatrons(trained: Workspace, stage: str) -> None:
    """The pretrained stage was saved by DP2, the midtrained one by PP2."""
    output = trained.phidias("export", "small", "runs_dir=runs", f"stage={stage}", "prompt=the loop")
    assert "sample:\nthe loop" in output
    folder = trained.run_dir / "export" / stage
    command = [sys.executable, "-W", "ignore", "-m", "tests.endtoend.logits", str(trained.run_dir), stage, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=trained.root, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["difference"] < 1e-4 and result["scale"] > 1
    assert result["architecture"] == "Phi3ForCausalLM"
    assert result["rope_theta"] == {"small": 10000.0, "long": 250000.0}[stage]
    assert result["chat"] == "<|im_start|>user<|im_sep|>hi<|im_end|><|im_start|>assistant<|im_sep|>"
    assert "agrees with the run's validation at step" in trained.phidias("eval", "small", "runs_dir=runs", f"stage={stage}")
    held_out = json.loads((trained.run_dir / "eval" / f"{stage}.json").read_text())["held_out"]
    assert held_out["agrees"] and abs(held_out["mixture"]["difference"]) < 1e-5


def test_a_port_in_use_is_refused(prepared: Workspace) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output = prepared.named("port").config("train", f"cluster.master_port={port}", code=2)
    assert f"found port {port}, which another process is using" in output


def test_another_model_in_the_same_directory_is_refused(trained: Workspace) -> None:
    output = trained.config("train", "model.num_layers=4", code=3)
    assert "model.num_layers" in output and "run.name" in output


def test_midtraining_without_pretraining_is_refused(prepared: Workspace) -> None:
    output = prepared.named("headless").config("train", "stage=long", code=2)
    assert "stage long starts from the end of small, which run headless has not trained" in output
    assert not (prepared.root / "runs" / "headless").exists()


@slow
def test_export_without_a_checkpoint_is_refused(prepared: Workspace) -> None:
    """A run that was opened and has not saved yet."""
    early = prepared.named("early")
    process = early.start_training("stage=small", "stage.tokens=4e5", "stage.checkpoint.interval_tokens=4e5")
    early.wait_for_step(1, stage="small", process=process)
    output = early.phidias("export", "early", "runs_dir=runs", code=3)
    assert "has no valid checkpoint" in output
    assert not list(early.run_dir.glob("export/*"))
    assert early.interrupt(process) == 130
    assert "NOT its end" in early.phidias("export", "early", "runs_dir=runs")


def test_a_damaged_shard_is_refused_before_anything_is_written(prepared: Workspace) -> None:
    data = prepared.root / "damaged"
    shutil.copytree(prepared.root / "data", data)
    os.truncate(data / "prose" / "shard_00000.bin", 100)
    words = [f"run.data_dir={data}", f"tokenizer.file={data / 'tokenizer.json'}"]
    damaged = prepared.named("damaged")
    for verb in ("train", "data"):
        output = damaged.config(verb, *words, code=2)
        assert "shard_00000.bin holds 100 bytes, the manifest says" in output and "remove" in output
    assert not damaged.run_dir.exists()


def test_no_data_is_refused_before_anything_is_written(prepared: Workspace) -> None:
    output = prepared.named("nodata").config("train", f"run.data_dir={prepared.root / 'nowhere'}", code=2)
    assert "mixture.sources.prose: found no data" in output and "mixture.sources.notes" in output
    assert not (prepared.root / "runs" / "nodata").exists()


def clone(workspace: Workspace, name: str) -> Path:
    """The trained run under another name, its pretraining not finished."""
    target = workspace.root / "runs" / name
    shutil.copytree(workspace.run_dir, target, ignore=shutil.ignore_patterns("long", "export"))
    config = target / "config.yaml"
    config.write_text(config.read_text().replace("name: small\n  seed", f"name: {name}\n  seed"))
    return target


def index_lines(run: Path) -> list[str]:
    return (run / "checkpoints" / "small" / "index.jsonl").read_text().splitlines(keepends=True)


@slow
def test_shards_that_megatron_wrote_are_taken_over(prepared: Workspace) -> None:
    """Shards without a manifest are refused by `data` with the way out, imported, left alone, and trained on."""
    data = prepared.root / "imported"
    shutil.copytree(prepared.root / "data", data)
    for source in ("prose", "notes"):  # of which Megatron writes nothing
        for ours in ("manifest.json", "plan.json"):
            (data / source / ours).unlink()
        shutil.rmtree(data / source / "receipts")
    words = [f"run.data_dir={data}", f"tokenizer.file={data / 'tokenizer.json'}"]
    imported = prepared.named("imported")
    assert "phidias data action=import" in imported.config("data", *words, code=2)
    assert "held out" in imported.config("data", "action=import", *words)
    before = {name: (data / name / "manifest.json").read_bytes() for name in ("prose", "notes")}
    imported.config("data", *words)
    assert before == {name: (data / name / "manifest.json").read_bytes() for name in before}
    imported.config("train", "stage=small", "stage.tokens=2048", "optim.warmup_tokens=512", *words)
    assert losses(prepared, "imported", "small")[4] > 0


def test_ranks_never_outlive_their_launchers(prepared: Workspace) -> None:
    """After kill -9 of `phidias train` the run stays locked while torchrun lives; ranks die with torchrun, and it is free."""
    orphan = prepared.named("orphan")
    process = orphan.start_training("stage=small", "stage.tokens=4e5")
    orphan.wait_for_step(2, stage="small", process=process)
    process.kill()
    process.communicate()
    assert "run orphan is live" in orphan.config("train", "stage=small", code=3)
    torchrun = [pid for pid, command in processes(orphan.run_dir).items() if "torch.distributed.run" in command]
    assert len(torchrun) == 1
    ranks = [pid for pid in processes(orphan.run_dir) if pid != torchrun[0]]
    groups = [os.getpgid(pid) for pid in ranks]
    os.kill(torchrun[0], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(group_lives(group) for group in groups) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(orphan.run_dir) == {}
    assert not any(group_lives(group) for group in groups), "helpers of a rank outlived it"
    assert not is_live(RunDir(orphan.run_dir))


def test_data_prepared_anew_under_a_run_is_refused(trained: Workspace) -> None:
    copy, data = clone(trained, "renewed"), trained.root / "renewed_data"
    (copy / "checkpoints" / "small" / "index.jsonl").write_text(
        "".join(line for line in index_lines(copy) if '"finished": true' not in line)
    )
    shutil.copytree(trained.root / "data", data)
    manifest = json.loads((data / "prose" / "manifest.json").read_text())
    manifest["train"]["shards"][0]["bin_xxh3"] = "0" * 32
    (data / "prose" / "manifest.json").write_text(json.dumps(manifest))
    output = trained.named("renewed").config("train", "stage=small", f"run.data_dir={data}", code=2)
    assert "source prose" in output and "was prepared anew since this run read from it" in output


def test_a_stage_that_another_started_from_keeps_its_end(trained: Workspace) -> None:
    output = trained.config("train", "stage=small", "stage.tokens=4e4", code=3)
    assert "stage long has started from its end" in output


def processes(run_dir: Path) -> dict[int, str]:
    """Processes that name the run directory."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str(run_dir) in (command := (entry / "cmdline").read_text().replace("\0", " ")):
                found[int(entry.name)] = command
    return found


def group_lives(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False
