"""`phidias sync` of offline runs, to a service on this machine that keeps what it is sent, and to one that is not there."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.report.dashboard import plan_dashboard
from launcher.rundir.paths import RunDir
from launcher.rundir.records import write_json
from launcher.verbs.wandb_service import PUBLIC_URL, service_url
from tests.launcher.wandb_service import KEY, service, write_offline


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where a run was started twice, and the names it has logged."""
    root = tmp_path_factory.mktemp("offline")
    return root, write_offline(root, parts=2)


@pytest.fixture
def run(written, tmp_path, monkeypatch):
    """A copy of it in the working directory, and nothing of this machine's W&B."""
    shutil.copytree(written[0] / "runs", tmp_path / "runs", symlinks=True)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of `discard`: nobody is there
    monkeypatch.chdir(tmp_path)
    return RunDir(tmp_path / "runs" / "tiny")


def logs(run):
    return sorted(run.wandb.glob("offline-run-*/run-*.wandb"))


def marked(run):
    return [path.with_suffix(".wandb.synced").exists() for path in logs(run)]


def rows_of(run):
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(row["samples"], row["loss"]) for row in rows if row["kind"] == "train"]


def tear(log):
    """As a crash would: the record of its end is cut off in the middle."""
    log.write_bytes(log.read_bytes()[:-10])


def test_all_parts_become_one_run_in_order_and_once(run, monkeypatch, capfd):
    tear(logs(run)[0])
    with service() as wandb:
        monkeypatch.setenv("WANDB_BASE_URL", wandb.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_MODE", "offline")  # as the job had it
        write_json(run.status, {"state": "running"})
        assert main(["sync", "tiny"]) == 0  # the second part is being written
        assert marked(run) == [True, False]
        assert "is still being written" in capfd.readouterr().out
        write_json(run.status, {"state": "stopped"})
        assert main(["sync", "tiny"]) == 0 and marked(run) == [True, True]
        name = (run.wandb / "phidias_run_id").read_text()
        assert f"1 of 1 parts uploaded to run {name}" in capfd.readouterr().out
        (name_there,) = wandb.history
        lines = [wandb.history[name][place] for place in sorted(wandb.history[name])]
        calls = len(wandb.calls)
        assert main(["sync", "tiny"]) == 0 and len(wandb.calls) == calls
    assert name_there == name and sorted(wandb.history[name]) == list(range(len(lines)))
    trained = [(row["pretrain/samples"], row["pretrain/train/loss"]) for row in lines if "pretrain/train/loss" in row]
    assert trained == rows_of(run) and len(trained) == 6
    steps = [row["_step"] for row in lines]
    assert steps == sorted(set(steps))
    assert "all 2 parts are uploaded" in capfd.readouterr().out
    assert not Path("wandb").exists()


def test_nothing_is_begun_without_a_network(run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert main(["sync", "tiny"]) == 11 and marked(run) == [False, False]
    assert "does not answer: [Errno 111] Connection refused. Nothing was uploaded" in capsys.readouterr().err


def test_nothing_is_begun_without_a_key(run, tmp_path, monkeypatch, capsys):
    assert main(["sync", "tiny"]) == 2
    error = capsys.readouterr().err
    assert "no key for http://127.0.0.1:9 in the environment" in error and "`wandb login`" in error
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    assert main(["sync", "tiny"]) == 11  # the key is there, the network is not


def test_a_run_that_logged_nothing_offline_is_refused(run, capsys):
    for path in logs(run):
        path.unlink()
    assert main(["sync", "tiny"]) == 2
    assert "no offline data, and monitor.wandb.mode=offline" in capsys.readouterr().err
    text = run.config.read_text()
    run.config.write_text(text.replace("mode: offline", "mode: online"))
    assert main(["sync", "tiny"]) == 2
    assert "W&B has had it all along" in capsys.readouterr().err


def test_the_newest_part_of_a_live_run_is_left(run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    logs(run)[0].with_suffix(".wandb.synced").touch()
    with run.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["sync", "tiny"]) == 0
    out = capsys.readouterr().out
    assert f"{logs(run)[1].parent.name} is still being written" in out and "all 2" not in out


def test_a_part_that_wandb_cannot_read_is_said(run, monkeypatch, capfd):
    """Damaged in its first record, past which whole ones follow."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    first, second = logs(run)
    second.write_bytes(b"")
    data = bytearray(first.read_bytes())
    data[14] ^= 0xFF
    first.write_bytes(data)
    with service() as wandb:
        monkeypatch.setenv("WANDB_BASE_URL", wandb.url)
        assert main(["sync", "tiny"]) == 11 and marked(run) == [False, False] and not wandb.history
    out, err = capfd.readouterr()
    assert f"{second.parent.name} holds nothing" in out
    assert "0 of 1 parts uploaded" in out and f"left {first.parent.name} behind" in err


def test_every_metric_of_a_dashboard_is_one_that_training_logs(written):
    _, logged = written
    dashboard = plan_dashboard(project="phidias", entity=None, run="tiny", stages=["pretrain"], gpus_per_node=0)
    panels = [panel for section in dashboard.document()["sections"] for panel in section["panels"]]
    named = {name for panel in panels for name in [*panel["metrics"], panel["x"]] if name} - {"Relative Time (Process)"}
    assert named <= set(logged)
    for panel in panels:
        matching = [name for name in logged if panel["pattern"] and re.fullmatch(panel["pattern"], name)]
        assert bool(matching) == bool(panel["pattern"])
        assert [name.rpartition("/")[2] for name in matching] in ([], ["a", "b"], ["created", "start"])
    # And the other way: what training logs is shown, but for these.
    shown = named | {name for name in logged for panel in panels if panel["pattern"] and re.match(panel["pattern"], name)}
    missed = {name.partition("/")[2] for name in set(logged) - shown if name.startswith("pretrain/")}
    unshown = ("goodput/productive_s", "goodput/wall_s", "train/slowest_node", "validation/seconds")
    assert missed == {*unshown, "validation/tokens_by_source/a", "validation/tokens_by_source/b"}


def test_where_the_service_is(run, tmp_path, monkeypatch):
    assert service_url() == "http://127.0.0.1:9"
    monkeypatch.delenv("WANDB_BASE_URL")
    assert service_url() == PUBLIC_URL
    Path(tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example.org/\n")
    assert service_url() == "https://wandb.example.org"
