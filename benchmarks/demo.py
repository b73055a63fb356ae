"""Wall time of `make demo` by phase, in a fresh folder, and what it comes to: held-out loss against unigram entropy."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import write_result
from benchmarks.phidias import demo_words
from launcher.report.summary import summarise
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        runs = f"runs_dir={work / 'runs'}"
        phases = {
            "corpora and tokenizer": ["data_prep.demo", str(work / "data")],
            "data": ["launcher", "data", *demo_words(work)],
            "pretrain": ["launcher", "train", *demo_words(work), "stage=demo_pretrain"],
            "midtrain": ["launcher", "train", *demo_words(work), "stage=demo_midtrain"],
            "export and sample": ["launcher", "export", "demo", runs, "prompt=def main("],
            "report": ["launcher", "report", "demo", runs],
        }
        seconds = {name: round(wall_time(words), 1) for name, words in phases.items()}
        run = RunDir(work / "runs" / "demo")
        summary = summarise(run, read_config(run))
    figures = {"held_out_loss": summary.held_out_loss, "unigram_entropy": summary.entropy}
    write_result("demo", {"seconds": seconds, "total_s": round(sum(seconds.values()), 1), **figures})


def wall_time(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
