"""The live view, fed with the files a run writes: what it prints, when, and what it leaves out."""

import io
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from launcher.config.schema import RunConfig
from launcher.report.live import PLAIN_INTERVAL_S, LiveView
from launcher.report.progress import RecordTail
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, write_json
from tests.training.tiny import run_config, stage_config


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return run_config(tmp_path, stages=[stage_config(), stage_config(stage={"name": "midtrain", "tokens": 256 * 3.0})])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "tiny")
    run.root.mkdir(parents=True)
    return run


def status(run: RunDir, *, state: str = "running", step: int = 0, stage: str = "pretrain", **fields: Any) -> None:
    base = {"name": "tiny", "stage": stage, "state": state, "step": step, "num_steps": 6, "tokens": step * 256}
    write_json(run.status, {**base, "tokens_per_s": 1234.0, "eta_s": 75.0, "time": 1.0 + step, "loss": 5.0, **fields})


def train(run: RunDir, *, step: int, stage: str = "pretrain", **fields: Any) -> None:
    row = {"stage": stage, "step": step, "samples": step * 8, "tokens": step * 256, "loss": 5.0, "loss_by_source": {"a": 4.5}}
    append_record(run.metrics, "train", **{**row, **fields})


def validation(run: RunDir, *, step: int, loss: float) -> None:
    row = {"stage": "pretrain", "step": step, "samples": step * 8, "tokens": step * 256, "tokens_by_source": {"a": 64}}
    append_record(run.metrics, "validation", loss=loss, loss_by_source={"a": loss - 1, "b": loss + 1}, **row)


def plain_view(run: RunDir, config: RunConfig) -> tuple[LiveView, io.StringIO, Clock]:
    output, clock = io.StringIO(), Clock()
    return LiveView(run, config, "plain", console=Console(file=output, width=80), clock=clock), output, clock


def test_plain_lines_come_at_intervals_and_validations_at_once(run: RunDir, config: RunConfig) -> None:
    view, output, clock = plain_view(run, config)
    with view:
        view.refresh()
        status(run, step=1)
        view.refresh()
        for step in (2, 3):
            status(run, step=step)
            view.refresh()
        validation(run, step=3, loss=4.25)
        view.refresh()
        clock.now += PLAIN_INTERVAL_S
        view.refresh()
        view.refresh()
        status(run, state="done", step=6)
    assert output.getvalue().splitlines() == [
        "starting: ranks load torch and build the model",
        "pretrain: step 1/6, loss 5.000, 256 tokens, 1,234 tokens/s, 1 min 15 s left",
        "pretrain: step 3, held-out loss 4.250 (a 3.250, b 5.250)",
        "pretrain: step 3/6, loss 5.000, 768 tokens, 1,234 tokens/s, 1 min 15 s left",
        "pretrain: step 6/6, loss 5.000, 1,536 tokens, done",
    ]


def test_a_resumed_view_takes_the_past_as_known(run: RunDir, config: RunConfig) -> None:
    status(run, state="stopped", step=4)
    validation(run, step=4, loss=4.0)
    view, output, _ = plain_view(run, config)
    with view:
        assert output.getvalue() == "pretrain: starting: ranks load torch and build the model\n"
        status(run, step=4, time=50.0)
        view.refresh()
    assert output.getvalue().splitlines()[1].startswith("pretrain: step 4/6")
    assert "held-out" not in output.getvalue()


def test_between_two_stages_the_next_one_starts(run: RunDir, config: RunConfig) -> None:
    view, output, _ = plain_view(run, config)
    with view:
        status(run, state="done", step=6)
        view.refresh()
        status(run, stage="midtrain", step=1, num_steps=3)
        view.refresh()
    lines = output.getvalue().splitlines()
    assert lines[1] == "midtrain: starting: ranks load torch and build the model"
    assert lines[2].startswith("midtrain: step 1/3")


def test_a_run_that_was_done_already_says_so(run: RunDir, config: RunConfig) -> None:
    status(run, state="done", stage="midtrain", step=3, num_steps=3)
    view, output, _ = plain_view(run, config)
    with view:
        view.note("midtrain: done already [0/8] /a/path")
    assert "midtrain: done already [0/8] /a/path\n" in output.getvalue()
    assert output.getvalue().splitlines()[-1].endswith(", done")


