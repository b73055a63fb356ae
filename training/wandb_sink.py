"""W&B, fed by a process of its own beside the first rank: `python -m training.wandb_sink RUN --stage NAME`. It reads
metrics.jsonl and events.jsonl as they grow, which are written anyway: a step waits for nothing of W&B, and nothing of it can
end one.

The history of a run is a function of its two files, whatever was killed, restarted or rewound: the rows in their order, without
those that a restart took again, each with W&B's own step set to the byte of metrics.jsonl at which it ends. So W&B itself, or
the newest of its logs, says from where to go on. Panels stand over `<stage>/samples`.

A service that does not answer makes the part of this start an offline one. `--part LOG` is how `phidias sync` sends what an
online part still owes."""

import argparse
import fcntl
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launcher.config.check_secrets import MASK
from launcher.config.schema import RunConfig
from launcher.config.validate import dump_run
from launcher.rundir.code import child_environment
from launcher.rundir.freeze import read_config
from launcher.rundir.goodput import Tail, goodput_fields, is_event
from launcher.rundir.paths import RunDir
from launcher.rundir.permissions import KEY, lend_key
from launcher.rundir.records import append_record, read_json, write_json
from launcher.rundir.wandb_log import SYNCED, UNFINISHED, is_offline, parts, records
from training.wandb_history import MOST_CHARACTERS, History, event_text, is_grave, is_loud

# For the service to answer; for the rows of an outage to be uploaded at the end. wandb's own variables come first.
INIT_S = float(os.environ.get("WANDB_INIT_TIMEOUT", "30"))
FINISH_S = float(os.environ.get("WANDB_FINISH_TIMEOUT", "45"))
CLOSE_S = 60.0  # that a rank waits for the process, which goes on by itself
POLL_S = 1.0
FLUSH_S = 1.0  # what wandb keeps back dies with it
RETRIES = 1_000_000  # wandb would give up on an outage of two hours, and end as if all were uploaded
END = b"end\n"


class WandbSink:
    """The process, as the first rank has it."""

    def __init__(self, run: RunDir, *, stage: str):
        run.wandb.mkdir(exist_ok=True)
        Sent.read(run).save()  # events of this start are new
        command = [sys.executable, "-m", "training.wandb_sink", str(run.root), f"--stage={stage}"]
        with (run.wandb / "sink.log").open("ab") as log:  # a session of its own: it outlives the rank, to tell of its end
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                bufsize=0,
                env=child_environment(),
                start_new_session=True,
            )
        assert self.process.stdin is not None
        self.input = self.process.stdin
        os.set_blocking(self.input.fileno(), False)

    def goodput(self, *, samples: int) -> None:
        """Has goodput measured, over there."""
        self._say(f"{samples}\n".encode())

    def close(self) -> None:
        self._say(END)
        self.input.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_S)

    def _say(self, line: bytes) -> None:
        with suppress(OSError):  # it has died; a full pipe takes nothing
            self.input.write(line)


@dataclass
class Sent:
    """wandb/sent.json. `begin`: bytes of metrics.jsonl that were sent before W&B's step was a place in it; `rows`: the step
    that the last start came to; `events`: bytes of events.jsonl that were looked through for alerts."""

    path: Path
    begin: int
    rows: int
    events: int

    @classmethod
    def read(cls, run: RunDir) -> "Sent":
        path, is_new = run.wandb / "sent.json", not (run.wandb / "phidias_run_id").exists()
        with suppress(OSError, ValueError, TypeError):
            return cls(path, **read_json(path))
        sizes = [file.stat().st_size if file.exists() else 0 for file in (run.metrics, run.events)]
        begin = 0 if is_new else sizes[0]
        return cls(path, begin=begin, rows=begin, events=sizes[1])

    def save(self) -> None:
        write_json(self.path, {"begin": self.begin, "rows": self.rows, "events": self.events})


