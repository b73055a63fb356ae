"""The processes of a small Slurm cluster, in a private folder: munged, slurmctld and a slurmd for each node.

Where namespaces are allowed (root, also in most containers) a node has its own hostname and its own processes, and dies whole.
Elsewhere nodes are addresses of this machine.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

# Jobs find the phidias of the environment that runs the tests; a user's PATH has no daemons.
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
BOOT_S = 30.0

# cred_expire is what a requeued job waits for; sched_interval what a new one waits for.
SLURM_CONF = """ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1024
EnforcePartLimits=ALL
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=4
ReturnToService=1
KillWait=5
MinJobAge=3600
TreeWidth=65533
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{settings}
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=7-0 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=7-0 State=UP PriorityTier=10 PreemptMode=OFF
"""
GRES_CONF = "AutoDetect=off\nName=gpu File={folder}/devices/nvidia[0-{last}]\n"


class Daemons:
    """A context manager. `env` is what a Slurm command needs to find the cluster, `nodes` the names of the nodes. `settings`
    are more lines for slurm.conf."""

    def __init__(self, *, nodes: int = 4, gpus: int = 8, cpus: int = 16, settings: str = "", namespaces: bool | None = None):
        self.namespaces = can_unshare() if namespaces is None else namespaces
        self._addresses = [f"127.0.0.{11 + number}" for number in range(nodes)]
        names = [f"n{number + 1}" for number in range(nodes)]
        self.nodes = tuple(names if self.namespaces else self._addresses)
        self._gpus, self._cpus, self._settings = gpus, cpus, settings
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket has 107 characters
        self.env = {**without_slurm(os.environ), "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process and removes the folder. Nothing is asked politely: nothing is to outlive the folder."""
        for name in list(self._running):
            self._stop(name)
        deadline = time.monotonic() + 10
        while (left := list(self.processes())) and time.monotonic() < deadline:
            self._kill(left)
            time.sleep(0.02)
        shutil.rmtree(self.folder, ignore_errors=True)

    def logs(self, *, lines: int) -> str:
        """The ends of what all daemons wrote."""
        return "\n".join(f"{path.name}:\n{tail(path, lines=lines)}" for path in sorted(self.folder.glob("*.out")))

    def _boot(self) -> None:
        self._write_files()
        sock, key = self.folder / "munge.sock", self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        own = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={sock}", "--num-threads=2", *own)
        self.until(sock.exists, what="munged")
        self._start_controller()
        for name in self.nodes:
            self._start_node(name)
        self._wait_idle(self.nodes)

    def _start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D", "-c")
        # A node that finds no controller tries again a second later.
        self.until(lambda: self._says("scontrol", "ping") is not None, what="slurmctld")

    def _write_files(self) -> None:
        folder, hosts = self.folder, zip(self._addresses, self.nodes, strict=True)
        folder.chmod(0o755)
        for name in ("devices", "state", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir()
        for number in range(self._gpus):
            (folder / "devices" / f"nvidia{number}").symlink_to("/dev/null")  # Slurm counts character devices alone
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "".join(f"{ip} {name}\n" for ip, name in hosts))
        (folder / "gres.conf").write_text(GRES_CONF.format(folder=folder, last=self._gpus - 1))
        (folder / "slurm.conf").write_text(self._configuration())

    def _configuration(self) -> str:
        host, (port, *ports) = os.uname().nodename, free_ports(1 + len(self.nodes))
        rest = f"CPUs={self._cpus} RealMemory=65536 Gres=gpu:{self._gpus} State=UNKNOWN"
        nodes = [
            f"NodeName={name} NodeHostname={name if self.namespaces else host} NodeAddr={address} Port={its_port} {rest}"
            for name, address, its_port in zip(self.nodes, self._addresses, ports, strict=True)
        ]
        user = pwd.getpwuid(os.getuid()).pw_name
        values = dict(folder=self.folder, host=host, port=port, user=user, settings=self._settings, nodes="\n".join(nodes))
        return SLURM_CONF.format(**values)

    def _start(self, name: str, *command: str) -> None:
        # The kernel ends it where the tests themselves are killed; a session of its own keeps Ctrl-C for pytest.
        line = ["setpriv", "--pdeathsig=KILL", *command]
        with (self.folder / f"{name}.out").open("ab") as log:
            self._running[name] = subprocess.Popen(
                line, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _start_node(self, name: str) -> None:
        become = f'hostname {name} && mount --bind "{self.folder}/hosts" /etc/hosts && exec "$@"'
        around = [*NAMESPACES, "sh", "-c", become, "-"] if self.namespaces else []
        self._start(name, *around, "env", f"LAB_NODE={name}", "slurmd", "-D", "-N", name)

    def _stop(self, name: str) -> None:
        daemon = self._running.pop(name)
        daemon.kill()
        daemon.wait()

    def _kill(self, processes: Iterable[int]) -> None:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, *marks: str) -> Iterator[int]:
        """What runs here: daemons and jobs carry our SLURM_CONF in their environment. With marks, those that carry one of them,
        `NAME=value\\0`, or `NAME=` for any value."""
        ours = f"\0SLURM_CONF={self.folder}/slurm.conf\0"
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended, or belongs to another user
                found = "\0" + path.read_bytes().decode(errors="replace")
                if ours in found and (not marks or any(f"\0{mark}" in found for mark in marks)):
                    yield int(path.parent.name)

    def _says(self, *command: str) -> str | None:
        """What a Slurm command prints; None where it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else None

    def _wait_idle(self, nodes: Sequence[str]) -> None:
        command = ("sinfo", "--noheader", "--Node", "--partition=low", f"--nodes={','.join(nodes)}", "--format=%t")
        self.until(lambda: (self._says(*command) or "").split() == ["idle"] * len(nodes), what="the nodes")

    def until(self, true: Callable[[], bool], *, what: str) -> None:
        deadline = time.monotonic() + BOOT_S
        while not true():
            dead = [name for name, daemon in self._running.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not come up; {', '.join(dead) or 'nothing'} ended\n{self.logs(lines=15)}")
            time.sleep(0.02)


def missing_programs() -> list[str]:
    """What this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def can_unshare() -> bool:
    return os.getuid() == 0 and subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0


def without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The tests may run inside a job, or where a site sets options of sbatch."""
    return {name: value for name, value in environment.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}


def free_ports(count: int) -> list[int]:
    """Held all at once, so that they are different ones."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def tail(path: Path, *, lines: int) -> str:
    text = path.read_text(errors="replace") if path.is_file() else ""
    return "\n".join(text.splitlines()[-lines:])
