"""What Phidias' jobs cost on Slurm, on the private cluster of the tests (tests/slurm/lab.py): three nodes on this machine, runs
on two of them, a rank each. Wall seconds, what is compared taking turns. Goals: the first job id of `phidias submit` within
1.5 s; from a batch script's first line to the first logged step, 2 s more than srun and torchrun on the same frozen run.

Moments are rows of events.jsonl and metrics.jsonl; when a batch script began is noted by BASH_ENV, in all ways alike. Not a
figure of Phidias: the lab lets a requeued job wait for 5 s (cred_expire; 120 s is Slurm's default).
"""

import argparse
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result
from launcher.jobs.local import rank_settings
from launcher.rundir.code import child_environment
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from tests.endtoend.workspace import Workspace
from tests.slurm import training
from tests.slurm.daemons import missing_programs
from tests.slurm.lab import SlurmLab

CLUSTER = "3 nodes on this machine, a rank on each of 2; a requeued job waits for 5 s (cred_expire)"
REPEATS = {"submit": 5, "start": 3, "faults": 2}
SUBMIT_GOAL_S, START_GOAL_S = 1.5, 2.0
ONE_CORE = "--cpus-per-task=1"
SHORT, LONG = "stage.tokens=4096", "stage.tokens=2048000"  # 8 steps, 4,000 steps
FAULT_AFTER = 20  # steps; a checkpoint is every 16
FILE = "STAMPS/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
STAMP = f"[[ -z ${{SLURM_JOB_ID:-}} || -e {FILE} ]] || echo $EPOCHREALTIME > {FILE}\n"
MASTER = "address=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1) port=$((20000 + SLURM_JOB_ID % 10000))\n"
TORCHRUN = "exec torchrun --nnodes=2 --node-rank=$SLURM_NODEID --nproc-per-node=1 --master-addr=$0 --master-port=$1"
# A batch script's last line by what starts the ranks.
PLAIN = {
    "srun and torchrun": f"srun --ntasks-per-node=1 bash -c '{TORCHRUN} -m training RUN --stage small' $address $port",
    "srun alone": "MASTER_ADDR=$address MASTER_PORT=$port srun --ntasks-per-node=1 python -m training RUN --stage small",
}
STARTS = ("created", "nodes_checked", "start", "stage_start", "first step")
AGAIN = ("nodes_checked", "start", "resume", "next step", "new step")


def kill_rank(slurm: SlurmLab, run: Workspace, job: str) -> None:
    os.kill(min(slurm.processes("SLURM_PROCID=1\0")), signal.SIGKILL)


def kill_node(slurm: SlurmLab, run: Workspace, job: str) -> None:
    slurm.kill_node(run.events("start")[-1]["nodes"][1])


def ask_to_save(slurm: SlurmLab, run: Workspace, job: str) -> None:
    slurm.run("scancel", "--batch", "--signal=USR1", job)


# What happens, and what follows it: one after another in a job of two nodes, and in one of three.
Fault = tuple[Callable[[SlurmLab, Workspace, str], None], tuple[str, ...]]
FAULTS: dict[str, Fault] = {
    "kill -9 of a rank": (kill_rank, ("job_end", *AGAIN)),
    "USR1, save and requeue": (ask_to_save, ("stop", "job_end", "batch script", *AGAIN)),
    "a node dies, none spare": (kill_node, ("batch script", *AGAIN)),
}
FAULTS_WITH_SPARE: dict[str, Fault] = {"a node dies, one spare": (kill_node, ("job_end", *AGAIN))}


