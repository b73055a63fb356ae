"""The local executor: torchrun on this machine, one stage after another, watched from the run directory.

Ctrl-C raises the stop flag: the ranks finish their step, save and exit. A second Ctrl-C ends them at once.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster, RunConfig
from launcher.report.live import LiveView
from launcher.rundir.exits import ExitClass
from launcher.rundir.lock import lock_run
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records

SOURCE_ROOT = Path(__file__).resolve().parents[2]
REFRESH_S = 0.2


def train(run: RunDir, config: RunConfig) -> ExitClass:
    """Trains every selected stage that is not done. Returns the exit class of the first that did not end well, else DONE."""
    refuse_port_in_use(config.cluster)
    with lock_run(run) as lock, LiveView(run, config, config.monitor.console) as view:
        run.stop_flag.unlink(missing_ok=True)
        append_record(run.events, "start", command=sys.argv, pid=os.getpid())
        for stage in config.stage_names:
            if stage_is_done(run, config, stage):
                view.note(f"{stage}: done already")
                continue
            ended = run_stage(run, config, stage=stage, lock=lock, view=view)
            if ended is not ExitClass.DONE:
                return ended
    return ExitClass.DONE


def stage_is_done(run: RunDir, config: RunConfig, stage: str) -> bool:
    """Whether the stage has a checkpoint at its end; a raised token horizon makes an ended stage go on."""
    from launcher.plan.stage import plan_stage

    samples = plan_stage(config.stage(stage), cluster=config.cluster).num_samples
    rows = read_records(run.checkpoints(stage) / "index.jsonl")
    return any(row["finished"] and row["samples"] >= samples for row in rows)


def run_stage(run: RunDir, config: RunConfig, *, stage: str, lock: int, view: LiveView) -> ExitClass:
    """Starts torchrun for one stage and waits for its end."""
    run.logs.mkdir(exist_ok=True)
    log_path = run.logs / f"{stage}.log"
    num_events = sum(1 for _ in read_records(run.events))
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            torchrun_command(run, cluster=config.cluster, stage=stage),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=rank_environment(config.cluster),
            start_new_session=True,  # Ctrl-C reaches this process alone, which asks the ranks to save
            pass_fds=[lock],  # the run stays locked while any rank lives, even if this process is killed
        )
        with ask_on_interrupt(run, process, view):
            while process.poll() is None:
                view.refresh()
                time.sleep(REFRESH_S)
        view.refresh()
    ended, error = how_it_ended(run, stage, skip=num_events, code=process.returncode)
    if error:
        view.note(f"{stage}: {error}\n  log: {log_path}")
    return ended


def torchrun_command(run: RunDir, *, cluster: Cluster, stage: str) -> list[str]:
    """torchrun's own rendezvous takes a free port unless the cluster names one."""
    port = cluster.master_port or 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={cluster.gpus_per_node}"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=0"]
    return [*torchrun, *rendezvous, "-m", "training", str(run.root), f"--stage={stage}"]


def rank_environment(cluster: Cluster) -> dict[str, str]:
    """This environment, with Phidias importable from where it stands, no `training/` of the working directory, and the
    cores shared out between the ranks."""
    threads = max(1, (os.cpu_count() or 1) // cluster.gpus_per_node)
    path = os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return {**os.environ, **ours, **cluster.env}


@contextmanager
def ask_on_interrupt(run: RunDir, process: "subprocess.Popen[bytes]", view: LiveView) -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM ask the ranks to save and stop; the second one kills them."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) == 1:
            run.stop_flag.touch()
            view.note("stopping: the ranks save after this step (again to end them at once)")
        else:
            os.killpg(process.pid, signal.SIGKILL)

    before = {kind: signal.signal(kind, ask) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def how_it_ended(run: RunDir, stage: str, *, skip: int, code: int) -> tuple[ExitClass, str | None]:
    """The exit class the ranks wrote, and the first fault's message. Without a word from them: a fault that may be retried."""
    rows = [row for row in list(read_records(run.events))[skip:] if row.get("stage") == stage]
    if fault := next((row for row in rows if row["kind"] == "fault"), None):
        return ExitClass[fault["exit"]], f"rank {fault['rank']}: {fault['error']}"
    if ending := next((row for row in rows if row["kind"] in ("stop", "stage_done")), None):
        return ExitClass[ending["exit"]], None
    return ExitClass.RETRYABLE, f"the ranks ended with code {code} and without a cause"


def refuse_port_in_use(cluster: Cluster) -> None:
    if cluster.master_port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", cluster.master_port))
        except OSError as error:
            fix = "cluster.master_port=null takes a free one"
            found = f"port {cluster.master_port}, which another process is using"
            raise ConfigError(Problem("cluster.master_port", found, "the rendezvous needs a free port", fix)) from error
