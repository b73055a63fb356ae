"""Checks of nodes: rules as tables, the inspection as a real process, and steps that hang, crash and print anything."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.compose import compose_run
from launcher.jobs import nodes as nodes_module
from launcher.jobs.node_rules import judge_bandwidth, judge_reports
from launcher.jobs.nodes import INSPECT, check_nodes, read_reports, to_be_measured
from launcher.rundir.paths import RunDir

H100 = compose_run(["run=phi4"]).cluster
UNCHECKED = replace(H100, checks=None)
CPU = replace(H100, name="lab", gpu=None, gpus_per_node=2, checks=None)
NODES = ("n1", "n2", "n3", "n4")
GPU = {
    "name": "NVIDIA H100 80GB HBM3", "memory_mib": 81559, "free_mib": 81008, "driver": "550.54", "max_sm_mhz": 1980,
    "ecc_errors": 0, "slowed": False, "processes": [],
}  # fmt: skip
PORT = {"state": "4: ACTIVE", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"}
GIB = 1 << 30


def report(*, gpu=None, port=None, num_gpus=8, num_ports=8, **changes):
    """A sound node; `gpu` and `port` change the first of them."""
    gpus = [{**GPU, "index": index, **(gpu or {} if index == 0 else {})} for index in range(num_gpus)]
    ports = [{**PORT, "name": f"mlx5_{index}/1", **(port or {} if index == 0 else {})} for index in range(num_ports)]
    row = {"gpus": gpus, "ports": ports, "gpu_error": None, "sees_token": True, "write_error": None}
    return {**row, "free_bytes": 5000 * GIB, "time": 1000.0, "arrived": 1000.1, **changes}


def judged(*reports, cluster=H100, nodes=NODES):
    """None: the node was silent."""
    given = {node: one for node, one in zip(nodes, reports, strict=True) if one is not None}
    return judge_reports(given, nodes=nodes, cluster=cluster)


def test_sound_nodes_have_no_fault():
    assert judged(*[report()] * 4) == ((), None)
    assert judged(report(), nodes=("n1",)) == ((), None)


ODD = {
    "seven GPUs": ({"num_gpus": 7}, "7 GPUs; cluster slurm_h100 has 8"),
    "nine GPUs": ({"num_gpus": 9}, "9 GPUs; cluster slurm_h100 has 8"),
    "no nvidia-smi": ({"num_gpus": 0, "gpu_error": "nvidia-smi does not start"}, "nvidia-smi does not start; cluster"),
    "held memory": (
        {"gpu": {"free_mib": 40960, "processes": ["python (pid 7, 40000 MiB)"]}},
        "GPU 0: 40.0 GiB free, held by python (pid 7, 40000 MiB); checks ask for 75",
    ),
    "held by nobody": ({"gpu": {"free_mib": 100}}, "GPU 0: 0.1 GiB free; checks ask for 75"),
    "memory errors": ({"gpu": {"ecc_errors": 3}}, "GPU 0: 3 uncorrected memory errors; none is right"),
    "hot": ({"gpu": {"slowed": True}}, "GPU 0: slowed down by its hardware"),
    "a port down": ({"port": {"state": "1: DOWN"}}, "7 active InfiniBand ports (mlx5_0/1 1: DOWN); checks ask for 8"),
    "a port without a state": ({"port": {"state": ""}}, "7 active InfiniBand ports (mlx5_0/1 unknown); checks"),
    "Ethernet": ({"port": {"link_layer": "Ethernet"}}, "7 active InfiniBand ports"),
    "no ports": ({"num_ports": 0}, "0 active InfiniBand ports; checks ask for 8"),
    "a slow port": (
        {"port": {"rate": "200 Gb/sec (2X NDR)"}},
        "InfiniBand rate 200 Gb/sec (2X NDR) and 400 Gb/sec (4X NDR); 3 of 4 nodes have 400 Gb/sec (4X NDR)",
    ),
    "another driver": ({"gpu": {"driver": "535.1"}}, "driver 535.1 and 550.54; 3 of 4 nodes have 550.54"),
    "another GPU": ({"gpu": {"name": "NVIDIA A100"}}, "GPU NVIDIA A100 and NVIDIA H100 80GB HBM3; 3 of 4"),
    "another clock": ({"gpu": {"max_sm_mhz": 1755}}, "largest SM clock 1755 and 1980; 3 of 4 nodes have 1980"),
    "a clock ahead": ({"time": 1007.0}, "clock 7.0 s ahead of the other nodes'; checks allow 5"),
    "a clock behind": ({"time": 990.0}, "clock 10.0 s behind the other nodes'; checks allow 5"),
    "another folder": ({"sees_token": False}, "does not see what another node writes in the run directory"),
    "read only": ({"write_error": "Read-only file system"}, "cannot write in the run directory: Read-only file system"),
    "a disk of its own": ({"free_bytes": 12 * GIB}, "12.0 GiB free where the run is written; checks ask for 1000"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_node_is_named_with_the_rule(name):
    changes, said = ODD[name]
    faults, problem = judged(report(), report(), report(**changes), report())
    assert [fault.node for fault in faults] == ["n3"] and said in faults[0].reason and problem is None


def test_what_is_not_known_is_no_fault():
    unknown = report(gpu={"free_mib": None, "ecc_errors": None, "slowed": None, "max_sm_mhz": None}, free_bytes=None)
    assert judged(*[unknown] * 4) == ((), None)


def test_a_node_started_late_has_the_same_clock():
    assert judged(report(), report(time=1100.0, arrived=1100.2), report(), report()) == ((), None)


def test_silent_nodes():
    faults, problem = judged(report(), None, report(), None)
    assert [(fault.node, fault.reason) for fault in faults] == [("n2", "did not answer"), ("n4", "did not answer")]
    assert problem is None
    assert judged(None, None, None, None) == ((), "no node answered")


def test_a_node_has_one_fault_with_all_its_reasons():
    faults, _ = judged(report(num_gpus=7, sees_token=False), report(), report(), report())
    assert len(faults) == 1 and "7 GPUs" in faults[0].reason and "does not see" in faults[0].reason


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([report(num_gpus=4)] * 4, "all 4 nodes, n1 for one: 4 GPUs; cluster slurm_h100 has 8"),
        ([report(gpu={"driver": "535.1"}), report(), report(gpu={"driver": "535.1"}), report()], "no value has a majority"),
        ([report(), report(time=1009.0), report(), report(time=1009.0)], "clocks lie up to 9.0 s apart without a majority"),
        ([report(free_bytes=(990 + i) * GIB) for i in range(4)], "990.0 GiB free where the run is written"),
        ([report(), *[report(sees_token=False)] * 3], "3 of 4 nodes do not see the run directory; it must be shared by all"),
        ([report(sees_token=False)] * 4, "4 of 4 nodes do not see the run directory"),
    ],
)
def test_what_no_node_is_to_blame_for(reports, said):
    faults, problem = judged(*reports)
    assert faults == () and said in problem


def test_two_nodes_do_not_outvote_each_other():
    for changes in ({"time": 1009.0}, {"gpu": {"driver": "535.1"}}):
        faults, problem = judged(report(), report(**changes), nodes=("n1", "n2"))
        assert faults == () and "majority" in problem


def test_a_node_alone_may_be_at_fault_but_not_for_the_disk():
    faults, problem = judged(report(num_gpus=7, free_bytes=GIB), nodes=("n1",))
    assert [fault.reason for fault in faults] == ["7 GPUs; cluster slurm_h100 has 8"] and problem.startswith("1.0 GiB free")


def test_a_problem_hides_no_fault():
    faults, problem = judged(*[report(free_bytes=GIB)] * 3, report(num_gpus=7, free_bytes=GIB))
    assert [fault.node for fault in faults] == ["n4"] and "GiB free" in problem


@pytest.mark.parametrize("name", ODD)
def test_without_checks_only_what_every_run_needs(name):
    faults, problem = judged(report(), report(), report(**ODD[name][0]), report(), cluster=UNCHECKED)
    basic = ("seven GPUs", "nine GPUs", "no nvidia-smi", "another folder", "read only")
    assert bool(faults) == (name in basic) and problem is None


def test_a_rule_that_is_null_is_not_looked_at():
    checks = replace(H100.checks, gpu_memory_free_gib=None, infiniband_ports=None, disk_free_gib=None, clock_skew_s=None)
    odd = report(gpu={"free_mib": 1}, num_ports=0, free_bytes=1, time=1.0)
    assert judged(odd, odd, odd, odd, cluster=replace(H100, checks=checks)) == ((), None)


def test_cpu_nodes_need_no_gpus():
    bare = report(num_gpus=0, num_ports=0, gpu_error="nvidia-smi does not start")
    checks = replace(H100.checks, infiniband_ports=None)
    for cluster in (CPU, replace(CPU, checks=checks)):
        assert judged(bare, bare, bare, bare, cluster=cluster) == ((), None)


# ---- bandwidth


def figures(*, n3=None, ranks=8, **changes):
    row = {
        "ranks": ranks, "nccl": "2.21.5", "torch": "2.9", "gemm_tflops": 650.0, "node_all_reduce_gb_per_s": 400.0,
        "pair_all_reduce_gb_per_s": 330.0,
    }  # fmt: skip
    nodes = {node: {**row, **((n3 or {}) if node == "n3" else {})} for node in NODES}
    return {"nodes": nodes, "all_reduce_gb_per_s": 300.0, "failed": None, "at": None, **changes}


def test_fast_nodes_pass():
    assert judge_bandwidth(figures(), nodes=NODES, cluster=H100) == ((), None)


@pytest.mark.parametrize(
    ("n3", "said"),
    [
        ({"gemm_tflops": 401.23}, "401 TFLOP/s in BF16 products on its slowest GPU; checks ask for 550"),
        ({"node_all_reduce_gb_per_s": 12.0}, "12 GB/s in all-reduce among its GPUs; checks ask for 300"),
        ({"pair_all_reduce_gb_per_s": 20.0}, "20 GB/s in all-reduce with the better of two other nodes; checks ask for 150"),
        ({"nccl": "2.19.3"}, "NCCL 2.19.3; 3 of 4 nodes have 2.21.5"),
        ({"ranks": 7}, "7 ranks came to be measured; cluster slurm_h100 has 8"),
    ],
)
def test_a_slow_node_is_named(n3, said):
    """Also where it drags the whole job along."""
    faults, problem = judge_bandwidth(figures(n3=n3, all_reduce_gb_per_s=20.0), nodes=NODES, cluster=H100)
    assert [fault.node for fault in faults] == ["n3"] and said in faults[0].reason
    assert (problem is None) == (n3.keys() <= {"gemm_tflops", "node_all_reduce_gb_per_s", "pair_all_reduce_gb_per_s"})


def test_a_slow_network_is_no_nodes_fault():
    faults, problem = judge_bandwidth(figures(all_reduce_gb_per_s=90.0), nodes=NODES, cluster=H100)
    assert faults == () and problem.startswith("90 GB/s in all-reduce among all 4 nodes")
    everywhere = figures()
    for row in everywhere["nodes"].values():
        row["gemm_tflops"] = 300.0
    faults, problem = judge_bandwidth(everywhere, nodes=NODES, cluster=H100)
    assert faults == () and "all 4 nodes, n1 for one: 300 TFLOP/s" in problem


def test_parts_left_out_are_not_judged():
    left_out = dict.fromkeys(("gemm_tflops", "node_all_reduce_gb_per_s", "pair_all_reduce_gb_per_s"))
    assert judge_bandwidth(figures(n3=left_out, all_reduce_gb_per_s=None), nodes=NODES, cluster=H100) == ((), None)


def test_what_ended_the_measurement():
    failed = {"part": "gemm", "nodes": {"n2": "rank 9: CUDA error"}}
    faults, problem = judge_bandwidth(figures(failed=failed), nodes=NODES, cluster=H100)
    assert [(fault.node, fault.reason) for fault in faults] == [("n2", "gemm failed: rank 9: CUDA error")] and problem is None
    failed = {"part": "all-reduce of all", "nodes": {"n2": "rank 9 did not end in time"}}
    faults, problem = judge_bandwidth(figures(failed=failed), nodes=NODES, cluster=H100)
    assert faults == () and problem == "n2: all-reduce of all failed: rank 9 did not end in time"
    faults, problem = judge_bandwidth(figures(at="gemm"), nodes=NODES, cluster=H100)
    assert [fault.node for fault in faults] == ["n1"] and "gemm failed: its first rank ended" in faults[0].reason
    faults, problem = judge_bandwidth(figures(at="pair all-reduce 2"), nodes=NODES, cluster=H100)
    assert faults == () and problem.startswith("n1: pair all-reduce 2 failed")


def test_a_node_that_never_came_to_be_measured():
    without = figures()
    del without["nodes"]["n2"]
    faults, _ = judge_bandwidth(without, nodes=NODES, cluster=H100)
    assert [(fault.node, fault.reason.partition(";")[0]) for fault in faults] == [("n2", "0 ranks came to be measured")]


def test_measured_where_a_figure_is_asked_for():
    assert to_be_measured(H100.checks) and not to_be_measured(None)
    none = replace(H100.checks, gemm_tflops=None, node_all_reduce_gb_per_s=None, all_reduce_gb_per_s=None)
    assert not to_be_measured(none) and to_be_measured(replace(none, all_reduce_gb_per_s=1.0))


# ---- the inspection, as a process

SMI = """#!{python} -ISE
import sys, time
query = sys.argv[1]
{body}
"""
EIGHT = """
assert sys.argv[2] == "--format=csv,noheader,nounits"
if "clocks_event_reasons" in query and {old}:
    sys.exit(print('Field "clocks_event_reasons.hw_slowdown" is not a valid field to query.') or 2)
