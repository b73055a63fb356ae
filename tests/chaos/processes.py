"""The processes of a run, as /proc shows them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Rank(NamedTuple):
    """A rank that runs, and torchrun, which has started it."""

    number: int
    pid: int
    parent: int

    def send(self, kind: signal.Signals) -> None:
        os.kill(self.pid, kind)


def ranks_of(run_dir: Path) -> list[Rank]:
    """By number; writers that ranks have forked are none."""
    words = ["-m", "training", str(run_dir)]
    found = [pid for pid in all_pids() if starts(pid, words)]
    parents = {pid: parent_of(pid) for pid in found}
    own = [pid for pid in found if parents[pid] not in found]
    ranks = [Rank(int(number), pid, parents[pid]) for pid in own if (number := setting(pid, "RANK"))]
    return sorted(ranks)


def starts(pid: int, words: list[str]) -> bool:
    """Whether these words follow each other on its command line, behind the interpreter and its flags."""
    line = read(pid, "cmdline").split("\0")
    return words in [line[at : at + len(words)] for at in range(1, 4)]


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208


def descendants(pid: int) -> Iterator[int]:
    """Children first."""
    for child in [one for one in all_pids() if parent_of(one) == pid]:
        yield child
        yield from descendants(child)


def parent_of(pid: int) -> int:
    fields = read(pid, "stat").rpartition(") ")[2].split()
    return int(fields[1]) if fields else 0


def setting(pid: int, name: str) -> str | None:
    """Of its environment."""
    rows = dict(line.partition("=")[::2] for line in read(pid, "environ").split("\0"))
    return rows.get(name)


def read(pid: int, file: str) -> str:
    """Empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""
