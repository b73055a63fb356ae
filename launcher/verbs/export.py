"""Writes the newest checkpoint of a stage, or that of a step, as a Hugging Face folder: config.json, safetensors, tokenizer,
model card. With a prompt it also generates a sample from what it wrote.

Keys: stage=<the last stage>  step=<the newest>  prompt=<text>  runs_dir=runs"""

from collections.abc import Sequence

from launcher.jobs.interop import call_interop
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, exportable, whole_number


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("stage", "step", "prompt", "runs_dir"))
    directory, config, stage = exportable(
        names, stage=options.get("stage"), runs_dir=options.get("runs_dir", RUNS_DIR), hint="quote the prompt: prompt='...'"
    )
    step = whole_number("step", options.get("step"), example="phidias status shows how far a stage is")
    chosen = ["--step", str(step)] if step is not None else []
    prompt = ["--prompt", options["prompt"]] if "prompt" in options else []
    return call_interop(directory, config, module="export", words=["--stage", stage, *chosen, *prompt])
