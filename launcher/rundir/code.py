"""Which code works on a run: versions and the commit, read without importing any of it."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SOURCE_ROOT = Path(__file__).resolve().parents[2]


def child_environment() -> dict[str, str]:
    """This environment for a Python of ours: Phidias importable from where it stands, nothing from the working directory."""
    path = os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


PACKAGES = ("megatron-core", "torch", "transformer-engine", "numpy", "hydra-core", "pydantic")


@cache
def code_version() -> dict[str, Any]:
    """`commit` and `dirty` are null where the code does not stand in a git repository."""
    return {
        "version": installed("phidias") or "source",
        **git_state(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state() -> dict[str, Any]:
    if not (SOURCE_ROOT / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit.strip(), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no").strip())}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(SOURCE_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
