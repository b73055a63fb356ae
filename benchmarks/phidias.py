"""Running Phidias' own commands for benchmarks."""

import subprocess
import sys
from pathlib import Path


def phidias(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "launcher", *words], capture_output=True, text=True, check=False)


def demo_words(work: Path, *, run: str = "demo") -> list[str]:
    """Overrides that put the demo under `work`."""
    return ["run=demo", f"run.name={run}", f"run.runs_dir={work / 'runs'}", f"run.data_dir={work / 'data'}"]


def prepare_demo(work: Path) -> None:
    """The demo's raw text, tokenizer and shards under `work`."""
    subprocess.run([sys.executable, "-m", "data_prep.demo", str(work / "data")], check=True, capture_output=True)
    done = phidias("data", *demo_words(work))
    if done.returncode:
        raise SystemExit(done.stderr)
