"""Rewriting a checkpoint for any layout, on this machine: as many ranks as its layout has parts of the model."""

import os
import subprocess
from contextlib import suppress
from dataclasses import replace

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import Cluster, RunConfig
from launcher.jobs.local import rank_environment, torchrun_command
from launcher.jobs.stages import end_ranks, how_it_ended
from launcher.rundir.checkpoints import FULLY_RESHARDABLE, Saved, newest_checkpoint, undo_replacing
from launcher.rundir.exits import ExitClass, RunStateError
from launcher.rundir.lock import lock_run
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records
from launcher.rundir.reshard import describe_key, reshard_key, unlike

SMI_S = 60.0


def convert_newest(run: RunDir, config: RunConfig, *, stage: str) -> ExitClass:
    """Rewrites the newest checkpoint of a stage as fully_reshardable, in its own place. Says so where there is nothing to do.

    ConfigError where the GPUs for it are not here, RunStateError where the run is live."""
    with lock_run(run) as lock:
        undo_replacing(run)
        saved, refused = newest_checkpoint(run, stage)
        for reason in refused:
            print(f"{stage}: passed over: {reason}")
        if saved is None or saved.meta.sharding == FULLY_RESHARDABLE:
            print(f"{stage}: {f'any layout can go on from {saved.path.name} already' if saved else 'no checkpoint'}")
            return ExitClass.DONE
        refuse_another_layout(run, config, saved=saved)
        cluster = cluster_for(config, stage=stage)
        refuse_missing_gpus(run, cluster, stage=stage)
        print(f"{stage}: {saved.path.name} is rewritten for any layout by {cluster.world_size} ranks", flush=True)
        return rewrite(run, cluster, saved=saved, lock=lock)


def cluster_for(config: RunConfig, *, stage: str) -> Cluster:
    """This machine with the fewest ranks that hold the model in this layout, each part of it once."""
    layout = config.stage(stage).layout
    return replace(config.cluster, kind="local", num_nodes=1, gpus_per_node=layout.tp * layout.pp, master_port=None)


def refuse_another_layout(run: RunDir, config: RunConfig, *, saved: Saved) -> None:
    """The ranks build the model that the frozen config says."""
    stage = saved.meta.stage
    differing = unlike(saved.meta, reshard_key(config.stage(stage), cluster=config.cluster))
    if differing:
        raise RunStateError(
            f"{saved.path} is of the layout {describe_key(saved.meta.reshard)}, and stage {stage} has another by now: "
            f"{', '.join(f'{name} {old} -> {new}' for name, (old, new) in differing.items())}; it is converted in its own. "
            f"Fix: give the stage that layout again"
        )


def refuse_missing_gpus(run: RunDir, cluster: Cluster, *, stage: str) -> None:
    if cluster.gpu is None:
        return
    wanted, found = cluster.gpus_per_node, count_gpus()
    if found < wanted:
        rule = f"a checkpoint of tp x pp = {wanted} is converted by {wanted} ranks, each on a GPU of one machine"
        words = f"checkpoint {run.name} action=convert stage={stage}"
        fix = f"`srun --gpus={wanted} phidias {words}`, or `sbatch --gpus={wanted} slurm/phidias.sh {words}`; where no machine "
        fix += f"has so many, go on in the layout it has and `phidias stop {run.name} layout=any`"
        raise ConfigError(Problem("cluster.gpu", f"{found} GPUs here", rule, fix))


def count_gpus() -> int:
    """That ranks started here can use."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    with suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=SMI_S, check=False)
        return sum(line.startswith("GPU ") for line in said.stdout.splitlines())
    return 0


def rewrite(run: RunDir, cluster: Cluster, *, saved: Saved, lock: int) -> ExitClass:
    """Starts the ranks and waits for them. The run stays locked while they live."""
    stage, num_events = saved.meta.stage, sum(1 for _ in read_records(run.events))
    run.logs.mkdir(exist_ok=True)
    log_path = run.logs / f"{stage}_convert.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            torchrun_command(run, cluster=cluster, stage=stage, flags=["--convert"]),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=rank_environment(cluster),
            start_new_session=True,
            pass_fds=[lock],
        )
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C: the checkpoint stays as it was
            end_ranks(process, gently=False)
            raise
    written, _ = newest_checkpoint(run, stage)  # an older one, where the newest was found damaged
    if code == 0 and written and written.meta.sharding == FULLY_RESHARDABLE:
        print(f"{stage}: any layout can go on from {written.path.name} now")
        return ExitClass.DONE
    ended, error = how_it_ended(run, stage, skip=num_events, code=code)
    print(f"{stage}: {saved.path.name} was not converted: {error}\n  log: {log_path}")
    return ended