class Bench:
    """The cluster, and a workspace with prepared data."""

    def __init__(self, slurm: SlurmLab, root: Path):
        self.slurm, self.workspace, self.stamps = slurm, training.workspace_of_slurm(root), root / "stamps"
        self.numbers = itertools.count(1)
        self.stamps.mkdir()
        self.workspace.config("data")
        (root / "stamp.sh").write_text(STAMP.replace("STAMPS", str(self.stamps)))
        slurm.env["BASH_ENV"] = str(root / "stamp.sh")
        self.template = self.new_run()  # frozen, never trained
        slurm.run("scancel", self.frozen(self.template, option="--hold"))

    def new_run(self) -> Workspace:
        return self.workspace.named(f"run{next(self.numbers)}")

    def submit(self) -> dict[str, float]:
        """Both stages of a new run, data ready: seconds until the first and the last job id are printed, and of the process."""
        run, jobs, seen = self.new_run(), list[str](), list[float]()
        command = ["phidias", "submit", *run.words(), "cluster=lab", "cluster.sbatch_options=['--hold']"]
        environment = {**self.slurm.env, "PYTHONUNBUFFERED": "1"}  # lines as a terminal gets them
        before, began = os.times(), time.perf_counter()
        with subprocess.Popen(command, env=environment, cwd=run.root, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if found := training.job_ids(line):
                    jobs, seen = [*jobs, *found], [*seen, time.perf_counter() - began]
        whole, cpu = time.perf_counter() - began, sum(os.times()[2:4]) - sum(before[2:4])  # of children
        assert process.returncode == 0 and len(jobs) == 2, f"{command}: {process.returncode}"
        began = time.perf_counter()
        jobs.append(self.slurm.submit(["sbatch", "--hold", "--nodes=2", "--wrap=true"]))
        plain = time.perf_counter() - began
        self.slurm.run("scancel", *jobs)
        return {"first job id": seen[0], "last job id": seen[-1], "whole process": whole, "its CPU": cpu, "sbatch": plain}

    def frozen(self, run: Workspace, *, option: str = ONE_CORE) -> str:
        words = training.words(run, SHORT, f"cluster.sbatch_options=['{option}']")
        return training.job_ids(training.phidias(self.slurm, run, "submit", *words))[0]

    def plain(self, run: Workspace, *, line: str) -> str:
        """A script as people write it, on a frozen run."""
        shutil.copytree(self.template.run_dir, run.run_dir)
        ranks = {**child_environment(), **rank_settings(read_config(RunDir(run.run_dir)).cluster, cores=1)}
        own = [f"export {name}='{value}'\n" for name, value in ranks.items() if os.environ.get(name) != value]
        script = run.root / f"{run.run}.sh"
        script.write_text("".join(["#!/usr/bin/env bash\n", *own, MASTER, line.replace("RUN", str(run.run_dir)), "\n"]))
        options = ["--nodes=2", *training.TASKS, ONE_CORE, f"--output={run.root}/%j.log"]
        return self.slurm.submit(["sbatch", *options, str(script)])

    def start_each(self) -> dict[str, dict[str, float]]:
        """From a batch script's first line to the first step, once in every way."""
        ways: dict[str, Callable[[Workspace], str]] = {
            "by hand": lambda run: training.submit(self.slurm, run, SHORT, options=[ONE_CORE]),
            "frozen by submit": self.frozen,
            **{name: lambda run, line=line: self.plain(run, line=line) for name, line in PLAIN.items()},
        }
        found = {}
        for name, start in ways.items():
            run = self.new_run()
            job = start(run)
            self.slurm.wait(job, "COMPLETED", timeout=training.STARTED_S)
            moments = follow(self.rows(run, job=job), after="batch script", kinds=STARTS)
            ahead = {"ahead of the ranks": moments["start"] - moments["batch script"]} if "start" in moments else {}
            found[name] = {**intervals(moments), **ahead}
        return found

    def break_each(self) -> dict[str, dict[str, float]]:
        """From a fault to the first step that the run had not taken yet."""
        found = {}
        for faults, more, nodes in ((FAULTS, [], 2), (FAULTS_WITH_SPARE, ["cluster.spare_nodes=1"], 3)):
            run = self.new_run()
            options = [ONE_CORE, *(["--no-kill"] if more else [])]
            job = training.submit(self.slurm, run, LONG, *more, nodes=nodes, options=options)
            found |= {name: self.break_one(run, fault, job=job) for name, fault in faults.items()}
            self.slurm.reset()
        return found

    def break_one(self, run: Workspace, fault: Fault, *, job: str) -> dict[str, float]:
        training.until_step(run, FAULT_AFTER + max((row["step"] for row in training.train_rows(run)), default=0))
        began = {"kind": "began", "time": time.time()}
        (act, follows), found = fault, {}
        act(self.slurm, run, job)
        while len(found) <= len(follows):
            assert time.time() < began["time"] + 2 * training.STARTED_S, f"no new step: {found}"
            time.sleep(0.1)
            found = follow([began, *self.rows(run, job=job)], after="began", kinds=follows)
        (resumed,) = (row["step"] for row in run.events("resume") if row["time"] == found["resume"])
        taken = max(row["step"] for row in training.train_rows(run) if row["time"] <= found["resume"])
        return {**intervals(found), "steps computed again": taken - resumed}

    def rows(self, run: Workspace, *, job: str) -> list[dict[str, Any]]:
        """Events, steps, and when the job's scripts began, as they happened. A step is `next`; also `first`, or `new` where the
        run had not come so far before."""
        stamps = [float(path.read_text()) for path in self.stamps.glob(f"{job}.*") if path.stat().st_size]
        rows, furthest = [{"kind": "batch script", "time": stamp} for stamp in stamps], 0
        for row in training.train_rows(run):
            names = ["next", *(["first"] if furthest == 0 else []), *(["new"] if row["step"] > furthest else [])]
            rows += [{"kind": f"{name} step", "time": row["time"]} for name in names]
            furthest = max(furthest, row["step"])
        return sorted([*run.rows("events.jsonl"), *rows], key=lambda row: row["time"])


def follow(rows: Iterable[dict[str, Any]], *, after: str, kinds: Sequence[str]) -> dict[str, float]:
    """Unix seconds, in order: of the first row of each kind after those before it; what has not come is left out."""
    times, moments = [(row["kind"], row["time"]) for row in rows], dict[str, float]()
    for kind in (after, *kinds):
        last = max(moments.values(), default=0.0)
        if at := next((at for name, at in times if name == kind and at >= last), None):
            moments[kind] = at
    return moments


def intervals(moments: dict[str, float]) -> dict[str, float]:
    """Seconds from each moment to the next, and from the first to the last."""
    times = list(moments.values())
    between = zip(list(moments)[1:], times, times[1:], strict=False)
    return {**{f"to {name}": after - before for name, before, after in between}, "in all": times[-1] - times[0]}


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every figure, over the repeats."""
    if not isinstance(rows[0], dict):
        return {name: round(of(rows), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))}
    return {name: medians([row[name] for row in rows]) for name in rows[0]}


def compared(submit: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """Medians beside those of what does without Phidias, and beside the goals."""
    first, total = submit["first job id"]["median"], {name: row["in all"]["median"] for name, row in start.items()}
    found = {"first job id, beside sbatch": beside(first, submit["sbatch"]["median"], s=first, goal=SUBMIT_GOAL_S)}
    for plain in PLAIN:
        for name in ("by hand", "frozen by submit"):
            more = total[name] - total[plain]
            found[f"start {name}, more than {plain}"] = beside(total[name], total[plain], s=more, goal=START_GOAL_S)
    return found


def beside(ours: float, plain: float, *, s: float, goal: float) -> dict[str, Any]:
    return {"s": round(s, 3), "ratio": round(ours / plain, 2), "goal_s": goal, "met": s < goal}


def show(figures: dict[str, Any], *, into: str = "") -> None:
    for name, row in figures.items():
        if "median" in row:
            print(f"{into + name:<64}{row['median']:>8.2f}   {row['min']:.2f} to {row['max']:.2f}")
        elif "met" in row:
            said = "met" if row["met"] else "MISSED"
            print(f"{into + name:<64}{row['s']:>8.2f}   {row['ratio']} times; goal {row['goal_s']}: {said}")
        else:
            show(row, into=f"{into}{name}: ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help=f"of each part; by default {REPEATS}")
    parser.add_argument("--parts", nargs="+", choices=REPEATS, default=list(REPEATS))
    parser.add_argument("--no-result", action="store_true", help="print the figures only")
    arguments = parser.parse_args()
    if missing := missing_programs():
        print(f"skipped: no {', '.join(missing)} on this machine")
        return
    load, figures = {"at start": round(os.getloadavg()[0], 2)}, dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder, SlurmLab(nodes=3) as slurm:
        bench = Bench(slurm, Path(folder))
        parts = {"submit": bench.submit, "start": bench.start_each, "faults": bench.break_each}
        for name in arguments.parts:
            figures[name] = medians([parts[name]() for _ in range(arguments.repeats or REPEATS[name])])
            load[f"after {name}"] = round(os.getloadavg()[0], 2)
    if {"submit", "start"} <= figures.keys():
        figures["compared"] = compared(figures["submit"], figures["start"])
    if not arguments.no_result:
        write_result("slurm", {"cluster": CLUSTER, "repeats": arguments.repeats or REPEATS, "load": load, **figures})
    show(figures)


if __name__ == "__main__":
    main()
