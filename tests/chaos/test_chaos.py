"""Two faults of every kind that needs no Slurm, in one run: it gets over each, and ends as a run that nothing happened to.
Nodes that go down are in tests/slurm/test_faults.py, more of everything in `make chaos`."""

import pytest

from launcher.rundir.records import append_record
from tests.chaos.faults import FAULTS
from tests.chaos.proof import calm_run, differences, unlike_losses, wrong_windows
from tests.chaos.storm import Storm
from tests.endtoend.workspace import Workspace

SEED = 7
# What is damaged while no rank is up costs no restart of its own.
BLOWS = (
    ("kill -9 of a rank", "checkpoint truncated"),
    ("rendezvous lost", "checkpoint bit flipped"),
    ("SIGTERM to a rank", "shard truncated"),
    ("SIGTERM to the launcher", "shard bit flipped"),
    ("kill -9 of a rank",),
    ("rendezvous lost",),
    ("SIGSTOP of a rank",),
    ("SIGSTOP of a rank",),
    ("disk full",),
    ("disk full",),
    ("NaN once",),
    ("NaN of a batch",),
    ("gradient norm",),
    ("loss spike",),
    ("loss spike",),
    ("slow rank",),
    ("slow rank",),
    ("slow read",),
)


@pytest.fixture
def workspace(tmp_path):
    made = Workspace(tmp_path, run="storm")
    made.config("data")
    return made


def test_a_run_gets_over_every_fault_and_ends_as_if_undisturbed(workspace):
    storm = Storm(workspace, seed=SEED)
    for outcome in storm.drive([tuple(FAULTS[kind] for kind in blow) for blow in BLOWS]):
        assert outcome.survived, outcome
    assert differences(storm.run_dir, calm_run(workspace, words=storm.words).run_dir) == []


ORDER = {sample: ("prose", 0, 64 * sample) for sample in range(4)}


@pytest.mark.parametrize(
    ("reads", "found"),
    [
        ([(0, [0, 1]), (2, [2, 3])], []),
        ([(0, [0, 1]), (0, [0, 1]), (2, [2, 3])], []),  # taken again after a restart
        ([(0, [0, 1])], ["sample 2 was never read", "sample 3 was never read"]),
        ([(0, [0, 1]), (2, [2, 2])], [f"sample 3: read {list(ORDER[2])}, not {ORDER[3]}", "a window was trained on twice"]),
    ],
)
def test_windows_that_are_missing_or_others_are_told(tmp_path, reads, found):
    for first, samples in reads:
        append_record(tmp_path / "windows.jsonl", "windows", first_sample=first, windows=[ORDER[sample] for sample in samples])
    assert wrong_windows(tmp_path, order=ORDER, skipped=set()) == found


def test_windows_that_were_left_out_need_not_be_read(tmp_path):
    append_record(tmp_path / "windows.jsonl", "windows", first_sample=0, windows=[ORDER[0], ORDER[1]])
    assert wrong_windows(tmp_path, order=ORDER, skipped={2, 3}) == []


def test_a_step_counts_as_it_was_taken_last(tmp_path):
    runs = {"stormy": [(1, 0.5), (2, 0.25), (2, 0.125)], "calm": [(1, 0.5), (2, 0.25)]}
    for name, rows in runs.items():
        (tmp_path / name).mkdir()
        for step, loss in rows:
            append_record(tmp_path / name / "metrics.jsonl", "train", step=step, loss=loss)
    assert unlike_losses(tmp_path / "stormy", tmp_path / "calm") == ["2: 0.125, not 0.25"]
