"""What the tests of replicas and pace run in a real gloo world: one process imports, and is forked into the ranks.

    python -m tests.training.health_ranks <work dir> <world size> <case> [<case> ...]

A case is `replicas:<name>`, weights compared while ranks hold damaged ones, or `pace`. Rank r leaves its results, by the case,
in <work dir>/rank<r>.json.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_dp3": dict(tp=2, sequence_parallel=True),
    "pp3_dp2": dict(pp=3),
    "cp2_dp3": dict(cp=2, distributed_optimizer=False),
}
# Of which weights which bit is flipped, on which ranks: the first of a layer, by its end.
LAYER, HEAD = "mlp.linear_fc2.weight", "output_layer.weight"
DAMAGES: dict[str, list[tuple[str, int, tuple[int, ...]]]] = {
    "tp2_dp3": [(LAYER, 0, (3,)), (HEAD, 22, (4,)), (LAYER, 31, (0, 1)), (LAYER, 3, (0, 2, 4)), (LAYER, 3, (0, 4))],
    "pp3_dp2": [(LAYER, 5, (2,)), (HEAD, 5, (5,))],
    "cp2_dp3": [(LAYER, 1, (1, 4)), (HEAD, 7, (0, 2, 4))],
}


def run_world(work: Path, *, world_size: int, cases: list[str]) -> list[dict[str, Any]]:
    """The results of every rank."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.health_ranks", str(work), str(world_size), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=work)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((work / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def main() -> int:
    work, world_size, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    from training import cpu

    cpu.install()
    import torch

    import training.model
    import training.pace
    import training.replicas  # noqa: F401  (once, before the fork)

    torch.set_num_threads(1)
    children = [fork(work, rank=rank, world_size=world_size, cases=cases) for rank in range(world_size)]
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


def fork(work: Path, *, rank: int, world_size: int, cases: list[str]) -> int:
    """The new process; in it this never returns."""
    if child := os.fork():
        return child
    try:
        (work / f"rank{rank}.json").write_text(json.dumps(run_rank(work, rank=rank, world_size=world_size, cases=cases)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_rank(work: Path, *, rank: int, world_size: int, cases: list[str]) -> dict[str, Any]:
    import torch.distributed as dist

    store, timeout = f"file://{work / 'store'}", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
    results = {}
    for case in cases:
        kind, *arguments = case.split(":")
        results[case] = CHECKS[kind](*arguments)
        dist.barrier()
    return results


@contextmanager
def layout(name: str) -> Iterator[tuple[Any, Any]]:
    """The stage in a layout, and this rank of it."""
    import torch
    from megatron.core import parallel_state

    from tests.training.world import stage
    from training.parallel import initialize_parallel

    config = stage(layout=LAYOUTS.get(name, {}))
    yield config, initialize_parallel(config.layout, seed=7, device=torch.device("cpu"), timeout_s=120)
    parallel_state.destroy_model_parallel()


def check_replicas(name: str) -> dict[str, Any]:
    """What is found while all is well, while each damage lasts, and afterwards."""
    from tests.training.world import model
    from training.model import build_model
    from training.replicas import compare_replicas, ranks_where

    with layout(name) as (config, rank):
        chunks = build_model(config, model=model(num_layers=6), seed=7)
        found = [compare_replicas(chunks, rank)]
        for ending, bit, ranks in DAMAGES[name]:
            flip(chunks, ending=ending, bit=bit, really=rank.rank in ranks)
            found.append(compare_replicas(chunks, rank))
            flip(chunks, ending=ending, bit=bit, really=rank.rank in ranks)
        found.append(compare_replicas(chunks, rank))
        where = ranks_where(rank.rank % 4 == 1, rank=rank)
    return {"found": [[asdict(one) | {"text": str(one)} for one in each] for each in found], "where": where}


def flip(chunks: Any, *, ending: str, bit: int, really: bool) -> None:
    """One bit of a weight in the middle; of a rank that has none by that name, none."""
    import torch

    from training.replicas import named_parameters

    weight = next((parameter for name, parameter in named_parameters(chunks) if name.endswith(ending)), None)
    if really and weight is not None:
        words = weight.data.view(-1).view(torch.int32)
        words[len(words) // 2] ^= -(2**31) if bit == 31 else 2**bit


def check_pace() -> dict[str, Any]:
    """Ranks on two nodes, each with numbers of its own."""
    import torch.distributed as dist

    from training.clocks import Spent
    from training.pace import gather_pace, gather_places, ratios, summary

    with layout("tp2_dp3") as (_, rank):
        os.environ["SLURMD_NODENAME"] = f"n{rank.rank // 4}"
        places = gather_places(rank)
        own = float(dist.get_rank() + 1)
        paces = gather_pace(rank, places=places, spent=Spent(own), wait_s=own / 10, step_s=10.1)
        return {"paces": [asdict(pace) for pace in paces], "summary": summary(paces, compared=ratios(paces))}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {"replicas": check_replicas, "pace": check_pace}

if __name__ == "__main__":
    sys.exit(main())
