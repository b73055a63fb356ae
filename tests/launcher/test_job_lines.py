"""Lines for sbatch and srun, and what an allocation is: values in, values out."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.config.schema import Container
from launcher.jobs.allocation import Allocation, fitted_to, job_comment, read_allocation, remembered
from launcher.jobs.graph import after_job, data_job, stage_job, sweep_job, waits_of
from launcher.jobs.queue import known_jobs, queued, work_left
from launcher.jobs.slurm import duration_s, parse_fields, run_sbatch
from launcher.jobs.steps import check_line, cores_of_node, one_process, outermost, place_of, rank_line
from launcher.jobs.submission import Submission, refuse_unexportable
from launcher.jobs.work import timed_out
from launcher.rundir.code import SOURCE_ROOT
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records, write_json
from launcher.verbs.job import Start

PHI4 = compose_run(["run=phi4", "cluster.partition=gpu", "cluster.account=us"])
NODES = tuple(f"n{number}" for number in range(240))
GIVEN = Allocation(job="4711", number=4711, element=None, tasks_per_node=8, nodes=NODES, restarts=0)
CODE = Path("/runs/phi4/code/0123456789ab")
WORDS = ["-m", "training", "/a b", "--stage=$(id)"]


def cluster_of(**changes):
    return replace(PHI4, cluster=replace(PHI4.cluster, **changes))


def options_of(line):
    """What stands between sbatch and the script."""
    place = line.index("sbatch")
    return line[place + 1 : next(i for i, word in enumerate(line) if i > place and not word.startswith("-"))]


def test_a_stage_as_a_job(tmp_path):
    run = RunDir(tmp_path / "my 10% runs" / "phi4")
    line = stage_job(PHI4, run=run, stage="midtrain", code=CODE).line(after="17")
    assert line[0] == "env" and line[-1] == f"{CODE}/slurm/pretrain.sh" and f"PHIDIAS_CODE={CODE}" in line
    for option in (
        "--parsable", "--job-name=phi4.midtrain", "--nodes=240", "--ntasks-per-node=8", "--gpus-per-node=8", "--exclusive",
        "--mem=0", "--partition=gpu", "--account=us", "--time=1-00:00:00", "--dependency=afterok:17",
        "--kill-on-invalid-dep=yes", f"--comment={run.root}:midtrain:{CODE.name}", "--export=ALL",
        f"--output={tmp_path}/my 10%% runs/phi4/logs/job_%j.log",
    ):  # fmt: skip
        assert option in options_of(line), option
    first = stage_job(PHI4, run=run, stage="pretrain", code=CODE).line(after=None)
    assert not any("dependency" in word for word in first)
    header = (SOURCE_ROOT / "slurm/pretrain.sh").read_text().splitlines()
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(header)


def test_a_branch_waits_for_the_stage_it_starts_from(tmp_path):
    names, starts = ("pretrain", "a", "b", "c"), (None, "pretrain", "pretrain", "/runs/other")
    stages = tuple(
        replace(PHI4.stages[0], stage=replace(PHI4.stages[0].stage, name=name, init_from=start))
        for name, start in zip(names, starts, strict=True)
    )
    config = replace(PHI4, run=replace(PHI4.run, stages=names), stages=stages)
    run = RunDir(tmp_path / "phi4")
    jobs = [data_job(config, words=["run=phi4"], run=run)]
    jobs += [stage_job(config, run=run, stage=name, code=CODE) for name in names]
    jobs += [after_job(config, run=run, what="export", stage="c", code=CODE)]

    def waits(some, after=None):
        ids = [job.what for job in some]
        return [waits_of(some, number=number, after=after, ids=ids[:number]) for number in range(len(some))]

    of_stages = [("data:pretrain", None), ("data:pretrain", "a"), ("data", "b"), ("c", None)]
    assert waits(jobs) == [(None, None), ("data", None), *of_stages]
    # The data is there, or another run's job makes it; pretraining is done.
    assert waits(jobs[2:]) == [(None, None), (None, "a"), (None, "b"), ("c", None)]
    assert waits(jobs[2:], after="7") == [("7", None), ("7", "a"), ("7", "b"), ("c", None)]
    line = jobs[3].line(after="data:pretrain", behind="a")
    assert "--dependency=afterok:data:pretrain,afterany:a" in options_of(line)


def test_what_follows_chosen_stages_keeps_no_stage_waiting(tmp_path, monkeypatch):
    """Each export waits for its stage alone, its evaluation for the export, and the next stage for neither."""
    evaluation = replace(PHI4.run.evaluation, tasks=("words",), task_dir=str(tmp_path))
    config = replace(PHI4, run=replace(PHI4.run, after_stages=PHI4.run.stages, evaluation=evaluation))
    run, done = RunDir(tmp_path / "phi4"), set()
    monkeypatch.setattr("launcher.jobs.queue.stage_is_done", lambda run, config, stage: stage in done)
    left = work_left(run, config, data_ready=True)
    assert left == [
        ("pretrain", None), ("export", "pretrain"), ("eval", "pretrain"),
        ("midtrain", None), ("export", "midtrain"), ("eval", "midtrain"),
    ]  # fmt: skip
    jobs = Submission(run, config, None, ()).jobs(code=CODE)[1:]  # the data first
    titles = [job.title for job in jobs]
    waits = [waits_of(jobs, number=number, after="7", ids=titles[:number]) for number in range(len(jobs))]
    assert dict(zip(titles, waits, strict=True)) == {
        "pretrain": ("7", None), "pretrain.export": ("pretrain", None), "pretrain.eval": ("pretrain.export", None),
        "midtrain": ("pretrain", None), "midtrain.export": ("midtrain", None), "midtrain.eval": ("midtrain.export", None),
    }  # fmt: skip
    assert jobs[1].line(after="8")[-1] == "stage=pretrain" and "--job-name=phi4.pretrain.export" in jobs[1].options
    done.add("pretrain")  # its export is still to be made, behind nothing
    assert work_left(run, config, data_ready=True)[:3] == [("export", "pretrain"), ("eval", "pretrain"), ("midtrain", None)]
    only = [job for job in jobs if job.title != "pretrain"]
    ids = [job.title for job in only]
    waits = [waits_of(only, number=number, after=None, ids=ids[:number]) for number in range(3)]
    assert waits == [(None, None), ("pretrain.export", None), (None, None)]


def test_kept_checkpoints_are_a_learning_curve_of_tasks(tmp_path):
    def words(tasks, every):
        checkpoint = replace(PHI4.stages[0].stage.checkpoint, keep_every_tokens=every)
        stages = tuple(replace(row, stage=replace(row.stage, checkpoint=checkpoint)) for row in PHI4.stages)
        run = replace(PHI4.run, evaluation=replace(PHI4.run.evaluation, tasks=tasks))
        config = replace(PHI4, run=run, stages=stages)
        return after_job(config, run=RunDir(tmp_path), what="eval", stage="pretrain", code=CODE).words

    assert words(("words",), 1e12)[-1] == "steps=all"
    assert "steps=all" not in (*words((), 1e12), *words(("words",), None))


@pytest.mark.parametrize(("changes", "said"), [
    ({"tasks": ("words",), "task_dir": "/nowhere"}, r"run\.evaluation\.task_dir: found /nowhere"),
    ({"tasks": ("words",), "task_dir": None}, r"run\.evaluation\.tasks: found words.*pip install 'phidias\[train,eval\]'"),
])  # fmt: skip
def test_tasks_that_no_job_could_measure_are_refused(changes, said, monkeypatch):
    monkeypatch.setattr("launcher.jobs.submission.installed", lambda package: None)
    evaluation = replace(PHI4.run.evaluation, **changes)
    with pytest.raises(ConfigError, match=said):
        refuse_unexportable(replace(PHI4, run=replace(PHI4.run, evaluation=evaluation)))


def test_cpu_ranks_ask_for_no_gpus(tmp_path):
    line = stage_job(cluster_of(gpu=None), run=RunDir(tmp_path), stage="pretrain", code=CODE).line(after=None)
    assert not any(word.startswith("--gpus") or word in ("--exclusive", "--mem=0") for word in line)


def test_what_a_site_wants_of_every_job(tmp_path):
    config = cluster_of(
        sbatch_options=("--qos=high", "--reservation=us"), spare_nodes=2, cpu_partition="cpu", setup=("a", "b c")
    )
    line = stage_job(config, run=RunDir(tmp_path), stage="pretrain", code=CODE).line(after=None)
    assert {"--qos=high", "--reservation=us", "--nodes=242", "--no-kill", "--partition=gpu"} <= set(options_of(line))
    assert not any("PHIDIAS_SETUP" in word for word in line)  # the launcher runs it, on every node
    export = after_job(config, run=RunDir(tmp_path / "phi4"), what="export", stage="midtrain", code=CODE).line(after="8")
    assert {"--partition=cpu", "--nodes=1", "--qos=high"} <= set(options_of(export)) and not any(
        w.startswith("--gpus") for w in export
    )
    assert "PHIDIAS_SETUP=a\nb c" in export
    assert export[-4:] == ["export", "phi4", f"runs_dir={tmp_path}", "stage=midtrain"]
    scored = after_job(config, run=RunDir(tmp_path), what="eval", stage="midtrain", code=CODE).line(after=None)
    assert "--gpus-per-node=1" in scored and scored[-1] == "stage=midtrain"
    # 14.7B parameters of four bytes, read and written: not what a login shell's default would give.
    (memory,) = (int(word[6:-1]) for word in export if word.startswith("--mem="))
    assert 2 * 4 * 14.66e9 / 2**30 < memory < 200


def test_the_warning_is_long_enough_to_save(tmp_path):
    def warned(config):
        line = stage_job(config, run=RunDir(tmp_path), stage="pretrain", code=CODE).line(after=None)
        return int(next(word for word in line if word.startswith("--signal=B:USR1@")).rpartition("@")[2])

    assert warned(PHI4) == 300
    slow = replace(PHI4.cluster.operations, checkpoint_gb_per_s=0.5)
    # 14 bytes and more a parameter at half a GB/s are seven minutes, and two are kept.
    assert warned(cluster_of(operations=slow)) > 2 * 400
    with pytest.raises(ConfigError, match=r"cluster\.time_limit: found 8:00; a job keeps 300 s to save.*at least 10 minutes"):
        warned(cluster_of(time_limit="8:00"))


def test_data_as_an_array(tmp_path):
    config = replace(
        cluster_of(cpu_partition="cpu", env={"A": "b c"}), data=replace(PHI4.data, num_machines=64, num_workers=32)
    )
    line = data_job(config, words=["run=phi4", "x='$(id)'"], run=RunDir(tmp_path / "phi4"), code=CODE).line(after=None)
    assert {"--array=0-63", "--cpus-per-task=32", "--partition=cpu"} <= set(options_of(line)) and "A=b c" in line
    assert line[-3:] == [f"{CODE}/slurm/data_prep.sh", "run=phi4", "x='$(id)'"]


def test_a_sweep_as_an_array(tmp_path):
    line = sweep_job([PHI4, PHI4, PHI4], runs=tmp_path / "sweep.json", code=CODE, concurrency=2).line(after="3:4")
    assert {"--array=0-2%2", f"--comment={tmp_path}/sweep.json:elements:{CODE.name}", "--dependency=afterok:3:4"} <= set(
        options_of(line)
    )


@pytest.fixture
def place(tmp_path):
    environment = {"SLURM_JOB_CPUS_PER_NODE": "96(x239),64"}
    config = replace(PHI4, run=replace(PHI4.run, data_dir=str(tmp_path / "data")))
    return place_of(RunDir(tmp_path / "runs" / "phi4"), config, code=tmp_path / "runs/phi4/code/x", environment=environment)


def test_srun_starts_a_task_a_rank(place):
    line = rank_line(WORDS, place=place, nodes=["n1", "n3"], tasks_per_node=8)
    for word in (
        "--nodes=2",
        "--nodelist=n1,n3",
        "--ntasks-per-node=8",
        "--ntasks=16",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=8",
    ):
        assert word in line, word
    assert line[-5:] == [sys.executable, *WORDS] and "--no-kill" not in line
    checks = check_line(WORDS, place=place, nodes=["n1", "n3"], tasks_per_node=1)
    assert "--ntasks=2" in checks and "--kill-on-bad-exit=0" in checks and "--unbuffered" not in checks
    spared = replace(place, cluster=replace(place.cluster, spare_nodes=1))
    assert "--no-kill" in rank_line(WORDS, place=spared, nodes=["n1"], tasks_per_node=8)


@pytest.mark.parametrize(("said", "cores"), [("16", 16), ("16(x4),8", 8), ("", None), ("odd", None)])
def test_cores_of_the_smallest_node(said, cores):
    assert cores_of_node({"SLURM_JOB_CPUS_PER_NODE": said}) == cores


def test_ranks_in_a_container(place, tmp_path):
    made = Container(runtime="pyxis", image="/images/phidias.sqsh", mounts=("/scratch:/scratch",), python="python3")
    inside = replace(place, cluster=replace(place.cluster, container=made))
    line = rank_line(WORDS, place=inside, nodes=["n1"], tasks_per_node=8)
    assert "--container-image=/images/phidias.sqsh" in line and f"--container-workdir={Path.cwd()}" in line
    (mounts,) = (word.partition("=")[2].split(",") for word in line if word.startswith("--container-mounts="))
    run, data = tmp_path / "runs/phi4", tmp_path / "data"
    assert "/scratch:/scratch" in mounts and {f"{run}:{run}", f"{data}:{data}"} <= set(mounts)
    assert not any(str(run / "code") in mount for mount in mounts)  # it comes with the run
    assert line[-8:] == ["env", f"PYTHONPATH={run}/code/x", "PYTHONSAFEPATH=1", "python3", *WORDS]
    other = replace(inside, cluster=replace(inside.cluster, container=replace(made, runtime="apptainer")))
    line = rank_line(WORDS, place=other, nodes=["n1"], tasks_per_node=8)
    start = line.index("apptainer")
    assert line[start : start + 3] == ["apptainer", "exec", "--nv"] and "/images/phidias.sqsh" in line
    assert line[-5:] == ["python3", *WORDS] and not any(word.startswith("--container") for word in line)


def test_one_process_of_a_job_is_in_its_container_too(place, monkeypatch):
    made = Container(runtime="apptainer", image="/i.sif", mounts=(), python="python3")
    inside = replace(place, cluster=replace(place.cluster, container=made, setup=("module load apptainer",)))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert one_process(WORDS, place=inside) == [sys.executable, *WORDS]
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    line = one_process(WORDS, place=inside)
    assert line[:3] == ["srun", "--nodes=1", "--ntasks=1"] and "apptainer" in line and "module load apptainer" in " ".join(line)
    assert one_process(WORDS, place=place) == [sys.executable, *WORDS]


def test_setup_lines_run_first_and_words_reach_no_shell(place, tmp_path):
    """The command behind srun, run: what a rank gets is what was said."""
    setup = ("export SEEN='it is set'", "echo first")
    prepared = replace(place, cluster=replace(place.cluster, setup=setup))
    show = ["-c", "import os, sys; print(os.environ['SEEN'], sys.argv[1:])", "a b", "$(touch pwned)", "it's; & *"]
    line = rank_line(show, place=prepared, nodes=["n1"], tasks_per_node=1)
    command = line[line.index("bash") :]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == ["first", f"it is set {show[2:]}"] and not list(tmp_path.iterdir())
    broken = rank_line(
        show, place=replace(place, cluster=replace(place.cluster, setup=("false",))), nodes=["n1"], tasks_per_node=1
    )
    assert subprocess.run(broken[broken.index("bash") :], capture_output=True).returncode == 1


def test_a_folder_inside_another_comes_with_it():
    assert outermost([Path("/a/b"), Path("/a"), Path("/c"), Path("/a"), Path("/ab")]) == [Path("/a"), Path("/c"), Path("/ab")]


def test_what_slurm_gave_counts():
    smaller = fitted_to(PHI4, replace(GIVEN, nodes=NODES[:120]), overrides=("run=phi4",))
    assert smaller.cluster.world_size == 960
    spared = fitted_to(cluster_of(spare_nodes=16), GIVEN, overrides=("run=phi4",))
    assert spared.cluster.num_nodes == 224


@pytest.mark.parametrize(
    ("config", "changes", "overrides", "said"),
    [
        (PHI4, {"nodes": NODES[:120]}, ("cluster.num_nodes=240",), "the job has 120.*sbatch --nodes=240"),
        (cluster_of(spare_nodes=4), {}, ("cluster.num_nodes=240",), "240, 4 of them spare.*sbatch --nodes=244"),
        (cluster_of(spare_nodes=240), {}, (), "ranks need one.*sbatch --nodes=241"),
        (PHI4, {"tasks_per_node": 1}, (), "sbatch --ntasks-per-node=8"),
    ],
)
def test_what_does_not_fit_the_job_is_refused(config, changes, overrides, said):
    with pytest.raises(ConfigError, match=said):
        fitted_to(config, replace(GIVEN, **changes), overrides=overrides)


def test_a_local_cluster_has_no_jobs():
    with pytest.raises(ConfigError, match=r"cluster\.kind"):
        fitted_to(compose_run(["run=demo"]), replace(GIVEN, tasks_per_node=2), overrides=())


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--config-dir=x", "run=phi4", "a=b"], ["--config-dir=x", "cluster.num_nodes=240", "run=phi4", "a=b"]),
        (["run=phi4", "--config-dir", "x"], ["cluster.num_nodes=240", "run=phi4", "--config-dir", "x"]),
        (["run=phi4", "cluster.spare_nodes=4"], ["cluster.num_nodes=236", "run=phi4", "cluster.spare_nodes=4"]),
        (["run=phi4", "cluster.num_nodes=8"], ["run=phi4", "cluster.num_nodes=8"]),
        ([], ["cluster.num_nodes=240"]),
    ],
)
def test_a_job_composes_for_the_nodes_it_has(words, given):
    assert Start(GIVEN, [], tuple(words)).words_with_nodes() == given


def test_ports_of_jobs_side_by_side_differ():
    assert replace(GIVEN, number=1).port != replace(GIVEN, number=2).port


def test_a_job_carries_its_run_stages_and_code(tmp_path):
    assert (
        job_comment(RunDir(tmp_path), what=("pretrain", "midtrain"), code=CODE) == f"{tmp_path}:pretrain,midtrain:{CODE.name}"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-00:00:00", 86400), ("2-12", 216000), ("1-01:30", 91800),
        ("UNLIMITED", None), ("", None), ("1:2:3:4", None), ("x-1", None),
    ],
)  # fmt: skip
def test_times_as_slurm_writes_them(text, expected):
    assert duration_s(text) == expected


def test_a_job_that_ran_out_of_time_is_told_from_one_that_was_cancelled():
    fields = parse_fields("JobId=7 JobName=a b JobState=COMPLETING RunTime=00:01:05 TimeLimit=00:01:00 Command=/x y=1 z")
    assert fields["JobName"] == "a b" and fields["Command"] == "/x y=1 z" and timed_out(fields)
    assert not timed_out({**fields, "RunTime": "00:00:59"}) and not timed_out({**fields, "TimeLimit": "UNLIMITED"})


JOBS = """JobId=17 ArrayJobId=17 ArrayTaskId=2 JobState=PENDING Comment={0}/sweep.json:elements:abc Restarts=0
JobId=18 ArrayJobId=17 ArrayTaskId=1 JobState=RUNNING Comment={0}/sweep.json:elements:abc Restarts=3
"""


def test_an_element_of_an_array_knows_its_run(tmp_path, monkeypatch):
    rows = [{"run": str(tmp_path / name), "stages": ["midtrain"]} for name in "ab"]
    write_json(tmp_path / "sweep.json", {"runs": rows})
    said = {"hostnames": "n1\nn2\n", "job": JOBS.format(tmp_path)}
    monkeypatch.setattr("launcher.jobs.slurm.slurm_says", lambda *command: said[command[2] if "job" not in command else "job"])
    # Of the job it was submitted from, too: what Slurm says of the job itself counts.
    environment = {
        "SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NTASKS_PER_NODE": "8(x2)", "SLURM_RESTART_COUNT": "9",
    }  # fmt: skip
    given = read_allocation(environment)
    assert (given.job, given.number, given.element, given.restarts) == ("17_1", 18, 1, 3)
    assert given.nodes == ("n1", "n2") and given.tasks_per_node == 8
    assert remembered(given) is None  # nothing is frozen there
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").touch()
    monkeypatch.setattr("launcher.jobs.allocation.read_config", lambda run: PHI4)
    known = remembered(given)
    assert known.run.root == tmp_path / "b" and known.code == tmp_path / "b" / "code" / "abc"
    assert known.config.stage_names == ("midtrain",)
    alone = replace(given, element=None, comment=f"{tmp_path}/b:pretrain,midtrain:abc")
    assert remembered(alone).config.stage_names == ("pretrain", "midtrain")
    assert remembered(replace(alone, comment="a comment of the user's own: 1")) is None


def test_a_new_job_does_not_take_itself_for_the_one_it_was_submitted_from(monkeypatch, tmp_path):
    program = tmp_path / "sbatch"
    program.write_text('#!/bin/sh\necho "${SLURM_ARRAY_JOB_ID-none} ${SLURM_RESTART_COUNT-none} $SLURM_CONF"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"SLURM_ARRAY_JOB_ID": "9", "SLURM_RESTART_COUNT": "4", "SLURM_CONF": "/c"}.items():
        monkeypatch.setenv(name, value)
    assert run_sbatch(["env", "A=b", "sbatch"]) == "none none /c"


SQUEUE = """#!/bin/sh
echo "$@" >&2
{0}
"""


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A squeue that says what it is told, and a run with two jobs."""
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    for job in ("7", "8", "7"):
        append_record(run.events, "start", job=job)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def says(script):
        (tmp_path / "squeue").write_text(SQUEUE.format(script))
        (tmp_path / "squeue").chmod(0o755)
        return run

    return says


def test_jobs_in_the_queue(squeue):
    run = squeue('echo "8 PENDING"')
    assert known_jobs(read_records(run.events)) == ["7", "8"]
    assert queued(run) == {"8": "PENDING"}
    assert queued(squeue('echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')) == {}


def test_a_queue_that_does_not_answer_is_not_empty(squeue, monkeypatch, tmp_path):
    """Else a second submit would queue a live run again."""
    run = squeue('echo "Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(ConfigError, match="Unable to contact slurm controller"):
        queued(run)
    (tmp_path / "squeue").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queued(run) == {}
