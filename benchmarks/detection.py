"""What recovery.py measures of detection, on two ranks: `torchrun --nproc-per-node 2 -m benchmarks.detection OUT`."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from training import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from launcher.rundir.paths import RunDir  # noqa: E402
from tests.training.tiny import run_config  # noqa: E402
from tests.training.world import model  # noqa: E402
from training.clocks import Spent  # noqa: E402
from training.health import StepHealth  # noqa: E402
from training.heartbeat import Heartbeat  # noqa: E402
from training.model import build_model  # noqa: E402
from training.pace import StragglerWatch, gather_pace, gather_places, ratios, summary  # noqa: E402
from training.parallel import initialize_parallel, join_world, leave_world  # noqa: E402
from training.replicas import compare_replicas, parameter_digest  # noqa: E402

WINDOW = 128
LARGE = dict(num_layers=12, hidden_size=768, num_attention_heads=12, num_query_groups=12, kv_channels=64, ffn_hidden_size=2048)


def best_us(act: Callable[[], object], *, repeats: int) -> float:
    """Of five rounds, microseconds a call."""
    act()
    rounds = []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(repeats):
            act()
        rounds.append((time.perf_counter() - began) / repeats)
    return round(1e6 * min(rounds), 1)


def main() -> None:
    torch.set_num_threads(1)
    device = join_world(timeout_s=120)
    folder = Path(sys.argv[1]).parent
    config = run_config(folder, ranks=2)
    rank = initialize_parallel(config.stages[0].layout, seed=7, device=device, timeout_s=120)
    health = StepHealth(replace(config.monitor.health, window_steps=WINDOW))
    run = RunDir(folder / "detection")
    sample = iter(range(1 << 30))

    def judge() -> None:
        first = next(sample)
        assert (
            health.judge(loss=2.0 + first % 7 / 100, grad_norm=1.0 + first % 5 / 100, samples=first, next_samples=first + 1)
            is None
        )
        health.accept(loss=2.0 + first % 7 / 100, grad_norm=1.0 + first % 5 / 100)

    beat = Heartbeat(run, stage="pretrain", rank=rank.rank, hang=config.monitor.hang)
    places, watch = gather_places(rank), StragglerWatch(config.monitor.health.straggler)

    def pace() -> None:
        paces = gather_pace(rank, places=places, spent=Spent(1.0), wait_s=0.0, step_s=2.0)
        compared = ratios(paces)
        assert not watch.judge(compared) and summary(paces, compared=compared)

    figures: dict[str, float] = {
        "judge, us": best_us(judge, repeats=2000),
        "heartbeat, us": best_us(lambda: beat.step(1, seconds=1.0), repeats=2000),
        "pace at a row, us": best_us(pace, repeats=100),
    }
    beat.close()
    chunks = build_model(config.stages[0], model=model(**LARGE), seed=7)
    num_bytes = sum(parameter.numel() * parameter.element_size() for chunk in chunks for parameter in chunk.parameters())
    digest_us = best_us(lambda: parameter_digest(chunks), repeats=3)
    compare_us = best_us(lambda: compare_replicas(chunks, rank), repeats=3)
    figures |= {
        "weights, MB": round(num_bytes / 1e6),
        "hash of the weights, ms": round(digest_us / 1e3, 2),
        "hash of the weights, MB/s": round(num_bytes / digest_us),
        "weights compared, ms": round(compare_us / 1e3, 2),
    }
    if rank.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(figures))
    leave_world()


if __name__ == "__main__":
    main()
