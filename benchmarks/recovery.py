"""What it costs that nothing is lost, on two CPU ranks of this machine: how long a checkpoint holds up training (asynchronous
and not), how fast it is written and read beside dd on the same disk, from a killed rank to the next new step, a start of ranks
phase by phase, and what detection takes of a step. Goals: detection below 0.2% of a step of 1 s; a start within the
budget below.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result
from benchmarks.phidias import demo_words, phidias, prepare_demo
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records

# 76M parameters in fp32: 1.2 GB a checkpoint.
LARGE = [
    "model.num_layers=6", "model.hidden_size=1024", "model.num_attention_heads=8", "model.kv_channels=128",
    "model.ffn_hidden_size=2816", "stage=demo_pretrain", "stage.seq_length=64", "stage.global_batch_size=4",
    "layout.micro_batch_size=2",
    "stage.validation.interval_tokens=1e9", "stage.validation.max_tokens=64", "stage.checkpoint.interval_tokens=1536",
    "stage.checkpoint.keep_last=1", "optim.warmup_tokens=512", "monitor.log_interval=1",
]  # fmt: skip
STEP_TOKENS = 256
SMALL = ["stage=demo_pretrain", "stage.checkpoint.interval_tokens=81920", "monitor.log_interval=1", "cluster.restarts=2"]
STEPS, MORE_STEPS = 30, 32  # a checkpoint every 6
KILL_AT = (25, 50, 75)
GOAL_OF_STEP = 0.002
# Seconds of a start on a CPU rank that has a core for itself: what is above is to be explained.
BUDGET = {"imports_s": 4.0, "world_s": 0.5, "groups_s": 0.5, "model_s": 0.5, "optimizer_s": 0.5, "data_s": 0.5, "load_s": 1.0,
          "first_batch_s": 0.2, "first_step_s": 1.0}  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        work = Path(folder)
        prepare_demo(work)
        figures = {
            "checkpoints": measure_checkpoints(work),
            "faults": measure_faults(work),
            "detection": measure_detection(work),
        }
    write_result("recovery", figures)


def measure_checkpoints(work: Path) -> dict[str, Any]:
    before, found = dd(work, megabytes=1000), {}
    for name, switch in (("asynchronous", "true"), ("synchronous", "false")):
        train(work, name, *LARGE, f"stage.checkpoint.asynchronous={switch}", f"stage.tokens={STEPS * STEP_TOKENS}")
        found[name] = of_checkpoints(work / "runs" / name)
    after = dd(work, megabytes=1000)
    # A longer horizon: the checkpoint at the old end is read again.
    train(work, "asynchronous", *LARGE, f"stage.tokens={MORE_STEPS * STEP_TOKENS}")
    run = RunDir(work / "runs" / "asynchronous")
    started, size = events(run, "started")[-1], events(run, "checkpoint")[-2]["bytes"]
    load_s = started["phases"]["load_s"]
    began = time.perf_counter()
    assert phidias("checkpoint", "asynchronous", f"runs_dir={work / 'runs'}", "action=verify").returncode == 0
    verify_s = time.perf_counter() - began
    on_disk = sum(meta["bytes"] for meta in events(run, "checkpoint")[-2:])
    return {
        **found,
        "dd, MB/s": {"before": before, "after": after},
        "load": {
            "seconds, digests included": load_s,
            "MB/s": round(size / load_s / 1e6),
            "what": "2 ranks, from the page cache",
        },
        "verify": {
            "seconds": round(verify_s, 2),
            "MB/s at least": round(size / verify_s / 1e6),
            "bytes of the last two": on_disk,
        },
    }


def of_checkpoints(root: Path) -> dict[str, Any]:
    """Of the interval ones. The first is apart: it plans who writes what, and starts the process that collects results."""
    run = RunDir(root)
    rows = [row for row in events(run, "checkpoint") if not row["finished"]]
    steps = [row for row in read_records(run.metrics) if row["kind"] == "train"]
    return {
        "bytes": rows[-1]["bytes"],
        "form": rows[-1]["sharding"],
        "stall, s": {"first": rows[0]["stall_s"], "median of the others": median(row["stall_s"] for row in rows[1:])},
        "written after, s": {"first": rows[0]["seconds"], "median of the others": median(row["seconds"] for row in rows[1:])},
        "MB/s": round(rows[-1]["bytes"] / median(row["seconds"] for row in rows[1:]) / 1e6),
        "step, s": median(row["step_time_s"] for row in steps),
        "all steps, s": round(sum(row["step_time_s"] for row in steps), 1),
        "last step - first step, s": round(steps[-1]["time"] - steps[0]["time"], 1),
    }


def measure_faults(work: Path) -> dict[str, Any]:
    """kill -9 of one of two ranks, three times in a run."""
    run = RunDir(work / "runs" / "faults")
    command = [sys.executable, "-m", "launcher", "train", *demo_words(work, run="faults"), *SMALL, "stage.tokens=4.5e5"]
    process, seconds = subprocess.Popen(command, stdout=subprocess.DEVNULL), []
    for step in KILL_AT:
        wait_for(run, step=step, process=process)
        highest = last_step(run)
        began = time.time()
        os.kill(rank_of(run), signal.SIGKILL)
        wait_for(run, step=highest + 1, process=process)
        seconds.append(next(row["time"] for row in steps_of(run) if row["time"] > began and row["step"] > highest) - began)
    assert process.wait() == 0
    starts = [row["phases"] for row in events(run, "started")]
    phases = {name: median(start[name] for start in starts) for name in BUDGET}
    return {
        "from kill -9 to the next new step, s": [round(value, 1) for value in seconds],
        "start of ranks, s": {**phases, "total": median(row["total_s"] for row in events(run, "started"))},
        "budget, s": BUDGET,
        "above it": [name for name, value in phases.items() if value > BUDGET[name]],
    }


def measure_detection(work: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    out = work / "detection.json"
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "benchmarks.detection", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(out.read_text())
    a_step = found["judge, us"] * 1e-6 + found["heartbeat, us"] * 1e-6 + found["pace at a row, us"] * 1e-6 / 10
    return {**found, "of a 1 s step": round(a_step, 6), "goal": GOAL_OF_STEP, "met": a_step < GOAL_OF_STEP}


def train(work: Path, run: str, *words: str) -> None:
    done = phidias("train", *demo_words(work, run=run), *words)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def dd(work: Path, *, megabytes: int) -> int:
    """MB/s of a file of zeros, on the disk when it ends."""
    path = work / "dd"
    began = time.perf_counter()
    words = ["dd", "if=/dev/zero", f"of={path}", "bs=1000000", f"count={megabytes}", "conv=fdatasync"]
    subprocess.run(words, check=True, capture_output=True)
    took = time.perf_counter() - began
    path.unlink()
    return round(megabytes / took)


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_records(run.events) if row["kind"] == kind]


def steps_of(run: RunDir) -> list[dict[str, Any]]:
    return [row for row in read_records(run.metrics) if row["kind"] == "train"]


def last_step(run: RunDir) -> int:
    return max((row["step"] for row in steps_of(run)), default=0)


def wait_for(run: RunDir, *, step: int, process: "subprocess.Popen[bytes]") -> None:
    while last_step(run) < step:
        assert process.poll() is None, run.root
        time.sleep(0.05)


def rank_of(run: RunDir) -> int:
    """The process of a rank: the newest that has the run in its words and is no writer of a checkpoint."""
    words = f"-m\0training\0{run.root}\0"
    found = [path for path in Path("/proc").glob("[0-9]*") if words in read(path / "cmdline")]
    parents = {path.name for path in found}
    return max(int(path.name) for path in found if read(path / "stat").rpartition(")")[2].split()[1] not in parents)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def median(values: Iterable[float]) -> float:
    found: Sequence[float] = list(values)
    return round(statistics.median(found), 3)


if __name__ == "__main__":
    main()
