"""Whether the nodes of a job are fit for its ranks: each looks at itself (inspect_node.py), then they are measured together
(training.bandwidth), and what they say is judged by `cluster.checks` (node_rules.py).
"""

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from launcher.config.schema import Cluster, NodeChecks
from launcher.jobs.node_rules import NodeFault, Report, judge_bandwidth, judge_reports, summary
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json

INSPECT = Path(__file__).with_name("inspect_node.py")
# What the inspection may take on a node: nvidia-smi and the shared folder 20 s each, and what srun needs.
INSPECT_S = 60.0
# From srun to the first line of a program, and to a world of ranks that have all imported torch, on hundreds of nodes at once.
CONTAINER_S = 300.0
TORCH_S = 150.0
# Slurm's KillWait is half a minute: until then srun is ending its tasks.
KILL_S = 35.0

# `step(words, nodes=[...], tasks_per_node=1)`: the command that runs Python with `words` on these nodes.
Step = Callable[..., list[str]]


@dataclass(frozen=True)
class Health:
    """`healthy`: nodes that answered and have no fault. `problem`: what no node is to blame for, `may_pass` where
    another try may do. `figures`: for the event."""

    healthy: tuple[str, ...]
    faults: tuple[NodeFault, ...]
    problem: str | None
    figures: Mapping[str, Any]
    may_pass: bool = False


def check_nodes(
    run: RunDir,
    cluster: Cluster,
    *,
    nodes: Sequence[str],
    step: Step,
    environment: Mapping[str, str],
    inspect: Path = INSPECT,
) -> Health:
    """Inspects the nodes, and measures those that passed where the cluster sets a figure. What the steps say goes to nodes.log.
    Ends in time whatever a node does."""
    folder, token = run.root / ".nodes", secrets.token_hex(8)
    try:
        run.logs.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        (folder / token).write_text(token)
    except OSError as error:
        return Health((), (), f"{run.root} cannot be written: {error}", {})
    steps = Steps(step=step, environment=environment, log_path=run.logs / "nodes.log")
    try:
        return examine(run, cluster, nodes=nodes, steps=steps, token=token, inspect=inspect)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def examine(run: RunDir, cluster: Cluster, *, nodes: Sequence[str], steps: "Steps", token: str, inspect: Path) -> Health:
    began = time.monotonic()
    start_s = CONTAINER_S if cluster.container else 0.0
    words = ["-I", "-S", str(inspect), str(run.root.resolve()), token]  # -I: nothing of this folder hides a module of Python's
    lines, _ = steps.run(words, nodes=nodes, tasks_per_node=1, limit_s=start_s + INSPECT_S)
    reports = read_reports(lines)
    seen = judge_reports(reports, nodes=nodes, cluster=cluster)
    healthy = without([node for node in nodes if node in reports], seen.faults)
    figures = {"inspect_s": round(time.monotonic() - began, 1), "nodes": {name: summary(row) for name, row in reports.items()}}
    if seen.problem or not healthy or not to_be_measured(cluster.checks):
        return Health(healthy, seen.faults, seen.problem, figures, may_pass=not reports)  # nobody answered: Slurm's fault
    # The first of the job's nodes, where ranks would meet, may be one that failed.
    rendezvous = {"MASTER_ADDR": healthy[0]} if steps.environment.get("MASTER_ADDR") in nodes else {}
    measured = measure(run, cluster, nodes=healthy, steps=steps, token=token, rendezvous=rendezvous)
    if isinstance(measured, str):
        return Health(healthy, seen.faults, measured, figures, may_pass=True)
    found = judge_bandwidth(measured, nodes=healthy, cluster=cluster)
    figures["bandwidth"] = measured
    return Health(without(healthy, found.faults), (*seen.faults, *found.faults), found.problem, figures)


def to_be_measured(checks: NodeChecks | None) -> bool:
    """CPU ranks too, over gloo, where their cluster sets a figure."""
    return checks is not None and any((checks.gemm_tflops, checks.node_all_reduce_gb_per_s, checks.all_reduce_gb_per_s))


