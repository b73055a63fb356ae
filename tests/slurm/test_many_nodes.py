"""A job of 64 nodes: what is one line for two must be one for many. Its ranks would be too much for one machine; the checks of
its nodes are what every job begins with."""

import json
import sys

from tests.endtoend.workspace import REPOSITORY
from tests.slurm.lab import SlurmLab

NODES = 64
JOB = """#!{python}
import json, os, sys
from pathlib import Path
sys.path.insert(0, {repository!r})
from launcher.config.compose import compose_run
from launcher.jobs.allocation import fitted_to, read_allocation
from launcher.jobs.nodes import check_nodes
from launcher.jobs.steps import check_line, place_of
from launcher.rundir.paths import RunDir

run = RunDir(Path({folder!r}) / "run")
run.root.mkdir()
allocation = read_allocation(os.environ)
config = compose_run(["run=demo", "cluster.kind=slurm", "cluster.gpus_per_node=1", "cluster.num_nodes={nodes}",
                      "layout=demo_dp", "stage=demo_pretrain", "stage.global_batch_size=512"])
config = fitted_to(config, allocation, overrides=())
place = place_of(run, config, code=Path({repository!r}), environment=os.environ)
health = check_nodes(run, config.cluster, nodes=allocation.nodes, environment=dict(os.environ),
                     step=lambda words, **given: check_line(words, place=place, **given))
found = dict(healthy=health.healthy, faults=[vars(fault) for fault in health.faults], problem=health.problem)
Path({folder!r}, "found.json").write_text(json.dumps(dict(found, nodes=allocation.nodes)))
"""


def test_a_job_of_64_nodes_hears_from_each(slurm_installed, tmp_path):
    (tmp_path / "job.py").write_text(
        JOB.format(python=sys.executable, repository=str(REPOSITORY), folder=str(tmp_path), nodes=NODES)
    )
    with SlurmLab(nodes=NODES, gpus=1, cpus=2) as slurm:
        line = ["sbatch", f"--nodes={NODES}", "--ntasks-per-node=1", f"--output={tmp_path}/log", str(tmp_path / "job.py")]
        (job,) = slurm.wait(slurm.submit(line), "COMPLETED", timeout=120)
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(found["healthy"]) == sorted(slurm.nodes) == sorted(found["nodes"])
    assert found["faults"] == [] and found["problem"] is None and job.exit_code == 0
