"""Writes the final checkpoint of a stage as a Hugging Face folder: config.json, safetensors, tokenizer. With a prompt it also
generates a sample from what it wrote.

Keys: stage=<the last stage>  prompt=<text>  runs_dir=runs"""

import subprocess
import sys
from collections.abc import Sequence

from launcher.config.errors import ConfigError, Problem
from launcher.rundir.code import child_environment
from launcher.rundir.freeze import read_config
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, find_run, one_or_more


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("stage", "prompt", "runs_dir"))
    if len(one_or_more(names)) > 1:
        raise ConfigError(Problem("run", " ".join(names), "export takes one run", "quote the prompt: prompt='...'"))
    directory = find_run(names[0], runs_dir=options.get("runs_dir", RUNS_DIR))
    config = read_config(directory)
    if config.model.family is None:
        rule = "a model without a family has no Hugging Face class"
        raise ConfigError(
            Problem("model.family", "null", rule, "train it with model.family=phi3 or llama, where the shape allows")
        )
    stages = config.stage_names
    stage = options.get("stage", stages[-1])
    if stage not in stages:
        raise ConfigError(Problem("stage", repr(stage), f"run {directory.name} has {', '.join(stages)}", f"stage={stages[-1]}"))
    command = [sys.executable, "-m", "training.interop.export", str(directory.root), "--stage", stage]
    command += ["--prompt", options["prompt"]] if "prompt" in options else []
    return subprocess.run(command, env=child_environment(), check=False).returncode
