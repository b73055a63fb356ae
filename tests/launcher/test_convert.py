"""`phidias checkpoint action=convert` and `phidias stop layout=any`, up to the ranks: those stand in for themselves here, in
tests/endtoend/test_convert.py they convert."""

import os
import signal
import sys
import threading
import time

import pytest

from launcher.cli import main
from launcher.config.compose import compose_run
from launcher.jobs import convert as module
from launcher.plan.prepared import Prepared
from launcher.rundir.checkpoints import DP_RESHARDABLE, FORMAT_VERSION, FULLY_RESHARDABLE, Meta, file_digest, newest_checkpoint
from launcher.rundir.exits import RunStateError
from launcher.rundir.freeze import open_run, read_config
from launcher.rundir.lock import is_live, lock_run
from launcher.rundir.records import append_record, read_json, write_atomic, write_json
from launcher.rundir.reshard import reshard_key
from launcher.rundir.stop import ask_to_stop, person_asked, wants_any_layout

CONVERTS = """
import sys
from pathlib import Path
from launcher.rundir.checkpoints import file_digest
from launcher.rundir.lock import is_live
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_json, write_json

assert is_live(RunDir(Path(sys.argv[1])))
folder = Path(sys.argv[2])
write_json(folder / "meta.json", read_json(folder / "meta.json") | {"sharding": "fully_reshardable"})
append_record(folder.parent / "index.jsonl", "checkpoint", path=folder.name, meta=file_digest(folder / "meta.json"))
"""
FAILS = """
import sys
from pathlib import Path
from launcher.rundir.records import append_record
events = Path(sys.argv[1]) / "events.jsonl"
append_record(events, "fault", stage=sys.argv[3], rank=1, exit="NEEDS_PERSON", error="the disk is full")
sys.exit(13)
"""
SLEEPS = "import sys, time, pathlib; (pathlib.Path(sys.argv[1]) / 'began').touch(); time.sleep(600)"