def rich_text(view: LiveView) -> str:
    output = io.StringIO()
    Console(file=output, width=90, force_terminal=True, color_system=None).print(view.render())
    return output.getvalue()


def test_rich_panel_shows_stages_losses_and_sources(run: RunDir, config: RunConfig) -> None:
    view = LiveView(run, config, "rich", console=Console(file=io.StringIO(), width=90, force_terminal=True))
    with view:
        assert "starting: ranks load torch" in rich_text(view)
        status(run, stage="midtrain", step=2, num_steps=3, tokens=2048)
        train(run, stage="midtrain", step=1, loss_by_source={"a": 4.5, "b": 3.25}, tokens_by_source={"a": 128})
        train(run, stage="midtrain", step=2, loss=2.125, loss_by_source={"a": 4.0}, tokens_by_source={"a": 256, "b": 77})
        view.refresh()
        lines = {line.strip("│ ").split(" ")[0]: line for line in rich_text(view).splitlines()}
    assert "6/6" in lines["pretrain"]
    assert "100%" in lines["pretrain"]
    assert "2/3" in lines["midtrain"]
    assert "67%" in lines["midtrain"]
    for figure in ("2.125", "2,048", "1,234", "1 min 15 s"):
        assert figure in lines["2.125"]
    assert "50.0%" in lines["a"]
    assert "4.000" in lines["a"]
    assert "77" in lines["b"]
    assert "3.250" in lines["b"]  # of the step before: the last one had none of it


def test_rich_view_of_a_narrow_terminal_stays_inside_it(run: RunDir, config: RunConfig) -> None:
    output = io.StringIO()
    with LiveView(run, config, "rich", console=Console(file=output, width=50, color_system=None, force_terminal=True)) as view:
        view.note("note above the panel")
    assert "note above the panel" in output.getvalue()
    assert all(len(line) <= 50 for line in rich_lines(view, width=50))


def rich_lines(view: LiveView, *, width: int) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width, color_system=None).print(view.render())
    return output.getvalue().splitlines()


def test_auto_is_plain_where_there_is_no_terminal(run: RunDir, config: RunConfig) -> None:
    output = io.StringIO()
    with LiveView(run, config, console=Console(file=output, width=80)):
        pass
    assert output.getvalue() == "starting: ranks load torch and build the model\n"


def test_tail_gives_whole_rows_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = RecordTail(path)
    assert tail.new_rows() == []
    path.write_text('{"a": 1}\n{"a"')
    assert tail.new_rows() == [{"a": 1}]
    with path.open("a") as file:
        file.write(': 2}\nnot a row\n{"a": 3}\n')
    assert tail.new_rows() == [{"a": 2}, {"a": 3}]
    assert tail.new_rows() == []


def test_tail_begins_near_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(1000)))
    assert [row["n"] for row in RecordTail(path, backlog_bytes=25).new_rows()] == [998, 999]


def test_a_closed_pipe_silences_the_view_and_nothing_else(tmp_path: Path) -> None:
    """`phidias train | head`: rich makes it a SystemExit, which would end the executor and orphan the ranks."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    config = run_config(tmp_path)
    run = RunDir(tmp_path / "runs" / "tiny")
    run.root.mkdir(parents=True)
    run.status.write_text("{torn")
    with LiveView(run, config, "plain", console=Console(file=Closed())) as view:
        view.note("a line")
        view.refresh()


@pytest.mark.parametrize("mode", ["plain", "rich"])
def test_a_view_that_fails_ends_nothing(run: RunDir, config: RunConfig, mode: Literal["plain", "rich"]) -> None:
    """A status that no rank wrote, a screen that cannot spell it: the executor goes on."""
    status(run, step=1)
    with LiveView(run, config, mode, console=Console(file=io.TextIOWrapper(io.BytesIO(), "ascii"), width=80)) as view:
        status(run, step=2, num_steps="many", tokens="many")
        view.refresh()
        view.note("\u2713")
