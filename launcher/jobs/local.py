"""The local executor: torchrun on this machine. Ctrl-C has the ranks save; a second Ctrl-C ends them at once. Ranks that a
fault ended are started again as long as the policy says so."""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster, RunConfig
from launcher.jobs.policy import fruitless_starts, judge
from launcher.jobs.stages import Ranks, signals_collected, train_stages, wait_before_restart
from launcher.rundir.code import child_environment
from launcher.rundir.exits import ExitClass
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records
from launcher.rundir.stop import lower_flag

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def train(run: RunDir, config: RunConfig) -> ExitClass:
    """Trains every selected stage that is not done, on this machine, through faults that may pass. Returns the exit class of
    the first that did not end well, else DONE."""
    refuse_port_in_use(config.cluster)
    ranks = Ranks(
        command=lambda stage: torchrun_command(run, cluster=config.cluster, stage=stage),
        environment=rank_environment(config.cluster),
        signals=SIGNALS,
        second_ends=True,
    )
    lower_flag(run)
    append_record(run.events, "asked", by="train")  # a person has looked: what was in vain before counts no more
    with signals_collected(SIGNALS) as asked:  # between two starts too
        while True:
            ended = train_stages(run, config, ranks=ranks, asked=asked)
            events = list(read_records(run.events))
            if not goes_on(run, config.cluster, ended=ended, events=events, asked=asked):
                return ended
            wait_before_restart(run, in_vain=fruitless_starts(events), asked=asked)
            if is_asked(run, asked=asked):
                return ExitClass.INTERRUPTED


def goes_on(run: RunDir, cluster: Cluster, *, ended: ExitClass, events: Sequence[dict[str, Any]], asked: Sequence[int]) -> bool:
    """Whether the ranks are started again, recorded as a job's is. There is no queue here to go back to."""
    verdict = judge(ended, events=events, restarts=cluster.restarts)
    again = verdict.after == "restart" and not is_asked(run, asked=asked)
    append_record(run.events, "job_end", job=None, exit=ended.name, after="restart" if again else "end", reason=verdict.reason)
    if again:
        print(f"{run.name}: ended as {ended.name}; its ranks are started again", flush=True)
    elif verdict.reason and cluster.restarts:
        print(f"{run.name}: ended as {ended.name}; not started again: {verdict.reason}", flush=True)
    return again


def is_asked(run: RunDir, *, asked: Sequence[int]) -> bool:
    """Whether someone wants it to end."""
    return bool(asked) or run.stop_flag.exists()


def torchrun_command(run: RunDir, *, cluster: Cluster, stage: str, flags: Sequence[str] = ()) -> list[str]:
    """torchrun's own rendezvous takes a free port unless the cluster names one. `flags`: of the ranks."""
    port = cluster.master_port or 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={cluster.gpus_per_node}"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=0"]
    return [*torchrun, *rendezvous, "-m", "training", str(run.root), f"--stage={stage}", *flags]


def rank_environment(cluster: Cluster) -> dict[str, str]:
    """The environment of a rank of this machine: the cores shared out between the ranks, and what the cluster sets."""
    return {**child_environment(), **rank_settings(cluster, cores=(os.cpu_count() or 1) // cluster.gpus_per_node)}


def rank_settings(cluster: Cluster, *, cores: int) -> dict[str, str]:
    """What a rank with so many cores finds in its environment, wherever it runs."""
    ours = {"OMP_NUM_THREADS": str(max(1, cores)), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if cluster.gpu is None:
        ours["CUDA_VISIBLE_DEVICES"] = ""  # CPU ranks were asked for, also where there are GPUs
    else:
        # Segments that grow leave little unused between tensors of many sizes; CUDA graphs then want NCCL not to register them.
        ours |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "0"}
    return {**ours, **cluster.env}


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
