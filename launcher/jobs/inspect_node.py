"""What a node finds when it looks at itself: its GPUs, its InfiniBand ports, its clock, and the folder of the run.

    python -I -S inspect_node.py <run directory> <token> [<sysfs>]

Stands alone, and imports nothing but a few modules of Python, so that it starts in an instant on hundreds of nodes. One short
JSON row for each GPU and each port, then the row with the rest: srun mixes the output of nodes within lines of more than a
kilobyte. launcher/jobs/nodes.py puts the rows together and judges them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FIELDS = (
    "index", "name", "memory.total", "memory.free", "driver_version", "clocks.max.sm",
    "ecc.errors.uncorrected.volatile.total", "uuid",
)  # fmt: skip
# One thing under its name of today, and of drivers before 535; some devices have neither.
SLOWDOWN = ("clocks_event_reasons.hw_slowdown", "clocks_throttle_reasons.hw_slowdown")
UNKNOWN_FIELD = "not a valid field"
SMI_S = 20.0
TOKEN_S = 20.0
POLL_S = 0.2
# Processes are worth naming from here on.
USED_MIB = 1024
TEXT = 200  # characters of a message, so that a row stays short


class SmiError(Exception):
    """nvidia-smi is not there, failed, or hangs."""


def main(run_dir: str, token: str, sysfs: str = "/sys") -> None:
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    gpus, error = list[dict[str, Any]](), None
    try:
        gpus = read_gpus()
    except SmiError as raised:
        error = str(raised)[:TEXT]
    ports = read_ports(Path(sysfs))
    for gpu in gpus:
        print(json.dumps({"node": node, "gpu": gpu}))
    for port in ports:
        print(json.dumps({"node": node, "port": port}))
    sees, write_error = look_at_folder(Path(run_dir, ".nodes"), token=token, node=node)
    rest = {"num_gpus": len(gpus), "num_ports": len(ports), "gpu_error": error, "sees_token": sees, "write_error": write_error}
    # The time last: what lies between it and the row's arrival is all that disturbs the comparison of clocks.
    print(json.dumps({"node": node, **rest, "free_bytes": free_bytes(run_dir), "time": time.time()}), flush=True)


def read_gpus(*, timeout_s: float = SMI_S) -> list[dict[str, Any]]:
    """Every GPU that nvidia-smi lists, memory in MiB, clocks in MHz; null where the device does not say. SmiError."""
    for slowdown in (*SLOWDOWN, None):
        fields = [*FIELDS, slowdown] if slowdown else list(FIELDS)
        code, said = ask_smi(f"--query-gpu={','.join(fields)}", timeout_s=timeout_s)
        if code == 0:
            break
        if UNKNOWN_FIELD not in said:
            raise SmiError(f"nvidia-smi ended with {code}: {said.strip()}")
    else:
        raise SmiError(f"nvidia-smi: {said.strip()}")
    gpus = [read_gpu(line) for line in said.splitlines() if line.strip()]
    used = any((gpu["memory_mib"] or 0) - (gpu["free_mib"] or 0) > USED_MIB for gpu in gpus)
    holders = read_processes(timeout_s=timeout_s) if used else {}
    for gpu in gpus:
        gpu["processes"] = holders.get(gpu.pop("uuid"), [])
    return gpus


def read_gpu(line: str) -> dict[str, Any]:
    """One row of nvidia-smi's. SmiError where it is none."""
    values = [value.strip() for value in line.split(",")]
    if len(values) < len(FIELDS):
        raise SmiError(f"nvidia-smi said: {line}")
    index, name, total, free, driver, clock, errors, uuid, *slowed = values
    return {
        "index": number(index), "name": name, "memory_mib": number(total), "free_mib": number(free), "driver": driver,
        "max_sm_mhz": number(clock), "ecc_errors": number(errors), "uuid": uuid,
        "slowed": {"Active": True, "Not Active": False}.get(slowed[0]) if slowed else None,
    }  # fmt: skip


def read_processes(*, timeout_s: float) -> dict[str, list[str]]:
    """What runs on GPUs, by their uuid; empty where nvidia-smi does not say: this only adds to a message."""
    try:
        code, said = ask_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory", timeout_s=timeout_s)
    except SmiError:
        return {}
    holders: dict[str, list[str]] = {}
    for values in (line.split(",") for line in said.splitlines() if code == 0):
        if len(values) >= 4 and len(holders.setdefault(values[0].strip(), [])) < 3:
            pid, name, used = values[1].strip(), ",".join(values[2:-1]).strip()[-60:], values[-1].strip()
            holders[values[0].strip()].append(f"{name} (pid {pid}, {used} MiB)")
    return holders


def ask_smi(query: str, *, timeout_s: float) -> tuple[int, str]:
    """Exit code and output. SmiError where it does not start or does not end. One that hangs in the driver cannot be killed:
    it is left behind."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    except OSError as error:
        raise SmiError(f"nvidia-smi does not start: {error.strerror}") from error
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        raise SmiError(f"nvidia-smi did not end in {timeout_s:g} s") from error
    return process.returncode, said.decode(errors="replace")


def number(text: str) -> int | None:
    """None for [N/A], [Not Supported] and their like."""
    try:
        return int(float(text))
    except ValueError:
        return None


def read_ports(sysfs: Path) -> list[dict[str, str]]:
    """Every port of every InfiniBand or RoCE adapter: `rate` as the kernel writes it, "400 Gb/sec (4X NDR)"."""
    return [
        {"name": f"{port.parts[-3]}/{port.name}", **{name: read_line(port / name) for name in ("state", "rate", "link_layer")}}
        for port in sorted(sysfs.glob("class/infiniband/*/ports/*"))
    ]


def read_line(path: Path) -> str:
    try:
        with path.open() as file:
            return file.readline().strip()[:TEXT]
    except (OSError, ValueError):
        return ""


def look_at_folder(folder: Path, *, token: str, node: str, timeout_s: float = TOKEN_S) -> tuple[bool, str | None]:
    """Whether this node sees what another one wrote, and why it cannot write there itself, if it cannot."""
    deadline = time.monotonic() + timeout_s
    while True:
        # An NFS client may keep an old listing for a minute; what it writes itself makes it ask again.
        error = write_error(folder / f"{token}.{node}")
        sees = read_line(folder / token) == token
        if (sees and error is None) or time.monotonic() > deadline:
            return sees, error
        time.sleep(POLL_S)


def write_error(path: Path) -> str | None:
    """Writes a file and removes it; what went wrong, if it did."""
    try:
        with path.open("w") as file:
            file.write("x\n")
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
    except OSError as error:
        return str(error)[-TEXT:]
    return None


def free_bytes(run_dir: str) -> int | None:
    """Of the file system, for one who is not root."""
    try:
        disk = os.statvfs(run_dir)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


if __name__ == "__main__":
    main(*sys.argv[1:])