@dataclass
class Feed:
    """A W&B run that is open. `step`: the last one it has; `stages`: those that it was told the axis of."""

    run: RunDir
    stage: str
    active: Any
    sent: Sent
    step: int
    history: History
    stages: set[str] = field(default_factory=set)

    def log_rows(self, *, until: int | None = None) -> None:
        for place, values in self.history.read():
            if until is not None and place > until:
                return
            if place > self.step:
                self.log(values, step=place)

    def log_goodput(self, samples: int) -> None:
        """Between two rows: a row is longer than there are of these."""
        if fields := goodput_fields(self.run):
            values = {f"{self.stage}/{name}": value for name, value in fields.items()}
            self.log(values | {f"{self.stage}/samples": samples}, step=self.step + 1)

    def log(self, values: dict[str, float], *, step: int) -> None:
        for stage in {name.partition("/")[0] for name in values if "/" in name} - self.stages:
            self.active.define_metric(f"{stage}/samples")
            self.active.define_metric(f"{stage}/*", step_metric=f"{stage}/samples")
            self.stages.add(stage)
        self.active.log(values, step=step, commit=True)
        self.step = step

    def alert(self, events: Tail) -> None:
        """Once each, through restarts too."""
        for event in events.documents():
            if is_event(event) and is_loud(event):
                title, text = f"{self.run.name}: {event['kind']}", clean(event_text(event))
                self.active.alert(title=title, text=text, level="ERROR" if is_grave(event) else "WARN")
        if events.offset > self.sent.events:
            self.sent.events = events.offset
            self.sent.save()

    def follow(self) -> bool:
        """Until the rank has ended. Whether it said so: one that a fault ended did not."""
        events, said, is_open = Tail(self.run.events), b"", True
        events.offset = self.sent.events
        while is_open:
            if select.select([0], [], [], POLL_S)[0]:
                said += (heard := os.read(0, 1 << 16))
                is_open = bool(heard)
            self.log_rows()
            self.alert(events)
            *lines, said = said.split(b"\n")
            for line in lines:
                if line.isdigit():
                    self.log_goodput(int(line))
                elif line == END.strip():
                    return True
        return False


def feed(run: RunDir, config: RunConfig, *, stage: str, mode: str) -> None:
    """From the start of a rank to its end."""
    sent = Sent.read(run)
    before = parts(run.wandb)
    active = begin(run, config, mode=mode, finish_s=FINISH_S)
    log = Path(active.settings.sync_file)
    if mode == "online":
        # All that W&B does not have is sent again, from the run's files: nothing is owed by earlier parts.
        log.with_suffix(UNFINISHED).touch()
        step = max(sent.begin, active.step - 1)
        for part in before:
            cover(part, begin=sent.begin)
    else:
        step = next((found for part in reversed(before) if (found := last_step(part))), sent.rows)
        step = max(sent.begin, step)
    sent.save()
    one = Feed(run, stage, active, sent, step, History(run))
    has_said_end = one.follow()
    sent.rows = one.step
    sent.save()
    # Whatever wandb does, the process ends.
    threading.Timer(FINISH_S + CLOSE_S, lambda: leave(1)).start()
    try:
        finish(active, exit_code=0 if has_said_end else 1)
    except TimeoutError:
        note(run, stage, f"not all was uploaded within {FINISH_S:.0f} s", mode="online")
        time.sleep(2 * FLUSH_S)
    else:
        log.with_suffix(UNFINISHED).unlink(missing_ok=True)


def send_part(run: RunDir, config: RunConfig, *, part: Path) -> None:
    """What W&B does not have yet, up to the end of an online part where `wandb sync` uploads another behind it."""
    is_last = parts(run.wandb)[-1] == part
    until = None if is_last else last_step(part) or 0
    with TemporaryDirectory() as folder:  # what is sent lies in the run's files and in the part: no log of it is kept
        active = begin(run, config, mode="online", finish_s=0.0, folder=Path(folder))
        sent = Sent.read(run)
        step = max(sent.begin, active.step - 1)
        Feed(run, "", active, sent, step, History(run)).log_rows(until=until)
        finish(active, exit_code=0)
    part.with_suffix(UNFINISHED).unlink(missing_ok=True)


def begin(run: RunDir, config: RunConfig, *, mode: str, finish_s: float, folder: Path | None = None) -> Any:
    """One W&B run per Phidias run: its id is kept in the run directory, so that a restart and the next stage go on in it.
    `finish_s` 0: its end waits for as long as it takes, and nothing is measured."""
    if mode == "online":
        lend_key(config)
    import wandb

    told = config.monitor.wandb
    settings = wandb.Settings(
        init_timeout=INIT_S,
        finish_timeout=finish_s,
        finish_timeout_raises=True,
        console="off",
        x_transaction_log_flush_interval=FLUSH_S,
        x_file_stream_retry_max=RETRIES,
        x_stats_pid=os.getppid(),
        x_disable_stats=not finish_s,
    )
    return wandb.init(
        mode=mode,
        project=told.project,
        entity=told.entity,
        group=told.group,
        id=wandb_id(run),
        name=run.name,
        resume="allow",
        dir=folder or run.root,
        config=described(run, config),
        settings=settings,
    )


