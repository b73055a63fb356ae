"""Tokens/s of the CPU step in each layout: the demo's pretraining (sequence 128, batch 32) as `phidias train` runs it. Median
over the steps after the first five; all layouts one after another in one run of this script."""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result
from benchmarks.phidias import demo_words, phidias, prepare_demo

STEPS = 25
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "one rank, bf16": (1, ["precision=bf16"]),
    "DP2": (2, []),
    "PP2": (2, ["layout.pp=2", "layout.micro_batch_size=4"]),
    "PP2 VPP2": (2, ["layout.pp=2", "layout.vpp=2", "layout.micro_batch_size=4"]),
    "CP2": (2, ["layout.cp=2"]),
    "TP2": (2, ["layout.tp=2"]),
    "TP2 SP": (2, ["layout.tp=2", "layout.sequence_parallel=true"]),
    "DP4": (4, []),
    "DP2 PP2": (4, ["layout.pp=2", "layout.micro_batch_size=4"]),
}


def measure(name: str, *, ranks: int, overrides: list[str], work: Path) -> dict[str, Any]:
    run = name.replace(" ", "_").replace(",", "")
    words = ["train", *demo_words(work, run=run), "stage=demo_pretrain", f"stage.tokens={STEPS * 4096}"]
    words += [f"cluster.gpus_per_node={ranks}", "monitor.log_interval=1", *overrides]
    done = phidias(*words)
    if done.returncode:
        return {"failed": done.stderr[-500:]}
    rows = [json.loads(line) for line in (work / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_s"] for row in rows if row["kind"] == "train"][5:]
    return {"ranks": ranks, "tokens_per_s": round(statistics.median(speeds)), "best": round(max(speeds))}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare_demo(work)
        figures = {name: measure(name, ranks=ranks, overrides=words, work=work) for name, (ranks, words) in LAYOUTS.items()}
    write_result("layouts", {"steps": STEPS, "layouts": figures})


if __name__ == "__main__":
    main()
