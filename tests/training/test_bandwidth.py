"""Measuring nodes: four real ranks over gloo, two on each of two nodes; and what is pure, as tables."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from launcher.config.compose import compose_run
from launcher.jobs.node_rules import judge_bandwidth
from training import bandwidth
from training.bandwidth import Book, parts, ring_rounds

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = ("gemm_tflops", "node_all_reduce_gb_per_s", "pair_all_reduce_gb_per_s")
H100 = compose_run(["run=phi4"]).cluster
CLUSTER = replace(H100, name="lab", gpu=None, gpus_per_node=2)

BROKEN = """
def broken(*_, **__):
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
if rank == 3:
    bandwidth.gemm_tflops = broken
"""


# Ranks as the module starts them, less the seconds that each would import torch.
FOUR = """
import os
from training import bandwidth
rank = next((rank for rank in (1, 2, 3) if os.fork() == 0), 0)
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % 2), SLURMD_NODENAME="n1 n1 n2 n2".split()[rank])
{0}
code = bandwidth.main()
ended = [os.wait()[1] for _ in range(3)] if rank == 0 else []
os._exit(code or any(ended))
"""


def measure(out, *options, program=("-m", "training.bandwidth"), world_size):
    """Starts rank 0, or a program that starts more; its exit code, and what it said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "SLURMD_NODENAME": "n1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", *program, str(out), *options]
    done = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_two_nodes_of_two_ranks(tmp_path):
    out = tmp_path / "out.json"
    code, said = measure(out, "--max-s=60", "--device=cpu", program=("-c", FOUR.format("")), world_size=4)
    assert code == 0, said
    found = json.loads(out.read_text())
    assert list(found["nodes"]) == ["n1", "n2"] and (found["failed"], found["at"], found["left_out"]) == (None, None, [])
    speeds = [found["all_reduce_gb_per_s"], *(row[name] for row in found["nodes"].values() for name in FIGURES)]
    assert all(math.isfinite(speed) and speed > 0 for speed in speeds), found
    assert list(found["seconds"]) == ["join", "gemm", "node all-reduce", "pair all-reduce 1", "all-reduce of all"]
    low = replace(H100.checks, gemm_tflops=1e-9, node_all_reduce_gb_per_s=1e-9, all_reduce_gb_per_s=1e-9)
    assert judge_bandwidth(found, nodes=("n1", "n2"), cluster=replace(CLUSTER, checks=low)) == ((), None)
    _, problem = judge_bandwidth(found, nodes=("n1", "n2"), cluster=CLUSTER)  # an H100's figures
    assert problem.count("all 2 nodes") == 3


def test_a_rank_that_fails_names_its_node(tmp_path):
    out = tmp_path / "out.json"
    code, said = measure(out, "--max-s=60", "--device=cpu", program=("-c", FOUR.format(BROKEN)), world_size=4)
    assert code == 1 and "uncorrectable ECC" in said
    found = json.loads(out.read_text())
    assert found["failed"]["part"] == "gemm" and found["all_reduce_gb_per_s"] is None
    faults, problem = judge_bandwidth(found, nodes=("n1", "n2"), cluster=CLUSTER)
    reason = "gemm failed: rank 3: RuntimeError: CUDA error: uncorrectable ECC error encountered"
    assert [fault.node for fault in faults] == ["n2"] and faults[0].reason == reason, problem


def test_ranks_without_a_gpu_or_that_never_come_are_told(tmp_path):
    out = tmp_path / "out.json"
    options = ("--max-s=5", "--join-s=1", "--device=cuda")
    code, _ = measure(out, *options, world_size=4)
    found = json.loads(out.read_text())
    assert code == 1 and found["nodes"]["n1"]["ranks"] == 1
    faults, problem = judge_bandwidth(found, nodes=("n1", "n2", "n3"), cluster=replace(CLUSTER, gpus_per_node=1))
    reasons = {fault.node: fault.reason for fault in faults}
    assert "local rank 0 needs its own" in reasons["n1"] and problem is None
    assert reasons["n2"].startswith("0 ranks came to be measured") and set(reasons) == {"n1", "n2", "n3"}


