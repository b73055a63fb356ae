"""What FP8 does to the loss: a model of 100M parameters trained on real text by `phidias train`, in bf16 and each FP8 recipe,
on one GPU. And whether a GPU goes on from a CPU's checkpoint, and a CPU from a GPU's.

    python -m benchmarks.gpu_loss --prepare .gpu_loss       text to shards, on a machine that has phidias[data]: 26 MB to carry
    python -m benchmarks.gpu_loss --data .gpu_loss          on the GPU: about 8 minutes; results/<date>_gpu_loss.json and .svg
    python -m benchmarks.gpu_loss --data .gpu_loss --cpu    the same with a tiny model on the CPU: a rehearsal of this file

NOT YET RUN ON A GPU (as of 2026-11-22): none could be had. Only the rehearsal has passed.

Goal: the FP8 loss within 0.5% of that in bf16 at the end. `bf16, again` differs from bf16 by the order in which kernels add
alone: what it differs by is noise. A run that fails loses no other.
"""

import argparse
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.gpu_processes import run_apart, without_engine
from benchmarks.machine import RESULTS, write_result
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records

Figures = dict[str, Any]
CORPUS = Path("../shared/data/corpus/corpus.jsonl.zst")
RANKS_FILE = Path("../shared/data/cl100k_base.tiktoken")
SOURCES = ("books_en", "math_latex", "peps_rfcs_eips", "linux_docs", "code_py", "code_c")
TEXT_BYTES = 22_000_000  # 24 MB of shards: kit, repository and these are carried in 64 MiB
MIXTURE = """name: gpu_loss
sources:
  text: {inputs: ["${run.data_dir}/raw/*.jsonl"], format: jsonl, share: 1.0, max_epochs: 100.0}
"""
GOAL = 0.005  # of the loss in bf16
SAME, SAME_NORM = 0.002, 0.05  # of a step's loss and gradient norm: bf16 on a GPU beside fp32 on a CPU
LAST = 30  # steps whose mean is the end of a curve
RUN = "loss"
STAGE = "series"


@dataclass(frozen=True)
class Size:
    """Of the runs: on the GPU, or in a rehearsal. The first precision is what the others are compared with."""

    precisions: tuple[str, ...]
    model: tuple[str, ...]
    small: tuple[str, ...]  # the model that a CPU trains too
    steps: int
    batch: int
    micro_batch: int
    length: int


REAL = Size(
    ("bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise"), (), ("model.num_layers=4",),
    steps=300, batch=32, micro_batch=16, length=1024,
)  # fmt: skip
THIN = (
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=2", "model.num_query_groups=1",
    "model.kv_channels=32", "model.ffn_hidden_size=128",
)  # fmt: skip
TINY = Size(("fp32", "bf16"), THIN, THIN, steps=4, batch=2, micro_batch=1, length=32)  # a CPU takes its time for bf16
SMALL_BATCH, SMALL_LENGTH, SMALL_STEPS = 4, 256, 8
NAMES = ("CPU, fp32", "GPU, bf16")


@dataclass(frozen=True)
class Bench:
    """`until`: on time.monotonic's clock."""

    size: Size
    data: Path
    folder: Path
    until: float
    on_cpu: bool


def main() -> int:
    options = read_options()
    if options.prepare:
        prepare(options.prepare.resolve())
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        size = TINY if options.cpu else REAL
        bench = Bench(size, options.data.resolve(), folder.resolve(), time.monotonic() + 60 * options.minutes, options.cpu)
        figures = measure(bench)
    if options.cpu:
        print(json.dumps(figures, indent=1))
    else:
        write_result("gpu_loss", figures)
    return min(1, len(list(failures(figures))))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_loss")
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--data", type=Path, default=Path(".gpu_loss"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def failures(figures: Any) -> Any:
    """What of it did not end, at any depth."""
    if isinstance(figures, dict):
        yield from (key for key in figures if key == "failed")
        for value in figures.values():
            yield from failures(value)


# Data, before


