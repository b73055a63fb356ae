"""Real multi-rank training over gloo: one torchrun a world size, many checks in each."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import plain
from tests.training.shards import write_sources

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = {
    1: ["layout:one", "layout:plain_optimizer", "layout:recompute",
        "resume:one", "rewind:one", "batch", "nan", "masked:one", "long:one", "yarn:one"],
    2: [
        *(f"layout:{name}" for name in ("tp2_sp", "pp2_vpp2", "cp2", "dp2_overlap")),
        *(f"resume:{name}" for name in ("dp2", "pp2_vpp2")),
        "resume:dp2:bf16", "rewind:dp2_overlap", "move:dp2:tp2_sp", "packed:cp2",
        "long:tp2_sp", "long:cp2", "yarn:cp2", "border:dp2:pp2_vpp2",
    ],
    4: ["layout:tp2_pp2_sp"],
}  # fmt: skip
# CI has no time for these: they run in `make test-slow`.
SLOW = {
    1: ["layout:mbs4", "layout:selective", "layout:selective_mlp", "masked:mbs4", "yarn:one+masked"],
    2: ["layout:tp2", "layout:dp2", "layout:pp2_vpp3_ends", "layout:dp2_plain", "layout:pp2_first1", "resume:cp2",
        "resume:tp2_sp", "resume:dp2_overlap", "resume:pp2", "move:pp2:cp2", "move:tp2:pp2_vpp2", "masked:cp2_mbs2",
        "masked:tp2_sp", "masked:pp2", "masked:pp2_vpp2", "masked:dp2", "long:pp2_vpp2", "long:dp2_overlap",
        "yarn:tp2_sp", "yarn:cp2+packed"],
    4: ["packed:pp2_vpp2_cp2", "layout:cp2_dp2", "layout:tp2_cp2", "packed:tp2_cp2", "masked:pp4", "long:tp2_pp2_sp"],
}  # fmt: skip
for world_size in SLOW if os.environ.get("PHIDIAS_SLOW") else ():
    CASES[world_size] += SLOW[world_size]
CASES_AT_ONCE = 8  # gloo leaves 90 threads behind for every layout that a process has been
# Sums of the same fp32 products in another order: the largest relative difference seen was below 1e-6.
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of every case, by `<case>`."""
    work = tmp_path_factory.mktemp("ranks")
    write_sources(work / "data")
    found: dict[str, Any] = {}
    for world_size, cases in CASES.items():
        for first in range(0, len(cases), CASES_AT_ONCE):
            run_ranks(work, world_size=world_size, cases=cases[first : first + CASES_AT_ONCE])
            found |= json.loads((work / f"world{world_size}.json").read_text())
    return found


def run_ranks(work: Path, *, world_size: int, cases: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={world_size}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "tests.training.ranks", str(work), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=work)
    assert done.returncode == 0, done.stderr[-6000:]


def cases_of(*kinds: str) -> list[str]:
    return [case for cases in CASES.values() for case in cases if case.split(":")[0] in kinds]