def test_parts_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    ours = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["bandwidth", str(out), "--max-s=0", "--device=cpu"])
    monkeypatch.setattr(bandwidth, "end_by", lambda *_, **__: None)  # it would end these tests
    assert bandwidth.main() == 0
    found = json.loads(out.read_text())
    (row,) = found["nodes"].values()
    assert found["left_out"] == ["gemm"] and row["gemm_tflops"] is None and found["at"] is None


@pytest.mark.parametrize("num_nodes", range(1, 12))
def test_every_node_is_measured_with_both_neighbours(num_nodes):
    rounds = ring_rounds(num_nodes)
    links = [link for links in rounds for link in links]
    assert len(rounds) <= 3 and all(len({node for link in links for node in link}) == 2 * len(links) for links in rounds)
    assert len({frozenset(link) for link in links}) == len(links) == {1: 0, 2: 1}.get(num_nodes, num_nodes)


def test_parts_of_a_job():
    found = {part.name: part.groups for part in parts(["a", "a", "b", "b", "c", "c"])}
    assert found["gemm"] == [[rank] for rank in range(6)] and found["node all-reduce"] == [[0, 1], [2, 3], [4, 5]]
    assert found["pair all-reduce 1"] == [[0, 1, 2, 3]] and found["pair all-reduce 3"] == [[0, 1, 4, 5]]
    assert found["all-reduce of all"] == [[0, 1, 2, 3, 4, 5]]
    assert [part.name for part in parts(["a", "a"])] == ["gemm", "node all-reduce"]
    assert [part.name for part in parts(["a"])] == ["gemm"]
    assert [part.name for part in parts(["a", "b"])] == ["gemm", "pair all-reduce 1", "all-reduce of all"]


def booked(nodes, *, bad):
    """A book after all links between nodes of one rank; those of a bad node are slow."""
    book = Book(Path("nowhere"))
    book.enter({rank: {"node": node, "nccl": None, "torch": "2"} for rank, node in enumerate(nodes)})
    for part in parts(nodes):
        if part.name.startswith("pair"):
            figures = {rank: 1.0 if bad & {nodes[other] for other in group} else 9.0 for group in part.groups for rank in group}
            ranks = range(len(nodes))
            book.add(part.name, {rank: {"figure": figures.get(rank)} for rank in ranks})
    return book


@pytest.mark.parametrize("num_nodes", [3, 4, 5, 8, 9])
def test_a_slow_node_does_not_drag_its_neighbours_along(num_nodes):
    nodes = [f"n{index}" for index in range(num_nodes)]
    cluster = replace(CLUSTER, gpus_per_node=1, checks=replace(H100.checks, all_reduce_gb_per_s=5.0))
    sets = [{node} for node in nodes]
    sets += [
        set(pair) for pair in combinations(nodes, 2) if num_nodes == 8 and nodes.index(pair[1]) - nodes.index(pair[0]) == 4
    ]
    for bad in sets:
        book = booked(nodes, bad=bad)
        faults, problem = judge_bandwidth({**vars(book), "at": None}, nodes=nodes, cluster=cluster)
        assert {fault.node for fault in faults} == bad and problem is None


def test_the_slowest_rank_is_the_nodes_figure():
    book = booked(["a", "a", "b"], bad=set())
    book.add("gemm", {0: {"figure": 5.0}, 1: {"figure": 3.0}, 2: {"figure": 4.0}})
    book.add("all-reduce of all", {0: {"figure": 5.0}, 1: {"figure": 3.0}, 2: {"figure": None}})
    assert book.nodes["a"]["gemm_tflops"] == 3.0 and book.nodes["b"]["gemm_tflops"] == 4.0
    assert book.all_reduce_gb_per_s == 3.0
