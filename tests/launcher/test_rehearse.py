"""`phidias rehearse` before and after the device is taken: refusals, what a measurement comes to, who reads it."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.jobs import rehearse as job
from launcher.jobs.inspect_node import SmiError
from launcher.plan.document import plan_document
from launcher.plan.memory import GIB
from launcher.plan.page import print_plan
from launcher.plan.parameters import count_by_stage, flops_by_stage, flops_per_token
from launcher.plan.rehearsal import compare_memory, compare_times, net_times, predicted_times, rank_flops, rehearsal_document
from launcher.plan.rehearsed import FOLDER, NEEDED, read_rehearsals
from launcher.plan.stage import plan_stage
from launcher.plan.timing import Timing
from launcher.report.rehearsal_page import print_rehearsal
from launcher.rundir.exits import ExitClass, RunStateError
from launcher.rundir.freeze import open_run
from launcher.rundir.paths import RunDir
from launcher.verbs import rehearse as verb
from launcher.verbs.request import Request
from tests.training import tiny

PHI4 = compose_run(["run=phi4", "stage=pretrain"])
STAGE = PHI4.stages[0]
COUNT = plan_stage(STAGE, cluster=PHI4.cluster).num_microbatches


def step(seconds, *, stand_in=0.0):
    """A step that has so many seconds of its own."""
    inside = {"forward": stand_in, "backward": 0.0, "other": 0.0}
    return {
        "step_s": seconds + stand_in, "gradients_s": seconds - 0.1 + stand_in, "update_s": 0.1, "optimizer_s": 0.05,
        "forward_s": seconds / 4 + stand_in, "backward_s": seconds / 2, "stand_in_s": inside, "loss": None, "grad_norm": 1.0,
        "peak_bytes": 1,
    }  # fmt: skip


def measured(*steps, pipeline_stage=1, **changes):
    sizes = dict(weights=7.0, gradients=14.0, optimizer=1.0, held_besides=0.25, activations=20.0, slack=1.0, context=0.5)
    return {
        "rank": 960, "world_size": 1920, "pipeline_stage": pipeline_stage, "tp_rank": 0, "cp_rank": 0, "dp_rank": 0,
        "device": "NVIDIA H100 80GB HBM3", "packages": {}, "num_microbatches": COUNT, "warmup_steps": 3, "data": "random",
        "steps": list(steps) or [step(2.0)], "problems": [], "num_params": 1, "kernels": None,
        "memory_bytes": {**{name: size * GIB for name, size in sizes.items()}, "peak": sum(sizes.values()) * GIB}, **changes,
    }  # fmt: skip


def request(config, **options):
    return Request(config, (), options, False)


# Refusals


@pytest.mark.parametrize(("rank", "steps", "words"), [("1920", "5", ["rank: found 1920"]), ("-1", "5", ["rank: found -1"]),
                                                      ("one", "0", ["rank: found one", "steps: found 0"])])  # fmt: skip
def test_ranks_and_steps_that_are_none_are_refused(rank, steps, words):
    with pytest.raises(ConfigError) as refused:
        job.read_asked({"rank": rank, "steps": steps}, config=PHI4)
    assert all(word in str(refused.value) for word in words)
    assert "0 to 1919" in str(refused.value)


def test_what_is_not_said_is_the_first_rank():
    assert job.read_asked({}, config=PHI4) == job.Asked(0, 5, False, False)
    asked = job.read_asked({"rank": "1919", "steps": "1", "data": "real", "profile": "true"}, config=PHI4)
    assert asked == job.Asked(1919, 1, True, True)


@pytest.mark.parametrize(
    ("gpus", "found"),
    [
        (SmiError("nvidia-smi does not start"), "h100_sxm, and no GPU here (nvidia-smi does not start)"),
        ([], "h100_sxm, and no GPU here"),
        (["NVIDIA H200"], "this machine has NVIDIA H200"),
        (["NVIDIA H100 80GB HBM3"], None),
        (["A device of 2031"], None),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(monkeypatch, gpus, found):
    def read_gpus():
        if isinstance(gpus, Exception):
            raise gpus
        return [{"name": name} for name in gpus]

    monkeypatch.setattr(job, "read_gpus", read_gpus)
    monkeypatch.setattr(job, "installed", lambda package: "1.0")
    monkeypatch.setattr(verb, "run_rehearsal", lambda *_, **__: job.Ended(7, None, None))
    if found is None:
        assert verb.act(request(PHI4)) == 7
        return
    with pytest.raises(ConfigError) as refused:
        verb.act(request(PHI4))
    assert found in str(refused.value) and "cluster.gpu" in str(refused.value)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(job, "installed", lambda package: None)
    assert [problem.path for problem in job.lacks_packages(PHI4)] == ["torch", "megatron-core", "transformer-engine"]
    on_cpu = replace(PHI4, cluster=replace(PHI4.cluster, gpu=None))
    assert [problem.path for problem in job.lacks_packages(on_cpu)] == ["torch", "megatron-core"]


def test_real_rows_whose_length_nobody_knows_are_refused():
    layout = replace(STAGE.layout, cp=2)
    apart = replace(STAGE, layout=layout, stage=replace(STAGE.stage, reset_attention_mask=True))
    (problem,) = job.lacks_shapes(apart, config=PHI4)
    assert problem.fix == "data=random"
    assert not list(job.lacks_shapes(STAGE, config=PHI4))
    assert not list(job.lacks_shapes(replace(apart, layout=replace(layout, pp=1)), config=PHI4))


def test_a_stage_that_does_not_fit_is_said_and_let_pass(capsys):
    stage = replace(STAGE, layout=replace(STAGE.layout, tp=1, pp=1, vpp=1, tp_comm_overlap=False, sequence_parallel=False))
    verb.warn_unfit(stage, config=PHI4)
    assert "a GPU has 79" in capsys.readouterr().err
    verb.warn_unfit(STAGE, config=PHI4)
    assert capsys.readouterr().err == ""


# What a measurement comes to


def test_flops_of_the_stages_add_up_to_the_models():
    for config in (PHI4, compose_run(["run=demo", "stage=demo_pretrain"])):
        for layout in (STAGE.layout, replace(STAGE.layout, pp=1, vpp=1)):
            whole = flops_per_token(config.model, seq_length=4096)
            rows = flops_by_stage(config.model, layout=layout, seq_length=4096)
            assert len(rows) == layout.pp
            for name, value in whole.items():
                assert sum(row[name] for row in rows) == pytest.approx(value, rel=1e-12)


def test_flops_of_a_rank_are_of_its_part():
    first, last = (rank_flops(index, config=PHI4, stage=STAGE) for index in (0, 1))
    logits = 6 * PHI4.model.padded_vocab_size * PHI4.model.hidden_size * 4096 / 2
    assert last["causal"] - first["causal"] == pytest.approx(logits)
    assert first["full"] > first["causal"]
    counts = count_by_stage(PHI4.model, layout=STAGE.layout)
    assert first["sixn"] == pytest.approx(6 * counts[0].total * 4096, rel=1e-3)  # norms are on each tensor-parallel rank


def test_medians_have_no_stand_ins_in_them():
    times = net_times(measured(step(2.0, stand_in=0.5), step(2.1, stand_in=0.1), step(3.0)))
    assert times["step_s"] == pytest.approx(2.1) and times["spread"] == pytest.approx(1.0 / 2.1)
    assert times["microbatch_s"] == pytest.approx(2.05 / COUNT)
    assert times["forward_s"] == pytest.approx(2.1 / 4 / COUNT) and times["stand_in_s"] == 0.1


def test_what_is_predicted_is_what_the_rank_computes():
    timing = Timing(STAGE, model=PHI4.model, cluster=PHI4.cluster, hardware=PHI4.hardware)
    predicted = predicted_times(1, config=PHI4, stage=STAGE, count=COUNT)
    work = timing.work[1]
    assert predicted["microbatch"] == pytest.approx(work.total - work.tp - work.cp - work.contention)
    assert predicted["step"] == pytest.approx(COUNT * predicted["microbatch"] + timing.optimizer_s)
    assert predicted["step"] < timing.step.total


def test_a_rank_as_fast_as_planned_differs_in_nothing():
    predicted = predicted_times(1, config=PHI4, stage=STAGE, count=COUNT)
    row = step(predicted["step"]) | {
        "forward_s": predicted["forward"] * COUNT,
        "backward_s": predicted["backward"] * COUNT,
        "optimizer_s": predicted["optimizer"],
    }
    kernels = {"gemm": predicted["gemm"] * COUNT, "attention": predicted["attention"] * COUNT, "stand_in": 1.0}
    kernels["other"] = predicted["memory"] * COUNT + predicted["optimizer"]
    found = measured(row, kernels=kernels)
    rows = compare_times(found, times=net_times(found), config=PHI4, stage=STAGE)
    assert [row.name for row in rows] == [
        "forward", "backward", "microbatch", "optimizer", "step", "gemm", "attention", "other kernels",
    ]  # fmt: skip
    assert all(abs(row.difference) < 1e-9 for row in rows)


def test_memory_is_compared_by_component_without_nccl():
    rows = {row.name: row for row in compare_memory(measured(), config=PHI4, stage=STAGE)}
    assert rows["weights"].measured == pytest.approx(7.0) and rows["weights"].predicted == pytest.approx(6.8, abs=0.3)
    assert rows["optimizer"].predicted < 1
    assert rows["held besides"].predicted == 0 and rows["held besides"].difference is None
    planned = plan_document(PHI4)[0]["memory_gib"]["by_stage"][1]
    nccl = planned["by_component"]["communication buffers"]
    assert rows["peak"].predicted == pytest.approx(planned["total"] - nccl)
    others = sum(row.predicted for name, row in rows.items() if name != "peak")
    assert others == pytest.approx(rows["peak"].predicted), "every component of the plan has a row"


def test_speed_is_of_the_whole_model():
    document = rehearsal_document(measured(), config=PHI4, stage=STAGE, date="2026-11-22", off=[])
    speed, whole = document["speed"], flops_per_token(PHI4.model, seq_length=4096)
    assert speed["tflops"]["causal"] * 1e12 / whole["causal"] == pytest.approx(speed["tokens_per_s"])
    assert speed["mfu"] == pytest.approx(speed["tflops"]["causal"] / 989.4, rel=1e-3)
    # Half of the ranks hold the head; were all as this one, so many tokens a second would pass through each of four.
    tokens = COUNT * 4096 / 4
    assert speed["tokens_per_s"] * 2.0 == pytest.approx(tokens, rel=0.05)


def test_the_page_says_all_of_it():
    document = rehearsal_document(measured(problems=["loss is nan in timed step 1"]), config=PHI4, stage=STAGE,
                                  date="2026-11-22", off=[verb.OVERLAP])  # fmt: skip
    console = Console(file=io.StringIO(), width=160)
    print_rehearsal(document, console=console)
    text = console.file.getvalue()
    for words in ("rank 960 of 1,920", "pipeline stage 1", "activations", "MFU (causal)", "planned besides", "bubble",
                  "communication buffers", "tp_comm_overlap", "loss is nan"):  # fmt: skip
        assert words in text


# Who reads it


def test_a_measurement_is_read_back_and_shown_by_plan(tmp_path, capsys):
    config = replace(PHI4, run=replace(PHI4.run, runs_dir=str(tmp_path)))
    document = verb.keep(job.Ended(0, measured(), "a table\n"), config=config, stage=STAGE)
    assert "written: " in capsys.readouterr().err
    (found,) = read_rehearsals(config, stage=STAGE)
    assert found == {key: document[key] for key in NEEDED}
    assert [path.suffixes for path in sorted((tmp_path / "phi4" / FOLDER).iterdir())] == [[".json"], [".kernels", ".txt"]]
    console = Console(file=io.StringIO(), width=200)
    print_plan(config, stages=plan_document(config), console=console)
    assert "rehearsed" in console.file.getvalue() and "ms a microbatch, 43.8 GiB" in console.file.getvalue()
    other = replace(STAGE, layout=replace(STAGE.layout, micro_batch_size=2))
    assert read_rehearsals(config, stage=other) == []


def test_a_run_begins_where_it_was_rehearsed(tmp_path):
    config = tiny.run_config(tmp_path)
    run = RunDir(tmp_path / "runs" / "tiny")
    (run.root / FOLDER).mkdir(parents=True)
    (run.root / FOLDER / "pretrain.json").write_text("{}")
    open_run(config, prepared=None)
    assert run.config.exists() and (run.root / FOLDER / "pretrain.json").exists()


def test_rehearsals_beside_someone_elses_files_do_not_make_a_run(tmp_path):
    root = tmp_path / "runs" / "tiny"
    (root / FOLDER).mkdir(parents=True)
    (root / "thesis.tex").touch()
    with pytest.raises(RunStateError, match=r"holds thesis\.tex and no config"):
        open_run(tiny.run_config(tmp_path), prepared=None)


def test_a_rank_of_many_is_rehearsed_in_a_process_of_its_own(tmp_path, capsys):
    stage = tiny.stage_config(layout={"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}, stage={"global_batch_size": 960})
    config = tiny.run_config(tmp_path, ranks=1920, stages=[stage])
    assert verb.act(request(config, rank="1919", steps="2", profile="true", out="json")) == ExitClass.DONE
    (document,) = json.loads(capsys.readouterr().out)
    assert document["measured"]["pipeline_stage"] == document["pipeline_stage"] == 1
    assert document["measured"]["world_size"] == 1920 and len(document["measured"]["steps"]) == 2
    names = {row["name"] for row in document["compared"]}
    assert {"weights", "gradients", "optimizer", "peak", "microbatch", "gemm"} <= names
    (found,) = read_rehearsals(config, stage=config.stages[0])
    assert found["microbatch_s"] == document["microbatch_s"] > 0
    (planned,) = plan_document(config)
    assert planned["rehearsals"] == [found]
    assert len(list((tmp_path / "runs" / "tiny" / FOLDER).glob("*.kernels.txt"))) == 1
    open_run(config, prepared=None)


def test_a_process_that_fails_measures_nothing(tmp_path):
    config = tiny.run_config(tmp_path)
    broken = replace(config, model=replace(config.model, num_attention_heads=3))
    assert verb.act(request(broken)) != ExitClass.DONE
    assert not (tmp_path / "runs").exists()
