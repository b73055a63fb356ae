"""The command line: exit codes, messages, Hydra's flags, options, completion; the data and train verbs on a small corpus."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import launcher.jobs.local
from launcher.cli import main
from launcher.rundir.checkpoints import Meta, file_digest
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, write_json
from launcher.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "megatron", "transformers", "hydra", "omegaconf", "pydantic", "numpy", "rich")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "PHIDIAS_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def phidias(capsys):
    """Runs the command line in this process: exit code, standard output, standard error."""

    def call(*words):
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as ending:  # Hydra's own flags end the process
            code = ending.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return call


def shell(*words, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-m", "launcher", *words], env=environment, capture_output=True, text=True)


def test_help_lists_every_verb_and_imports_nothing_heavy():
    code = f"import sys; from launcher.cli import main; main(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert all(f"\n  {verb} " in ended.stdout and about.help in ended.stdout for verb, about in VERBS.items())
    assert ended.stdout.rstrip().endswith("[]")


def test_config_verbs_never_import_torch():
    code = "import sys; from launcher.cli import main; main(['plan', 'run=phi4']); print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ended.stdout.endswith("False\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(phidias, verb):
    code, out, _ = phidias(verb, "--help")
    assert code == 0 and f"usage: phidias {verb}" in out


def test_help_of_a_config_verb_names_its_options(phidias):
    assert phidias("plan", "-h")[1].startswith("usage: phidias plan [out=json] [picture=FILE] [group=choice")
    assert phidias("data", "-h")[1].startswith("usage: phidias data [dry=true] [action=verify|import] [group=choice")


def test_help_of_a_config_verb_lists_groups_and_keys(phidias):
    _, out, _ = phidias("plan", "--help")
    assert "model: demo, llama3_8b, phi4_14b, phi_100m" in out and "num_layers: 4" in out


def test_unknown_verb(phidias):
    assert phidias("pln") == (2, "", "phidias: no verb 'pln': did you mean plan?\n")
    code, _, err = phidias("zzz")
    assert code == 2 and "the verbs are plan, exposure" in err


def test_plan_out_json_is_json_alone(phidias):
    code, out, err = phidias("plan", "run=phi4", "out=json")
    documents = json.loads(out)
    assert (code, err, [document["stage"] for document in documents]) == (0, "", ["pretrain", "midtrain"])
    assert documents[0]["num_params"] == 14_659_507_200


def test_plan_page(phidias):
    code, out, _ = phidias("plan")
    assert code == 0 and "demo_pretrain" in out and "1,787,008 parameters" in out


def test_exposure_out_json(phidias):
    _, out, _ = phidias("exposure", "run=phi4", "stage=pretrain", "out=json")
    assert [row["source"] for row in json.loads(out)] == ["web", "web_rewrites", "synthetic", "code", "acquired"]


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["plan", "layout.tpp=3"], 2, ["layout.tpp", "did you mean layout.tp"]),
        (["plan", "stage=pretrain"], 2, ["run 'demo' has the stages"]),
        (["plan", "layout.tp=2"], 2, ["add stage=demo_pretrain"]),
        (["plan", "out=xml"], 2, ["'xml'", "out=json"]),
        (["plan", "dry=true"], 2, ["dry: found an option of data and submit; plan takes out="]),
        (["train", "out=json"], 2, ["out: found an option of plan and exposure"]),
        (["plan", "outt=json"], 2, ["did you mean out=?"]),
        (["data", "dry=true", "action=verify"], 2, ["action: found action=verify with dry=true"]),
        (["status", "runs_dir=/nonexist"], 2, ["runs_dir: found '/nonexist'; there is no such folder"]),
        (["data", "action=verfy"], 2, ["it is one of verify"]),
        (["plan", "model.num_layers=0"], 2, ["greater than 0"]),
        (["plan", "--config-dir", "nowhere"], 2, ["nowhere"]),
        (["train", "run=phi4"], 2, ["cluster.kind: found slurm", "`phidias submit` with the same words"]),
        (
            ["train"],
            2,
            ["config refused, 5 problems", "no data (runs/demo_data/code/manifest.json is missing)", "phidias data"],
        ),
        (["data"], 2, ["raw/code"]),
        (["report"], 2, ["needs the name of a run"]),
        (["report", "nothing"], 3, ["no run 'nothing' in runs: it holds no run"]),
        (["export", "nothing"], 3, ["no run 'nothing'"]),
        (["status", "--wide"], 2, ["--wide", "it takes run names and runs_dir="]),
        (["export", "demo", "promt=x"], 2, ["did you mean prompt=?"]),
    ],
)
def test_refusals(phidias, words, code, parts):
    ended, out, err = phidias(*words)
    assert (ended, out) == (code, "")
    assert err.startswith("phidias: ") and "Traceback" not in err
    assert all(part in err for part in parts), err
    assert not Path("runs").exists()


def test_refusal_from_the_shell_has_no_trace_unless_asked_for():
    ended = shell("plan", "model=phi5")
    assert (
        (ended.returncode, ended.stdout) == (2, "") and "did you mean phi" in ended.stderr and "Traceback" not in ended.stderr
    )
    for variable in ("HYDRA_FULL_ERROR", "PHIDIAS_DEBUG"):
        ended = shell("plan", "model=phi5", **{variable: "1"})
        assert ended.returncode == 2 and "Traceback" in ended.stderr and "MissingConfigException" in ended.stderr


def test_cfg_job_prints_the_config(phidias):
    code, out, _ = phidias("plan", "run=phi4", "--cfg", "job", "--package", "stage")
    assert code == 0 and "seq_length: 4096" in out


def test_config_dir_adds_files(phidias, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "tiny.yaml").write_text("defaults: [demo, _self_]\nname: tiny\nnum_layers: 2\n")
    code, out, _ = phidias("plan", "--config-dir", "mine", "model=tiny", "out=json")
    assert code == 0 and json.loads(out)[0]["model"] == "tiny"
    code, _, err = phidias("plan", "--config-dir", "mine", "model=tinny")
    assert code == 2 and "did you mean tiny?" in err


def test_a_sweep_prints_one_document_a_line_and_names_its_runs(phidias):
    code, out, _ = phidias("plan", "-m", "run=demo", "model.num_layers=2,4", "out=json")
    first, second = (json.loads(line) for line in out.splitlines())
    assert code == 0 and first[0]["num_params"] < second[0]["num_params"]
    names = {first[0]["run"], second[0]["run"]}
    assert len(names) == 2 and all(name.startswith("demo-") for name in names)


def test_a_sweep_goes_on_after_a_refusal(phidias):
    code, out, err = phidias("plan", "-m", "model.num_layers=3,4", "out=json")
    assert code == 2 and len(out.splitlines()) == 1 and "must divide model.num_layers (3)" in err


SIZES = ("100m", "14b", "200m", "3b", "400m", "7b")
RUNS = ("ablation", "demo", "phi4", "series", *(f"series_{size}" for size in SIZES))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("phidias plan run=", [f"run={name}" for name in RUNS]),
        ("phidias plan model=phi4", ["model=phi4_14b"]),
        ("phidias train stage.seq", ["stage.seq_length="]),
        ("phidias pl", list(VERBS)),
        ("phidias status de", []),
    ],
)
def test_tab_completion(phidias, monkeypatch, line, found):
    monkeypatch.setenv("COMP_LINE", line)
    code, out, _ = phidias("-sc", "query=bash")
    assert code == 0 and out.split() == found


def test_completion_installs(phidias):
    code, out, _ = phidias("-sc", "install=bash")
    assert code == 0 and "COMP_LINE" in out


SENTENCE = "The quick brown fox jumps over the lazy dog, and number {} follows it home. "


def write_corpus(root):
    """The demo's four sources in small: text, jsonl.gz, jsonl.zst and parquet, and a tokenizer trained on them."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    from data_prep.demo import train_tokenizer

    texts = [SENTENCE.format(i) * 40 for i in range(60)]
    for name in ("code", "reference", "prose", "long"):
        (root / "raw" / name).mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (root / "raw/code/a.jsonl.gz").write_bytes(gzip.compress(lines))
    (root / "raw/reference/a.jsonl.zst").write_bytes(zstandard.compress(lines))
    for index, text in enumerate(texts):
        (root / f"raw/prose/{index}.txt").write_text(text)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), root / "raw/long/a.parquet")
    (root / "tokenizer.json").write_text(train_tokenizer(texts))


