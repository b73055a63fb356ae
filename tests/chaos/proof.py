"""Whether a run came to what an undisturbed one did: weights and optimizer bit by bit, the loss of every batch, and each window
of the order read once, except those that it says were left out.

    python -m tests.chaos.proof RUN...    what of these runs only torch can read, as JSON
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.rundir.order import recorded_skips
from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record, read_records
from tests.chaos.storm import STAGE
from tests.endtoend.workspace import REPOSITORY, Workspace

Window = tuple[str, int, int]
SHOWN = 5
CALM_S = 900


def calm_run(stormy: Workspace, *, words: Sequence[str]) -> Workspace:
    """Trains the same from the start by `phidias <words>`, with nothing but the same batches left out."""
    calm = stormy.named(f"{stormy.run}_calm")
    shutil.rmtree(calm.run_dir, ignore_errors=True)
    calm.run_dir.mkdir()
    config = (stormy.run_dir / "config.yaml").read_text()
    (calm.run_dir / "config.yaml").write_text(config.replace(f"name: {stormy.run}\n", f"name: {calm.run}\n", 1))
    shutil.copy(stormy.run_dir / "order.json", calm.run_dir)
    events = calm.run_dir / "events.jsonl"
    append_record(events, "created", stages=[STAGE])
    for first, end in left_out(stormy.run_dir):
        append_record(events, "skip", stage=STAGE, step=0, first_sample=first, num_samples=end - first, cause="copied")
    process = calm.start(*[word.replace(f"run.name={stormy.run}", f"run.name={calm.run}") for word in words])
    out, err = process.communicate(timeout=CALM_S)
    assert process.returncode == 0, f"{out}\n{err}\n{calm.logs()}"
    return calm


def left_out(run_dir: Path) -> list[tuple[int, int]]:
    """Samples [first, end)."""
    return recorded_skips(RunDir(run_dir), STAGE)


def differences(stormy: Path, calm: Path) -> list[str]:
    """What is not as it has to be; nothing where all is."""
    read = facts_of(stormy, calm)
    facts, undisturbed = read[str(stormy)], read[str(calm)]
    found = [f"the checkpoint at the end: {name}" for name in unlike(facts["tensors"], undisturbed["tensors"])]
    found += [f"loss of step {name}" for name in unlike_losses(stormy, calm)]
    found += [f"left out in the undisturbed run: {one}" for one in left_out(calm) if one not in left_out(stormy)]
    skipped = {sample for first, end in left_out(stormy) for sample in range(first, end)}
    found += [f"left out by the checkpoint: {facts['skipped']}, not {len(skipped)}"] * (facts["skipped"] != len(skipped))
    found += [f"ledger: {facts['ledger']}, not {facts['counted']}"] * (facts["ledger"] != facts["counted"])
    order = {sample: tuple(window) for sample, window in enumerate(facts["order"])}
    return found + wrong_windows(stormy, order=order, skipped=skipped)


def unlike(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)][:SHOWN]


def unlike_losses(stormy: Path, calm: Path) -> list[str]:
    ours, theirs = losses(stormy), losses(calm)
    return [f"{step}: {ours.get(step)}, not {loss}" for step, loss in theirs.items() if ours.get(step) != loss][:SHOWN]


def losses(run_dir: Path) -> dict[int, float]:
    """By steps, which are updates of the weights; one that was taken again counts as it was taken last."""
    return {row["step"]: row["loss"] for row in read_records(run_dir / "metrics.jsonl") if row["kind"] == "train"}


def wrong_windows(run_dir: Path, *, order: dict[int, Window], skipped: set[int]) -> list[str]:
    """Against the order [samples]: what ranks read is written down a slice of a batch at a time, and again at every read."""
    read: dict[int, Window] = {}
    found = []
    for row in read_records(run_dir / "windows.jsonl"):
        for sample, window in enumerate(row["windows"], start=row["first_sample"]):
            found += [f"sample {sample}: read {window}, not {order.get(sample)}"] * (order.get(sample) != tuple(window))
            read[sample] = tuple(window)
    trained = {sample: window for sample, window in read.items() if sample not in skipped}
    found += [f"sample {sample} was never read" for sample in order if sample not in read and sample not in skipped]
    found += ["a window was trained on twice"] * (len(set(trained.values())) != len(trained))
    return found[:SHOWN]


def facts_of(*runs: Path) -> dict[str, dict[str, Any]]:
    """In a process of its own: it imports torch."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.chaos.proof", *map(str, runs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def read_facts(run_dir: Path) -> dict[str, Any]:
    """The checkpoint at the end, tensor by tensor; its ledger, and the same counted window by window in the order."""
    from launcher.rundir.checkpoints import newest_checkpoint
    from launcher.rundir.freeze import read_config
    from launcher.rundir.order import recorded_tables
    from training.data import StageData

    run = RunDir(run_dir)
    config, (saved, refused) = read_config(run), newest_checkpoint(run, STAGE, finished=True)
    assert saved is not None, refused
    data = StageData(config, config.stage(STAGE), ledger={}, phases=recorded_tables(run)[STAGE])
    windows = data.order.windows(0, saved.meta.samples)
    names = [data.names[source] for source in windows.source.tolist()]
    return {
        "tensors": tensor_digests(saved.path),
        "skipped": saved.meta.skipped_samples,
        "ledger": {name: row["position"] for name, row in saved.meta.ledger.items()},
        "counted": {name: names.count(name) for name in data.names},
        "order": list(zip(names, windows.epoch.tolist(), windows.offset.tolist(), strict=True)),
    }


def tensor_digests(path: Path) -> dict[str, str]:
    """Of every tensor of a checkpoint, weights and optimizer, however it lies in files; and of the random states."""
    import torch
    import xxhash
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    found = {}
    for name, value in flat(state):
        tensor = value if torch.is_tensor(value) else torch.frombuffer(bytearray(repr(value), "utf8"), dtype=torch.uint8)
        found[name] = xxhash.xxh3_128_hexdigest(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found


def flat(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if pairs is None:
        return [(name, tree)]
    return [leaf for key, value in pairs for leaf in flat(value, f"{name}/{key}")]


if __name__ == "__main__":
    print(json.dumps({folder: read_facts(Path(folder)) for folder in sys.argv[1:]}))
