"""`phidias dashboard`: its data, and what W&B's service is sent. Its metrics against what a run really logs: test_sync.py,
which writes such a run."""

import json
import os

import pytest

from launcher.cli import main
from launcher.report.dashboard import FIRST, SYSTEM, TABLE, plan_dashboard
from launcher.rundir.freeze import open_run
from launcher.rundir.records import write_json
from tests.launcher.wandb_service import KEY, service
from tests.training.tiny import run_config, stage_config

WANDB = {"mode": "online", "key_file": None, "project": "phidias", "entity": None, "group": None}


@pytest.fixture(autouse=True)
def nothing_of_this_machine(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of `discard`: nobody is there
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path):
    stages = [stage_config(), stage_config(stage={"name": "midtrain"})]
    return open_run(run_config(tmp_path, stages=stages, monitor={"wandb": WANDB}), prepared=None)


def panels_of(document):
    return [panel for section in document["sections"] for panel in section["panels"]]


def test_what_is_looked_at_first_stands_first(run, capsys):
    write_json(run.status, {"stage": "midtrain", "state": "running"})
    assert main(["dashboard", "tiny", "out=json"]) == 0
    document = json.loads(capsys.readouterr().out)
    names = [section["name"] for section in document["sections"]]
    assert names[:2] == [f"{FIRST}: midtrain", f"{FIRST}: pretrain"] and names[-1] == SYSTEM
    titles = [panel["title"] for panel in document["sections"][0]["panels"]]
    assert titles[:5] == ["Loss", "Held-out loss", "Gradient norm", "Speed", "MFU"]
    assert titles[5:8] == ["Step time and wait for data", "Slowest rank", "Goodput"]
    assert titles[8:] == ["Time lost, by cause", "Events so far", "Events"]
    assert document["sections"][0]["is_open"] and not document["sections"][-1]["is_open"]
    assert document["sections"][0]["panels"][0]["metrics"] == ["midtrain/train/loss"]
    assert len(panels_of(document)) == 2 * (len(TABLE) + 1) + 2


def test_gpu_panels_have_a_line_for_each_gpu_of_a_node():
    dashboard = plan_dashboard(project="p", entity="e", run=None, stages=["s"], gpus_per_node=2)
    busy = dashboard.sections[-1].panels[0]
    assert busy.metrics == ("system/gpu.0.gpu", "system/gpu.1.gpu") and dashboard.name == "Phidias: p"


def test_a_project_has_the_stages_of_its_runs(run, capsys):
    assert main(["dashboard", "project=phidias", "entity=team", "out=json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"] is None and document["entity"] == "team"
    assert document["sections"][1]["name"] == f"{FIRST}: midtrain"
    assert main(["dashboard", "project=other", "stages=a", "out=json"]) == 0
    assert json.loads(capsys.readouterr().out)["sections"][0]["name"] == FIRST


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["project=other"], "no run in runs that logs to 'other'"),
        ([], "name one run, or project=NAME"),
        (["one", "two"], "found one two"),
        (["tiny", "stages=a,,b"], "found 'a,,b'"),
        (["tiny", "out=html"], "out: found 'html'"),
        (["tiny"], "no key for http://127.0.0.1:9"),
    ],
)
def test_what_is_refused(run, capsys, words, told):
    assert main(["dashboard", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_run_that_logs_nothing_has_none(tmp_path, capsys):
    open_run(run_config(tmp_path), prepared=None)
    assert main(["dashboard", "tiny"]) == 2
    assert "logs nothing to W&B" in capsys.readouterr().err


def test_without_a_network_nothing_is_made(run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert main(["dashboard", "tiny"]) == 11
    assert "Nothing was made; out=json needs no network" in capsys.readouterr().err


def test_the_service_is_sent_a_workspace_and_a_report_and_the_same_again(run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with service() as wandb:
        monkeypatch.setenv("WANDB_BASE_URL", wandb.url)
        assert main(["dashboard", "tiny"]) == 0
        told = capsys.readouterr().out
        assert main(["dashboard", "tiny"]) == 0
    assert "workspace: http://127.0.0.1" in told and "report: http://127.0.0.1" in told
    report, workspace, *again = wandb.views
    assert (workspace["projectName"], workspace["entityName"], workspace["displayName"]) == ("phidias", "me", "Phidias: tiny")
    planned = plan_dashboard(project="phidias", entity=None, run="tiny", stages=["pretrain", "midtrain"], gpus_per_node=0)
    want = [name for panel in panels_of(planned.document()) for name in panel["metrics"]]
    for view in (workspace, report):
        assert found(json.loads(view["spec"]), "metrics") == want
    assert "^tiny$" in found(json.loads(workspace["spec"]), "query")
    assert [view["id"] for view in again] == ["view1", "view2"]


def test_a_project_that_is_not_there_yet(run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with service() as wandb:
        wandb.has_project = False
        monkeypatch.setenv("WANDB_BASE_URL", wandb.url)
        assert main(["dashboard", "tiny"]) == 2 and not wandb.views
    assert "the first run makes a project" in capsys.readouterr().err


def found(tree, key):
    """What stands under a key, wherever it is, lists of it as one."""
    if isinstance(tree, list):
        return [value for branch in tree for value in found(branch, key)]
    if not isinstance(tree, dict):
        return []
    own = tree.get(key, [])
    return [*(own if isinstance(own, list) else [own]), *(value for branch in tree.values() for value in found(branch, key))]
