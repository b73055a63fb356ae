"""What stands for W&B in tests: a service on this machine that answers what its client asks and keeps what it is sent, and runs
that training's own sinks have written offline."""

import ast
import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from launcher.rundir.wandb_log import LAST, WHOLE, pieces

STARTED = json.dumps({"t": 1})  # what a run has in its config once its first part has begun
KEY = "0123456789abcdef" * 2 + "01234567"
REPOSITORY = Path(__file__).parents[2]
# Where training's rows come from, beside trainer.py.
FIELDS_OF_ROWS = (
    ("training/pace.py", "summary"),
    ("training/norms.py", "after"),
    ("training/fp8.py", "take"),
    ("launcher/rundir/speed.py", "speed_fields"),
)


class Service:
    """`history`: lines by W&B run, each at the place it was sent for; `views`: saved workspaces and reports."""

    def __init__(self) -> None:
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.views: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.has_project = True
        self.url = ""

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if "viewer" in query:
            data["viewer"] = {"id": "u", "flags": "{}", "entity": "me", "username": "me", "teams": {"edges": []}}
        if "RunResumeStatus" in query:
            data["model"] = {
                "id": "p",
                "name": "phidias",
                "entity": {"id": "e", "name": "me"},
                "bucket": self.resume(variables),
            }
        if "upsertBucket" in query:
            data["upsertBucket"] = {"bucket": bucket(variables["name"], self.history), "inserted": True}
        if "GetProjects" in query:
            node = {"id": "p", "name": "phidias", "entityName": "me", "createdAt": "2026-01-01T00:00:00", "isBenchmark": False}
            node |= {"user": None, "tags": [], "internalId": "p1", "__typename": "Project"}
            page = {"hasNextPage": False, "endCursor": None}
            data["models"] = {"edges": [{"node": node, "cursor": "c"}], "pageInfo": page, "totalCount": 1}
        if "internalId" in query:
            data["project"] = {"internalId": "p1"} if self.has_project else None
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            data["createRunFiles"] = {"runID": "x", "uploadHeaders": [], "files": files}
        if "upsertView" in query:
            self.views.append(variables)
            view = {"id": variables.get("id") or f"view{len(self.views)}", "name": variables.get("name") or "n"}
            data["upsertView"] = {"view": {**view, **self.view_fields(variables)}, "inserted": True}
        return data

    def view_fields(self, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": variables.get("projectName"), "entityName": "me"}
        return {
            "type": variables.get("type"),
            "displayName": variables.get("displayName"),
            "description": variables.get("description"),
            "spec": variables.get("spec"),
            "project": project,
        }

    def resume(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        lines = self.history.get(variables["name"])
        if not lines:
            return None
        last, tail = lines[max(lines)], json.dumps([json.dumps(lines[max(lines)])])
        counts = {"historyLineCount": len(lines), "logLineCount": 0, "eventsLineCount": 0}
        tails = {"historyTail": tail, "eventsTail": json.dumps([json.dumps({"_runtime": 1})])}
        return (
            bucket(variables["name"], self.history)
            | counts
            | tails
            | {"summaryMetrics": json.dumps(last), "wandbConfig": STARTED}
        )

    def stream(self, run: str, body: dict[str, Any]) -> None:
        sent = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for place, line in enumerate(sent["content"], start=sent["offset"]):
            self.history.setdefault(run, {})[place] = json.loads(line)


def bucket(name: str, history: dict[str, Any]) -> dict[str, Any]:
    project = {"id": "p", "name": "phidias", "entity": {"id": "e", "name": "me"}}
    texts = {"name": name, "displayName": name, "description": "", "notes": "", "config": "{}", "sweepName": None, "tags": []}
    return {"id": "x", **texts, "historyLineCount": len(history.get(name, {})), "project": project}


@contextmanager
def service() -> Iterator[Service]:
    found = Service()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self.answer({})

        def do_PUT(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            found.calls.append(self.path)
            if self.path.endswith("/graphql"):
                asked = json.loads(body)
                self.answer({"data": found.graphql(asked["query"], asked.get("variables") or {})})
            else:
                if self.path.endswith("/file_stream"):
                    found.stream(self.path.split("/")[-2], json.loads(body))
                self.answer({})

        def answer(self, content: dict[str, Any]) -> None:
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


def write_offline(root: Path, *, parts: int) -> list[str]:
    """A run `tiny` under `root` that training's sinks wrote in `parts` starts, three rows each; in a process of its own, as the
    client leaves another one behind. Returns the names it has logged, read back from its logs."""
    command = [sys.executable, "-m", "tests.launcher.wandb_service", str(root), str(parts)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def main(root: Path, parts: int) -> None:
    import os

    os.environ |= {"WANDB_SILENT": "true", "WANDB_API_KEY": ""}
    from launcher.plan.stage import plan_stage
    from launcher.rundir.freeze import open_run
    from launcher.rundir.records import append_record
    from tests.training.tiny import run_config
    from training.clocks import StepTimes
    from training.metrics import Metrics

    wandb_settings = {"mode": "offline", "key_file": None, "project": "phidias", "entity": None, "group": None}
    config = run_config(root, monitor={"wandb": wandb_settings})
    run = open_run(config, prepared=None)
    plan, times = plan_stage(config.stages[0], cluster=config.cluster), StepTimes()
    times.add(tokens=256, seconds=1.0, waited_s=0.1)
    train, validation, pace = fields_of("train"), fields_of("validation"), dict.fromkeys(literal_names(), 1.0)
    for part in range(parts):
        metrics = Metrics(run, config, stage="pretrain", plan=plan, is_writer=True)
        append_record(run.events, "start")
        for step in range(3 * part + 1, 3 * part + 4):
            metrics.train(step, samples=step * 8, **train | {"loss": 9.0 - step}, **times.means(), **pace)
        metrics.validation(step, samples=step * 8, **validation)
        metrics.goodput(samples=step * 8)
        metrics.status("stopped")
        metrics.close()
    logs = sorted(run.wandb.glob("offline-run-*/run-*.wandb"))
    assert len(logs) == parts
    print(json.dumps(sorted({name for log in logs for name in logged_names(log)})))


def fields_of(kind: str) -> dict[str, Any]:
    """What training gives a row of this kind, by name: read from its source, which takes long to import."""
    calls = [
        node for node in ast.walk(ast.parse((REPOSITORY / "training/trainer.py").read_text())) if isinstance(node, ast.Call)
    ]
    (call,) = (call for call in calls if ast.unparse(call.func) == f"self.metrics.{kind}")
    names = [keyword.arg for keyword in call.keywords if keyword.arg not in (None, "samples")]
    return {str(name): {"a": 1.0, "b": 2.0} if str(name).endswith("_by_source") else 1.0 for name in names}


def literal_names() -> list[str]:
    """What a row says besides: keys of the dicts that these functions write out."""
    found = []
    for file, name in FIELDS_OF_ROWS:
        nodes = [node for node in ast.walk(ast.parse((REPOSITORY / file).read_text())) if isinstance(node, ast.FunctionDef)]
        (function,) = (node for node in nodes if node.name == name)
        rows = [node for node in ast.walk(function) if isinstance(node, ast.Dict)]
        keys = [key.value for row in rows for key in row.keys if isinstance(key, ast.Constant)]
        assert keys, f"{file} {name} writes no field out"
        found += keys
    return found


def logged_names(log: Path) -> Iterator[str]:
    """Of history rows as they are, of the machine's measurements behind `system/`."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in records(log.read_bytes()):
        record = Record.FromString(data)
        for item in record.history.item:
            yield item.key or "/".join(item.nested_key)
        for item in record.stats.item:
            yield f"system/{item.key}"


def records(data: bytes) -> Iterator[bytes]:
    """Of a log."""
    parts = b""
    for begin, end, kind in pieces(data):
        parts += data[begin:end]
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
