"""The local executor: torchrun on this machine. Ctrl-C has the ranks save; a second Ctrl-C ends them at once."""

import os
import signal
import socket
import sys

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster, RunConfig
from launcher.jobs.stages import Ranks, lower_flag, train_stages
from launcher.rundir.code import child_environment
from launcher.rundir.exits import ExitClass
from launcher.rundir.paths import RunDir


def train(run: RunDir, config: RunConfig) -> ExitClass:
    """Trains every selected stage that is not done, on this machine. Returns the exit class of the first that did not end well,
    else DONE."""
    refuse_port_in_use(config.cluster)
    ranks = Ranks(
        command=lambda stage: torchrun_command(run, cluster=config.cluster, stage=stage),
        environment=rank_environment(config.cluster),
        signals=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
        second_ends=True,
    )
    lower_flag(run)
    return train_stages(run, config, ranks=ranks, asked=[])


def torchrun_command(run: RunDir, *, cluster: Cluster, stage: str) -> list[str]:
    """torchrun's own rendezvous takes a free port unless the cluster names one."""
    port = cluster.master_port or 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={cluster.gpus_per_node}"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=0"]
    return [*torchrun, *rendezvous, "-m", "training", str(run.root), f"--stage={stage}"]


def rank_environment(cluster: Cluster) -> dict[str, str]:
    """The environment of a rank of this machine: the cores shared out between the ranks, and what the cluster sets."""
    return {**child_environment(), **rank_settings(cluster, cores=(os.cpu_count() or 1) // cluster.gpus_per_node)}


def rank_settings(cluster: Cluster, *, cores: int) -> dict[str, str]:
    """What a rank with so many cores finds in its environment, wherever it runs."""
    ours = {"OMP_NUM_THREADS": str(max(1, cores)), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if cluster.gpu is None:
        ours["CUDA_VISIBLE_DEVICES"] = ""  # CPU ranks were asked for, also where there are GPUs
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
