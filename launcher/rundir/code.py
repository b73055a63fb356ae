"""Which code works on a run: versions and the commit, read without importing any of it; and a copy of it in the run directory,
which jobs go on with whatever becomes of the repository."""

import json
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

from launcher.rundir.paths import RunDir

SOURCE_ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("data_prep", "launcher", "model_configs", "slurm", "training")
SUFFIXES = frozenset({".css", ".html", ".js", ".py", ".sh", ".typed", ".yaml"})
DIGEST_BYTES = 6
# In a copy: the code_version of what was copied.
VERSION_FILE = "code.json"


def child_environment(root: Path = SOURCE_ROOT) -> dict[str, str]:
    """This environment for a Python of ours: Phidias importable from `root`, nothing from the working directory."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def source_files() -> Iterator[Path]:
    """Of Phidias, relative to where it stands, in order."""
    for folder in FOLDERS:
        for path in sorted((SOURCE_ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                yield path.relative_to(SOURCE_ROOT)


@cache
def code_digest() -> str:
    """Of the content of all source files: names a copy."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for path in source_files():
        content = (SOURCE_ROOT / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def snapshot_code(run: RunDir) -> Path:
    """The copy of this code in the run directory, made where there is none yet: whole or not at all."""
    final = run.code_copy(code_digest())
    if final.exists():
        return final
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    for path in source_files():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        copy_with_bytecode(SOURCE_ROOT / path, to=partial / path)
    (partial / VERSION_FILE).write_text(json.dumps(code_version(), indent=1) + "\n")
    for path in (final.parent, partial, *partial.rglob("*")):
        path.chmod(path.stat().st_mode & ~stat.S_IWOTH)  # what lies here is run, whatever the umask
    try:
        partial.rename(final)
    except OSError:  # another job was quicker
        shutil.rmtree(partial)
        if not final.exists():
            raise
    return final


def copy_with_bytecode(source: Path, *, to: Path) -> None:
    """With its mode, so that scripts stay executable, and its time, so that bytecode copied beside it stays valid: else every
    rank would compile every module at once."""
    shutil.copy2(source, to)
    cached = Path(cache_from_source(str(source)))
    if source.suffix == ".py" and cached.exists():
        (to.parent / cached.parent.name).mkdir(exist_ok=True)
        shutil.copy2(cached, to.parent / cached.parent.name)


PACKAGES = ("megatron-core", "torch", "transformer-engine", "numpy", "hydra-core", "pydantic")


@cache
def code_version() -> dict[str, Any]:
    """`commit` and `dirty` are null where the code does not stand in a git repository; a copy says what it was copied from."""
    if (SOURCE_ROOT / VERSION_FILE).exists():
        copied: dict[str, Any] = json.loads((SOURCE_ROOT / VERSION_FILE).read_text())
        return copied
    return {
        "version": installed("phidias") or "source",
        **git_state(),
        "digest": code_digest(),
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