def finish(active: Any, *, exit_code: int) -> None:
    """Uploads the rest, and waits for the end of the log, which wandb's process writes a little later. TimeoutError."""
    import wandb

    active.finish(exit_code=exit_code)
    wandb.teardown(exit_code)


def described(run: RunDir, config: RunConfig) -> dict[str, Any]:
    """The config, the plan of each stage, and the code."""
    more: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError, KeyError):
        more["plan"] = {row["stage"]: row for row in read_json(run.plan)}
    with suppress(OSError, ValueError):
        more["code"] = read_json(run.code)
    return dump_run(config) | more


def wandb_id(run: RunDir) -> str:
    """Unique in the project, though others may have a run of the same name."""
    path = run.wandb / "phidias_run_id"
    if not path.exists():
        run.wandb.mkdir(exist_ok=True)
        path.write_text(f"{run.name}-{secrets.token_hex(4)}")
    return path.read_text()


def last_step(log: Path) -> int | None:
    """Of the last whole row in one of wandb's logs; None where it has none."""
    from wandb.proto.wandb_internal_pb2 import Record

    last = None
    for data in records(log.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            last = record.history.step.num
    return last


def cover(part: Path, *, begin: int) -> None:
    """Nothing of it is to be uploaded any more: its rows are sent again. Not one of an older phidias, whose steps are small."""
    part.with_suffix(UNFINISHED).unlink(missing_ok=True)
    synced = part.with_suffix(SYNCED)
    if is_offline(part) and not synced.exists() and (last_step(part) or 0) > begin:
        synced.touch()


def clean(text: str) -> str:
    """Without the key, whoever has put it there."""
    return text.replace(key, MASK) if (key := os.environ.get(KEY)) else text


def note(run: RunDir, stage: str, why: str, **fields: Any) -> None:
    told = " ".join(clean(why).split())[:MOST_CHARACTERS]
    reason = f"{told}; `phidias sync {run.name}` uploads what is missing"
    with suppress(OSError):
        append_record(run.events, "wandb", stage=stage, **fields, reason=reason)


@contextmanager
def sole_writer(run: RunDir) -> Iterator[None]:
    """The process of the start before may still be uploading."""
    with (run.wandb / "lock").open("a") as file:
        deadline = time.monotonic() + INIT_S + FINISH_S + CLOSE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError("another process of this run still writes to W&B") from None
                time.sleep(POLL_S / 4)
        yield


def end_children() -> None:
    """wandb's own process, which would wait for its service for days."""
    with suppress(OSError):
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with suppress(OSError):
                os.kill(int(child), signal.SIGKILL)


def leave(code: int) -> None:
    """Without wandb's exit handlers, which wait for its service."""
    sys.stdout.flush()
    sys.stderr.flush()
    end_children()
    os._exit(code)


def go_offline(words: Sequence[str]) -> None:
    """The same again in a fresh process image: a wandb that has not reached its service begins no second run."""
    end_children()
    os.environ.pop("WANDB_SERVICE", None)
    os.execv(sys.executable, [sys.executable, "-m", "training.wandb_sink", *words, "--offline"])


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.wandb_sink", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", default="")
    parser.add_argument("--offline", action="store_true", help="whatever the config says")
    parser.add_argument("--part", type=Path, help="a log that was not uploaded to its end")
    arguments = parser.parse_args(words)
    run, stage = RunDir(arguments.run_dir), arguments.stage
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the rank's to answer: this process ends with it
    try:
        config = read_config(run)
        mode = "offline" if arguments.offline else config.monitor.wandb.mode
        with sole_writer(run):
            if arguments.part:
                send_part(run, config, part=arguments.part)
            else:
                feed(run, config, stage=stage, mode=mode)
    except Exception as error:  # of wandb's, whatever they are
        why = f"{type(error).__name__}: {error}"
        print(clean(why), file=sys.stderr, flush=True)
        if not arguments.part and not arguments.offline:
            note(run, stage, why, mode="offline")
            go_offline(words)
        elif not arguments.part:
            note(run, stage, why, mode="off")
        return 1
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
