"""phidias plan: what each stage comes to, before anything is taken: steps, memory, speed, days and cost.

out=json prints it as data; picture=plan.html (or .svg, .png) draws a step and the memory of each pipeline stage. A stage that
does not fit its GPUs is shown and refused: exit code 2.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError, Problem
from launcher.plan.document import plan_document
from launcher.plan.planner import check_fits
from launcher.plan.prepared import known_sizes
from launcher.rundir.exits import ExitClass
from launcher.verbs.request import Request

FEWER = "a shorter stage.checkpoint.interval_tokens, or figures of the cluster that are not so bad"
FORMATS = (".html", ".svg", ".png")
OPTIONS: dict[str, tuple[str, ...]] = {"out": ("json",), "picture": ()}


def act(request: Request) -> int:
    refuse_format(request.options.get("picture"))
    sizes = known_sizes(request.config)
    stages = plan_document(request.config, sizes=sizes)
    if request.wants_json:
        print(json.dumps(stages, indent=None if request.in_sweep else 1))
    else:
        print_page(request, stages=stages, sizes=sizes)
    if picture := request.options.get("picture"):
        draw(Path(picture), stages=stages)
    check_fits(request.config)
    hopeless = [f"stage {stage['stage']}: {line}. Fix: {FEWER}" for stage in stages for line in stage["refusals"]]
    for line in hopeless:
        print(f"phidias: {line}", file=sys.stderr)
    return ExitClass.REFUSED if hopeless else ExitClass.DONE


def print_page(request: Request, *, stages: list[dict[str, Any]], sizes: Any) -> None:
    from launcher.plan.exposure import plan_exposure
    from launcher.plan.page import print_exposure, print_plan

    print_plan(request.config, stages=stages, found=request.found)
    print_exposure(request.config, rows=plan_exposure(request.config, sizes=sizes))


def refuse_format(picture: str | None) -> None:
    if picture is not None and Path(picture).suffix not in FORMATS:
        rule = "the suffix says what is drawn"
        raise ConfigError(Problem("picture", picture, rule, f"one of {', '.join(FORMATS)}"))
    if picture is not None and not os.access(Path(picture).parent, os.W_OK):
        rule = f"it is written to {Path(picture).parent}, which is no folder that you may write to"
        raise ConfigError(Problem("picture", picture, rule, "another path"))


def draw(path: Path, *, stages: list[dict[str, Any]]) -> None:
    from launcher.report.page import ReportError
    from launcher.report.plan_page import write_plan_page

    try:
        write_plan_page(path, stages)
    except ReportError as error:
        found, _, fix = str(error).partition(" Fix: ")
        raise ConfigError(Problem("picture", str(path), found, fix)) from error
    print(f"drawn: {path}", file=sys.stderr)
