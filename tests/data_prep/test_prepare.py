"""Tasks, receipts and claims: the same bytes from any number of workers, through any number of kills."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.inputs import find_inputs
from data_prep.manifest import verify_source
from data_prep.prepare.place import HEARTBEAT_S, STALE_S, LocalPlace
from data_prep.prepare.plan import deal, decode_plan
from data_prep.readers import Piece, Rejects, RowCount, can_be_cut, read_piece
from tests.data_prep.test_build import REPOSITORY, Lab, snapshot, some_texts, tokenizer_file  # noqa: F401 (a fixture)

FILES, ROWS = 12, 100


@pytest.fixture
def lab(tmp_path, tokenizer_file):  # noqa: F811
    lab = Lab(tmp_path, tokenizer_file)
    for number in range(FILES):
        lab.texts(f"{number:02d}.jsonl", [f"file {number}: {text}" for text in some_texts(ROWS)])
    return lab


def receipts(lab, name="web"):
    return sorted(path.name for path in (lab.data_dir / name / "receipts").glob("*.json"))


def content(lab, name="web"):
    """Every file of the source."""
    return snapshot(lab.data_dir / name)


def test_any_number_of_workers_gives_the_same_bytes(lab):
    lab.prepare(num_workers=1, shuffle_mib=1)
    first = content(lab)
    assert len(receipts(lab)) > 10 and "claims" not in {Path(name).parts[0] for name in first}
    for workers in (2, 5):
        shutil.rmtree(lab.data_dir)
        lab.prepare(num_workers=workers, shuffle_mib=1)
        assert content(lab) == first


def test_datatrove_s_executor_gives_the_same_bytes(lab):
    lab.prepare(shuffle_mib=1)
    ours = content(lab)
    shutil.rmtree(lab.data_dir)
    lab.prepare(shuffle_mib=1, num_workers=2, engine="datatrove")
    assert content(lab) == ours
    shutil.rmtree(lab.data_dir)
    lab.write("99.jsonl", ["bad\n"])
    with pytest.raises(DataError, match=r"99\.jsonl, line 1: the row is not valid JSON"):
        lab.prepare(num_workers=2, engine="datatrove")


def test_ray_gives_the_same_bytes(lab):
    """Ray is half a gigabyte that no other test needs: run by hand, `pip install ray`, see LOG.md."""
    pytest.importorskip("ray", reason="ray is not in the dev extra; `pip install ray` and run this test")
    lab.prepare(shuffle_mib=1)
    ours = content(lab)
    shutil.rmtree(lab.data_dir)
    lab.prepare(shuffle_mib=1, num_workers=2, engine="ray")
    assert content(lab) == ours


def test_shuffled_documents_are_the_same_documents(lab):
    plain, mixed = lab.prepare("plain"), lab.prepare("mixed", shuffle_mib=1)
    ordered, shuffled = lab.read_back("plain"), lab.read_back("mixed")
    for one, other in zip(ordered, shuffled, strict=True):
        assert Counter(one) == Counter(other) and one != other
    assert ordered[0] == sorted(ordered[0], key=lambda text: (int(text.split(":")[0][5:]), int(text.split()[3])))
    assert (plain.train.tokens, plain.text_bytes) == (mixed.train.tokens, mixed.text_bytes)
    first_shard = shuffled[0][: mixed.train.shards[0].documents]
    assert len({text.split(":")[0] for text in first_shard}) < FILES  # a task reads a part of the files
    numbers = [int(text.split()[3]) for text in shuffled[0]]
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.1
    lab.prepare("other_seed", shuffle_mib=1, seed=2)
    assert lab.read_back("other_seed")[0] != shuffled[0]


def worker(lab, *, workers=1, name="web"):
    """A process that prepares the source, in a group of its own."""
    script = f"""
from pathlib import Path
from tests.data_prep.test_build import Lab
if __name__ == "__main__":
    Lab(Path({str(lab.folder)!r}), Path({lab.tokenizer.file!r})).prepare({name!r}, num_workers={workers}, shuffle_mib=1)