@pytest.fixture
def phidias(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def call(*words):
        capsys.readouterr()
        code = main(words)
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return call


def trained(*words, stage="demo_pretrain", sharding=DP_RESHARDABLE):
    """A run with a checkpoint."""
    config = compose_run([*words, f"stage={stage}"])
    run = open_run(config, prepared=Prepared())
    path = run.checkpoints(stage) / "step_00000010"
    path.mkdir(parents=True)
    key = reshard_key(config.stage(stage), cluster=config.cluster)
    meta = Meta(
        FORMAT_VERSION, stage, 10, 80, 5120, False, {}, {}, {}, {}, {}, sharding=sharding, reshard=key
    )  # fmt: skip
    write_json(path / "meta.json", vars(meta))
    append_record(path.parent / "index.jsonl", "checkpoint", path=path.name, meta=file_digest(path / "meta.json"))
    return run


@pytest.fixture
def ranks(monkeypatch):
    """What runs in place of torchrun; how it would have been started."""
    asked = {}

    def started_as(script):
        def command(run, *, cluster, stage, flags):
            asked.update(ranks=cluster.world_size, flags=flags, stage=stage)
            return [sys.executable, "-c", script, str(run.root), str(run.checkpoints(stage) / "step_00000010"), stage]

        monkeypatch.setattr(module, "torchrun_command", command)
        return asked

    return started_as


def test_the_list_says_who_can_read_them(phidias):
    trained("layout.pp=2")
    code, out, _ = phidias("checkpoint", "demo")
    assert code == 0 and "tp1 pp2  whole" in out
    trained("run.name=other", sharding=FULLY_RESHARDABLE)
    assert "any     whole" in phidias("checkpoint", "other")[1]


def test_it_is_rewritten_in_its_place(phidias, ranks):
    run, asked = trained("layout.pp=2"), ranks(CONVERTS)
    code, out, _ = phidias("checkpoint", "demo", "action=convert")
    assert (code, asked) == (0, {"ranks": 2, "flags": ["--convert"], "stage": "demo_pretrain"})
    assert "step_00000010 is rewritten for any layout by 2 ranks" in out and "can go on from step_00000010 now" in out
    saved, refused = newest_checkpoint(run, "demo_pretrain")
    assert saved and saved.meta.sharding == FULLY_RESHARDABLE and not refused and not is_live(run)
    assert "any     whole" in phidias("checkpoint", "demo")[1]
    open_run(compose_run(["stage=demo_pretrain", "layout.pp=1"]), prepared=Prepared())


def test_context_and_data_parallel_ranks_are_not_needed(phidias, ranks):
    trained("layout.cp=2"), ranks(CONVERTS)
    assert "by 1 ranks" in phidias("checkpoint", "demo", "action=convert", "stage=demo_pretrain")[1]


@pytest.mark.parametrize("sharding", [FULLY_RESHARDABLE, None])
def test_where_there_is_nothing_to_do(phidias, ranks, sharding):
    asked = ranks(FAILS)
    run = trained(sharding=sharding or DP_RESHARDABLE)
    if sharding is None:
        (run.checkpoints("demo_pretrain") / "index.jsonl").unlink()
    code, out, _ = phidias("checkpoint", "demo", "action=convert")
    assert code == 0 and not asked
    assert ("step_00000010 already" if sharding else "demo_pretrain: no checkpoint") in out


def test_what_the_ranks_say_is_the_exit(phidias, ranks):
    run, _ = trained(), ranks(FAILS)
    code, out, _ = phidias("checkpoint", "demo", "action=convert")
    assert code == 13 and "was not converted: rank 1: the disk is full" in out and "demo_pretrain_convert.log" in out
    saved, _ = newest_checkpoint(run, "demo_pretrain")
    assert saved and saved.meta.sharding == DP_RESHARDABLE


def test_ranks_that_end_well_and_did_nothing_are_found_out(phidias, ranks):
    trained(), ranks("pass")
    code, out, _ = phidias("checkpoint", "demo", "action=convert")
    assert code == 11 and "was not converted: the ranks ended with code 0" in out


def test_a_crash_of_an_earlier_conversion_is_taken_back(phidias, ranks):
    """At every launch, before its checkpoints are looked at."""
    run, asked = trained("layout.pp=2"), ranks(CONVERTS)
    folder = run.checkpoints("demo_pretrain") / "step_00000010"
    folder.rename(folder.with_name("step_00000010.old"))
    with pytest.raises(RunStateError, match="saved in another layout: pp 2 -> 1"):
        open_run(compose_run(["stage=demo_pretrain", "layout.pp=1"]), prepared=Prepared())
    assert folder.exists()
    folder.rename(folder.with_name("step_00000010.old"))
    assert phidias("checkpoint", "demo", "action=convert")[0] == 0 and asked["ranks"] == 2


def test_a_live_run_is_left_alone(phidias, ranks):
    run, asked = trained(), ranks(CONVERTS)
    with lock_run(run):
        code, _, err = phidias("checkpoint", "demo", "action=convert")
    assert code == 3 and "run demo is live" in err and not asked


def test_ctrl_c_ends_the_ranks(phidias, ranks):
    run, _ = trained(), ranks(SLEEPS)

    def press():
        while not (run.root / "began").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    assert phidias("checkpoint", "demo", "action=convert")[0] == 130
    deadline = time.monotonic() + 10
    while is_live(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_live(run)  # nobody holds the lock that they inherited


def test_another_layout_by_now(phidias, ranks):
    """Amended by other means: the ranks would build another model than the checkpoint's."""
    run, asked = trained("layout.pp=2"), ranks(CONVERTS)
    write_atomic(run.config, run.config.read_text().replace("pp: 2", "pp: 1"))
    assert read_config(run).stage("demo_pretrain").layout.pp == 1
    code, _, err = phidias("checkpoint", "demo", "action=convert")
    assert code == 3 and "is of the layout tp1 pp2" in err and "pp 2 -> 1" in err and not asked


def test_gpus_that_are_not_here(phidias, ranks, monkeypatch):
    asked = ranks(CONVERTS)
    words = ["run=phi4", "run.runs_dir=runs", "stage.global_batch_size=3840", "layout.tp=2", "layout.pp=4"]
    run = trained(*words, "layout.sequence_parallel=true", stage="pretrain")
    monkeypatch.setattr(module, "count_gpus", lambda: 2)
    code, _, err = phidias("checkpoint", run.name, "action=convert", "stage=pretrain")
    assert code == 2 and "cluster.gpu: found 2 GPUs here" in err and not asked
    assert f"`srun --gpus=8 phidias checkpoint {run.name} action=convert stage=pretrain`" in err
    assert f"`phidias stop {run.name} layout=any`" in err
    monkeypatch.setattr(module, "count_gpus", lambda: 8)
    assert phidias("checkpoint", run.name, "action=convert", "stage=pretrain")[0] == 0 and asked["ranks"] == 8


@pytest.mark.parametrize(("visible", "count"), [("0,1,3", 3), ("-1", 0), ("GPU-1a,GPU-2b", 2)])
def test_gpus_that_this_process_may_use(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert module.count_gpus() == count


def test_gpus_by_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho 'GPU 1: H100 (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert module.count_gpus() == 2
    smi.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.count_gpus() == 0


def test_a_stop_says_how_to_save(phidias):
    run = trained()
    with lock_run(run):
        code, out, _ = phidias("stop", "demo", "layout=any")
        assert code == 0 and "its ranks save for any layout after this step" in out
        assert wants_any_layout(run) and person_asked(run)
        assert phidias("stop", "demo")[0] == 0  # the last word counts
        assert not wants_any_layout(run) and person_asked(run)
    run.stop_flag.unlink()
    assert "nothing of it is running" in phidias("stop", "demo", "layout=any")[1] and not run.stop_flag.exists()


def test_a_stop_is_never_half_written(phidias, monkeypatch):
    """An empty flag is a person's for any form: what reads it meanwhile finds what was asked before."""
    run = trained()
    ask_to_stop(run, any_layout=True)

    def full(descriptor):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            ask_to_stop(run)
    assert wants_any_layout(run) and not list(run.root.glob(".stop*"))


@pytest.mark.parametrize("words", [["layout=tp1"], ["layout=any", "now=true"]])
def test_a_stop_that_makes_no_sense(phidias, words):
    trained()
    code, _, err = phidias("stop", "demo", *words)
    assert code == 2 and "layout: found" in err


def test_prune_keeps_what_the_config_keeps(phidias):
    run = trained("stage.checkpoint.keep_best=1")
    folder = run.checkpoints("demo_pretrain")
    for step, loss in ((20, 3.0), (30, 1.0), (40, 2.0), (50, 2.0)):
        path = folder / f"step_000000{step}"
        path.mkdir()
        write_json(path / "meta.json", read_json(folder / "step_00000010" / "meta.json") | {"step": step, "samples": step * 8})
        append_record(folder / "index.jsonl", "checkpoint", path=path.name, validation_loss=loss)
    assert phidias("checkpoint", "demo", "action=prune", "keep=1")[0] == 0
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000030", "step_00000050"]
