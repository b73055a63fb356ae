"""The copy of the code that a run's jobs work with."""

import importlib.util
import json
import os
import stat
import struct
import subprocess
import sys

import pytest

from launcher.rundir import code as module
from launcher.rundir.code import SOURCE_ROOT, code_digest, code_version, snapshot_code, source_files
from launcher.rundir.paths import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def test_the_copy_is_what_it_was_made_of(run):
    copy = snapshot_code(run)
    assert copy == run.root / "code" / code_digest() and snapshot_code(run) == copy
    for path in source_files():
        assert (copy / path).read_bytes() == (SOURCE_ROOT / path).read_bytes(), path
    assert os.access(copy / "slurm" / "pretrain.sh", os.X_OK)
    assert json.loads((copy / "code.json").read_text()) == code_version()
    assert list((run.root / "code").iterdir()) == [copy]


def test_nothing_that_git_knows_is_left_out():
    tracked = subprocess.run(["git", "ls-files", *module.FOLDERS], cwd=SOURCE_ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("the code does not stand in a git repository; in CI it does")
    assert set(tracked.stdout.split()) <= {str(path) for path in source_files()}


def test_phidias_runs_from_the_copy_and_says_what_it_was(run, tmp_path):
    copy = snapshot_code(run)
    script = "import launcher.rundir.code as c; print(c.SOURCE_ROOT, c.code_digest(), c.code_version()['commit'])"
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-P", "-c", script]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True).stdout
    assert said.split() == [str(copy), code_digest(), str(code_version()["commit"])]


def test_bytecode_comes_along_and_is_valid(run, tmp_path, monkeypatch):
    """By size and time of the source, as Python compares them."""
    (tmp_path / "root" / "launcher").mkdir(parents=True)
    source = tmp_path / "root" / "launcher" / "one.py"
    source.write_text("VALUE = 1\n")
    os.utime(source, times=(1_700_000_000, 1_700_000_000))
    subprocess.run([sys.executable, "-m", "compileall", "-q", source], check=True)
    monkeypatch.setattr(module, "SOURCE_ROOT", tmp_path / "root")
    monkeypatch.setattr(module, "code_digest", lambda: "0123")
    monkeypatch.setattr(module, "code_version", dict)
    copied = snapshot_code(run) / "launcher" / "one.py"
    with open(importlib.util.cache_from_source(str(copied)), "rb") as file:  # noqa: PTH123
        _, flags, time, size = struct.unpack("<4sIII", file.read(16))
    assert (flags, time, size) == (0, int(copied.stat().st_mtime), copied.stat().st_size)


def test_no_umask_makes_it_writable_for_all(run):
    before = os.umask(0)
    try:
        copy = snapshot_code(run)
    finally:
        os.umask(before)
    assert not [path for path in (copy.parent, copy, *copy.rglob("*")) if path.stat().st_mode & stat.S_IWOTH]