if query.startswith("--query-compute-apps"):
    sys.exit(print("GPU-1, 4711, /opt/app, 1/python, 40000"))
for index in range(8):
    free = 40960 if index == 1 else 81008
    slowed = ", Active" if index == 2 else ", Not Active"
    print(f"{{index}}, NVIDIA H100 80GB HBM3, 81559, {{free}}, 550.54.15, 1980, [N/A], GPU-{{index}}" + slowed)
"""


@pytest.fixture
def inspect(tmp_path):
    """Runs the inspection with an nvidia-smi of our own; its report and what lines it printed."""
    run_dir, programs, sysfs = tmp_path / "a run", tmp_path / "bin", tmp_path / "sys"
    (run_dir / ".nodes").mkdir(parents=True)
    (run_dir / ".nodes" / "token").write_text("token")
    programs.mkdir()

    def run(body=None, *, token="token", code=0, **changes):
        if body is not None:
            (programs / "nvidia-smi").write_text(SMI.format(python=sys.executable, body=body))
            (programs / "nvidia-smi").chmod(0o755)
        environment = {"PATH": str(programs), "SLURMD_NODENAME": "n7"}
        source = INSPECT.read_text()
        for name, value in changes.items():
            source = source.replace(f"{name} = 20.0", f"{name} = {value}")
        script = tmp_path / "inspect_node.py"
        script.write_text(source)
        words = [sys.executable, "-I", "-S", str(script), str(run_dir), token, str(sysfs)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=20)
        assert done.returncode == code, done.stderr
        reports = read_reports((time.time(), line) for line in done.stdout.splitlines())
        return reports["n7"], done.stdout.splitlines()

    run.run_dir, run.sysfs = run_dir, sysfs
    return run


def write_port(sysfs, name, **said):
    folder = sysfs / "class" / "infiniband" / name / "ports" / "1"
    folder.mkdir(parents=True)
    for file, text in said.items():
        (folder / file).write_text(f"{text}\n")


@pytest.mark.parametrize("old", [False, True])
def test_a_node_looks_at_itself(inspect, old):
    write_port(inspect.sysfs, "mlx5_0", state="4: ACTIVE", rate="400 Gb/sec (4X NDR)", link_layer="InfiniBand")
    write_port(inspect.sysfs, "mlx5_1", state="1: DOWN")
    found, lines = inspect(EIGHT.format(old=old))
    assert len(found["gpus"]) == 8 and found["gpu_error"] is None and found["sees_token"] and found["write_error"] is None
    first, second, third = found["gpus"][:3]
    assert first == {**GPU, "index": 0, "driver": "550.54.15", "ecc_errors": None}
    assert second["free_mib"] == 40960 and second["processes"] == ["/opt/app, 1/python (pid 4711, 40000 MiB)"]
    assert third["slowed"] is True
    assert [(port["name"], port["state"]) for port in found["ports"]] == [("mlx5_0/1", "4: ACTIVE"), ("mlx5_1/1", "1: DOWN")]
    assert abs(found["time"] - time.time()) < 10 and found["free_bytes"] > 0
    assert max(map(len, lines)) < 1000  # beyond, srun mixes those of several nodes
    assert [path.name for path in (inspect.run_dir / ".nodes").iterdir()] == ["token"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "nvidia-smi does not start: No such file"),
        (
            "sys.exit(print('Failed to initialize NVML: Driver/library version mismatch') or 18)",
            "ended with 18: Failed to init",
        ),
        ("print('No devices were found')", "nvidia-smi said: No devices were found"),
        ("sys.exit(print('Field \"x\" is not a valid field to query.') or 2)", "not a valid field"),
        ("sys.stdout.buffer.write(bytes(range(128, 256)))", "nvidia-smi said"),
        ("time.sleep(60)", "nvidia-smi did not end in 0.3 s"),
    ],
)
def test_what_nvidia_smi_may_do(inspect, body, said):
    found, _ = inspect(body, SMI_S=0.3 if body and "sleep" in body else 10.0)
    assert said in found["gpu_error"] and found["gpus"] == [] and found["sees_token"]


def test_no_gpus_is_not_an_error(inspect):
    found, _ = inspect("")
    assert found["gpu_error"] is None and found["gpus"] == []


def test_a_folder_that_is_not_shared(inspect):
    found, _ = inspect(token="another", TOKEN_S=0.1)
    assert found["sees_token"] is False and found["write_error"] is None
    (inspect.run_dir / ".nodes" / "token").write_text("")
    assert inspect(TOKEN_S=0.1)[0]["sees_token"] is False  # its name is there, and not yet what it holds
    (inspect.run_dir / ".nodes" / "token").unlink()
    (inspect.run_dir / ".nodes").rmdir()
    found, _ = inspect(TOKEN_S=0.1)
    assert "No such file" in found["write_error"]


def test_a_token_that_comes_late(inspect):
    token = inspect.run_dir / ".nodes" / "token"
    token.unlink()
    late = subprocess.Popen(["sh", "-c", 'sleep 0.5; printf token > "$0"', str(token)])
    assert inspect()[0]["sees_token"] and late.wait() == 0


# ---- steps

MEASURES = """
import json, os, sys
out, *options = sys.argv[3:]
assert sys.argv[1:3] == ["-m", "training.bandwidth"] and options[0][:8] == "--max-s=" and options[1:] == ["--device=cpu"]
{body}
"""


INSPECTS = '"$@"'


class Lab:
    """Nodes that are processes of this machine: `scripts` replace the inspection on some of them."""

    def __init__(self, folder: Path, **scripts: str):
        self.folder, self.scripts, self.calls, self.measures = folder, scripts, [], None
        self.run = RunDir(folder / "run")
        self.run.root.mkdir(parents=True)
        self.environment = {**os.environ, "MASTER_ADDR": "n1"}

    def step(self, words, *, nodes, tasks_per_node):
        self.calls.append((words, nodes, tasks_per_node))
        if words[0] == "-m":
            return [sys.executable, "-c", MEASURES.format(body=self.measures), *words]
        each = [f"(export SLURMD_NODENAME={node}; {self.scripts.get(node, INSPECTS)}) &" for node in nodes]
        return ["sh", "-c", f"{' '.join(each)} wait", "sh", sys.executable, *words]

    def check(self, cluster=CPU, nodes=NODES):
        health = check_nodes(self.run, cluster, nodes=nodes, step=self.step, environment=self.environment)
        assert not (self.run.root / ".nodes").exists()
        return health

    @property
    def log(self):
        return (self.run.logs / "nodes.log").read_text()


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.setattr(nodes_module, "INSPECT_S", 3.0)
    monkeypatch.setattr(nodes_module, "TORCH_S", 0.0)
    monkeypatch.setattr(nodes_module, "KILL_S", 0.5)


def test_sound_nodes_are_healthy(tmp_path):
    lab = Lab(tmp_path)
    health = lab.check()
    assert (health.healthy, health.faults, health.problem) == (NODES, (), None)
    assert set(health.figures["nodes"]) == set(NODES) and health.figures["nodes"]["n1"]["disk_free_gib"] > 0
    json.dumps(health.figures)
    assert lab.calls[0][1:] == (list(NODES), 1) and str(INSPECT) in lab.log


def test_nodes_that_hang_crash_or_print_garbage(tmp_path, limits):
    """One that ignores SIGTERM as well; and what they say is in the log."""
    garbage = "echo hello; echo '[1]'; echo '{'; echo '{\"node\": \"n4\", \"time\": 1}'; printf '\\377\\n'"
    lab = Lab(tmp_path, n2="trap '' TERM; sleep 60", n3="echo out of luck >&2; exit 3", n4=garbage)
    began = time.monotonic()
    health = lab.check()
    assert health.healthy == ("n1",) and {fault.node for fault in health.faults} == {"n2", "n3", "n4"}
    assert health.problem is None and time.monotonic() - began < 8
    assert "out of luck" in lab.log and "hello" in lab.log and "did not end in 3 s" in lab.log


def test_half_a_report_is_none(tmp_path):
    cut = """echo '{"node": "n2", "num_gpus": 8, "num_ports": 0, "time": 1.0}'"""
    assert [fault.node for fault in Lab(tmp_path, n2=cut).check().faults] == ["n2"]


def test_a_node_that_was_asked_twice_is_one_node(tmp_path):
    lab = Lab(tmp_path, n1=f"{INSPECTS} & {INSPECTS}; wait")
    assert lab.check().healthy == NODES
    rows = [{"node": "n1", "gpu": {**GPU, "index": index % 2}} for index in range(4)]
    rows += [{"node": "n1", "num_gpus": 2, "num_ports": 0, "time": 1.0}] * 2
    found = read_reports((1.0, f"{number}: {json.dumps(row)}") for number, row in enumerate(rows))
    assert [gpu["index"] for gpu in found["n1"]["gpus"]] == [0, 1]


def test_a_step_that_cannot_start(tmp_path):
    lab = Lab(tmp_path)
    lab.step = lambda words, **_: [str(tmp_path / "no-srun"), *words]
    health = lab.check()
    assert (health.healthy, health.problem) == ((), "no node answered") and "no-srun" in lab.log


def test_a_run_directory_that_cannot_be_written(tmp_path):
    lab = Lab(tmp_path)
    lab.run = RunDir(tmp_path / "gone")
    assert "cannot be written" in lab.check().problem


CHECKS = replace(
    H100.checks, gpu_memory_free_gib=None, disk_free_gib=None, infiniband_ports=None, clock_skew_s=60.0, gemm_tflops=1.0,
    node_all_reduce_gb_per_s=None, all_reduce_gb_per_s=None,
)  # fmt: skip


def test_nodes_that_passed_are_measured(tmp_path):
    lab = Lab(tmp_path, n1="exit 1")
    lab.measures = """