@pytest.mark.parametrize("case", [case for case in cases_of("layout", "masked", "packed", "yarn") if case != "layout:one"])
def test_every_layout_learns_the_same(case: str, results: dict[str, Any]) -> None:
    yarn = "yarn:one+masked" if "+" in case else "yarn:one"
    one = results[{"layout": "layout:one", "yarn": yarn}.get(case.split(":")[0], "masked:one")]
    for found, expected in zip(results[case]["rows"], one["rows"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert found["loss_by_source"] == pytest.approx(expected["loss_by_source"], rel=TOLERANCE)
        assert found["tokens_by_source"] == expected["tokens_by_source"]
        assert found["lr"] == expected["lr"]
        assert found["epochs_by_source"] == expected["epochs_by_source"]
        assert found["weight_norm"] == pytest.approx(expected["weight_norm"], rel=TOLERANCE)
        assert found["update_ratio"] == pytest.approx(expected["update_ratio"], rel=1e-3)
        assert found["zero_grads"] == pytest.approx(expected["zero_grads"], rel=1e-3)
    assert results[case]["held_out"] == pytest.approx(one["held_out"], rel=TOLERANCE)


@pytest.mark.parametrize("case", cases_of("layout"))
def test_the_split_of_a_step_adds_up(case: str, results: dict[str, Any]) -> None:
    """What is neither computed nor waited for data is waited for other ranks; alone there is next to nobody to wait for."""
    for row in results[case]["rows"]:
        parts = [row[f"{part}_s"] for part in ("forward", "backward", "optimizer", "exposed")]
        assert min(parts) > 0.0
        assert sum(parts) <= row["rank_step_s"] * 1.02 + 1e-4
        assert row["memory_max_bytes"] > 50e6


@pytest.fixture(scope="module")
def plain_rows(results: dict[str, Any]) -> list[dict[str, float]]:
    one = results["long:one"]
    work = Path(one["work"])
    return plain.train(torch.load(work / "initial.pt"), batches=one["windows"], data_dir=work / "data")


@pytest.mark.parametrize("case", cases_of("long"))
def test_fifty_steps_are_those_of_a_plain_loop(case: str, results: dict[str, Any], plain_rows: list[dict[str, float]]) -> None:
    """transformers and torch's AdamW on one process: masks, weight decay, schedule, clipping and means of losses over micro
    batches, pipelines and sequence parts are what anyone would take them for. 2e-7 is what was found for one rank."""
    found = [(row["loss"], row["grad_norm"]) for row in results[case]["rows"]]
    expected = [(row["loss"], row["grad_norm"]) for row in plain_rows]
    assert len(found) == 50 and expected[-1][0] < expected[0][0] - 1.0
    for (loss, norm), (plain_loss, plain_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(plain_loss, abs=2e-5) and norm == pytest.approx(plain_norm, rel=1e-3)


def test_masks_change_what_is_learned(results: dict[str, Any]) -> None:
    """Less is seen and less is predicted; documents here are of 50 tokens."""
    masked, whole = results["masked:one"]["rows"][-1], results["layout:one"]["rows"][-1]
    assert masked["loss"] != pytest.approx(whole["loss"], rel=1e-3)
    share = sum(masked["tokens_by_source"].values()) / sum(whole["tokens_by_source"].values())
    assert share == pytest.approx(1 - 1 / 50, abs=0.005)


def test_scaled_angles_change_what_is_learned(results: dict[str, Any]) -> None:
    scaled, plain_angles = (results[f"{kind}:one"]["rows"][-1] for kind in ("yarn", "layout"))
    assert scaled["loss"] != pytest.approx(plain_angles["loss"], rel=1e-4)


def test_it_learns(results: dict[str, Any]) -> None:
    losses = [row["loss"] for row in results["layout:one"]["rows"]]
    assert losses[0] == pytest.approx(math.log(250), abs=0.3)
    assert losses[-1] < losses[0] - 0.1


def test_learning_rate_warms_up_and_ends_at_its_minimum(results: dict[str, Any]) -> None:
    rates = [row["lr"] for row in results["layout:one"]["rows"]]
    assert rates == pytest.approx([1.5e-3, 3e-3, 2.325e-3, 1.65e-3, 9.75e-4, 3e-4])


@pytest.mark.parametrize("case", cases_of("resume"))
def test_resume_is_bitwise(case: str, results: dict[str, Any]) -> None:
    assert results[case]["start"] == 3
    assert results[case]["found"] == results[case]["expected"]


@pytest.mark.parametrize("case", [case for case in CASES[2] if case.startswith("move:")])
def test_a_checkpoint_goes_on_in_another_layout(case: str, results: dict[str, Any]) -> None:
    expected = [row["loss"] for row in results["layout:one"]["rows"]]
    assert results[case]["losses"] == pytest.approx(expected, rel=TOLERANCE)


WEIGHTS, MOMENTS = ("weights", "weights_sum"), ("exp_avg", "exp_avg_sq", "exp_avg_sum", "exp_avg_sq_sum", "step")


@pytest.fixture(scope="module")
def border(results: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = results["border:dp2:pp2_vpp2"]
    return found


@pytest.mark.parametrize("stage", ["kept", "new"])
def test_a_stage_begins_with_the_fp32_weights_of_the_one_before(stage: str, border: dict[str, Any]) -> None:
    """Bitwise, in bf16: nothing is rounded at the border."""
    assert [border[stage][name] for name in WEIGHTS] == [border["end"][name] for name in WEIGHTS]
    event = border[stage]["event"]
    assert (event["init_from"], event["path"], event["weights"]) == ("pretrain", "step_00000006", "fp32")


def test_moments_are_kept_or_new(border: dict[str, Any]) -> None:
    end, kept, new = (border[name] for name in ("end", "kept", "new"))
    assert end["exp_avg_sum"] > 0 and [kept[name] for name in MOMENTS] == [end[name] for name in MOMENTS]
    assert (new["step"], new["exp_avg_sum"], new["exp_avg_sq_sum"]) == (0, 0.0, 0.0)
    assert (kept["event"]["moments"], new["event"]["moments"]) == ("kept", "new")
    # The settings are the new stage's; the first loss is of the same weights, the second of others.
    assert [row["lr"] for row in kept["rows"]] == [row["lr"] for row in new["rows"]] == pytest.approx([8e-4, 7e-4])
    assert kept["rows"][0]["loss"] == new["rows"][0]["loss"] and kept["rows"][1]["loss"] != new["rows"][1]["loss"]
    assert (kept["stepped"]["step"], new["stepped"]["step"]) == (8, 2)


def test_another_run_goes_on_in_its_own_layout(border: dict[str, Any]) -> None:
    """With the weights, the moments and the ledger of a checkpoint that a path names."""
    end, kept, moved = (border[name] for name in ("end", "kept", "moved"))
    for name in ("weights_sum", "exp_avg_sum", "exp_avg_sq_sum"):
        assert moved[name] == pytest.approx(end[name], rel=1e-12)
    assert moved["step"] == end["step"] and moved["goes_on"]
    assert [row["loss"] for row in moved["rows"]] == pytest.approx([row["loss"] for row in kept["rows"]], rel=TOLERANCE)
    event = moved["event"]
    parent = {"run": event["init_from"], "stage": "pretrain", "step": 6, "tokens": 1536, "digest": event["parent"]["digest"]}
    assert event["parent"] == parent and event["goes_on"] == ["a", "b", "c"]


def test_a_changed_batch_size_reads_the_same_samples(results: dict[str, Any]) -> None:
    rows = results["batch"]["rows"]
    assert [row["samples"] for row in rows] == [8, 16, 24, 28, 32, 36, 40, 44, 48]
    assert [row["tokens"] for row in rows] == [row["samples"] * 32 for row in rows]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert rows[-1]["tokens_by_source"] == results["layout:one"]["rows"][-1]["tokens_by_source"]


@pytest.mark.parametrize("case", cases_of("rewind"))
def test_a_rewind_is_bitwise_the_run_that_never_took_the_batch(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found["found"] == found["expected"] and found["finished"]
    assert found["kinds"][-4:] == ["checkpoint", "skip", "rewind", "resume"]
    assert found["names"] == ["step_00000002", "step_00000004"]
    assert "no checkpoint from before sample 16 is left to rewind to; later ones are as they were" in found["error"]


def test_nan_is_refused_before_the_weights_are_touched(results: dict[str, Any]) -> None:
    assert "loss is nan" in results["nan"]["error"] and results["nan"]["unchanged"]
    assert results["nan"]["step"] == 1 and results["nan"]["left_out"] == [[8, 8], [16, 8]]
