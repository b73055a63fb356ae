"""What W&B is told, read back from its own logs and from a service on this machine: through kills, rewinds and outages."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from launcher.cli import main
from launcher.plan.stage import plan_stage
from launcher.rundir.freeze import open_run
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_json, read_records, write_json
from launcher.rundir.wandb_log import HEAD, MAGIC, UNFINISHED, WHOLE, is_offline, is_waiting, parts, records
from tests.launcher.wandb_service import KEY, Service, service
from tests.slow import slow
from tests.training.tiny import run_config, stage_config
from training import wandb_sink
from training.metrics import Metrics
from training.wandb_history import History, event_text, flatten, is_loud
from training.wandb_sink import Feed, Sent

ROOT = Path(__file__).parents[2]
# A rank that is killed with all that it has started, amid rows.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_wandb import begin, history_of, train, wait_for
metrics = begin(Path(sys.argv[1]), mode="offline")
train(metrics, range(1, 13))
wait_for(lambda: history_of(metrics.run))
train(metrics, range(13, 15))
os.killpg(metrics.wandb.process.pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")


def begin(root: Path, *, mode: str, stage: str = "pretrain") -> Metrics:
    stages = [stage_config(), stage_config(stage={"name": "midtrain"})]
    wandb = {"mode": mode, "key_file": None, "project": "phidias", "entity": None, "group": None}
    config = run_config(root, stages=stages, monitor={"wandb": wandb})
    run = open_run(config, prepared=None)
    append_record(run.events, "start")
    return Metrics(run, config, stage=stage, plan=plan_stage(config.stage(stage), cluster=config.cluster), is_writer=True)


def train(metrics: Metrics, steps: range) -> None:
    """Rows that say the same whenever they are taken."""
    times = {"tokens_per_s": 256.0, "step_time_s": 1.0, "data_wait_s": 0.1}
    for step in steps:
        by_source = {"a": 1.0 / step, "b": float("nan") if step == 3 else 2.0}
        metrics.train(step, samples=8 * step, loss=9.0 - step / 8, loss_by_source=by_source, grad_norm=None, **times)
        if step % 5 == 0:
            metrics.validation(step, samples=8 * step, loss=8.0 - step / 8)
            metrics.event("checkpoint", step=step)
            metrics.goodput(samples=8 * step)


def of_log(log: Path, kind: str) -> Iterator[Any]:
    for data in records(log.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == kind:
            yield getattr(record, kind)


def history_of(run: RunDir) -> list[dict[str, Any]]:
    """As all parts together have it."""
    rows = [row for log in parts(run.wandb) for row in of_log(log, "history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of training and validation alone, without wandb's own fields and events."""
    found = []
    for row in rows:
        stage = next((name.partition("/")[0] for name in row if "/train/" in name or "/validation/" in name), None)
        own = {name: value for name, value in row.items() if name.startswith(f"{stage}/") and "/event/" not in name}
        found += [own] if own else []
    return found


def wanted(run: RunDir) -> list[dict[str, Any]]:
    """From metrics.jsonl: each row the first time it was written."""
    rows: dict[Any, dict[str, Any]] = {}
    for row in read_records(run.metrics):
        stage, kind, samples = row["stage"], row["kind"], row["samples"]
        fields = {f"{kind}/{name}": row[name] for name in ("loss", "tokens_per_s", "step_time_s", "data_wait_s") if name in row}
        fields |= {f"{kind}/loss_by_source/{name}": value for name, value in row.get("loss_by_source", {}).items()}
        fields = {f"{stage}/{name}": value for name, value in fields.items() if value == value}
        rows.setdefault((stage, kind, samples), fields | {f"{stage}/samples": samples})
    return list(rows.values())


def notes(run: RunDir) -> list[dict[str, Any]]:
    return [row for row in read_records(run.events) if row["kind"] == "wandb"]


