"""Who is slow: which ranks are compared with which, and for how long one has to be slow."""

from typing import Any

import pytest

import tests.training.world  # noqa: F401  (megatron warns when it is first imported)
from launcher.config.monitoring import Straggler
from tests.training.health_ranks import run_world
from training.pace import Place, RankPace, StragglerWatch, ratios, summary

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def paces(*stages: list[float], tp: int = 1) -> list[RankPace]:
    """Of ranks on nodes of two: of each pipeline stage the forward seconds, tensor-parallel ranks side by side."""
    numbered = [(stage, index // tp, value) for stage, values in enumerate(stages) for index, value in enumerate(values)]
    return [
        RankPace(
            rank, Place(f"n{rank // 2}", stage, replica), value, 0.2, 0.05, wait_s=0.01 * rank, step_s=1.0, memory_bytes=rank
        )
        for rank, (stage, replica, value) in enumerate(numbered)
    ]


def watch(*, factor: float = 1.3, rows: int = 3) -> StragglerWatch:
    return StragglerWatch(Straggler(factor=factor, rows=rows, action="note", budget=1))


def test_ranks_are_compared_within_their_stage() -> None:
    """The last stage computes the loss too; that does not make it slow."""
    found = ratios(paces([1.0, 1.0, 1.0], [2.0, 2.2, 2.0]))
    assert (found[0].rank, found[0].node, found[0].ratio) == (4, "n2", 1.1)
    assert [one.ratio for one in found[1:]] == [1.0] * 5


def test_of_a_tensor_parallel_group_the_slowest_counts() -> None:
    """Ranks that wait for it are as slow."""
    found = ratios(paces([1.0, 1.0, 1.9, 2.0, 1.0, 1.0], tp=2))
    assert [(one.rank, one.ratio) for one in found] == [(3, 2.0), (0, 1.0), (4, 1.0)]


def test_of_two_replicas_the_slower_one_is_slow() -> None:
    assert [(one.rank, one.ratio) for one in ratios(paces([1.0, 1.5]))] == [(1, 1.5), (0, 1.0)]


def test_one_replica_cannot_be_judged() -> None:
    assert ratios(paces([1.0], [5.0])) == [] == ratios(paces([1.0, 3.0], tp=2))
    alone = paces([1.0], [5.0])
    row = summary(alone, compared=ratios(alone))
    assert row["forward_s"] == 3.0 and row["forward_max_s"] == 5.0 and "slowest_rank" not in row


def test_a_stage_without_computation() -> None:
    assert ratios(paces([0.0, 0.0, 0.0])) == []


def test_a_straggler_is_slow_in_rows_in_a_row() -> None:
    slow, well = paces([1.0, 1.0, 1.0, 1.5]), paces([1.0, 1.0, 1.0, 1.1])
    judge = watch().judge
    assert [len(judge(ratios(row))) for row in (slow, slow, well, slow, slow, slow)] == [0, 0, 0, 0, 0, 1]


def test_a_straggler_is_told_once() -> None:
    slow, well = paces([1.0, 1.0, 1.0, 1.5]), paces([1.0, 1.0, 1.0, 1.0])
    judge = watch(rows=2).judge
    found = [[one.rank for one in judge(ratios(row))] for row in (slow, slow, slow, slow, well, slow, slow)]
    assert found == [[], [3], [], [], [], [], [3]]


def test_a_slow_group_is_one_straggler_whoever_of_it_is_slowest() -> None:
    judge = watch(rows=2).judge
    judge(ratios(paces([1.0, 1.0, 1.0, 1.0, 1.5, 1.6], tp=2)))
    (slow,) = judge(ratios(paces([1.0, 1.0, 1.0, 1.0, 1.6, 1.5], tp=2)))
    assert (slow.rank, slow.node, slow.ratio) == (4, "n2", 1.6)


def test_a_slow_node_has_several() -> None:
    judge = watch(rows=1).judge
    found = judge(ratios(paces([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.4, 1.5])))
    assert [(one.rank, one.node) for one in found] == [(7, "n3"), (6, "n3")]


def test_the_pace_of_all_ranks_is_known_to_all(tmp_path) -> None:
    world: list[dict[str, Any]] = run_world(tmp_path, world_size=6, cases=["pace"])
    assert all(each == world[0] for each in world)
    found = world[0]["pace"]["paces"]
    assert [(one["rank"], one["forward_s"], one["wait_s"], one["step_s"]) for one in found] == [
        (rank, rank + 1.0, (rank + 1) / 10, 10.1) for rank in range(6)
    ]
    assert [one["place"]["node"] for one in found] == ["n0"] * 4 + ["n1"] * 2
    assert [one["place"]["dp_rank"] for one in found] == [0, 0, 1, 1, 2, 2]
    summary = world[0]["pace"]["summary"]
    assert summary.pop("memory_max_bytes") > 50e6
    assert summary == {
        "forward_s": 3.5,
        "forward_max_s": 6.0,
        "backward_s": 0.0,
        "optimizer_s": 0.0,
        "exposed_s": 6.25,
        "rank_step_s": 10.1,
        "rank_step_max_s": 10.1,
        "data_wait_max_s": 0.6,
        "slowest_rank": 5,
        "slowest_node": "n1",
        "slowest_ratio": 1.5,
    }


def test_a_row_says_where_the_ranks_spent_their_step() -> None:
    """Of 1.0 s: forward, 0.2 backward, 0.05 optimizer, and up to 0.03 without a batch; the rest is waiting for others."""
    row = summary(paces([0.4, 0.5], [0.6, 0.3]), compared=[])
    assert row["forward_s"] == 0.45 and row["backward_s"] == 0.2 and row["optimizer_s"] == 0.05
    assert row["exposed_s"] == pytest.approx(1.0 - 0.45 - 0.2 - 0.05 - 0.015)
    assert row["memory_max_bytes"] == 3
