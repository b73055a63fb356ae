"""Processes that read what a run has trained: on this machine, or in the container of the job they are called in."""

import os
import subprocess
import sys
from collections.abc import Sequence

from launcher.config.schema import RunConfig
from launcher.jobs.steps import one_process, place_of
from launcher.rundir.code import SOURCE_ROOT, child_environment
from launcher.rundir.paths import RunDir


def call_interop(run: RunDir, config: RunConfig, *, module: str, words: Sequence[str]) -> int:
    """`python -m training.interop.<module> <run directory> words...`, without a network; its exit code."""
    place = place_of(run, config, code=SOURCE_ROOT, environment=os.environ)
    # Python's warnings would be megatron-core's, of the packages it could use and these do not need.
    line = ["-W", "ignore", "-m", f"training.interop.{module}", str(run.root.resolve()), *words]
    environment = {**child_environment(), "HF_HUB_OFFLINE": "1", **({} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"})}
    return subprocess.run(one_process(line, place=place), env=environment, check=False).returncode
