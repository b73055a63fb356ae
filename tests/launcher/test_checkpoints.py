"""Checkpoints on disk without torch: which one is gone on from, which are kept."""

from pathlib import Path

import pytest

from launcher.rundir.checkpoints import (
    FORMAT_VERSION,
    CheckpointError,
    Meta,
    damages,
    file_digest,
    newest_checkpoint,
    prune,
    read_checkpoint,
    set_torn_aside,
    stage_end,
)
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_json, replace_folder, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def write(run: RunDir, step: int, *, finished: bool = False, size: int = 10) -> Path:
    directory = run.checkpoints("pretrain")
    path = directory / f"step_{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "shard").write_bytes(b"x" * size)
    meta = Meta(FORMAT_VERSION, "pretrain", step, step * 8, step * 256, finished, {}, {}, {}, {}, {"shard": size})
    write_json(path / "meta.json", vars(meta) | {"digests": {"shard": file_digest(path / "shard")}})
    digest = file_digest(path / "meta.json")
    row = {"path": path.name, "finished": finished, "tokens": step * 256, "meta": digest}
    append_record(directory / "index.jsonl", "checkpoint", **row)
    return path


def tear(path: Path) -> None:
    (path / "shard").write_bytes(b"x")


def test_the_newest_whole_one_is_found_and_why_others_are_not(run: RunDir) -> None:
    write(run, 100)
    tear(write(run, 200))
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.meta.step == 100
    assert len(refused) == 1 and "found 1 bytes, written with 10; the checkpoint is torn" in refused[0]


def test_a_step_written_again_is_as_new_as_its_last_writing(run: RunDir) -> None:
    for step, finished in ((100, False), (200, False), (120, False), (200, True)):
        write(run, step, finished=finished)
    saved, _ = newest_checkpoint(run, "pretrain")
    assert saved and saved.meta.step == 200 and saved.meta.finished


def test_torn_ones_set_aside_cost_no_good_one(run: RunDir) -> None:
    good, torn = write(run, 100), write(run, 200)
    tear(torn)
    set_torn_aside(run, "pretrain")
    newest = write(run, 120)
    prune(run.checkpoints("pretrain"), keep_last=1)
    assert newest.exists() and not good.exists() and not torn.exists()
    assert torn.with_name(torn.name + ".torn").exists()
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.meta.step == 120 and refused == []


def test_pruning_keeps_the_last_and_the_ends(run: RunDir) -> None:
    end = write(run, 1, finished=True)
    for step in (2, 3, 4):
        write(run, step)
    leftover = run.checkpoints("pretrain") / "step_00000005.partial"
    leftover.mkdir()
    prune(run.checkpoints("pretrain"), keep_last=2)
    names = sorted(path.name for path in run.checkpoints("pretrain").glob("step_*"))
    assert names == [end.name, "step_00000003", "step_00000004"]


def test_an_end_counts_for_the_horizon_it_reached(run: RunDir) -> None:
    write(run, 100, finished=True)
    assert stage_end(run, "pretrain", num_samples=800)
    assert stage_end(run, "pretrain", num_samples=801) is None


def test_another_format_is_named_as_such(run: RunDir) -> None:
    path = write(run, 1)
    write_json(path / "meta.json", {**read_json(path / "meta.json"), "format_version": 99, "new": 1})
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        read_checkpoint(path)


def test_replacing_a_folder_leaves_the_new_one_alone(tmp_path: Path) -> None:
    new, final = tmp_path / "new", tmp_path / "final"
    for folder in (new, final):
        folder.mkdir()
        (folder / folder.name).touch()
    replace_folder(new, final)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in final.iterdir()] == ["new"]


def test_content_that_was_changed_is_found(run: RunDir) -> None:
    """Of the same size: only its digest tells."""
    path = write(run, 100)
    saved = read_checkpoint(path)
    assert damages(saved) == []
    (path / "shard").write_bytes(b"x" * 9 + b"y")
    assert damages(saved) == [f"{path / 'shard'}: its content is not what was written; the checkpoint is damaged"]
    assert damages(saved, names=[]) == []
    (path / "shard").unlink()
    assert "No such file" in damages(saved)[0]


def test_a_checkpoint_that_this_run_did_not_write_is_refused(run: RunDir) -> None:
    """Put in place of another with a meta.json of its own."""
    write(run, 100)
    path = write(run, 200)
    write_json(path / "meta.json", read_json(path / "meta.json") | {"samples": 7})
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.meta.step == 100 and "not the one that this run wrote" in refused[0]


def test_what_is_known_to_be_damaged_is_passed_over_and_set_aside(run: RunDir) -> None:
    good, bad = write(run, 100), write(run, 200)
    saved, refused = newest_checkpoint(run, "pretrain", passing={bad.name})
    assert saved and saved.path == good and refused == []
    set_torn_aside(run, "pretrain", damaged={bad.name})
    assert good.exists() and not bad.exists() and bad.with_name(f"{bad.name}.torn").exists()


def test_milestones_stay(run: RunDir) -> None:
    """The first checkpoint past every 1,000 tokens: one that was pruned long ago does not make the next one a milestone."""
    for step in (2, 4, 5, 6, 8, 9, 10):  # of 256 tokens each
        write(run, step)
        removed = prune(run.checkpoints("pretrain"), keep_last=1, keep_every_tokens=1000.0)
    names = sorted(path.name for path in run.checkpoints("pretrain").glob("step_*"))
    assert names == ["step_00000004", "step_00000008", "step_00000010"] and removed == ["step_00000009"]


def test_an_older_checkpoint_without_digests_is_read(run: RunDir) -> None:
    path = write(run, 100)
    row = read_json(path / "meta.json")
    del row["digests"]
    write_json(path / "meta.json", row)
    (run.checkpoints("pretrain") / "index.jsonl").unlink()
    append_record(run.checkpoints("pretrain") / "index.jsonl", "checkpoint", path=path.name, finished=False)
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and refused == [] and damages(saved) == []
