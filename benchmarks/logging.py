"""What a metrics row costs a step, on two CPU ranks of this machine: looking at weights and gradients, what ranks tell each
other, and the row itself with each sink. Goal: below 0.3% of a step of 0.5 s with a row each.

    python -m benchmarks.logging
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCES = [f"source_{index:02d}" for index in range(30)]  # as many as the mixture of phi4 has parts
ROWS = 300
GOAL_OF_STEP, STEP_S = 0.003, 0.5
WANDB = dict(key_file=None, project="phidias", entity=None, group=None)
SINKS: dict[str, dict[str, Any]] = {
    "row, ms": {"tensorboard": False, "wandb": dict(mode="disabled") | WANDB},
    "row with TensorBoard, ms": {"tensorboard": True, "wandb": dict(mode="disabled") | WANDB},
    "row with W&B offline, ms": {"tensorboard": False, "wandb": dict(mode="offline") | WANDB},
}
# A rank of phi4's 1,920 owns 7.6M parameters; two ranks share twice as many here.
MODEL = dict(num_layers=6, hidden_size=384, num_attention_heads=6, num_query_groups=6, kv_channels=64, ffn_hidden_size=1536)


def main() -> None:
    from benchmarks.machine import write_result

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        out = Path(folder) / "logging.json"
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "benchmarks.logging", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"})
        figures: dict[str, Any] = json.loads(out.read_text())
    write_result("logging", figures)


def of_ranks(out: Path) -> None:
    from training import cpu

    cpu.install()

    import torch
    import torch.distributed as dist
    import yaml  # type: ignore[import-untyped]

    from launcher.config.validate import dump_run
    from launcher.plan.stage import plan_stage
    from launcher.rundir.paths import RunDir
    from tests.training.test_step import batch_of
    from tests.training.tiny import run_config
    from tests.training.world import model
    from training.clocks import Spent
    from training.metrics import Metrics
    from training.model import build_model
    from training.optimizer import build_optimizer
    from training.pace import gather_pace, gather_places, ratios, summary
    from training.parallel import initialize_parallel, join_world, leave_world
    from training.step import Flags, Stepper

    torch.set_num_threads(1)
    device = join_world(timeout_s=120)
    config = run_config(out.parent, ranks=2)
    stage = config.stages[0]
    rank = initialize_parallel(stage.layout, seed=7, device=device, timeout_s=120)
    chunks = build_model(stage, model=model(**MODEL), seed=7)
    stepper = Stepper(stage, chunks=chunks, optimizer=build_optimizer(stage, chunks=chunks), rank=rank)
    result = stepper.gradients([batch_of([0])], num_microbatches=1, flags=Flags())
    stepper.update(result.grad_norm)
    owned = sum(parameter.numel() for parameter in stepper.optimizer.get_parameters())
    watch_s, places = [], gather_places(rank)
    for _ in range(20):
        dist.barrier()
        began = time.perf_counter()
        stepper.watch.before()
        watched = stepper.watch.after()
        watch_s.append(time.perf_counter() - began)
    pace_s = []
    for _ in range(ROWS):
        dist.barrier()
        began = time.perf_counter()
        paces = gather_pace(rank, places=places, spent=Spent(0.1, 0.2, 0.01), wait_s=0.0, step_s=0.5)
        told = summary(paces, compared=ratios(paces))
        pace_s.append(time.perf_counter() - began)
    figures: dict[str, Any] = {
        "parameters a rank owns": owned,
        "weights and gradients looked at, ms": milliseconds(watch_s),
        "pace of the ranks, ms": milliseconds(pace_s),
    }
    dist.barrier()
    if rank.rank == 0:
        by_source = dict.fromkeys(SOURCES, 2.0)
        fields = dict(loss=2.0, loss_by_source=by_source, tokens_by_source=by_source, epochs_by_source=by_source, lr=1e-4)
        fields |= dict(grad_norm=1.0, tokens_per_s=1e6, step_time_s=0.5, data_wait_s=0.0, checkpoint_s=0.0) | watched | told
        plan = plan_stage(stage, cluster=config.cluster)
        for name, monitor in SINKS.items():
            run = RunDir(out.parent / "runs" / name)
            run.root.mkdir(parents=True)
            sunk = run_config(out.parent, ranks=2, monitor=monitor)
            run.config.write_text(yaml.safe_dump(dump_run(sunk)))  # W&B's process reads it
            figures[name] = of_rows(Metrics(run, sunk, stage="pretrain", plan=plan, is_writer=True), fields=fields)
        a_row = sum(figures[name] for name in ("weights and gradients looked at, ms", "pace of the ranks, ms"))
        part = (a_row + figures["row with W&B offline, ms"]["in the step"]) / 1e3 / STEP_S
        figures |= {"of a step of 0.5 s, with W&B": round(part, 6), "goal": GOAL_OF_STEP, "met": part < GOAL_OF_STEP}
        out.write_text(json.dumps(figures))
    dist.barrier()
    leave_world()


def of_rows(metrics: Any, *, fields: dict[str, Any]) -> dict[str, float]:
    """Milliseconds a row: what the step waits for, rows 20 ms apart, and what the process computes meanwhile, other
    threads included."""
    time.sleep(5.0)  # W&B's client starts
    taken, used = [], time.process_time()
    for step in range(1, ROWS + 1):
        began = time.perf_counter()
        metrics.train(step, samples=8 * step, **fields)
        taken.append(time.perf_counter() - began)
        time.sleep(0.02)
    used = time.process_time() - used
    metrics.close()
    return {"in the step": milliseconds(taken), "worst": round(1e3 * max(taken), 3), "computed": round(1e3 * used / ROWS, 3)}


def milliseconds(seconds: list[float]) -> float:
    """The median."""
    return round(1e3 * statistics.median(seconds), 3)


if __name__ == "__main__":
    of_ranks(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
