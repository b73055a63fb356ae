"""One rank: `torchrun -m training <run directory> --stage NAME`. Reads the frozen config; ends in an exit class."""

import argparse
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record
from training.errors import exit_class


def main() -> ExitClass:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", required=True)
    arguments = parser.parse_args()
    run = RunDir(arguments.run_dir)
    try:
        return train(run, stage_name=arguments.stage)
    except BaseException as error:  # some of torch's are no Exception
        report_fault(run, arguments.stage, error)
        return exit_class(error)


def train(run: RunDir, *, stage_name: str) -> ExitClass:
    # What the libraries say of themselves, on every rank, hides what a run says.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|training\.cpu)")
    if not torch.cuda.is_available():
        from training import cpu

        cpu.install()
    from training.loop import train_stage
    from training.parallel import initialize_parallel, join_world, leave_world

    config = read_config(run)
    device = join_world(timeout_s=config.cluster.timeout_s)
    rank = initialize_parallel(config.stage(stage_name).layout, seed=config.run.seed, device=device)
    ended = train_stage(run, config, stage_name=stage_name, rank=rank)
    leave_world()
    return ended


def report_fault(run: RunDir, stage: str, error: BaseException) -> None:
    """Names the cause in the run directory: torchrun and srun replace a rank's exit code by their own."""
    traceback.print_exc()
    rank = int(os.environ.get("RANK", "0"))
    message = f"{type(error).__name__}: {error}"
    append_record(run.events, "fault", stage=stage, rank=rank, exit=exit_class(error).name, error=message)


def hard_exit(code: ExitClass) -> None:
    """Leaves without waiting for other threads: a failed rank must not hang in a collective's destructor."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    hard_exit(main())
