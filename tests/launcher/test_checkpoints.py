"""Checkpoints on disk without torch: which one is gone on from, which are kept."""

import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launcher.rundir import checkpoints as module
from launcher.rundir.checkpoints import (
    DP_RESHARDABLE,
    FORMAT_VERSION,
    FULLY_RESHARDABLE,
    CheckpointError,
    Meta,
    damages,
    file_digest,
    lost,
    newest_checkpoint,
    prune,
    publish,
    read_checkpoint,
    set_later_aside,
    set_torn_aside,
    stage_end,
    undo_replacing,
)
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_json, replace_folder, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def write(run: RunDir, step: int, *, finished: bool = False, size: int = 10, loss: float | None = None) -> Path:
    directory = run.checkpoints("pretrain")
    path = directory / f"step_{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "shard").write_bytes(b"x" * size)
    meta = Meta(FORMAT_VERSION, "pretrain", step, step * 8, step * 256, finished, {}, {}, {}, {}, {"shard": size})
    write_json(path / "meta.json", vars(meta) | {"digests": {"shard": file_digest(path / "shard")}})
    digest = file_digest(path / "meta.json")
    row = {"path": path.name, "finished": finished, "tokens": step * 256, "validation_loss": loss, "meta": digest}
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
    with pytest.raises(CheckpointError, match="format 99, this version reads up to 2"):
        read_checkpoint(path)


def test_one_of_the_first_format_is_read_as_what_it_was(run: RunDir) -> None:
    path = write(run, 100)
    row = read_json(path / "meta.json")
    added = ("sharding", "reshard", "health", "skipped_samples", "validation_loss")
    write_json(path / "meta.json", {name: value for name, value in row.items() if name not in added} | {"format_version": 1})
    meta = read_checkpoint(path).meta
    assert (meta.sharding, meta.reshard, meta.skipped_samples, meta.validation_loss) == (FULLY_RESHARDABLE, {}, 0, None)


def test_what_was_added_comes_back(run: RunDir) -> None:
    path, added = (
        write(run, 100),
        {"sharding": DP_RESHARDABLE, "reshard": {"tp": 2}, "skipped_samples": 16, "validation_loss": 2.5},
    )
    write_json(path / "meta.json", read_json(path / "meta.json") | added)
    meta = read_checkpoint(path).meta
    assert {name: getattr(meta, name) for name in added} == added


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


def names(run: RunDir) -> list[str]:
    return sorted(path.name.removeprefix("step_000000") for path in run.checkpoints("pretrain").glob("step_*"))


def test_the_best_stay(run: RunDir) -> None:
    """Of lowest held-out loss; those that were not measured, or came to NaN, are not among them."""
    for step, loss in ((10, 2.0), (20, 1.5), (30, None), (40, math.nan), (50, 1.7), (60, 1.9), (70, None)):
        write(run, step, loss=loss)
    prune(run.checkpoints("pretrain"), keep_last=1, keep_best=2)
    assert names(run) == ["20", "50", "70"]
    write(run, 20, loss=3.0)  # again, after a rewind: what it is now counts
    write(run, 80, loss=1.8)
    prune(run.checkpoints("pretrain"), keep_last=1, keep_best=2)
    assert names(run) == ["50", "80"]


def test_a_best_one_that_is_gone_keeps_no_place(run: RunDir) -> None:
    for step, loss in ((10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)):
        write(run, step, loss=loss)
    prune(run.checkpoints("pretrain"), keep_last=3)
    prune(run.checkpoints("pretrain"), keep_last=1, keep_best=1)
    assert names(run) == ["20", "40"]


@pytest.mark.parametrize("writing", ["step_00000030", "step_00000030.partial"])
def test_what_is_being_written_is_no_leftover(run: RunDir, writing: str) -> None:
    write(run, 10)
    for step in (20, 30):
        (run.checkpoints("pretrain") / f"step_000000{step}.partial").mkdir()
    prune(run.checkpoints("pretrain"), keep_last=1, writing=writing)
    assert names(run) == ["10", "30.partial"]


def test_a_rewind_leaves_what_is_later_behind(run: RunDir) -> None:
    for step in (10, 20, 30):
        write(run, step)
    assert set_later_aside(run, "pretrain", samples=10 * 8) == ["step_00000030", "step_00000020"]
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.meta.step == 10 and refused == []
    write(run, 15)
    prune(run.checkpoints("pretrain"), keep_last=9)
    assert names(run) == ["10", "15", "20.rewound", "30.rewound"]  # for a look
    write(run, 20)
    prune(run.checkpoints("pretrain"), keep_last=9)
    assert names(run) == ["10", "15", "20", "30.rewound"]
    assert set_later_aside(run, "pretrain", samples=15 * 8) == ["step_00000020"]  # once more
    write(run, 31)
    prune(run.checkpoints("pretrain"), keep_last=9)
    assert names(run) == ["10", "15", "31"]


