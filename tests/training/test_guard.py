"""What monitor.health finds and what it leads to, of one rank in a world of its own; several ranks are tests/chaos."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import RunConfig
from launcher.plan.stage import plan_stage
from launcher.rundir.checkpoints import DiskFullError, UnwrittenError
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records
from tests.training.tiny import HEALTH, run_config
from tests.training.world import cpu_seams, one_rank
from training import guard as module
from training.errors import CorruptionError, NodeError, NonFiniteError, UnhealthyError, exit_class
from training.guard import Guard
from training.health import Finding
from training.metrics import Metrics
from training.pace import Place, Slow
from training.step import Result, Sums

Build = Callable[..., Guard]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """A guard of a fresh start of ranks; keywords are parts of monitor.health."""
    config = run_config(tmp_path)
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    with cpu_seams(), one_rank(config.stages[0].layout) as rank:

        def made(**parts: dict[str, Any]) -> Guard:
            health = {**HEALTH, **{name: {**HEALTH[name], **part} for name, part in parts.items()}}  # type: ignore[dict-item]
            changed = with_health(config, tmp_path, health)
            metrics = Metrics(run, changed, stage="pretrain", plan=plan_of(changed), is_writer=True)
            return Guard(run, changed, stage="pretrain", rank=rank, chunks=[], metrics=metrics)

        yield made


def with_health(config: RunConfig, root: Path, health: dict[str, Any]) -> RunConfig:
    monitor = run_config(root, monitor={"health": health}).monitor
    return replace(config, monitor=monitor)


def plan_of(config: RunConfig) -> Any:
    return plan_stage(config.stages[0], cluster=config.cluster)


def events(guard: Guard, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_records(guard.run.events) if row["kind"] == kind]


def finding(kind: Any = "non_finite", action: Any = "skip", budget: int = 2) -> Finding:
    return Finding(kind, action, budget, math.nan, None, first_sample=8, end_sample=16, text="loss is nan")


def result(loss: float, *, grad_norm: float = 1.0) -> Result:
    return Result(Sums((loss * 4,), (4,)), grad_norm, own_loss=loss * 4)


def test_a_budget_outlives_a_restart_and_ends_with_a_person(build: Build) -> None:
    assert [build().act(finding(), step=step) for step in (1, 2)] == ["skip", "skip"]  # each of another start of ranks
    with pytest.raises(NonFiniteError, match=r"2 such steps were left out before: monitor\.health\.non_finite\.budget"):
        build().act(finding(), step=3)
    guard = build()
    assert [row["action"] for row in events(guard, "non_finite")] == ["skip", "skip", "stop"]
    append_record(guard.run.events, "fault", stage="pretrain", exit="NEEDS_PERSON", error="")
    assert build().act(finding(), step=4) == "skip"  # the person went on
    assert build().act(finding("loss_spike", "rewind"), step=4) == "rewind"  # a budget of its own


def test_what_a_person_wants_to_see_at_once_is_raised_at_once(build: Build) -> None:
    with pytest.raises(UnhealthyError, match="loss is nan; the update was not taken") as raised:
        build().act(finding("loss_spike", "stop"), step=3)
    assert not isinstance(raised.value, NonFiniteError) and exit_class(raised.value).name == "NEEDS_PERSON"


@pytest.mark.parametrize(
    ("action", "ranks", "error", "ends"),
    [
        ("restart", [0], CorruptionError, "RETRYABLE"),
        ("requeue", [0], NodeError, "BAD_NODE"),
        ("requeue", [], CorruptionError, "RETRYABLE"),  # whose it is is not known
        ("stop", [0], UnhealthyError, "NEEDS_PERSON"),
    ],
)
def test_a_step_that_comes_to_something_else_ends_the_ranks(
    build: Build, action: str, ranks: list[int], error: type[Exception], ends: str
) -> None:
    guard = build(corruption={"action": action, "tolerance": 1e-3})
    guard.compare(result(2.0), result(2.001), step=5)
    guard.compare(result(math.nan), result(math.nan), step=5)
    with pytest.raises(error, match="silent corruption") as raised:
        guard.corrupt("step 5 computed twice", ranks=ranks, step=5)
    assert exit_class(raised.value).name == ends
    (row,) = events(guard, "corruption")
    assert row["node"] == (guard.places[0].node if ranks else None) == getattr(raised.value, "node", row["node"])
    # This rank's own part of the loss differs: it is known whose it is.
    known = {"restart": CorruptionError, "requeue": NodeError, "stop": UnhealthyError}[action]
    with pytest.raises((known, UnhealthyError), match=r"loss 2\.0, then 2\.1"):
        build(corruption={"action": action, "tolerance": 1e-3, "budget": 9}).compare(result(2.0), result(2.1), step=6)


def test_a_straggler_is_left_behind_after_a_checkpoint(build: Build) -> None:
    guard = build(straggler={"action": "requeue"})
    slow = [Slow(rank, Place(f"n{rank - 1}", pp_rank=0, dp_rank=rank), ratio) for rank, ratio in ((3, 1.7), (2, 1.5))]
    guard._leave_behind(slow, step=9)
    assert guard.leaving is not None and guard.leaving.node == "n2" and exit_class(guard.leaving).name == "BAD_NODE"
    assert "rank 3 on n2 computes 1.70 times as long" in str(guard.leaving)
    noted = build()
    noted._leave_behind(slow[:1], step=9)
    # One node at a time: a budget is not spent by eight ranks of one.
    assert noted.leaving is None and [row["action"] for row in events(noted, "straggler")] == ["requeue", "note", "note"]


def test_a_wait_for_data_is_told_by_the_rank_that_waits(build: Build) -> None:
    guard = build(data_stall={"limit_s": 2.0})
    guard.look_at_own(step=4, waited_s=1.9)
    guard.look_at_own(step=5, waited_s=2.1)
    (row,) = events(guard, "data_stall")
    assert (row["step"], row["rank"], row["value"], row["limit"]) == (5, 0, 2.1, 2.0)
    with pytest.raises(UnhealthyError, match="rank 0 waited 3 s for its batch"):
        build(data_stall={"limit_s": 2.0, "action": "stop"}).look_at_own(step=6, waited_s=3.0)


def test_a_gpu_that_fails_ends_its_rank_as_a_bad_node(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = build(device_error={"action": "requeue"})
    monkeypatch.setattr(guard.devices, "poll", lambda: "XID 79: the GPU has fallen off the bus")
    with pytest.raises(NodeError, match="GPU of rank 0: XID 79"):
        guard.look_at_own(step=4, waited_s=0.0)
    assert events(guard, "device_error")[0]["reason"].startswith("XID 79")


def test_a_disk_without_room_for_the_next_checkpoint_is_told_before_it(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    free = module.shutil.disk_usage(build().run.root)._replace(free=10 << 30)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free)
    guard = build(disk_low={"free_gib": 2.0, "action": "stop"})
    guard.check_disk(step=4, last_bytes=9 << 30)
    with pytest.raises(DiskFullError, match=r"10\.00 GiB are free at .*, 11\.00 wanted .*Fix: free space"):
        guard.check_disk(step=5, last_bytes=10 << 30)
    build(disk_low={"free_gib": 11.0}).check_disk(step=6, last_bytes=0)
    assert [(row["step"], row["action"]) for row in events(guard, "disk_low")] == [(5, "stop"), (6, "note")]


def test_a_checkpoint_that_failed_may_be_let_pass(build: Build) -> None:
    error = UnwrittenError("step_00000016 could not be written")
    guard = build(checkpoint={"action": "note", "budget": 1})
    guard.checkpoint_failed(error, step=16)
    with pytest.raises(DiskFullError):  # a person has to make room, whatever the config says
        guard.checkpoint_failed(DiskFullError("the disk is full"), step=32)
    with pytest.raises(UnwrittenError):
        build(checkpoint={"action": "restart", "budget": 1}).checkpoint_failed(error, step=16)
    with pytest.raises(UnhealthyError, match="could not be written"):
        build(checkpoint={"action": "restart", "budget": 1}).checkpoint_failed(error, step=16)
    assert [row["action"] for row in events(guard, "checkpoint_failed")] == ["note", "stop", "restart", "stop"]


def test_training_without_checkpoints_ends(build: Build) -> None:
    """What is only noted is let pass as often in a row as the budget says, and never at the end."""
    error, guard = UnwrittenError("step_00000016 could not be written"), build(checkpoint={"action": "note", "budget": 2})
    guard.checkpoint_failed(error, step=16)
    guard.checkpoint_failed(error, step=32)
    with pytest.raises(UnwrittenError):
        guard.checkpoint_failed(error, step=48)
    with pytest.raises(UnwrittenError):
        build(checkpoint={"action": "note", "budget": 2}).checkpoint_failed(error, step=48, is_last=True)


def test_steps_are_computed_again_where_it_helps(build: Build) -> None:
    guard = build(corruption={"interval_steps": 4})
    assert [step for step in range(10) if guard.replays(None, step=step)] == [4, 8]
    assert guard.replays(finding(), step=3) and not guard.replays(finding("loss_spike", "note"), step=3)
    never = build()
    assert not any(never.replays(None, step=step) for step in range(10))
    assert never.checks_replicas(step=3, saves=True) and not never.checks_replicas(step=3, saves=False)
