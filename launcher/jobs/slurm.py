"""Slurm's commands: called with values only, never through a shell."""

import re
import subprocess
from collections.abc import Sequence

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster
from launcher.rundir.code import child_environment

# `Name=value Name=value`: values may hold spaces and `=`; names begin with a capital after a space.
FIELD = re.compile(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)")


def slurm_says(*command: str) -> str:
    """ConfigError where Slurm's command fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        found, fix = f"`{' '.join(command)}`: {said}", "see `sinfo` and `squeue`"
        raise ConfigError(Problem("cluster", found, "Slurm must answer", fix)) from error


def parse_fields(line: str) -> dict[str, str]:
    """A line of `scontrol --oneliner show job`."""
    return dict(FIELD.findall(line.strip()))


def duration_s(text: str) -> int | None:
    """Seconds of a time as Slurm writes it: minutes, `m:s`, `h:m:s`, `days-h`, `days-h:m` or `days-h:m:s`. None of anything
    else: UNLIMITED, for one."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, rest = [*numbers, 0, 0][:3]
    else:
        hours, minutes, rest = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def site_flags(cluster: Cluster, *, on_cpus: bool = False) -> list[str]:
    """What a site wants to know of every job. `on_cpus`: of one that needs no GPU."""
    partition = (cluster.cpu_partition if on_cpus else None) or cluster.partition
    given = {"partition": partition, "account": cluster.account, "time": cluster.time_limit}
    return [*(f"--{flag}={value}" for flag, value in given.items() if value), *cluster.sbatch_options]


def run_sbatch(command: Sequence[str]) -> str:
    """Submits; the job id. ConfigError where Slurm is not here, or refuses."""
    return sbatch_says(command).stdout.strip().partition(";")[0]


def try_sbatch(command: Sequence[str]) -> str:
    """What Slurm says of a job that it is not given yet: when it would start. ConfigError where it would refuse it."""
    place = list(command).index("sbatch") + 1
    return sbatch_says([*command[:place], "--test-only", *command[place:]]).stderr.strip()


def sbatch_says(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=child_environment())
    except FileNotFoundError as error:
        raise ConfigError(no_sbatch()) from error
    except subprocess.CalledProcessError as error:
        if error.returncode == 127:  # of `env`, which found none
            raise ConfigError(no_sbatch()) from error
        found = f"sbatch said: {error.stderr.strip()}"
        fix = "correct cluster.*; `sinfo` shows partitions"
        raise ConfigError(Problem("cluster", found, "Slurm takes the job", fix)) from error


def no_sbatch() -> Problem:
    rule = "jobs are submitted by sbatch of this machine"
    return Problem("cluster", "no sbatch on the PATH", rule, "log in where jobs are submitted")