SMALL = ["data.num_workers=1", "data.held_out_fraction=0.1"]


@pytest.fixture
def corpus(phidias):
    write_corpus(Path("runs/demo_data"))
    code, out, err = phidias("data", *SMALL)
    assert code == 0, err
    return out


def test_data_prepares_every_source_and_says_what_came_of_it(corpus, phidias):
    assert "code: 60 documents" in corpus and "bytes/token" in corpus
    for name in ("code", "reference", "prose", "long"):
        assert Path("runs/demo_data", name, "manifest.json").exists()
    code, out, _ = phidias("data", "action=verify", *SMALL)
    assert code == 0 and out.count("shards agree with the manifest") == 4
    shard = next(Path("runs/demo_data/code").glob("shard*.bin"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    code, out, _ = phidias("data", "action=verify", *SMALL)
    assert code == 3 and "code: 1 findings" in out
    shutil.rmtree("runs/demo_data/prose")
    code, out, _ = phidias("data", "action=verify", *SMALL)
    assert code == 3 and "no data for source 'prose'" in out and "code: 1 findings" in out


def test_data_dry_writes_nothing(phidias):
    write_corpus(Path("runs/demo_data"))
    code, out, _ = phidias("data", "dry=true")
    assert code == 0 and "prose" in out and "60" in out
    assert not Path("runs/demo_data/prose").exists()


def test_data_says_once_that_the_tokenizer_is_not_there(phidias):
    write_corpus(Path("runs/demo_data"))
    code, _, err = phidias("data", "tokenizer=cl100k", *SMALL)
    assert code == 2 and err.count("cannot read tokenizer.ranks_file") == 1 and "sources failed" not in err


def test_exposure_counts_what_is_prepared(corpus, phidias):
    _, out, _ = phidias("exposure", "out=json", *SMALL)
    rows = {row["source"]: row for row in json.loads(out)}
    assert 0 < rows["code"]["unique_tokens"] < 1e6 and rows["code"]["epochs"] > 1


FITS = [*SMALL, "stage.tokens=8192", "stage=demo_pretrain", "optim.warmup_tokens=0"]


@pytest.fixture
def trained(monkeypatch):
    """The local executor, replaced by one that only remembers; its exit class is the second item."""
    calls, ending = [], [ExitClass.DONE]
    monkeypatch.setattr(launcher.jobs.local, "train", lambda run, config: calls.append((run, config)) or ending[0])
    return calls, ending


def test_train_freezes_the_config_and_returns_the_executors_exit_class(corpus, phidias, trained):
    calls, ending = trained
    assert phidias("train", *FITS)[0] == 0
    run, config = calls[0]
    assert read_config(run) == config and config.stage_names == ("demo_pretrain",)
    ending[0] = ExitClass.CHECKPOINTED
    assert phidias("train", *FITS)[0] == 10
    code, out, _ = phidias("train", *FITS, "monitor.log_interval=7")
    assert code == 10 and "amended: monitor.log_interval " in out and "-> 7\n" in out
    code, _, err = phidias("train", *FITS, "run.seed=3")
    assert code == 3 and "run.seed: the run has 42, asked for 3" in err


def test_resume_goes_on_with_what_is_frozen(corpus, phidias, trained):
    calls, ending = trained
    ending[0] = ExitClass.INTERRUPTED
    assert phidias("train", *FITS, "run.name=again", "monitor.log_interval=7")[0] == 130
    assert phidias("resume", "again")[0] == 130
    (_, before), (run, config) = calls
    assert config == before and config.monitor.log_interval == 7 and run.name == "again"
    code, _, err = phidias("resume", "agian")
    assert code == 3 and "did you mean again" in err
    (Path("runs/demo_data") / "code" / "manifest.json").unlink()
    code, _, err = phidias("resume", "again")
    assert code == 2 and "no data" in err and len(calls) == 2


def test_train_reports_all_that_is_wrong_with_the_data(corpus, phidias, trained):
    tokenizer = Path("runs/demo_data/tokenizer.json")
    fields = json.loads(tokenizer.read_text())
    fields["normalizer"] = {"type": "NFC"}
    tokenizer.write_text(json.dumps(fields))
    Path("runs/demo_data/prose/manifest.json").unlink()
    words = [*SMALL, "stage=demo_pretrain", "model.vocab_size=128", "model.padded_vocab_size=128"]
    words += [
        "data.chunk_tokens=65536",
        "data.group_tokens=65536",
        "stage.seq_length=65536",
        "stage.validation.max_tokens=65536",
    ]
    code, _, err = phidias("train", *words)
    assert code == 2 and not trained[0] and not Path("runs/demo").exists()
    for part in (
        "mixture.sources.prose: found no data",
        "mixture.sources.code: found data made by a tokenizer with fingerprint",
        "model.padded_vocab_size: found 128; it must hold the",
        "one window at stage.seq_length 65536 takes 65537",
    ):
        assert part in err, err


def test_a_broken_cap_refuses_the_launch_and_is_shown_by_exposure(corpus, phidias, trained):
    """Counted from the manifest: the mixture assumes no size."""
    words = [*FITS, "mixture.sources.code.max_epochs=0.05"]
    code, _, err = phidias("train", *words)
    assert code == 2 and not trained[0] and not Path("runs/demo").exists()
    assert "mixture.sources.code.max_epochs: found 0.05" in err and "epochs by the end of it" in err
    code, out, err = phidias("exposure", "out=json", *words)
    assert code == 2 and json.loads(out)[0]["max_epochs"] == 0.05 and "epochs by the end of it" in err


def test_data_refuses_a_vocabulary_that_does_not_fit(phidias):
    write_corpus(Path("runs/demo_data"))
    code, _, err = phidias("data", *SMALL, "model.vocab_size=128", "model.padded_vocab_size=128")
    assert code == 2 and "model.padded_vocab_size: found 128" in err
    code, _, err = phidias("data", *SMALL, "model.vocab_size=128")
    assert code == 2 and "model.vocab_size: found 128; it must hold the" in err and "padded" not in err


def test_status_and_report_read_the_run_directory(corpus, phidias, trained):
    assert phidias("train", *FITS)[0] == 0
    run = RunDir(Path("runs/demo"))
    append_record(run.events, "start")
    append_record(run.events, "resume", stage="demo_pretrain", step=2)
    append_record(run.events, "fault", stage="demo_pretrain", rank=0, exit="RETRYABLE", error="a cable [/x:1]")
    append_record(run.events, "start")
    write_json(run.status, {"stage": "demo_pretrain", "state": "running", "step": 3, "tokens": 12288, "loss": 2.5})
    code, out, _ = phidias("status", "out=json")
    (row,) = json.loads(out)
    assert code == 0 and (row["name"], row["state"], row["step"], row["restarts"]) == ("demo", "died", 3, 1)
    assert row["last_fault"] == "a cable [/x:1]" and row["goodput"] is None
    assert "demo" in phidias("status", "demo")[1]
    code, _, err = phidias("status", "dmo")
    assert code == 3 and "did you mean demo?" in err
    code, out, _ = phidias("report", "demo")
    assert code == 0 and Path(out.splitlines()[-1].removeprefix("report: ")).exists()


def test_status_of_torn_and_faulty_runs(phidias):
    """A torn file hides no other run, a fault that looks like markup has a line of its own, one that is over is not shown."""
    runs = [RunDir(Path("runs") / name) for name in ("binary", "torn", "faulty", "mended")]
    for run in runs:
        run.root.mkdir(parents=True)
        run.config.touch()
    binary, torn, faulty, mended = runs
    binary.status.write_bytes(b"\xff\xfe")
    torn.status.write_text("{torn")
    error = f"[/__w/pytorch/c10.cpp:1] {'a long word ' * 10}\nat line 2"
    for run in (faulty, mended):
        append_record(run.events, "fault", stage="a", error=error, exit="RETRYABLE", rank=0)
    append_record(mended.events, "resume", stage="a", step=1)
    code, out, _ = phidias("status")
    assert code == 0 and all(f"\n{name} " in out for name in ("binary", "torn", "mended"))
    assert f"\nfaulty: {error.splitlines()[0]}\n" in out and "mended: " not in out


def test_export_hands_over_to_a_process_with_torch(corpus, phidias, trained, monkeypatch):
    assert phidias("train", *FITS)[0] == 0
    commands = []

    def remember(command, **options):
        commands.append((command, options["env"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", remember)
    assert phidias("export", "demo", "prompt=def f(x):")[0] == 3
    command, environment = commands[0]
    words = [str(Path("runs/demo").resolve()), "--stage", "demo_pretrain", "--prompt", "def f(x):"]
    assert command[1:] == ["-W", "ignore", "-m", "training.interop.export", *words]
    assert environment["PYTHONSAFEPATH"] == "1" and str(ROOT) in environment["PYTHONPATH"]
    code, _, err = phidias("export", "demo", "stage=demo_midtrain")
    assert code == 2 and "run demo has demo_pretrain" in err


def test_checkpoints_of_a_run(corpus, phidias, trained):
    """Listed, verified, pruned; a byte that was changed is found."""
    assert phidias("train", *FITS)[0] == 0
    run = RunDir(Path("runs/demo"))
    assert phidias("checkpoint", "demo")[:2] == (0, "no checkpoints\n")
    folder = run.checkpoints("demo_pretrain")
    for step, finished in ((10, False), (20, False), (30, True)):
        path = folder / f"step_{step:08d}"
        path.mkdir(parents=True)
        (path / "shard").write_bytes(b"content")
        meta = Meta(
            1, "demo_pretrain", step, step * 8, step * 512, finished, {}, {}, {}, {}, {"shard": 7},
            {"shard": file_digest(path / "shard")},
        )  # fmt: skip
        write_json(path / "meta.json", vars(meta))
        append_record(folder / "index.jsonl", "checkpoint", path=path.name, meta=file_digest(path / "meta.json"))
    code, out, _ = phidias("checkpoint", "demo", "action=verify")
    assert code == 0 and out.count("step_000000") == 3 and "stage end" in out
    (folder / "step_00000020" / "shard").write_bytes(b"contenu")
    assert phidias("checkpoint", "demo")[0] == 0  # sizes are right
    code, out, _ = phidias("checkpoint", "demo", "action=verify")
    assert code == 3 and "step_00000020/shard: its content is not what was written" in out
    assert phidias("checkpoint", "demo", "action=prune", "keep=1")[:2] == (
        0, "demo_pretrain: removed step_00000010, step_00000020\n",
    )  # fmt: skip
    assert phidias("checkpoint", "demo", "keep=2")[0] == phidias("checkpoint", "demo", "action=prune")[0] == 2
    assert phidias("checkpoint", "demo", "stage=other")[0] == 2
