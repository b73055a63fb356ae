"""Slurm's commands: called with values only, never through a shell."""

import re
import subprocess
import time
from collections.abc import Sequence

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster
from launcher.rundir.code import child_environment

# How long a controller may not answer before a job gives up.
INSIST_S = 600.0
AWAY = re.compile(r"contact|timed? ?out|connect|socket|temporar|try again", re.IGNORECASE)
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


def insist(*command: str) -> str:
    """What a Slurm command says, asked again while the controller does not answer: a job that gives up then is lost time.
    ConfigError where it never does, and at once where it answers with a refusal."""
    deadline = time.monotonic() + INSIST_S
    while True:
        try:
            return slurm_says(*command)
        except ConfigError as error:
            if time.monotonic() > deadline or not AWAY.search(str(error)):
                raise
            time.sleep(5)


def show_job(number: int) -> dict[str, str]:
    """All that scontrol says of the job of that number: of an array that is one element, or what is left of it."""
    lines = [parse_fields(line) for line in insist("scontrol", "--oneliner", "show", "job", str(number)).splitlines()]
    return next((fields for fields in lines if fields.get("JobId") == str(number)), {})


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
        return subprocess.run(command, capture_output=True, text=True, check=True, env=without_job(child_environment()))
    except FileNotFoundError as error:
        raise ConfigError(no_sbatch()) from error
    except subprocess.CalledProcessError as error:
        if error.returncode == 127:  # of `env`, which found none
            raise ConfigError(no_sbatch()) from error
        found = f"sbatch said: {error.stderr.strip()}"
        fix = "correct cluster.*; `sinfo` shows partitions"
        raise ConfigError(Problem("cluster", found, "Slurm takes the job", fix)) from error


def without_job(environment: dict[str, str]) -> dict[str, str]:
    """Without what Slurm says of the job we are in: sbatch would hand it on, and the new job take it for its own."""
    return {name: value for name, value in environment.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def no_sbatch() -> Problem:
    rule = "jobs are submitted by sbatch of this machine"
    return Problem("cluster", "no sbatch on the PATH", rule, "log in where jobs are submitted")
