"""What `phidias rehearse` has measured of a stage on one GPU, where it has: read beside the prediction, never mixed into it.

A measurement is a JSON file in <runs_dir>/<run>/rehearsals/: {"stage", "hardware", "layout": {...}, "precision", "seq_length",
"pipeline_stage", "microbatch_s", "peak_gib", "date"}; those of another layout, precision or device say nothing of this one.
Beside these keys it holds what launcher/plan/rehearsal.py makes of a measurement, and the measurement itself.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig, StageConfig

FOLDER = "rehearsals"
NEEDED = ("stage", "hardware", "layout", "precision", "seq_length", "pipeline_stage", "microbatch_s", "peak_gib", "date")


def read_rehearsals(config: RunConfig, *, stage: StageConfig) -> list[dict[str, Any]]:
    """Measurements of this stage as it is planned, by pipeline stage and date. A file that is none is passed over."""
    found = []
    for path in sorted(rehearsals_folder(config).glob("*.json")):
        try:
            row = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(row, dict) and all(key in row for key in NEEDED) and is_of(row, config=config, stage=stage):
            found.append({key: row[key] for key in NEEDED})
    return sorted(found, key=lambda row: (row["pipeline_stage"], str(row["date"])))


def rehearsals_folder(config: RunConfig) -> Path:
    return Path(config.run.runs_dir) / config.run.name / FOLDER


def is_of(row: dict[str, Any], *, config: RunConfig, stage: StageConfig) -> bool:
    return bool(
        row["stage"] == stage.stage.name
        and row["hardware"] == config.cluster.gpu
        and row["precision"] == stage.precision.name
        and row["seq_length"] == stage.stage.seq_length
        and row["layout"] == layout_document(stage)
    )


def layout_document(stage: StageConfig) -> dict[str, Any]:
    """As JSON has it."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(stage.layout)))
    return document