def test_what_a_rewind_left_behind_does_not_come_back(run: RunDir) -> None:
    """Neither as the newest one nor as the milestone or the best that it was."""
    for step, loss in ((2, 4.0), (4, 1.0), (6, 2.0)):
        write(run, step, loss=loss)
    set_later_aside(run, "pretrain", samples=2 * 8)
    for step, loss in ((5, 3.0), (7, 3.5)):
        write(run, step, loss=loss)
    prune(run.checkpoints("pretrain"), keep_last=1, keep_every_tokens=1000.0, keep_best=1)
    assert names(run) == ["05", "07"]  # 5 is the first past 1,000 tokens now, and the best
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.meta.step == 7 and refused == []


def test_a_checkpoint_is_not_lost_between_two_renames(run: RunDir) -> None:
    path = write(run, 100)
    path.rename(path.with_name(f"{path.name}.old"))  # a crash, where its successor was to follow
    assert newest_checkpoint(run, "pretrain")[0] is None
    undo_replacing(run)
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.path == path and refused == []


def prepared(run: RunDir, step: int, *, content: bytes = b"new") -> tuple[Path, Path]:
    """A checkpoint that is written and not published yet, and where it belongs."""
    final = run.checkpoints("pretrain") / f"step_{step:08d}"
    partial = final.with_name(f"{final.name}.partial")
    partial.mkdir(parents=True)
    (partial / "shard").write_bytes(content)
    meta = Meta(FORMAT_VERSION, "pretrain", step, step * 8, step * 256, False, {}, {}, {}, {}, {"shard": len(content)})
    write_json(partial / "meta.json", vars(meta))
    return partial, final


