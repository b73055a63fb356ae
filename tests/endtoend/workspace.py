"""A small run driven the way a user drives it: through `phidias`, in processes, with a YAML folder of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SENTENCE = "the loop reads a batch and takes one step while every rank holds its own shard of the model"
WORDS = SENTENCE.split()

RUN = """# @package _global_
defaults:
  - override /model: demo
  - override /tokenizer: huggingface
  - override /cluster: local
  - override /stage: small
run: {{name: small, seed: 1, runs_dir: "{root}/runs", data_dir: "{root}/data", stages: [small, long]}}
data: {{held_out_fraction: 0.1, shard_tokens: 20000, chunk_tokens: 512, group_tokens: 8192, num_workers: 1}}
monitor: {{log_interval: 1}}
model: {{num_layers: 2, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, kv_channels: 16, ffn_hidden_size: 96,
  vocab_size: 300, padded_vocab_size: 384}}
"""
STAGE = """# @package _global_
defaults:
  - override /layout: {layout}
  - override /precision: fp32
  - override /optim: demo_{kind}
  - override /mixture: small
stage:
  name: {name}
  seq_length: {seq_length}
  global_batch_size: {batch}
  tokens: {tokens}
  rotary_base: {base}
  init_from: {init_from}
  validation: {{interval_tokens: 20000, max_tokens: 2000}}
  checkpoint: {{interval_tokens: 8192, keep_last: 2}}
optim: {{warmup_tokens: 2048}}
layout: {{micro_batch_size: 2}}
"""
MIXTURE = """name: small
sources:
  prose: {{inputs: ["{root}/raw/prose/*.jsonl"], format: jsonl, share: 0.7}}
  notes: {{inputs: ["{root}/raw/notes/*.txt"], format: text, share: 0.3}}
"""


class Workspace:
    """A folder with raw text, a tokenizer, YAML of its own and runs."""

    def __init__(self, root: Path, *, run: str = "small"):
        self.root, self.run = root, run
        self.run_dir = root / "runs" / run
        if not (root / "yaml").exists():
            write_raw(root)
            write_tokenizer(root)
            write_yaml(root)

    def named(self, run: str) -> "Workspace":
        """The same text, data and YAML with another run."""
        return Workspace(self.root, run=run)

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """`phidias <words>` in the background, in a session of its own."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "launcher", *words]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=self.root,
            start_new_session=True,
        )  # fmt: skip

    def phidias(self, *words: str, code: int = 0) -> str:
        """Runs to the end; the output, standard error last."""
        process = self.start(*words)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}\n{self.logs()}"
        return out + err

    def config(self, verb: str, *overrides: str, code: int = 0) -> str:
        return self.phidias(verb, *self.words(), *overrides, code=code)

    def start_training(self, *overrides: str) -> "subprocess.Popen[str]":
        return self.start("train", *self.words(), *overrides)

    def words(self) -> list[str]:
        return [f"--config-dir={self.root / 'yaml'}", "run=small", f"run.name={self.run}"]

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.run_dir / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows("events.jsonl") if row["kind"] == kind]

    def wait_for_step(self, step: int, *, stage: str, process: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + 120
        while not any(r["kind"] == "train" and r["stage"] == stage and r["step"] >= step for r in self.rows("metrics.jsonl")):
            assert process.poll() is None, f"ended early: {process.communicate()}"
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def interrupt(self, process: "subprocess.Popen[str]") -> int:
        """Ctrl-C, and the exit code."""
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=120)
        return process.returncode

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.run_dir.glob("logs/*.log"))


def write_raw(root: Path) -> None:
    (root / "raw" / "prose").mkdir(parents=True)
    (root / "raw" / "notes").mkdir()
    lines = []
    for number in range(400):
        words = [WORDS[(number * 7 + i * (1 + number % 3)) % len(WORDS)] for i in range(40 + number % 60)]
        lines.append(json.dumps({"id": number, "text": " ".join(words)}))
    (root / "raw" / "prose" / "part.jsonl").write_text("\n".join(lines) + "\n")
    for number in range(40):
        text = "\n".join(f"{number} {word} {number * 3}" for word in WORDS * 6)
        (root / "raw" / "notes" / f"{number:03d}.txt").write_text(text)


def write_tokenizer(root: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE] * 10, trainer)
    (root / "data").mkdir()
    tokenizer.save(str(root / "data" / "tokenizer.json"))


def write_yaml(root: Path) -> None:
    yaml = root / "yaml"
    for group in ("run", "stage", "mixture"):
        (yaml / group).mkdir(parents=True)
    (yaml / "run" / "small.yaml").write_text(RUN.format(root=root))
    (yaml / "mixture" / "small.yaml").write_text(MIXTURE.format(root=root))
    small = dict(name="small", kind="pretrain", layout="demo_dp", seq_length=64, batch=8, tokens=512 * 40)
    long = dict(name="long", kind="midtrain", layout="demo_pp", seq_length=256, batch=2, tokens=512 * 8)
    stages = [{**small, "base": 10000, "init_from": "null"}, {**long, "base": 250000, "init_from": "small"}]
    for stage in stages:
        (yaml / "stage" / f"{stage['name']}.yaml").write_text(STAGE.format(**stage))
