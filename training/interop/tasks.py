"""Tasks of lm-evaluation-harness on an exported folder: section `tasks` of eval/<stage>.json.

No network is used: a task's data lies in files beside its YAML, or in Hugging Face's cache. Relative paths of a YAML are
relative to the folder of tasks. Task files may hold Python: who may write them runs code here.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.config.validate import nearest
from launcher.rundir.exits import RunStateError

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
BATCH = 4  # requests at once
BOOTSTRAPS = 1000  # of metrics whose standard error has no formula
# What a task that cannot be had fails with: no file, no cache, no package, a YAML with a mistake.
UNUSABLE = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError)
MOST_SAID = 200
Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """Which tasks, and how: `directory` holds YAML files of them; `num_fewshot` and `limit` (documents a task): None is each
    task's own number, and all."""

    names: tuple[str, ...]
    directory: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None

    @property
    def how(self) -> dict[str, list[int | None]]:
        """Of each task, so that figures of another question are known."""
        return {name: [self.num_fewshot, self.limit] for name in self.names}


class Tasks:
    """The tasks that are asked for, with their data: RunStateError where one is not known, or not to be had."""

    def __init__(self, asked: Asked):
        self.asked, self.manager = asked, build_manager(asked)
        groups: Row = {}
        leaves: Row = {}
        inside: set[str] = set()
        for name in asked.names:
            found = load_task(self.manager, name, directory=asked.directory)
            groups |= found["groups"]
            leaves |= found["tasks"]
            inside |= {child for children in found["group_map"].values() for child in children}
        self.top = [task for name, task in {**groups, **leaves}.items() if name not in inside]

    def measure(self, model: Any, tokenizer: Any) -> Row:
        """Section `tasks`."""
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, softmax_dtype="float32")
        found: Any = simple_evaluate(
            model=language_model, tasks=self.top, task_manager=self.manager, num_fewshot=self.asked.num_fewshot,
            limit=self.asked.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False,
        )  # fmt: skip
        rows = {name: row for name in found["results"] if (row := row_of(name, found))["metrics"]}
        return {"lm_eval": version("lm-eval"), "asked": list(self.asked.names), "how": self.asked.how, "rows": rows}


def build_manager(asked: Asked) -> Any:
    """What knows the tasks: lm-eval's own are read only where the folder has not all of them, as they take 10 s."""
    os.environ.update(OFFLINE)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RunStateError(
            f"tasks are measured by lm-eval, which is not installed ({error}). Fix: pip install 'phidias[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if asked.directory is not None and not asked.directory.is_dir():
        raise RunStateError(f"task_dir {asked.directory} is no folder here; it holds YAML files of tasks. Fix: its path")
    directory = str(asked.directory.resolve()) if asked.directory else None
    manager = TaskManager(include_path=directory, include_defaults=False)
    if unknown(asked, manager):
        manager = TaskManager(include_path=directory)
    if missing := unknown(asked, manager):
        close = nearest(missing[0], known=manager.all_tasks)
        hint = f"did you mean {' or '.join(close)}?" if close else "task_dir=<the folder of its YAML file>"
        raise RunStateError(
            f"no task {missing[0]!r} in {asked.directory or 'task_dir (there is none)'} or lm-eval {version('lm-eval')}: {hint}"
        )
    return manager


def unknown(asked: Asked, manager: Any) -> list[str]:
    known = set(manager.all_tasks)
    return [name for name in asked.names if name not in known]


def load_task(manager: Any, name: str, *, directory: Path | None) -> Any:
    """Its tasks with their data, by lm-eval's words."""
    try:
        with contextlib.chdir(directory or Path.cwd()):
            return manager.load([name])
    except UNUSABLE as error:
        rule = "no network is used: its data lies in files of task_dir, or in Hugging Face's cache (HF_HOME)"
        fix = f"fetch it once where there is a network, `lm_eval --model dummy --tasks {name} --limit 1`, with the same HF_HOME"
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:MOST_SAID]
        raise RunStateError(f"task {name} cannot be had ({said}); {rule}. Fix: {fix}") from error


def row_of(name: str, found: Mapping[str, Any]) -> Row:
    """Of a task or group: each metric, how it was asked, and of how many documents."""
    count = found.get("n-samples", {}).get(name) or {}
    return {
        "metrics": dict(metrics_of(found["results"][name], higher=found.get("higher_is_better", {}).get(name) or {})),
        "num_fewshot": found.get("n-shot", {}).get(name),
        "documents": count.get("effective"),
        "version": found.get("versions", {}).get(name),
        "is_group": name in found.get("groups", {}),
    }


def metrics_of(values: Mapping[str, Any], *, higher: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """lm-eval writes `<metric>,<filter>` and `<metric>_stderr,<filter>`; "none" is no filter."""
    for key, value in values.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kept}")
        stderr = float(error) if isinstance(error, int | float) else None
        yield metric if kept == "none" else key, {
            "value": float(value), "stderr": stderr, "higher_is_better": higher.get(metric)
        }  # fmt: skip


def kept(before: Mapping[str, Any], section: Mapping[str, Any] | None) -> Row:
    """The section, with what was measured of the same export earlier and not now; empty where there is neither."""
    sections = [before.get("tasks") or {}, section or {}]
    rows = {name: row for one in sections for name, row in one.get("rows", {}).items()}
    asked = list(dict.fromkeys(name for one in sections for name in one.get("asked", ())))
    how_asked = {name: row for one in sections for name, row in one.get("how", {}).items()}
    return {**sections[0], **sections[1], "asked": asked, "how": how_asked, "rows": rows}


def table(section: Mapping[str, Any]) -> str:
    """As `phidias eval` prints it."""
    rows = [
        (name, metric, f"{found['value']:.4f}", "" if found["stderr"] is None else f"± {found['stderr']:.4f}", how(row))
        for name, row in section["rows"].items()
        for metric, found in row["metrics"].items()
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(4)] if rows else []
    head = f"tasks of lm-eval {section['lm_eval']}"
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + f"  {row[-1]}" for row in rows]
    return "\n".join([head, *lines])


def how(row: Mapping[str, Any]) -> str:
    shots = "" if row["num_fewshot"] is None else f"{row['num_fewshot']}-shot"
    return ", ".join(filter(None, [shots, f"{row['documents']:,} documents" if row["documents"] else ""]))
