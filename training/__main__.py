"""One rank: `torchrun -m training <run directory> --stage NAME`. Reads the frozen config; ends in an exit class."""

import argparse
import contextlib
import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path

from training.processes import adopt_slurm_rank, die_with_parent

if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:  # Slurm ends what it has started itself
        die_with_parent()  # before torch is imported, which takes seconds
    adopt_slurm_rank(os.environ)
    os.register_at_fork(after_in_child=die_with_parent)  # the writers of a checkpoint

import torch

from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record
from training.errors import NodeError, PrecisionError, exit_class


def main() -> ExitClass:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--convert", action="store_true", help="rewrites its newest checkpoint for any layout, trains nothing")
    arguments = parser.parse_args()
    run = RunDir(arguments.run_dir)
    try:
        return train(run, stage_name=arguments.stage, converts=arguments.convert)
    except BaseException as error:  # some of torch's are no Exception
        report_fault(run, arguments.stage, error)
        return exit_class(error)


def train(run: RunDir, *, stage_name: str, converts: bool) -> ExitClass:
    # What the libraries say of themselves, on every rank, hides what a run says.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|training\.cpu)")
    if not torch.cuda.is_available():
        from training import cpu

        cpu.install()
    from training.convert import convert_stage
    from training.heartbeat import Heartbeat
    from training.loop import train_stage
    from training.parallel import initialize_parallel, join_world, leave_world
    from training.startup import Phases, compute_alike

    phases = Phases()
    config = read_config(run)
    if config.cluster.gpu and not torch.cuda.is_available():
        # The config was checked on another node, and this one's GPUs before the ranks started.
        raise (NodeError if "SLURM_PROCID" in os.environ else PrecisionError)(
            f"cluster.gpu: found {config.cluster.gpu} and no CUDA device; the run would train on the CPU. "
            "Fix: see nvidia-smi on this node, or cluster=local"
        )
    if config.stage(stage_name).stage.deterministic:
        compute_alike()
    heartbeat = Heartbeat(run, stage=stage_name, rank=int(os.environ["RANK"]), hang=config.monitor.hang)
    phases.mark("imports_s")
    device = join_world(timeout_s=config.cluster.timeout_s)
    phases.mark("world_s")
    if converts:
        ended = convert_stage(run, config, stage_name=stage_name, device=device)
    else:
        layout, timeout_s = config.stage(stage_name).layout, config.cluster.timeout_s
        rank = initialize_parallel(layout, seed=config.run.seed, device=device, timeout_s=timeout_s)
        phases.mark("groups_s")
        ended = train_stage(run, config, stage_name=stage_name, rank=rank, heartbeat=heartbeat, phases=phases)
    leave_world()
    heartbeat.close()
    return ended


def report_fault(run: RunDir, stage: str, error: BaseException) -> None:
    """Names the cause in the run directory: torchrun and srun replace a rank's exit code by their own."""
    traceback.print_exc()
    rank = int(os.environ.get("RANK", "0"))
    message = f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):  # the disk may be full; the trace is in the log
        node = getattr(error, "node", None) or os.environ.get("SLURMD_NODENAME")
        row = {"rank": rank, "node": node, "exit": exit_class(error).name, "error": message}
        append_record(run.events, "fault", stage=stage, **row)


def leave(code: ExitClass) -> None:
    """Ends the process. A rank that failed leaves at once: it must not hang in the destructor of a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (ExitClass.DONE, ExitClass.INTERRUPTED):
        sys.exit(code)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
