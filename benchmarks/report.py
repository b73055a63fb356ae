"""How long the report page of a month takes, and how large it is: 400,000 logged steps over 20 sources, every field of a row, a
fault a day. Goals: under 10 s, under 5 MB. Wall and processor seconds of a whole process, and of its parts: median of 3."""

import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from benchmarks.machine import write_result
from launcher.config.compose import compose_run
from launcher.config.schema import RunConfig
from launcher.config.validate import dump_run, validate_run
from launcher.plan.document import plan_document
from launcher.report.figures import build_figures
from launcher.report.history import read_history
from launcher.report.page import render_page
from launcher.report.report_config import config_section
from launcher.report.report_plan import Plans
from launcher.report.summary import summarise
from launcher.rundir.paths import RunDir

STEPS, SOURCES, FAULTS, CHECKPOINTS, VALIDATIONS = 400_000, 20, 30, 1_200, 800
BEGAN = 1_790_000_000.0
PROCESS = "import sys; from pathlib import Path; from launcher.rundir.paths import RunDir; from launcher.report.page import {0}"
WRITES = f"{PROCESS.format('make_report')}; make_report(RunDir(Path(sys.argv[1])))"
IMPORTS = PROCESS.format("make_report")


def make_run(root: Path) -> RunDir:
    """A run directory as training leaves it."""
    config = with_sources(compose_run(["run=phi4", "stage=pretrain"]))
    run = RunDir(root)
    root.mkdir(parents=True)
    plan = plan_document(config)
    run.config.write_text(yaml.safe_dump(dump_run(config), sort_keys=False))
    run.plan.write_text(json.dumps(plan))
    run.status.write_text(json.dumps({"name": root.name, "stage": "pretrain", "state": "done"}))
    events: list[dict[str, Any]] = [launch(BEGAN)]
    with run.metrics.open("w") as file:
        for step in range(1, STEPS + 1):
            row = train_row(step, plan=plan[0])
            file.write(json.dumps(row) + "\n")
            position = {"stage": "pretrain", "step": step, "samples": row["samples"], "tokens": row["tokens"]}
            if step % (STEPS // VALIDATIONS) == 0:
                losses = {"loss": row["loss"], "loss_by_source": row["loss_by_source"]}
                counts = {"tokens_by_source": dict.fromkeys(row["loss_by_source"], 500_000), "seconds": 3.0}
                file.write(json.dumps({"time": row["time"], "kind": "validation", **position, **losses, **counts}) + "\n")
            if step % (STEPS // CHECKPOINTS) == 0:
                events.append({"time": row["time"], "kind": "checkpoint", **position, "seconds": 40.0, "bytes": 2e11})
            if step % (STEPS // FAULTS) == 0:
                fault = {"stage": "pretrain", "rank": 7, "exit": "RETRYABLE", "error": "NCCL error: unhandled system error"}
                resume = {"stage": "pretrain", "step": step, "path": f"step_{step:08}"}
                events += [
                    {"time": row["time"], "kind": "fault", **fault},
                    launch(row["time"] + 0.1),
                    {"time": row["time"] + 0.2, "kind": "resume", **resume},
                ]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def launch(at: float) -> dict[str, Any]:
    return {"time": at, "kind": "start", "command": ["phidias train", "run=phi4"], "job": "1", "restarts": 0}


def with_sources(config: RunConfig) -> RunConfig:
    tree = dump_run(config)
    [stage] = tree["stages"]
    one = next(iter(stage["mixture"]["sources"].values()))
    names = [f"source_{index:02}" for index in range(SOURCES)]
    stage["mixture"] |= {"sources": {name: {**one, "share": 1 / SOURCES, "max_epochs": None} for name in names}, "phases": []}
    return validate_run(tree)


def train_row(step: int, *, plan: dict[str, Any]) -> dict[str, Any]:
    part, seconds = step / STEPS, plan["step_time_s"] * random.uniform(1.0, 1.1)
    samples = step * plan["global_batch_size"]
    tokens = samples * plan["seq_length"]
    loss = 2.0 + 9.0 * math.exp(-100 * part) + random.gauss(0.0, 0.02)
    speed = plan["tokens_per_step"] / seconds
    names = [f"source_{index:02}" for index in range(SOURCES)]
    return {
        "time": round(BEGAN + 1 + step * plan["step_time_s"] * 1.1, 3),
        "kind": "train",
        "stage": "pretrain",
        "step": step,
        "samples": samples,
        "tokens": tokens,
        "loss": loss,
        "loss_by_source": {name: loss + random.gauss(0.0, 0.1) for name in names},
        "tokens_by_source": dict.fromkeys(names, tokens // SOURCES),
        "epochs_by_source": {name: 2 * part * random.random() for name in names},
        "lr": 3e-4 * (1 - part),
        "grad_norm": abs(random.gauss(0.3, 0.05)),
        "weight_norm": 300 + 200 * part,
        "update_ratio": 1e-3 * random.random(),
        "zero_grads": 0.01 * random.random(),
        "tokens_per_s": round(speed, 1),
        "step_time_s": round(seconds, 4),
        "data_wait_s": round(0.001 * random.random(), 4),
        "checkpoint_s": round(0.01 * random.random(), 4),
        "forward_s": 0.3 * seconds,
        "backward_s": 0.5 * seconds,
        "optimizer_s": 0.02 * seconds,
        "exposed_s": 0.15 * seconds,
        "forward_max_s": 0.31 * seconds,
        "memory_max_bytes": 60 * 2**30,
        "tokens_per_s_per_gpu": speed / plan["world_size"],
        "tflops_per_gpu": 400.0,
        "mfu": 0.4 * random.uniform(0.9, 1.0),
        "slowest_rank": 7,
        "slowest_node": "n001",
        "slowest_ratio": random.uniform(1.0, 1.1),
    }


def process_seconds(code: str, run: RunDir) -> tuple[float, float]:
    """Of wall and of processor."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, str(run.root)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def part_seconds(run: RunDir, config: RunConfig) -> dict[str, float]:
    """Of one report in this process. `page` are the tables, the config's base and plotly.js."""
    began = time.perf_counter()
    history = read_history(run)
    read = time.perf_counter()
    summary = summarise(run, config, history=history)
    summed = time.perf_counter()
    build_figures(history, config=config, summary=summary, plans=Plans(run))
    drawn = time.perf_counter()
    config_section(config, history=history)
    composed = time.perf_counter()
    render_page(run, config=config, history=history, summary=summary)
    parts = {"history": read - began, "goodput_and_summary": summed - read, "figures": drawn - summed}
    return parts | {"base_config": composed - drawn, "page_with_both": time.perf_counter() - composed}


def median(rows: list[float]) -> float:
    return round(statistics.median(rows), 2)


def main() -> None:
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "phi4")
        config = with_sources(compose_run(["run=phi4", "stage=pretrain"]))
        whole = [process_seconds(WRITES, run) for _ in range(3)]
        imports = [process_seconds(IMPORTS, run) for _ in range(3)]
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        parts = [part_seconds(run, config) for _ in range(3)]
        by_part = {name: median([row[name] for row in parts]) for name in parts[0]}
        figures = {
            "steps": STEPS,
            "sources": SOURCES,
            "metrics_mb": round(run.metrics.stat().st_size / 1e6),
            "seconds": median([wall for wall, _ in whole]),
            "min_seconds": round(min(wall for wall, _ in whole), 2),
            "processor_seconds": median([spent for _, spent in whole]),
            "seconds_by_part": {"imports": median([wall for wall, _ in imports]), **by_part},
            "page_mb": round(run.report.stat().st_size / 1e6, 2),
            "peak_memory_mb": round(largest / 1024),
        }
    write_result("report", figures)


if __name__ == "__main__":
    main()
