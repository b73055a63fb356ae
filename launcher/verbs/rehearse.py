"""phidias rehearse: one rank of the job, alone on one GPU (or CPU process) of this machine: how long what it computes takes and
what it holds, beside the plan.

rank= says which of the job's ranks (0); steps= how many steps are timed (5); data=real reads the prepared shards; profile=true
adds a table of kernels; out=json prints the measurement alone. It is written to <runs_dir>/<run>/rehearsals/, where
`phidias plan` finds it.
"""

import json
import sys
import time
from typing import Any

from launcher.config.schema import RunConfig, StageConfig
from launcher.jobs.rehearse import Ended, read_asked, refuse_unrehearsable, run_rehearsal
from launcher.plan.planner import unfit
from launcher.plan.preflight import check_data_ready
from launcher.plan.rehearsal import rehearsal_document
from launcher.plan.rehearsed import rehearsals_folder
from launcher.rundir.exits import ExitClass
from launcher.rundir.records import write_json
from launcher.verbs.request import Request

OPTIONS: dict[str, tuple[str, ...]] = {
    "rank": (),
    "steps": (),
    "data": ("random", "real"),
    "profile": ("true",),
    "out": ("json",),
}
OVERLAP = "layout.tp_comm_overlap: the buffers of a tensor-parallel group take all of its GPUs"


def act(request: Request) -> int:
    config = request.config
    asked = read_asked(request.options, config=config)
    refuse_unrehearsable(config, asked=asked)
    if asked.real_data:
        check_data_ready(config)
    documents = []
    for stage in config.stages:
        warn_unfit(stage, config=config)
        ended = run_rehearsal(config, stage=stage.stage.name, asked=asked)
        if ended.measured is None:
            return ended.code or ExitClass.RETRYABLE
        documents.append(keep(ended, config=config, stage=stage))
        if not request.wants_json:
            show(documents[-1])
    if request.wants_json:
        print(json.dumps(documents, indent=None if request.in_sweep else 1))
    return ExitClass.DONE


def warn_unfit(stage: StageConfig, *, config: RunConfig) -> None:
    problem = unfit(stage, config=config)
    if problem:
        print(f"phidias: warning: {problem}", file=sys.stderr)


def keep(ended: Ended, *, config: RunConfig, stage: StageConfig) -> dict[str, Any]:
    """Writes the measurement file, and the table of kernels beside it."""
    assert ended.measured is not None
    off = [OVERLAP] if stage.layout.tp_comm_overlap and config.cluster.gpu else []
    date = time.strftime("%Y-%m-%d %H:%M")
    document = rehearsal_document(ended.measured, config=config, stage=stage, date=date, off=off)
    rank = ended.measured["rank"]
    path = rehearsals_folder(config) / f"{stage.stage.name}-rank{rank}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    print(f"written: {path}", file=sys.stderr)
    if ended.profile is not None:
        table = path.with_suffix(".kernels.txt")
        table.write_text(ended.profile)
        print(f"written: {table}", file=sys.stderr)
    return document


def show(document: dict[str, Any]) -> None:
    from launcher.report.rehearsal_page import print_rehearsal

    print_rehearsal(document)
