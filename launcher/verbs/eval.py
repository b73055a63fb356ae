"""Measures an exported Hugging Face folder, through transformers alone, on the held-out text that the run's validation reads:
loss and perplexity by source, which must be those that the run measured. Writes eval/<stage>.json; no network needed.

Of a stage with longer sequences than the one before, also what it makes of long text: loss by position, needles in a haystack.
With tasks, by name and with commas, also those, through lm-evaluation-harness: its own, or the YAML files of task_dir
(docs/evaluation.md). What is not said is as the run's config says (run.evaluation); `tasks=` is none.

step=N is of a checkpoint that was exported by itself; steps=all goes on with each checkpoint of the stage that is still there
and has no figures yet, which it exports for that alone.

Keys: stage=<the last stage>  step=<the newest>  steps=all  long_context=true|false  tasks=a,b  task_dir=<folder>  num_fewshot=N
limit=<documents a task>  runs_dir=runs"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Evaluation, RunConfig
from launcher.jobs.interop import call_interop
from launcher.rundir.code import installed
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, exportable, whole_number

KEYS = ("stage", "step", "steps", "long_context", "tasks", "task_dir", "num_fewshot", "limit", "runs_dir")


def run(words: Sequence[str]) -> int:
    names, options = read_run_words(words, keys=KEYS)
    hint = f"phidias eval {names[0]}" if names else "name one"
    directory, config, stage = exportable(
        names, stage=options.get("stage"), runs_dir=options.get("runs_dir", RUNS_DIR), hint=hint
    )
    chosen = [*which_words(options), *task_words(options, config=config)]
    refuse_uninstalled(config, packages=["transformers", *(["lm-eval"] if "--tasks" in chosen else [])])
    return call_interop(directory, config, module="evaluate", words=["--stage", stage, *chosen])


def which_words(options: Mapping[str, str]) -> list[str]:
    """Which checkpoints, and whether long text."""
    long, every = options.get("long_context"), options.get("steps")
    if long not in (None, "true", "false"):
        raise ConfigError(Problem("long_context", repr(long), "it is true or false", "long_context=true, or leave it away"))
    if every not in (None, "all") or (every and "step" in options):
        raise ConfigError(Problem("steps", repr(every), "it is all, and without step", "steps=all, or step=<one>"))
    step = whole_number("step", options.get("step"), example="step=1000")
    one = ["--step", str(step)] if step is not None else []
    return [*one, *(["--every-step"] if every else []), *(["--long-context", long] if long else [])]


def task_words(options: Mapping[str, str], *, config: RunConfig) -> list[str]:
    """Which tasks and how, by the options and else by the run's config; nothing where there are none."""
    said: Evaluation = config.run.evaluation
    tasks = options.get("tasks", ",".join(said.tasks))
    if not tasks:
        return []
    folder = options.get("task_dir", said.task_dir)
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(Problem("task_dir", folder, "it is the folder of the YAML files of tasks", "its path from here"))
    numbers = {"num_fewshot": said.num_fewshot, "limit": said.limit}
    found = {key: whole_number(key, options.get(key), example=f"{key}=10") for key in numbers}
    if found["limit"] == 0:
        raise ConfigError(Problem("limit", "0", "so many documents of a task are scored", "limit=10, or leave it out for all"))
    rows = {key: number if found[key] is None else found[key] for key, number in numbers.items()}
    flags = [word for key, value in rows.items() if value is not None for word in (f"--{key.replace('_', '-')}", str(value))]
    return ["--tasks", tasks, *(["--task-dir", str(Path(folder).resolve())] if folder else []), *flags]


def refuse_uninstalled(config: RunConfig, *, packages: Sequence[str]) -> None:
    """ConfigError; a container has its own."""
    if config.cluster.container is not None and "SLURM_JOB_ID" in os.environ:
        return
    rules = {"transformers": "eval loads the exported folder through it", "lm-eval": "eval measures tasks through it"}
    if missing := [name for name in packages if installed(name) is None]:
        fix = "pip install 'phidias[train,eval]'"
        raise ConfigError(*(Problem(name, "not installed", rules[name], fix) for name in missing))
