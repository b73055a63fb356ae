"""No secret in a config, a message or a file; who may read the key and write the run; no user's word in a shell."""

import ast
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.config.check import check_run
from launcher.config.check_secrets import refuse_secret_words
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.rundir.exits import RunStateError
from launcher.rundir.permissions import check_key_file, lend_key

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2hunter2"
KEY = "0123456789abcdef" * 2 + "01234567"

# An override with a secret, the path it is refused under, what is shown of it.
REFUSED = [
    ("+cluster.env.WANDB_API_KEY={}", "cluster.env.WANDB_API_KEY", "monitor.wandb.key_file"),
    ("+cluster.env.AWS_SECRET_ACCESS_KEY={}", "cluster.env.AWS_SECRET_ACCESS_KEY", "export AWS_SECRET_ACCESS_KEY before"),
    ("+cluster.env.HF_TOKEN={}", "cluster.env.HF_TOKEN", "by its name a secret"),
    ("+cluster.env.PGPASSWORD={}", "cluster.env.PGPASSWORD", "***"),
    ("+cluster.env.my_credential={}", "cluster.env.my_credential", "***"),
    ("+cluster.env={{HF_TOKEN: {}}}", "cluster.env.HF_TOKEN", "***"),
    ("+cluster.env.HTTPS_PROXY='http://me:{}@proxy:8080'", "cluster.env.HTTPS_PROXY", "http://***@ in an address"),
    ("run.data_dir='s3://me:{}@bucket/data'", "run.data_dir", "s3://***@"),
    ("run.data_dir='s3://bucket/data?X-Amz-Security-Token={}&a=1'", "run.data_dir", "X-Amz-Security-Token=***"),
    ("run.runs_dir='https://{}@host/runs'", "run.runs_dir", "https://***@"),
    ("mixture.sources.code.inputs=['https://host/x?se=1&sig={}']", "mixture.sources.code.inputs", "sig=***"),
    ("tokenizer.file='https://host/x?AWSAccessKeyId={}'", "tokenizer.file", "AWSAccessKeyId=***"),
    (
        "cluster.container={{runtime: pyxis, image: 'docker://me:{}@registry/x', mounts: [], python: python3}}",
        "cluster.container",
        "docker://***@",
    ),
    ("cluster.setup=['module load cuda','export WANDB_API_KEY={}']", "cluster.setup", "WANDB_API_KEY=***"),
    ("cluster.setup=['export HF_TOKEN=\"{}\"']", "cluster.setup", "HF_TOKEN=***"),
    ("cluster.setup=['wandb login {}']", "cluster.setup", "wandb login ***"),
    ("cluster.setup=['hf auth login --token {}']", "cluster.setup", "--token ***"),
    ("cluster.sbatch_options=['--export=ALL,HF_TOKEN={}']", "cluster.sbatch_options", "HF_TOKEN=***"),
]
ALLOWED = [
    "+cluster.env.TOKENIZERS_PARALLELISM='false'",
    "+cluster.env.NCCL_IB_PKEY='0x7fff'",
    "+cluster.env.NCCL_SOCKET_IFNAME=ib0",
    "+cluster.env.MONKEY=business",
    "+cluster.env.HF_TOKEN_PATH=/home/me/token",
    "+cluster.env.HF_HUB_DISABLE_IMPLICIT_TOKEN='1'",
    "+cluster.env.HTTPS_PROXY='http://proxy:8080'",
    "run.data_dir='s3://bucket/me@work:now?region=x'",
    "mixture.sources.code.inputs=['s3://bucket/part-?.jsonl']",
    "cluster.setup=['module load cuda/12.8','export HF_TOKEN=$(cat ~/token)','export WANDB_API_KEY=\"$MINE\"']",
    "cluster.sbatch_options=['--signal=B:USR1@60','--qos=high']",
    "cluster.container={runtime: pyxis, image: 'docker://torch:24.1@sha256:ab12', mounts: [], python: python3}",
    "monitor.wandb.key_file=/home/me/wandb_key",
]


def refusal(action, *arguments):
    with pytest.raises(ConfigError) as caught:
        action(*arguments)
    return caught.value


@pytest.mark.parametrize(("word", "path", "part"), REFUSED, ids=[word for word, *_ in REFUSED])
def test_a_secret_is_refused_and_never_repeated(word, path, part):
    word = word.format(SECRET)
    for error in (refusal(compose_run, ["stage=demo_pretrain", word]), refusal(refuse_secret_words, [word])):
        assert all(problem.path.startswith(path) for problem in error.problems)
        assert part in str(error) and SECRET not in str(error)


@pytest.mark.parametrize("word", ALLOWED)
def test_what_only_looks_like_a_secret_passes(word):
    compose_run(["stage=demo_pretrain", word])
    refuse_secret_words([word])


def test_secrets_are_reported_together_and_before_rules_that_would_repeat_values():
    words = ["run.data_dir='s3://me:{}@bucket'", "+cluster.env.HF_TOKEN={}", "model.num_layers=3"]
    error = refusal(compose_run, [word.format(SECRET) for word in words])
    paths = {problem.path for problem in error.problems}
    assert paths == {"run.data_dir", "cluster.env.HF_TOKEN"}  # not model.num_layers, and data_dir once
    assert SECRET not in str(error)