def measure(
    run: RunDir, cluster: Cluster, *, nodes: Sequence[str], steps: "Steps", token: str, rendezvous: Mapping[str, str]
) -> Report | str:
    """What training.bandwidth wrote, or why it wrote nothing."""
    assert cluster.checks is not None
    result = run.root.resolve() / ".nodes" / f"{token}.json"
    kind = "cuda" if cluster.gpu else "cpu"
    steps = replace(steps, environment={**steps.environment, **rendezvous})
    words = ["-m", "training.bandwidth", str(result), f"--max-s={cluster.checks.max_s}", f"--device={kind}"]
    limit_s = (CONTAINER_S if cluster.container else 0.0) + TORCH_S + cluster.checks.max_s
    _, ended = steps.run(words, nodes=nodes, tasks_per_node=cluster.gpus_per_node, limit_s=limit_s)
    try:
        measured = read_json(result)
    except (OSError, ValueError):
        return f"the nodes were not measured: {ended}; see {steps.log_path}"
    return measured if isinstance(measured, dict) else f"{result} holds no figures"


def without(nodes: Iterable[str], faults: Iterable[NodeFault]) -> tuple[str, ...]:
    faulty = {fault.node for fault in faults}
    return tuple(node for node in nodes if node not in faulty)


def read_reports(lines: Iterable[tuple[float, str]]) -> dict[str, dict[str, Any]]:
    """The report of each node that gave all of it, from rows of inspect_node.py and when they arrived. Other lines are none,
    and a node that was asked twice has its GPUs once."""
    parts, reports = dict[tuple[str, str], dict[Any, Any]](), dict[str, dict[str, Any]]()
    for arrived, line in lines:
        row = parse_row(line)
        node = str(row.get("node"))
        if isinstance(gpu := row.get("gpu"), dict):
            parts.setdefault((node, "gpus"), {})[gpu.get("index")] = gpu
        elif isinstance(port := row.get("port"), dict):
            parts.setdefault((node, "ports"), {})[port.get("name")] = port
        elif {"num_gpus", "num_ports", "time"} <= row.keys():
            reports[node] = {**row, "arrived": arrived}
    for node, report in reports.items():
        report |= {kind: list(parts.get((node, kind), {}).values()) for kind in ("gpus", "ports")}
    return {
        node: row for node, row in reports.items() if all(len(row[kind]) == row[f"num_{kind}"] for kind in ("gpus", "ports"))
    }


def parse_row(line: str) -> dict[str, Any]:
    """Empty where the line is no row. srun may have put the number of the task before it."""
    try:
        row = json.loads(line[max(line.find("{"), 0) :])
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


@dataclass(frozen=True)
class Steps:
    """Commands on nodes, each with an end in time."""

    step: Step
    environment: Mapping[str, str]
    log_path: Path

    def run(
        self, words: Sequence[str], *, nodes: Sequence[str], tasks_per_node: int, limit_s: float
    ) -> tuple[list[tuple[float, str]], str]:
        """Lines of its output with the time of their arrival, and how it ended; all it says is in the log as well."""
        command = self.step(list(words), nodes=list(nodes), tasks_per_node=tasks_per_node)
        lines: list[tuple[float, str]] = []
        with self.log_path.open("a", buffering=1) as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n")
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace",
                    env=dict(self.environment), start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{error}\n")
                return [], str(error)
            ended = await_end(process, lines=lines, log=log, limit_s=limit_s)
            log.write(f"{ended}\n")
        return lines, ended


def await_end(process: "subprocess.Popen[str]", *, lines: list[tuple[float, str]], log: IO[str], limit_s: float) -> str:
    """Collects its lines; ends it at the limit, and where this process is interrupted."""

    def collect() -> None:
        assert process.stdout is not None
        with suppress(ValueError):  # the log is closed: a task that nobody can end still holds the pipe
            for line in process.stdout:
                lines.append((time.time(), line))
                log.write(line)

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    try:
        process.wait(limit_s)
        ended = f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"did not end in {limit_s:g} s"
    finally:
        end(process)
        reader.join(5.0)
    return ended


def end(process: "subprocess.Popen[str]") -> None:
    """SIGTERM makes srun end its tasks, on every node that can; then it is not waited for any longer."""
    if process.poll() is not None:
        return
    for kind, wait_s in ((signal.SIGTERM, KILL_S), (signal.SIGKILL, 1.0)):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, kind)
            process.wait(wait_s)