class CrashError(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """At the call of that number, of all that change what lies there or make it last; before it has done anything."""
    left = [call]

    def broken(act: Callable[..., Any]) -> Callable[..., Any]:
        def acts(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise CrashError
            return act(*args, **kwargs)

        return acts

    monkeypatch.setattr(Path, "rename", broken(Path.rename))
    monkeypatch.setattr(module, "append_record", broken(append_record))
    monkeypatch.setattr("shutil.rmtree", broken(shutil.rmtree))
    monkeypatch.setattr("os.fsync", broken(os.fsync))


@pytest.mark.parametrize("before", ["nothing", "another step", "the same step", "an older one", "nobody's", "rewound", "gone"])
@pytest.mark.parametrize("call", range(7))
def test_a_crash_while_one_is_published_costs_none_before_it(run: RunDir, monkeypatch: Any, before: str, call: int) -> None:
    """And what is gone on from then is whole: the new one, or what was there; a stage without any begins anew. Published again
    it is the newest."""
    if before != "nothing":
        write(run, 100 if before != "another step" else 50)
    index = run.checkpoints("pretrain") / "index.jsonl"
    if before == "an older one":
        index.write_text("")
        append_record(index, "checkpoint", path="step_00000100", finished=False)
    elif before == "nobody's":
        index.unlink()
    elif before in ("rewound", "gone"):
        write(run, 50)
        set_later_aside(run, "pretrain", samples=50 * 8) if before == "rewound" else None
        shutil.rmtree(run.checkpoints("pretrain") / "step_00000100", ignore_errors=True)
    kept, _ = newest_checkpoint(run, "pretrain")
    partial, final = prepared(run, 100)
    with monkeypatch.context() as patch:
        crash_at(patch, call)
        with suppress(CrashError):
            publish(partial, final, row={"samples": 800, "tokens": 25600, "finished": False})
    undo_replacing(run)
    saved, refused = newest_checkpoint(run, "pretrain")
    assert not refused and (saved is not None or kept is None)
    if saved and saved.path == final:
        assert kept is not None or (final / "shard").read_bytes() == b"new"
    shutil.rmtree(partial, ignore_errors=True)
    publish(*prepared(run, 100, content=b"newer"), row={"samples": 800, "tokens": 25600, "finished": False})
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and not refused and (saved.path / "shard").read_bytes() == b"newer"
    assert not list(run.checkpoints("pretrain").glob("*.old"))


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(run: RunDir, monkeypatch: Any) -> None:
    path = write(run, 100)
    partial, final = prepared(run, 100)
    rename = Path.rename

    def refuses(self: Path, target: Path) -> Path:
        if self == partial:
            raise OSError("stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(OSError, match="stale"):
        publish(partial, final, row={})
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.path == path and refused == [] and (path / "shard").read_bytes() == b"x" * 10


def test_digests_from_before_a_rewind_count_no_more(run: RunDir) -> None:
    write(run, 10)
    path = write(run, 20)
    set_later_aside(run, "pretrain", samples=10 * 8)
    left = path.with_name(f"{path.name}.rewound")
    publish(*prepared(run, 20), row={})
    shutil.rmtree(path)
    left.rename(path)
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.meta.step == 10 and "not the one that this run wrote" in refused[0]


def test_folders_that_the_index_does_not_name_are_none(run: RunDir) -> None:
    """Pruning counts by the index: three that a crash left there do not cost the two that are kept."""
    for step in (10, 20, 30):
        write(run, step)
    for step in (40, 50, 60):
        partial, final = prepared(run, step)
        partial.rename(final)
    assert prune(run.checkpoints("pretrain"), keep_last=2) == ["step_00000010"]
    assert names(run) == ["20", "30", "40", "50", "60"]
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.meta.step == 30 and refused == []
    publish(*prepared(run, 40), row={"samples": 320, "tokens": 10240, "finished": False})
    assert prune(run.checkpoints("pretrain"), keep_last=2) == ["step_00000020"]
    assert set_later_aside(run, "pretrain", samples=240) == ["step_00000040"]


def test_a_stage_that_has_lost_its_checkpoints_says_so(run: RunDir) -> None:
    assert lost(run, "pretrain") == [] and newest_checkpoint(run, "pretrain") == (None, [])
    first, second = write(run, 10), write(run, 20)
    shutil.rmtree(second)
    assert lost(run, "pretrain") == []
    shutil.rmtree(first)
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved is None and refused == lost(run, "pretrain") and "names step_00000020, and no checkpoint" in refused[0]
    write(run, 10)
    write(run, 20)
    set_later_aside(run, "pretrain", samples=0)
    assert newest_checkpoint(run, "pretrain") == (None, [])  # all were rewound: it does begin anew


@pytest.mark.parametrize("told", [True, False])
def test_one_broken_file_does_not_stop_what_is_kept_and_left(run: RunDir, told: bool) -> None:
    """The index tells what meta.json cannot. What nothing tells of is left alone."""
    index = run.checkpoints("pretrain") / "index.jsonl"
    for step in (10, 20, 30, 40):
        path = write(run, step)
        if step in (10, 40):
            (path / "meta.json").write_text("{")
            if not told:
                index.write_text("".join(line + "\n" for line in index.read_text().splitlines() if path.name not in line))
                append_record(index, "checkpoint", path=path.name)
            else:
                append_record(index, "checkpoint", path=path.name, samples=step * 8, tokens=step * 256, finished=False)
    assert set_later_aside(run, "pretrain", samples=30 * 8) == (["step_00000040"] if told else [])
    removed = prune(run.checkpoints("pretrain"), keep_last=1 if told else 2)
    assert removed == (["step_00000010", "step_00000020"] if told else ["step_00000020"])


def test_what_was_being_removed_is_a_leftover(run: RunDir) -> None:
    """It has no meta.json any more, or other files."""
    write(run, 20)
    (run.checkpoints("pretrain") / "step_00000010.pruned").mkdir()
    prune(run.checkpoints("pretrain"), keep_last=1)
    assert names(run) == ["20"]


def test_an_index_names_steps_alone(run: RunDir) -> None:
    """Whatever else stands in it: nothing outside of its folder is read or removed for it."""
    for step in (10, 20, 30):
        write(run, step)
    outside = run.root / "kept"
    shutil.copytree(run.checkpoints("pretrain") / "step_00000010", outside)
    index = run.checkpoints("pretrain") / "index.jsonl"
    append_record(index, "checkpoint", path="../../kept", finished=False)
    append_record(index, "checkpoint", finished=False)
    saved, refused = newest_checkpoint(run, "pretrain")
    assert saved and saved.meta.step == 30 and refused == []
    assert prune(run.checkpoints("pretrain"), keep_last=1) == ["step_00000010", "step_00000020"] and outside.exists()


def test_one_that_cannot_be_removed_does_not_stop_the_next(run: RunDir, monkeypatch: Any) -> None:
    for step in (10, 20, 30):
        write(run, step)
    rename = Path.rename

    def refuses(self: Path, target: Path) -> Path:
        if self.name == "step_00000010":
            raise OSError("stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    assert prune(run.checkpoints("pretrain"), keep_last=1) == ["step_00000020"]
    assert names(run) == ["10", "30"]