def wait_for(is_there: Any, *, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_there() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert is_there()


def test_kills_and_repeated_steps_leave_one_history_without_gaps_or_doubles(tmp_path: Path) -> None:
    """The first start is killed with all its processes, rows that wandb has not written yet among them; the second repeats
    steps 6 on, as from a checkpoint; a stage follows."""
    words, environment = [sys.executable, "-c", KILLED, str(tmp_path)], {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    run = RunDir(tmp_path / "runs" / "tiny")
    assert 0 < len(told(history_of(run))) < len(wanted(run))
    second = begin(tmp_path, mode="offline")
    train(second, range(6, 21))
    time.sleep(0.002)  # events are placed by their time, in ms
    second.event("loss_spike", step=20, action="note", value=7.5)
    second.close()
    third = begin(tmp_path, mode="offline", stage="midtrain")
    train(third, range(1, 4))
    third.close()
    logs, rows = parts(run.wandb), history_of(run)
    assert len(logs) == 3 and all(map(is_offline, logs))
    assert told(rows) == wanted(run) and len(told(rows)) == 20 + 4 + 3
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    (only,) = {log.stem for log in logs}
    assert only == f"run-{(run.wandb / 'phidias_run_id').read_text()}"
    # What is beside the rows: goodput, events counted once each, an alert for the one that matters.
    goodput = [row["pretrain/samples"] for row in rows if "pretrain/goodput/productive" in row]
    assert goodput == sorted(goodput) and {120, 160} <= set(goodput)
    counts = [row["pretrain/event/checkpoint"] for row in rows if "pretrain/event/checkpoint" in row]
    assert counts[-1] == 5 and counts == sorted(set(counts))  # of steps 5, 10, 10, 15, 20
    (spike,) = [row for row in rows if "pretrain/event/loss_spike" in row]
    assert spike["pretrain/event/loss_spike"] == 1 and spike["pretrain/samples"] == 160  # where pretrain stood
    alerts = [alert for log in logs for alert in of_log(log, "alert")]
    assert [(alert.title, alert.text) for alert in alerts] == [("tiny: loss_spike", "pretrain, step 20, value 7.5, note")]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@contextmanager
def listening(*, answers: bool) -> Iterator[str]:
    """A port that refuses connections, or one that takes them and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_service_that_refuses_or_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    ranks = {}
    with listening(answers=False) as refusing, listening(answers=True) as hanging:
        for name, url in (("refuses", refusing), ("hangs", hanging)):
            monkeypatch.setenv("WANDB_BASE_URL", url)
            ranks[name] = begin(tmp_path / name, mode="online")
        for metrics in ranks.values():
            began = time.monotonic()
            train(metrics, range(1, 201))
            assert time.monotonic() - began < 1.0
        for metrics in ranks.values():
            metrics.close()
            assert metrics.wandb and metrics.wandb.process.returncode == 0
    for metrics in ranks.values():
        (note,) = notes(metrics.run)
        assert note["mode"] == "offline" and "`phidias sync tiny`" in note["reason"] and "CommError" in note["reason"]
        assert told(history_of(metrics.run)) == wanted(metrics.run) and len(wanted(metrics.run)) == 240
        (log,) = [log for log in parts(metrics.run.wandb) if is_waiting(log)]
        assert is_offline(log) and list(of_log(log, "exit"))  # whole, to its end


def uploaded(found: Service) -> list[dict[str, Any]]:
    ((_, lines),) = found.history.items()
    return [lines[place] for place in sorted(lines)]


@slow
def test_an_outage_is_made_up_for_by_the_next_start_and_by_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with service() as there:
        monkeypatch.setenv("WANDB_BASE_URL", there.url)
        first = begin(tmp_path, mode="online")
        train(first, range(1, 8))
        first.close()
        run = first.run
        assert told(uploaded(there)) == wanted(run) and not any(map(is_waiting, parts(run.wandb)))
        second = begin(tmp_path, mode="online")
        wait_for(lambda: any(map(is_waiting, parts(run.wandb))))
    train(second, range(5, 12))  # it is open, and the service has gone
    second.close()
    assert len(told(uploaded(there))) == 8 and "not all was uploaded" in notes(run)[-1]["reason"]
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    third = begin(tmp_path, mode="online")
    train(third, range(12, 15))
    third.close()
    assert [is_offline(log) for log in parts(run.wandb) if is_waiting(log)] == [False, True]
    with service() as back:
        back.history = there.history
        monkeypatch.delenv("WANDB_INIT_TIMEOUT")
        monkeypatch.setenv("WANDB_BASE_URL", back.url)
        assert main(["sync", "tiny"]) == 0
        assert told(uploaded(back)) == wanted(run) and len(wanted(run)) == 16
        calls = len(back.calls)
        assert main(["sync", "tiny"]) == 0 and len(back.calls) == calls


def test_a_wandb_that_raises_ends_its_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "wandb.py").write_text(f"raise RuntimeError('broken by {KEY}')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    metrics = begin(tmp_path, mode="online")
    train(metrics, range(1, 6))
    metrics.close()
    assert [row["mode"] for row in notes(metrics.run)] == ["offline", "off"]
    assert all("RuntimeError: broken by ***" in row["reason"] for row in notes(metrics.run))
    assert len(list(read_records(metrics.run.metrics))) == 6


# The history alone: no wandb.


def feed(run: RunDir, *, step: int, sent: Sent | None = None) -> tuple[Feed, list[tuple[int, dict[str, float]]]]:
    """One that a stand-in of wandb's run listens to."""
    logged: list[tuple[int, dict[str, float]]] = []
    active = SimpleNamespace(
        log=lambda values, *, step, commit: logged.append((step, values)),
        define_metric=lambda *_, **__: None,
        alert=lambda **words: logged.append((-1, words)),
    )
    return Feed(run, "pretrain", active, sent or Sent.read(run), step, History(run)), logged


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "tiny")
    run.root.mkdir()
    return run


def add(run: RunDir, samples: int, *, kind: str = "train", stage: str = "pretrain", **fields: Any) -> int:
    """Where the row ends."""
    append_record(run.metrics, kind, stage=stage, step=samples, samples=samples, tokens=32 * samples, **fields)
    return run.metrics.stat().st_size


def test_rows_are_sent_by_their_place_and_those_that_were_are_not(run: RunDir) -> None:
    places = [add(run, samples, loss=float(samples)) for samples in (8, 16, 24)]
    repeated = [add(run, samples, loss=-1.0) for samples in (16, 24)]
    places += [add(run, 24, kind="validation", loss=3.0), add(run, 32, loss=32.0)]
    run.metrics.write_bytes(run.metrics.read_bytes() + b'{"time": 1, "kind": "train", "st')  # a crash
    places.append(add(run, 40, loss=40.0))
    one, logged = feed(run, step=places[1])
    one.log_rows()
    assert [step for step, _ in logged] == places[2:] and not set(repeated) & set(places)
    assert [values.get("pretrain/train/loss") for _, values in logged] == [24.0, None, 32.0, 40.0]
    assert logged[1][1]["pretrain/validation/loss"] == 3.0 and logged[1][1]["pretrain/samples"] == 24
    one.log_rows()
    assert len(logged) == 4


def test_an_event_is_counted_in_the_first_row_behind_it_through_restarts(run: RunDir) -> None:
    place = 0
    for samples in (8, 16):
        append_record(run.events, "checkpoint", stage="pretrain")
        place = add(run, samples, loss=1.0)
    time.sleep(0.002)
    append_record(run.events, "job_start")
    append_record(run.events, "checkpoint", stage="pretrain")
    add(run, 8, stage="midtrain", loss=2.0)
    one, logged = feed(run, step=place)
    one.log_rows()
    ((_, values),) = logged
    events = {name: value for name, value in values.items() if "/event/" in name}
    assert events == {"pretrain/event/checkpoint": 3, "midtrain/event/job_start": 1}
    assert (values["pretrain/samples"], values["midtrain/samples"]) == (16, 8)


def test_a_person_is_told_once_and_only_of_what_matters(run: RunDir) -> None:
    sent = Sent.read(run)
    append_record(run.events, "checkpoint", stage="pretrain", step=3)
    append_record(run.events, "fault", stage="pretrain", rank=3, node="n7", exit="BAD_NODE", error="NodeError: lost\nmore")
    append_record(run.events, "job_end", job="1", exit="DONE", after="end", reason=None)
    append_record(run.events, "job_end", job="1", exit="NEEDS_PERSON", after="end", reason="3 starts in vain")
    run.wandb.mkdir()
    one, logged = feed(run, step=0, sent=sent)
    one.alert(History(run).events)
    assert [(words["title"], words["level"]) for _, words in logged] == [("tiny: fault", "ERROR"), ("tiny: job_end", "ERROR")]  # type: ignore[comparison-overlap]
    assert logged[0][1]["text"] == "pretrain, rank 3, node n7, BAD_NODE, NodeError: lost"  # type: ignore[comparison-overlap]
    assert read_json(run.wandb / "sent.json")["events"] == run.events.stat().st_size
    assert event_text({"kind": "skip", "cause": "loss_spike"}) == "loss_spike" and not is_loud({"kind": "start"})


def test_of_a_run_from_before_only_what_is_new_is_sent(run: RunDir) -> None:
    """Its steps in W&B are not places."""
    before = add(run, 8, loss=1.0)
    run.wandb.mkdir()
    assert Sent.read(run).begin == 0
    (run.wandb / "phidias_run_id").write_text("tiny-1")
    assert Sent.read(run).begin == before


def test_flatten_names_what_is_nested_and_leaves_out_what_is_no_number() -> None:
    fields = {"loss": 1, "by": {"a": 2.0, "deep": {"b": 3}, "c": float("nan")}, "note": "text", "norm": float("inf")}
    assert flatten(fields, prefix="train") == {"train/loss": 1, "train/by/a": 2.0, "train/by/deep/b": 3}


def test_wandb_is_told_config_plan_and_code_and_finds_the_key_in_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text(KEY)
    wandb = {"mode": "online", "key_file": str(file), "project": "phidias", "entity": None, "group": "sweep"}
    config = run_config(tmp_path, monitor={"wandb": wandb})
    run = open_run(config, prepared=None)
    write_json(run.plan, [{"stage": "pretrain", "num_steps": 6}])
    heard: list[Any] = []
    monkeypatch.setattr("wandb.init", lambda **words: heard.append((words, os.environ["WANDB_API_KEY"])))
    wandb_sink.begin(run, config, mode="online", finish_s=1.0)
    ((words, key),) = heard
    assert key == KEY and KEY not in repr(words) and (words["mode"], words["group"]) == ("online", "sweep")
    assert words["config"]["monitor"]["wandb"]["key_file"] == str(file)
    assert words["config"]["plan"] == {"pretrain": {"stage": "pretrain", "num_steps": 6}}
    assert words["config"]["code"] == read_json(run.code) and words["config"]["model"]["ffn_hidden_size"] == 96


def test_an_online_start_answers_for_earlier_parts(tmp_path: Path) -> None:
    """Offline ones too, unless an older phidias wrote them: in those, steps count rows."""
    names = ("run-20260101_000000-x", "offline-run-20260102_000000-x", "offline-run-20260103_000000-x")
    for name, step in zip(names, (500, 900, 7), strict=True):
        row = Record()
        row.history.step.num = step
        data = row.SerializeToString()
        log = tmp_path / name / "run-x.wandb"
        log.parent.mkdir()
        log.write_bytes(MAGIC + bytes(HEAD - len(MAGIC)) + struct.pack("<IHB", 0, len(data), WHOLE) + data + b"torn")
    found = parts(tmp_path)
    assert [log.parent.name for log in found] == list(names)
    assert [wandb_sink.last_step(log) for log in found] == [500, 900, 7]
    found[0].with_suffix(UNFINISHED).touch()
    assert all(map(is_waiting, found))
    for log in found:
        wandb_sink.cover(log, begin=100)
    assert [is_waiting(log) for log in found] == [False, False, True]