"""
    path = lab.folder / "worker.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, path], cwd=REPOSITORY, start_new_session=True, env=environment)


def test_killed_at_random_moments_and_restarted_gives_the_same_bytes(lab):
    """Fifty kills: some before anything is done, some in a task, some between a shard and its receipt."""
    lab.prepare(num_workers=1, shuffle_mib=1)
    whole = content(lab)
    shutil.rmtree(lab.data_dir)
    moments, kills = random.Random(7), 0
    while kills < 50:
        victim = os.fork()
        if not victim:
            lab.prepare(num_workers=1, shuffle_mib=1, on_progress=lambda _: time.sleep(0.002))
            os._exit(0)
        time.sleep(moments.uniform(0.0, 0.12))
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        kills += 1
        if not os.WIFSIGNALED(status):  # it was through
            assert content(lab) == whole
            shutil.rmtree(lab.data_dir)
    lab.prepare(num_workers=1, shuffle_mib=1)
    assert content(lab) == whole and verify_source(lab.data_dir / "web") == []


def test_restart_does_only_what_has_no_valid_receipt(lab):
    lab.prepare(shuffle_mib=1)
    before = content(lab)
    folder = lab.data_dir / "web"
    (folder / "manifest.json").unlink()
    lost = sorted(folder.glob("shard_*.bin"))[3]
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard_*") if path.stem[:11] != lost.stem[:11]}
    lost.write_bytes(lost.read_bytes()[:-4])
    (folder / "receipts" / "tokenize_00005.json").write_text("{")
    kept = {path: time for path, time in kept.items() if "00005" not in path.stem}
    lab.prepare(shuffle_mib=1)
    assert content(lab) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_what_two_settings_made_is_never_mixed(lab):
    lab.prepare(shuffle_mib=1)
    folder = lab.data_dir / "web"
    (folder / "manifest.json").unlink()
    before = content(lab)
    with pytest.raises(DataError, match=r"begun with other settings, and \d+ of its tasks are done: seed: found 1, wanted 2"):
        lab.prepare(shuffle_mib=1, seed=2)
    lab.texts("00.jsonl", ["changed"])
    with pytest.raises(DataError, match=r"inputs: found .*00\.jsonl\); what two settings made is never mixed"):
        lab.prepare(shuffle_mib=1)
    assert content(lab) == before
    shutil.rmtree(folder / "receipts")  # nothing is done: it is planned anew
    lab.prepare(shuffle_mib=1, seed=2)
    assert json.loads((folder / "manifest.json").read_text())["settings"]["seed"] == 2


def test_two_calls_share_the_work(lab):
    lab.prepare(shuffle_mib=1)
    alone = content(lab)
    shutil.rmtree(lab.data_dir)
    both = [worker(lab), worker(lab, workers=2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert content(lab) == alone


def test_ctrl_c_leaves_a_state_to_go_on_from(lab):
    for number in range(FILES):  # enough that it is not through when it is stopped
        lab.texts(f"{number:02d}.jsonl", [f"file {number}: {text}" for text in some_texts(30 * ROWS)])
    process = worker(lab, workers=2)
    deadline = time.monotonic() + 60
    while not receipts(lab) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    folder = lab.data_dir / "web"
    assert not (folder / "manifest.json").exists()
    assert not list(folder.rglob("*.partial")) and not list((folder / "claims").iterdir())
    lab.prepare(shuffle_mib=1)
    assert verify_source(folder) == [] and sum(map(len, lab.read_back())) == FILES * 30 * ROWS


def test_a_killed_worker_does_not_stop_the_others(lab):
    process = worker(lab, workers=2)
    deadline = time.monotonic() + 60
    children: list[str] = []
    while not (receipts(lab) and len(children) >= 2) and time.monotonic() < deadline and process.poll() is None:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = listed.read_text().split() if listed.exists() else []
        time.sleep(0.01)
    for child in children[-1:]:
        os.kill(int(child), signal.SIGKILL)
    process.wait(120)
    lab.prepare(shuffle_mib=1)
    assert verify_source(lab.data_dir / "web") == [] and sum(map(len, lab.read_back())) == FILES * ROWS


# Claims


def test_a_claim_is_one_process_s(tmp_path):
    place = LocalPlace(tmp_path / "web")
    with place.claim("a") as claim:
        assert claim and place.claim("a") is None and place.claim("b") is not None
    assert place.claim("a") is not None
    assert STALE_S > 3 * HEARTBEAT_S


def test_claims_of_the_dead_are_taken_over(tmp_path):
    place = LocalPlace(tmp_path / "web")
    child = os.fork()
    if not child:
        place.claim("a")
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "web/claims/a").exists() and place.claim("a") is not None
    elsewhere = tmp_path / "web/claims/b"
    elsewhere.write_text(json.dumps({"host": "another", "pid": 1}))
    assert place.claim("b") is None
    old = time.time() - STALE_S - 5
    os.utime(elsewhere, (old, old))
    assert place.claim("b") is not None


# Plans and pieces


@pytest.mark.parametrize("limit", [1.0, 7.0, 1e9])
def test_tasks_take_every_piece_once(limit):
    tokens = np.random.default_rng(0).integers(1, 20, size=200).astype(float)
    runs = deal(tokens, limit=limit)
    assert runs[0][0] == 0 and runs[-1][1] == 200 and all(a[1] == b[0] for a, b in itertools.pairwise(runs))
    sizes = [tokens[low:high].sum() for low, high in runs]
    assert max(sizes) <= limit + 20
    assert deal(np.array([]), limit=1.0) == []


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_pieces_of_a_file_hold_every_line_once(tmp_path, size):
    """Borders fall on newlines, just after them, and inside lines longer than a piece."""
    texts = ["a", "", "b" * 50, "ünï\u2028code", "c" * 3, *map(str, range(30))]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts) + b"\n\n")
    lab = Lab(tmp_path, tmp_path / "no")
    (file,) = find_inputs(lab.source("a.jsonl"), name="web")
    counts, found, lines = RowCount(), [], []
    for start in range(0, file.size, size):
        piece = Piece(file, start, min(file.size, start + size))
        rejects = Rejects(tmp_path / "rejects", tolerance=0)
        for rows in read_piece(piece, source=lab.source("a.jsonl"), counts=counts, rejects=rejects):
            found += rows.texts
            lines += [place.where.number for place in rows.places]
    assert found == texts and lines == list(range(1, len(texts) + 1))
    assert (counts.rows, counts.blank_lines) == (len(texts), 1)


def test_large_files_are_cut_and_the_place_of_a_bad_line_is_its_line(lab):
    for path in lab.folder.glob("*.jsonl"):
        path.unlink()
    rows = [{"text": f"{number} " + "x" * 1000} for number in range(300)]
    lab.write("big.jsonl", [*rows[:200], "bad\n", *rows[200:]])
    with pytest.raises(DataError, match=r"big\.jsonl, line 201: the row is not valid JSON"):
        lab.prepare()
    manifest = lab.prepare(max_rejected_rows=1)
    plan = decode_plan((lab.data_dir / "web" / "plan.json").read_bytes(), path="plan.json")
    assert len(plan.pieces) > 3 and can_be_cut(plan.files[0], format="jsonl")
    assert (manifest.rejected_rows, manifest.train.documents + manifest.held_out.documents) == (1, 300)
    assert json.loads((lab.data_dir / "web" / "rejects.jsonl").read_text())["line"] == 201


def test_rows_that_are_too_large_are_named_and_cost_no_memory(lab):
    big = {"text": "y" * (3 << 20)}
    lab.write("99.jsonl", [{"text": "before"}, big, {"text": "after"}])
    with pytest.raises(DataError, match=r"99\.jsonl, line 2: the row holds 3,145,\d+ bytes or more; .*data\.max_row_mib"):
        lab.prepare()
    assert lab.prepare(max_rejected_rows=1).rejected_rows == 1
    train, held_out = lab.read_back()
    assert {"before", "after"} <= set(train + held_out)


def test_the_same_key_twice_is_refused(lab):
    lab.write("99.jsonl", ['{"text": "one", "meta": {"text": "inner"}}\n', '{"text": "one", "id": 1, "text": "two"}\n'])
    with pytest.raises(DataError, match=r"99\.jsonl, line 2: the row has the field 'text' 2 times; the rule is once"):
        lab.prepare()


def test_statistics_count_every_document(lab):
    manifest = lab.prepare(shuffle_mib=1)
    found = manifest.statistics
    train, _ = lab.read_back()
    lengths = np.array([len(text.encode()) + 1 for text in train])
    wanted = [int(((lengths >= 2**b) & (lengths < 2 ** (b + 1))).sum()) for b in range(32)]
    assert list(found.length_documents) == wanted and sum(found.length_tokens) == manifest.train.tokens
    assert found.rows == FILES * ROWS and found.dropped == {} and len(found.code) == 1