assert os.environ["MASTER_ADDR"] == "n2"
row = dict.fromkeys(("nccl", "torch", "node_all_reduce_gb_per_s", "pair_all_reduce_gb_per_s")) | {"ranks": 2}
nodes = {node: {**row, "gemm_tflops": 0.5 if node == "n4" else 2.0} for node in ("n2", "n3", "n4")}
json.dump({"nodes": nodes, "all_reduce_gb_per_s": None, "failed": None, "at": None}, open(out, "w"))
"""
    health = lab.check(replace(CPU, checks=CHECKS))
    assert lab.calls[1][1:] == (["n2", "n3", "n4"], 2)
    assert health.healthy == ("n2", "n3") and health.problem is None
    reasons = {fault.node: fault.reason for fault in health.faults}
    assert reasons["n1"] == "did not answer" and reasons["n4"].startswith("0.5 TFLOP/s in BF16 products")
    assert health.figures["bandwidth"]["nodes"]["n2"]["gemm_tflops"] == 2.0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit(9)", "the nodes were not measured: ended with 9; see"),
        ("open(out, 'w').write('{')", "the nodes were not measured: ended with 0"),
        ("open(out, 'w').write('[]')", "holds no figures"),
        ("import time; time.sleep(60)", "the nodes were not measured: did not end in 1 s"),
    ],
)
def test_a_measurement_that_fails(tmp_path, limits, body, said):
    lab = Lab(tmp_path)
    lab.measures = body
    health = lab.check(replace(CPU, checks=replace(CHECKS, max_s=1)))
    assert said in health.problem and health.healthy == NODES