def prepare(folder: Path) -> None:
    """Shards, the tokenizer's ranks and the mixture, under `folder`; the text itself is not carried."""
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "mixture").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "mixture" / "gpu_loss.yaml").write_text(MIXTURE)
    shutil.copyfile(RANKS_FILE, folder / RANKS_FILE.name)
    (folder / "raw" / "text.jsonl").write_text("".join(some_text()))
    words = [*words_of(folder, TINY, precision="fp32", on_cpu=True), "data.num_workers=2"]
    done = run_apart(["-m", "launcher", "data", *words], limit_s=1200)
    if done.code != 0:
        raise SystemExit(done.why)
    shutil.rmtree(folder / "raw")
    print(f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB in {folder}")


def some_text() -> list[str]:
    """Rows of the corpus, as many bytes of each source."""
    import zstandard

    taken, rows = dict.fromkeys(SOURCES, 0), []
    with CORPUS.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            row = json.loads(line)
            if row["source"] in taken and taken[row["source"]] < TEXT_BYTES / len(SOURCES):
                taken[row["source"]] += len(row["text"].encode())
                rows.append(json.dumps({"text": row["text"]}) + "\n")
    return rows


def words_of(data: Path, size: Size, *, precision: str, on_cpu: bool, steps: int = 0, model: tuple[str, ...] = ()) -> list[str]:
    """Overrides of a run of so many steps (the size's own)."""
    tokens = size.batch * size.length
    count = steps or size.steps
    device = ["cluster=local", "cluster.gpus_per_node=1", *([] if on_cpu else ["cluster.gpu=h200_sxm"])]
    return [
        "--config-dir", str(data / "configs"), "run=series_100m", f"run.name={RUN}", f"run.data_dir={data}", *device,
        "mixture=gpu_loss", "layout=dp", f"layout.micro_batch_size={size.micro_batch}", f"precision={precision}",
        f"stage.seq_length={size.length}", f"stage.global_batch_size={size.batch}", f"stage.tokens={count * tokens}",
        f"stage.validation.interval_tokens={size.steps * tokens}", f"stage.validation.max_tokens={size.batch * size.length}",
        f"stage.checkpoint.interval_tokens={size.steps * tokens}", "optim.lr=1e-3", "optim.schedule=constant",
        "optim.min_lr=1e-3", f"optim.warmup_tokens={max(1, size.steps // 20) * tokens}", "monitor.log_interval=1",
        "monitor.wandb.mode=disabled", "monitor.console=plain", "data.held_out_fraction=0.02", *(model or size.model),
    ]  # fmt: skip


# Runs


def train(bench: Bench, words: list[str], *, runs: Path, on_cpu: bool) -> Figures:
    """A run to its end: its losses by step, held-out loss and times; or why there are none."""
    left_s = bench.until - time.monotonic()
    if left_s < 15:
        return {"failed": f"{left_s:.0f} s were left"}
    began = time.monotonic()
    env = without_engine(bench.folder) if on_cpu else {}
    ended = run_apart(["-m", "launcher", "train", *words, f"run.runs_dir={runs}"], limit_s=left_s, env=env)
    if ended.code != 0:
        log = runs / RUN / "logs"
        return {"failed": ended.why + (ended.out[-500:] if not ended.err else ""), "logs": sorted(map(str, log.rglob("*")))}
    rows = list(read_records(RunDir(runs / RUN).metrics))
    steps = [row for row in rows if row["kind"] == "train"]
    return {
        "took, s": round(time.monotonic() - began, 1),
        "step, ms": round(1e3 * statistics.median(row["step_time_s"] for row in steps), 2),
        "held out": next((row["loss"] for row in reversed(rows) if row["kind"] == "validation"), None),
        "losses": [round(row["loss"], 5) for row in steps],
        "norms": [round(row["grad_norm"], 4) for row in steps],
    }


def measure(bench: Bench) -> Figures:
    figures: Figures = {"rehearsal": "a tiny model on the CPU; no figure of a GPU"} if bench.on_cpu else {}
    figures |= {"size": vars(bench.size), "goal": GOAL, "curves": {}}

    lock = Lock()

    def keep(name: str, value: Any) -> None:
        with lock:
            figures[name] = value
            (bench.folder / "gpu_loss.json").write_text(json.dumps(figures, indent=1))

    def check_devices() -> None:
        keep("first steps", first_steps(bench))
        keep("a CPU's checkpoint on the GPU, and back", moved(bench))

    with ThreadPoolExecutor(1) as pool:
        # Beside the curves, which are of losses and not of times: what the CPU computes leaves the GPU idle.
        checks = None if bench.on_cpu else pool.submit(check_devices)
        plain = bench.size.precisions[0]
        for name, precision in {**{name: name for name in bench.size.precisions}, f"{plain}, again": plain}.items():
            curves = figures["curves"] | {name: curve(bench, precision, name=name)}
            keep("curves", curves)
            keep("ends", compare_ends(curves, plain=plain))
        check_devices() if checks is None else checks.result()
    picture = draw_curves(figures["curves"])
    (bench.folder / "gpu_loss.svg").write_text(picture)
    if not bench.on_cpu:
        (RESULTS / f"{time.strftime('%Y-%m-%d')}_gpu_loss.svg").write_text(picture)
    return figures


def curve(bench: Bench, precision: str, *, name: str) -> Figures:
    words = words_of(bench.data, bench.size, precision=precision, on_cpu=bench.on_cpu)
    found = train(bench, words, runs=bench.folder / name.replace(", ", "_"), on_cpu=bench.on_cpu)
    print(f"{name}: {found.get('failed') or (found['held out'], found['step, ms'])}", flush=True)
    return found


def compare_ends(curves: Figures, *, plain: str) -> Figures:
    """How far each recipe ends from bf16, as a fraction: held-out loss, and the mean loss of the last steps."""
    base, rows = curves[plain], {}
    for name, found in curves.items():
        if name != plain and "losses" in found and "losses" in base:
            apart = {"held out": off(found["held out"], base["held out"]), "training": off(end_of(found), end_of(base))}
            rows[name] = {**apart, "met": max(map(abs, apart.values())) <= GOAL}
    return rows


def off(found: float, expected: float) -> float:
    return round(found / expected - 1, 5)


def end_of(found: Figures) -> float:
    return statistics.fmean(found["losses"][-LAST:])


# CPU and GPU


def small(bench: Bench, *, on_cpu: bool, steps: int) -> list[str]:
    """Of the model that both train: in fp32 on the CPU, which may have no fast bf16, and in bf16 on the GPU."""
    size = Size((), (), (), steps=SMALL_STEPS, batch=SMALL_BATCH, micro_batch=2, length=SMALL_LENGTH)
    size = TINY if bench.on_cpu else size
    precision = "fp32" if on_cpu else "bf16"
    on_cpu = on_cpu or bench.on_cpu
    return words_of(bench.data, size, precision=precision, on_cpu=on_cpu, steps=steps, model=bench.size.small)


def first_steps(bench: Bench) -> Figures:
    """The first steps in fp32 on the CPU and in bf16 on the GPU: of one seed, so of the same weights and batches."""
    count = TINY.steps if bench.on_cpu else SMALL_STEPS
    cpu, gpu = (
        train(bench, small(bench, on_cpu=on_cpu, steps=count), runs=bench.folder / name, on_cpu=on_cpu or bench.on_cpu)
        for name, on_cpu in (("cpu", True), ("gpu", False))
    )
    return beside(cpu, gpu, since=0)


def beside(cpu: Figures, gpu: Figures, *, since: int) -> Figures:
    """Losses and gradient norms of two runs, step by step, from step `since` on."""
    if broken := next((found for found in (cpu, gpu) if "failed" in found), None):
        return broken
    figures: Figures = {}
    for kind, tolerance in (("losses", SAME), ("norms", SAME_NORM)):
        pairs = list(zip(cpu[kind][since:], gpu[kind][since:], strict=True))
        apart = max(abs(other / one - 1) for one, other in pairs)
        figures[kind] = {name: list(column) for name, column in zip(NAMES, zip(*pairs, strict=True), strict=True)}
        figures[kind] |= {"largest difference": round(apart, 6), "tolerance": tolerance, "met": apart <= tolerance}
    return figures


def moved(bench: Bench) -> Figures:
    """From a checkpoint of the CPU both devices go on; from the GPU's then both again."""
    base, away, back = (bench.folder / name for name in ("moved", "away", "back"))
    count = TINY.steps if bench.on_cpu else SMALL_STEPS

    def go(runs: Path, *, on_cpu: bool, times: int) -> Figures:
        words = small(bench, on_cpu=on_cpu, steps=times * count)
        return train(bench, words, runs=runs, on_cpu=on_cpu or bench.on_cpu)

    first = go(base, on_cpu=True, times=1)
    if "failed" in first:
        return first
    shutil.copytree(base, away)
    there = beside(go(base, on_cpu=True, times=2), go(away, on_cpu=False, times=2), since=count)
    if "failed" in there:
        return {"CPU to GPU": there}
    shutil.copytree(away, back)
    home = beside(go(back, on_cpu=True, times=3), go(away, on_cpu=False, times=3), since=2 * count)
    return {"CPU to GPU": there, "GPU to CPU": home}


# The picture


WIDTH, HEIGHT, EDGE = 900, 420, 40
COLOURS = ("#222222", "#c0392b", "#2471a3", "#1e8449", "#999999")


def draw_curves(curves: Figures) -> str:
    """Losses by step as an SVG, each the mean of the ten steps up to it."""
    lines = {name: smoothed(found["losses"]) for name, found in curves.items() if found.get("losses")}
    values = [value for line in lines.values() for value in line] or [0.0, 1.0]
    low, high, count = min(values), max(values), max([len(line) for line in lines.values()] or [2])
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    for place, (name, line) in enumerate(lines.items()):
        points = " ".join(f"{x_of(step, count)},{y_of(value, low, high)}" for step, value in enumerate(line))
        colour = COLOURS[place % len(COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        parts.append(f'<text x="{WIDTH - 190}" y="{EDGE + 18 * place}" fill="{colour}">{name}: {line[-1]:.4f}</text>')
    for value in (low, high):
        parts.append(f'<text x="2" y="{y_of(value, low, high)}">{value:.2f}</text>')
    parts.append(f'<text x="{EDGE}" y="{HEIGHT - 8}">loss in nats by step, 1 to {count}; mean of ten steps</text></svg>')
    return "\n".join(parts) + "\n"


def smoothed(losses: list[float]) -> list[float]:
    return [statistics.fmean(losses[max(0, step - 9) : step + 1]) for step in range(len(losses))]


def x_of(step: int, count: int) -> float:
    return round(EDGE + (WIDTH - 2 * EDGE) * step / max(1, count - 1), 1)


def y_of(value: float, low: float, high: float) -> float:
    return round(EDGE + (HEIGHT - 2 * EDGE) * (high - value) / max(high - low, 1e-9), 1)


if __name__ == "__main__":
    sys.exit(main())
