"""The command lines of Slurm jobs: no word is lost, changed or read by a shell between `phidias data` and the element."""

import os
import shlex
import subprocess
import sys

import pytest

from launcher.cli import main
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.jobs.graph import data_job
from launcher.jobs.slurm import run_sbatch, try_sbatch
from launcher.rundir.code import SOURCE_ROOT

ODD = ["run.name='a b'", 'x.y="it\'s; $(touch pwned)"', "mixture.sources.web.inputs=['/raw/*.jsonl', `id`]", "~data.trace", ""]
DATA_SCRIPT = SOURCE_ROOT / "slurm" / "data_prep.sh"
WORKERS, MINE = "data.num_workers=4", "data.num_workers=9"


def line(*overrides):
    return data_job(compose_run(["run=demo", *overrides]), words=overrides).line(after=None)


def program(path, *lines):
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)
    return path


def test_an_array_has_the_size_that_the_config_says():
    words = line("data.num_machines=64", "data.num_workers=32")
    assert words[:3] == ["env", f"PHIDIAS_PYTHON={sys.executable}", f"PHIDIAS_CODE={SOURCE_ROOT}"]
    assert words[3:7] == ["sbatch", "--parsable", "--array=0-63", "--cpus-per-task=32"]
    assert words[7:] == ["--export=ALL", str(DATA_SCRIPT), *words[-2:]]
    assert words[-2:] == ["data.num_machines=64", "data.num_workers=32"] and os.access(DATA_SCRIPT, os.X_OK)


def test_what_a_site_wants_comes_before_the_script():
    words = line("cluster.partition=cpu", "cluster.account=lab", "cluster.time_limit='2-00:00:00'")
    options = words[: words.index(str(DATA_SCRIPT))]
    assert {"--partition=cpu", "--account=lab", "--time=2-00:00:00"} <= set(options)
    assert not any(word.startswith(("--partition", "--account", "--time")) for word in line())


def test_yaml_of_ones_own_comes_along(tmp_path, monkeypatch, capsys):
    """Hydra does not count --config-dir as an override."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "yaml" / "mixture").mkdir(parents=True)
    source = 'own: {inputs: ["raw/*.jsonl"], format: jsonl, share: 1.0}'
    (tmp_path / "yaml" / "mixture" / "own.yaml").write_text(f"name: own\nsources:\n  {source}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.verbs.data.build_tokenizer", lambda _: None)
    words = ["stage=demo_pretrain", "mixture=own", "hydra.searchpath=[pkg://model_configs]"]
    assert main(["data", *words, "--config-dir", "yaml", "engine=slurm", "dry=true"]) == 0
    script, *rest = shlex.split(capsys.readouterr().out.splitlines()[-1])[-5:]
    assert (script, rest) == (str(DATA_SCRIPT), [f"--config-dir={tmp_path}/yaml", words[2], *words[:2]])


@pytest.mark.parametrize(
    ("words", "arrives"),
    [
        (ODD, [WORKERS, *ODD]),
        (["--config-dir=/y", "run=a", MINE], ["--config-dir=/y", WORKERS, "run=a", MINE]),
        (["--config-dir", "/y", "run=a"], ["--config-dir", "/y", WORKERS, "run=a"]),
        (["run=a", "--config-dir", "/y"], [WORKERS, "run=a", "--config-dir", "/y"]),
        (["--config-dir", "/y"], ["--config-dir", "/y", WORKERS]),
        ([], [WORKERS]),
    ],
)
def test_the_script_hands_its_words_on(tmp_path, words, arrives):
    """Overrides stay side by side, where Hydra wants them; a word of the user's comes after ours and wins."""
    (tmp_path / "slurm").symlink_to(SOURCE_ROOT / "slurm")
    python = program(tmp_path / "python 3", f'printf "%s\\0" "$PWD" "$@" > "{tmp_path}/seen"', "exit 13")
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "4", "PHIDIAS_PYTHON": str(python)}
    done = subprocess.run(["bash", DATA_SCRIPT, *words], env={**os.environ, **environment})
    assert done.returncode == 13  # the element's exit code is phidias's
    assert (tmp_path / "seen").read_text().split("\0")[:-1] == [str(tmp_path), "-P", "-m", "launcher", "data", *arrives]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("place", [".venv/bin", "bin"])
def test_by_hand_the_environment_of_the_checkout_comes_first(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / "slurm").symlink_to(SOURCE_ROOT / "slurm")
    program(tmp_path / place / "phidias", "echo $0")
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    said = subprocess.run(["bash", DATA_SCRIPT], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{tmp_path}/{place}/phidias"


@pytest.mark.parametrize("given", [{}, {"PHIDIAS_PYTHON": "/gone/python"}])
def test_an_element_without_phidias_says_so(tmp_path, given):
    (tmp_path / "slurm").symlink_to(SOURCE_ROOT / "slurm")
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", **given}
    done = subprocess.run(["bash", DATA_SCRIPT, "run=a"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and f"no {given.get('PHIDIAS_PYTHON', 'phidias')} on " in done.stderr


def test_sbatch_answers_with_an_id_or_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    program(tmp_path / "sbatch", '[[ $PWD == "$1" ]] || { echo "submitted from $PWD" >&2; exit 1; }', "echo '12;lab'")
    assert run_sbatch(["sbatch", str(tmp_path)]) == "12"  # where paths of the overrides are relative to
    with pytest.raises(ConfigError, match=r"cluster: found sbatch said: submitted from /.*correct cluster"):
        run_sbatch(["sbatch", "/"])
    with pytest.raises(ConfigError, match="cluster: found no sbatch on the PATH"):
        run_sbatch(["no-such-sbatch"])
    with pytest.raises(ConfigError, match="cluster: found no sbatch on the PATH"):
        run_sbatch(["env", "A=b", "no-such-sbatch"])


def test_slurm_is_asked_before_it_is_given_a_job(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path / "sbatch", 'echo "$A $*" >&2')
    assert try_sbatch(["env", "A=b", "sbatch", "--parsable", "x.sh", "sbatch"]) == "b --test-only --parsable x.sh sbatch"


@pytest.mark.parametrize("script", ["pretrain.sh", "data_prep.sh", "phidias.sh"])
def test_a_script_that_was_submitted_from_elsewhere_says_so(tmp_path, script):
    done = subprocess.run(
        ["bash", SOURCE_ROOT / "slurm" / script], env={"SLURM_SUBMIT_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "from the root of the repository" in done.stderr


def test_a_requeue_runs_the_code_the_run_was_frozen_with(tmp_path):
    """The comment names the copy; setup lines have run before, also those that read variables nobody set."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "slurm").symlink_to(SOURCE_ROOT / "slurm")
    copy = tmp_path / "runs" / "a b" / "code" / "0123"
    copy.mkdir(parents=True)
    program(tmp_path / "squeue", f'echo "{tmp_path}/runs/a b:pretrain:0123   "')
    python = program(tmp_path / "python", 'echo "$PYTHONPATH|$PWD|$SET|$*"')
    environment = {
        "SLURM_SUBMIT_DIR": str(tmp_path / "repository"), "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:/usr/bin:/bin",
        "PHIDIAS_PYTHON": str(python), "PHIDIAS_SETUP": "export SET=yes$NOBODY\ntrue # a comment",
    }  # fmt: skip
    script = SOURCE_ROOT / "slurm" / "pretrain.sh"
    said = subprocess.run(["bash", script, "a=b"], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{copy}|{tmp_path}/repository|yes|-P -m launcher job a=b"
    program(tmp_path / "squeue", "echo '(null)'")
    said = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith("|")
