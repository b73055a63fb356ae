"""Processes of a GPU benchmark: each part is one, so that what fails or hangs takes no other with it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SAID = 1500  # characters of what a process said that are kept


@dataclass(frozen=True)
class Ended:
    """`code`: null of one that its limit ended."""

    code: int | None
    out: str
    err: str

    @property
    def why(self) -> str:
        """Of one that did not end well."""
        return f"{'out of time' if self.code is None else f'exit code {self.code}'}: {self.err[-SAID:]}"


def run_apart(words: Sequence[str], *, limit_s: float, env: Mapping[str, str] | None = None) -> Ended:
    """`python words` in a session of its own; ended with all that it started when the limit comes."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": python_path(), **(env or {})},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return Ended(None, out, err)
    except BaseException:  # Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ended(process.returncode, out, err)


def without_engine(folder: Path) -> dict[str, str]:
    """The environment of CPU ranks where transformer-engine is installed: megatron-core would call its CUDA kernels."""
    hidden = folder / "without_engine"
    hidden.mkdir(parents=True, exist_ok=True)
    (hidden / "transformer_engine.py").write_text('raise ModuleNotFoundError("hidden from CPU ranks")\n')
    return {"PYTHONPATH": os.pathsep.join([str(hidden.resolve()), python_path()])}


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
