"""Writes the final checkpoint of a stage as a Hugging Face folder: config.json, safetensors, tokenizer. With a prompt it also
generates a sample from what it wrote.

Keys: stage=<the last stage>  prompt=<text>  runs_dir=runs"""

from collections.abc import Sequence

from launcher.jobs.interop import call_interop
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, exportable


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("stage", "prompt", "runs_dir"))
    directory, config, stage = exportable(
        names, stage=options.get("stage"), runs_dir=options.get("runs_dir", RUNS_DIR), hint="quote the prompt: prompt='...'"
    )
    prompt = ["--prompt", options["prompt"]] if "prompt" in options else []
    return call_interop(directory, config, module="export", words=["--stage", stage, *prompt])
