"""Measures an exported Hugging Face folder, through transformers alone, on the held-out text that the run's validation reads:
loss and perplexity by source, which must be those that the run measured. Writes eval/<stage>.json; no network needed.

Of a stage with longer sequences than the one before, also what it makes of long text: loss by position, needles in a haystack.

Keys: stage=<the last stage>  long_context=true|false  runs_dir=runs"""

import os
from collections.abc import Sequence

from launcher.config.errors import ConfigError, Problem
from launcher.jobs.interop import call_interop
from launcher.rundir.code import installed
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, exportable


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=("stage", "long_context", "runs_dir"))
    hint = f"phidias eval {names[0]}" if names else "name one"
    directory, config, stage = exportable(
        names, stage=options.get("stage"), runs_dir=options.get("runs_dir", RUNS_DIR), hint=hint
    )
    elsewhere = config.cluster.container is not None and "SLURM_JOB_ID" in os.environ
    if installed("transformers") is None and not elsewhere:
        rule = "eval loads the exported folder through it"
        raise ConfigError(Problem("transformers", "not installed", rule, "pip install 'phidias[train,eval]'"))
    long = options.get("long_context")
    if long not in (None, "true", "false"):
        raise ConfigError(Problem("long_context", repr(long), "it is true or false", "long_context=true, or leave it away"))
    words = ["--stage", stage, *(["--long-context", long] if long else [])]
    return call_interop(directory, config, module="evaluate", words=words)
