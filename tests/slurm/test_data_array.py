"""slurm/data_prep.sh on a real cluster: the bytes of engine=local, whatever is killed on the way."""

import json
import os
import re
import shlex
import time
from pathlib import Path

import pytest

from data_prep.prepare.place import STALE_S
from launcher.cli import main
from tests.data_prep.test_build import REPOSITORY, snapshot, some_texts, tokenizer_file  # noqa: F401 (a fixture)

SCRIPT = str(REPOSITORY / "slurm" / "data_prep.sh")
FILES, ROWS, REPEAT = 10, 40, 100  # a second's work for one: long enough to be killed in
RUN = """# @package _global_
defaults:
  - override /stage: web
run: {{name: web, seed: 1, runs_dir: "{root}/runs", data_dir: "???", stages: [web]}}
tokenizer: {{file: "{tokenizer}"}}
data: {{held_out_fraction: 0.1, shard_tokens: 50000, shuffle_mib: 1, chunk_tokens: 512, group_tokens: 8192, num_workers: 1}}
"""
STAGE = """# @package _global_
defaults:
  - demo_pretrain
  - override /mixture: web
  - _self_
stage: {name: web}
"""
MIXTURE = """name: web
sources:
  web: {{inputs: ["{root}/raw/*.jsonl"], format: jsonl, share: 1.0}}
"""


class Text:
    """A folder with text, and YAML that names it."""

    def __init__(self, root: Path, *, tokenizer: Path):
        self.root, values = root, {"root": root, "tokenizer": tokenizer}
        (root / "raw").mkdir(parents=True)
        for number in range(FILES):
            rows = [json.dumps({"text": f"file {number}: {text * REPEAT}"}) for text in some_texts(ROWS)]
            (root / "raw" / f"{number:02d}.jsonl").write_text("\n".join(rows) + "\n")
        for group, text in {"run": RUN.format(**values), "stage": STAGE, "mixture": MIXTURE.format(**values)}.items():
            (root / "yaml" / group).mkdir(parents=True)
            (root / "yaml" / group / "web.yaml").write_text(text)

    def words(self, data_dir: str) -> list[str]:
        """What follows `phidias data` for a data folder of the text's."""
        return [f"--config-dir={self.root / 'yaml'}", "run=web", f"run.data_dir='{self.root / data_dir}'"]

    def made(self, data_dir: str) -> dict[str, bytes]:
        """All but what a dead machine left half written, which stays for an hour."""
        files = snapshot(self.root / data_dir / "web")
        return {name: content for name, content in files.items() if not name.endswith(".partial")}

    def receipts(self, data_dir: str) -> list[str]:
        return [path.name for path in (self.root / data_dir / "web" / "receipts").glob("*.json")]


@pytest.fixture(scope="module")
def text(tmp_path_factory, tokenizer_file):  # noqa: F811
    text = Text(tmp_path_factory.mktemp("text"), tokenizer=tokenizer_file)
    assert main(["data", *text.words("local")]) == 0
    return text


@pytest.fixture
def sbatch(slurm, text):
    """Submits the script by hand, as its first lines say; the job id."""

    def submit(words, *, elements, options=()):
        line = ["sbatch", f"--array=0-{elements - 1}", "--cpus-per-task=1", f"--output={text.root}/%A_%a.log", *options]
        return slurm.submit([*line, "slurm/data_prep.sh", *words], cwd=REPOSITORY)

    return submit


def wait_for_receipts(text, data_dir, *, count=2):
    deadline = time.monotonic() + 60
    while len(text.receipts(data_dir)) < count and time.monotonic() < deadline:
        time.sleep(0.005)


def test_an_array_makes_the_bytes_of_one_machine(slurm, text, sbatch):
    job = sbatch(text.words("array"), elements=4)
    assert [element.exit_code for element in slurm.wait(job, "COMPLETED")] == [0] * 4
    assert text.made("array") == text.made("local") and len(text.receipts("array")) > 10


def test_phidias_submits_what_it_prints(slurm, text, monkeypatch, capsys):
    """From any folder; the line holds what a shell would take apart."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.env[name])
    monkeypatch.chdir(text.root)
    odd, before = "it is; $(touch pwned) & *", len(slurm.jobs())
    words = [*text.words("local")[:-1], f"run.data_dir='{odd}'", "engine=slurm", "data.num_machines=2"]
    assert main(["data", *words, "dry=true"]) == 0
    assert len(slurm.jobs()) == before
    line = capsys.readouterr().out.splitlines()[-1]
    assert main(["data", *words]) == 0
    printed, said = capsys.readouterr().out.splitlines()
    assert printed == line and shlex.split(line)[3:7] == ["sbatch", "--parsable", "--array=0-1", "--cpus-per-task=1"]
    slurm.wait(re.match(r"job (\d+): ", said)[1], "COMPLETED")
    assert text.made(odd) == text.made("local") and not list(text.root.rglob("pwned"))


def test_an_element_killed_and_the_same_line_again(slurm, text, sbatch):
    options = [f"--nodelist={slurm.nodes[0]}"]  # a machine knows of its own dead at once, of another's after STALE_S
    job = sbatch(text.words("killed"), elements=2, options=options)
    wait_for_receipts(text, "killed")
    slurm.run("scancel", "--batch", "--signal=KILL", f"{job}_1")
    done = len(text.receipts("killed"))
    again = sbatch(text.words("killed"), elements=1, options=options)
    assert [element.exit_code for element in slurm.wait(again, "COMPLETED")] == [0]
    states = {element.id: (element.state, element.signal) for element in slurm.wait(job)}
    assert states == {f"{job}_0": ("COMPLETED", 0), f"{job}_1": ("FAILED", 9)} and done < len(text.receipts("local"))
    assert text.made("killed") == text.made("local")


def test_a_node_that_dies(slurm, text, sbatch):
    """Its element starts again elsewhere, and nobody needs to submit anything."""
    job = sbatch(text.words("node"), elements=2, options=["--exclusive"])
    wait_for_receipts(text, "node")
    victim = next(element.node for element in slurm.jobs(job) if element.state == "RUNNING")
    slurm.kill_node(victim)
    for claim in (text.root / "node" / "web" / "claims").glob("*"):
        os.utime(claim, times=(time.time() - STALE_S - 1,) * 2)  # the wait, shortened
    slurm.wait(job, "COMPLETED")
    assert sorted(element.restarts for element in slurm.jobs(job)) == [0, 1]
    assert text.made("node") == text.made("local")


def test_a_bad_row_fails_the_source_for_all_elements(slurm, text, sbatch):
    (text.root / "bad.jsonl").write_text("no json\n")
    inputs = f"mixture.sources.web.inputs=['{text.root}/raw/*.jsonl','{text.root}/bad.jsonl']"
    job = sbatch([*text.words("bad"), inputs], elements=3)
    elements = slurm.wait(job, "FAILED")
    assert [element.exit_code for element in elements] == [2] * 3
    logs = "\n".join(element.output.read_text() for element in elements)
    assert f"{text.root}/bad.jsonl, line 1: the row is not valid JSON" in logs
    assert not (text.root / "bad" / "web" / "manifest.json").exists()