def test_a_secret_of_one_stage_is_told_with_it():
    config = compose_run(["run=demo"])
    stage = config.stage("demo_midtrain")
    long = replace(stage.mixture.sources["long"], inputs=(f"s3://me:{SECRET}@bucket/*",))
    mixture = replace(stage.mixture, sources={**stage.mixture.sources, "long": long})
    error = refusal(check_run, replace(config, stages=(config.stages[0], replace(stage, mixture=mixture))))
    assert [problem.path for problem in error.problems] == ["mixture.sources.long.inputs.0 (stage demo_midtrain)"]


def test_a_refused_override_is_written_nowhere(tmp_path, monkeypatch, capsys):
    """events.jsonl records the command line of a launch; one that is refused has none."""
    monkeypatch.chdir(tmp_path)
    for verb in (["plan"], ["train"], ["data"], ["submit"], ["plan", "-m"]):
        assert main([*verb, "run=demo", f"+cluster.env.HF_TOKEN={SECRET}"]) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and "cluster.env.HF_TOKEN" in said.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def wandb(file, *, mode="online"):
    return compose_run(["run=demo", f"monitor.wandb.mode={mode}", f"monitor.wandb.key_file={file}"])


@pytest.fixture
def key_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")  # what lend_key sets is taken back with it
    file = tmp_path / "wandb_key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_the_key_is_lent_to_the_process(key_file, mode):
    key_file.chmod(mode)
    check_key_file(wandb(key_file))
    lend_key(wandb(key_file))
    assert os.environ["WANDB_API_KEY"] == KEY


def test_the_key_of_the_environment_comes_first(key_file, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "mine")
    key_file.chmod(0o666)  # not read
    check_key_file(wandb(key_file))
    lend_key(wandb(key_file))
    assert os.environ["WANDB_API_KEY"] == "mine"


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_without_a_network_no_key_is_read(key_file, mode):
    lend_key(wandb(key_file.with_name("absent"), mode=mode))
    assert not os.environ["WANDB_API_KEY"]


def test_home_is_known(key_file, monkeypatch):
    monkeypatch.setenv("HOME", str(key_file.parent))
    check_key_file(wandb("'~/wandb_key'"))


def absent(file):
    file.unlink()


def folder(file):
    file.unlink()
    file.mkdir()


def pipe(file):
    file.unlink()
    os.mkfifo(file, 0o600)


BAD_FILES = [
    (lambda file: file.chmod(0o640), "with mode 0640", "chmod 600"),
    (lambda file: file.chmod(0o604), "with mode 0604", "chmod 600"),
    (lambda file: file.write_text(""), "something else than one key", "the key alone"),
    (lambda file: file.write_text(f"{KEY}\n{KEY}\n"), "something else than one key", "the key alone"),
    (lambda file: file.write_bytes(b"\x00\xff"), "something else than one key", "the key alone"),
    (absent, "No such file", "export WANDB_API_KEY"),
    (folder, "no regular file", "the path of a file"),
    (pipe, "no regular file", "the path of a file"),
]


@pytest.mark.parametrize(("spoil", "found", "fix"), BAD_FILES, ids=[f"{found} {fix}" for _, found, fix in BAD_FILES])
def test_a_key_file_that_others_could_read_or_that_holds_no_key(key_file, spoil, found, fix):
    spoil(key_file)
    text = str(refusal(check_key_file, wandb(key_file)))
    assert "monitor.wandb.key_file: found" in text and found in text and fix in text and KEY not in text
    with pytest.raises(RunStateError, match=r"monitor\.wandb\.key_file"):
        lend_key(wandb(key_file))
    assert not os.environ["WANDB_API_KEY"]


def test_a_key_file_of_another_user(key_file, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: key_file.stat().st_uid + 1)
    if key_file.stat().st_uid == 0:  # root's may be read
        os.chown(key_file, 12345, -1)
    assert "belongs to user" in str(refusal(check_key_file, wandb(key_file)))


def test_train_refuses_a_bad_key_file_before_it_touches_anything(key_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    key_file.chmod(0o644)
    assert main(["train", "run=demo", "monitor.wandb.mode=online", f"monitor.wandb.key_file={key_file}"]) == 2
    assert "with mode 0644" in capsys.readouterr().err and not (tmp_path / "runs").exists()


# Words of users reach programs as arguments. `cluster.setup` is shell by its meaning and has one place of its own.
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}
SETUP = 'eval "${PHIDIAS_SETUP:-}"'


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node, node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


@pytest.mark.parametrize("folder", ["launcher", "data_prep", "training", "slurm"])
def test_no_command_goes_through_a_shell(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for call, name in calls(path):
            where = f"{path.relative_to(ROOT)}:{call.lineno}"
            assert name not in SHELLS, where
            assert not (isinstance(call.func, ast.Name) and name in ("eval", "exec")), where
            assert not [word for word in call.keywords if word.arg == "shell"], where


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_keep_words_apart(path):
    lines = [line.partition(" #")[0].strip() for line in path.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if re.search(r"\beval\b", line) and line != SETUP]
    assert not [line for line in lines if re.search(r"\b(ba)?sh -l?c\b", line)]
    assert not [line for line in lines if re.search(r"(?<![\"{])\$[@*]", line)]
