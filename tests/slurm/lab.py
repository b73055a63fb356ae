"""A real Slurm cluster for a test, gone afterwards. Every node claims sixteen cores and eight GPUs (links to /dev/null): jobs
are placed, given CUDA_VISIBLE_DEVICES, signalled, preempted (`low` by `high`) and requeued as on a cluster.

    with SlurmLab() as slurm:
        job = slurm.submit(["sbatch", "--array=0-3", "job.sh"])
        slurm.wait(job, "COMPLETED")
"""

import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.slurm.daemons import Daemons, tail

ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"})
POLL_S = 0.1


class Job(NamedTuple):
    """A job, or an element of an array; elements that wait are one, `7_0-3`. `fields`: all that scontrol says of it."""

    id: str
    state: str
    exit_code: int
    signal: int
    node: str
    restarts: int
    output: Path
    fields: dict[str, str]


class SlurmLab(Daemons):
    """The cluster, and what a test does with it."""

    def run(self, *command: str, code: int = 0, cwd: Path | None = None) -> str:
        """A command, of Slurm's or one that calls them; what it prints. It works in the lab's own folder by default."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, cwd=cwd or self.folder)
        assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}\n{self.log()}"
        return done.stdout

    def submit(self, command: Sequence[str], *, cwd: Path | None = None) -> str:
        """`sbatch ...`; the job id."""
        return self.run(command[0], "--parsable", *command[1:], cwd=cwd).strip().partition(";")[0]

    def jobs(self, job: str = "") -> list[Job]:
        """All jobs, or those of one id: an array has several."""
        return parse_jobs(self.run(*show(job)))

    def wait(self, job: str, *states: str, timeout: float = 60.0) -> list[Job]:
        """Until each element is in one of the states; any end by default. Fails at once where one has ended otherwise."""
        wanted, deadline = frozenset(states) or ENDED, time.monotonic() + timeout
        while other := {one.state for one in self.jobs(job)} - wanted:
            over = other & ENDED or time.monotonic() > deadline
            assert not over, f"job {job} is not {' or '.join(sorted(wanted))}\n{self.log(job)}"
            time.sleep(POLL_S)
        return self.jobs(job)

    def kill_node(self, name: str, *, noticed: bool = True) -> None:
        """Power off, with all that runs there. `noticed` tells slurmctld, which takes half a minute to see it by itself."""
        self._stop(name)
        self._kill(self.processes(f"LAB_NODE={name}\0", f"SLURMD_NODENAME={name}\0"))
        if noticed:
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def start_node(self, name: str) -> None:
        """A node that was killed comes back."""
        self._start_node(name)
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self._wait_idle([name])

    def reset(self) -> None:
        """As after the boot, for the next test: no jobs, all nodes up and idle."""
        if left := [job.id for job in self.jobs() if job.state not in ENDED]:
            self._says("scancel", *left)
            self._kill(self.processes("SLURM_JOB_ID="))  # those that ignore SIGTERM take KillWait
        for name in set(self.nodes) - set(self._running):
            self.start_node(name)
        self._wait_idle(self.nodes)

    def log(self, job: str = "", *, lines: int = 15) -> str:
        """For a message: the jobs and what they wrote, and what slurmctld did with them."""
        found = parse_jobs(self._says(*show(job)) or "")
        parts = [f"{one.id} {one.state} {one.exit_code}:{one.signal}\n{tail(one.output, lines=lines)}" for one in found]
        return "\n".join([*parts, "slurmctld:", tail(self.folder / "slurmctld.log", lines=lines)])


def show(job: str) -> list[str]:
    return ["scontrol", "--oneliner", "show", "job", *filter(None, [job])]


def parse_jobs(text: str) -> list[Job]:
    return [parse_job(line) for line in text.splitlines() if line.startswith("JobId=")]


def parse_job(line: str) -> Job:
    """A line of `scontrol --oneliner show job`. Values may hold spaces and `=`; names begin with a capital after a space."""
    fields = dict(re.findall(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)", line.strip()))
    array, number = fields.get("ArrayJobId"), fields.get("ArrayTaskId")
    code, _, signal = fields["ExitCode"].partition(":")
    return Job(
        id=f"{array}_{number}" if array else fields["JobId"],
        state=fields["JobState"],
        exit_code=int(code),
        signal=int(signal),
        node=fields.get("NodeList", ""),
        restarts=int(fields.get("Restarts", 0)),
        output=Path(fields.get("StdOut", "")),
        fields=fields,
    )
