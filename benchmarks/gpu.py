"""What one Hopper GPU does with the 14B, in one command and at most 8 minutes: its ceilings (products, attention, copies), a
layer and ranks of the real job beside them and beside the plan, our loop beside bare megatron-core, the wait for data and for
checkpoints. One table, and benchmarks/results/<date>_gpu.json.

    python -m benchmarks.gpu [--minutes 8] [--parts ceilings,ranks] [--out FOLDER]
    python -m benchmarks.gpu --rehearse        the same code with tiny shapes on the CPU, without FP8: a rehearsal of this file

NOT YET RUN ON A GPU (as of 2026-11-22): none could be had. Only the rehearsal has passed.

Each part is a process of its own; what it has measured is written as it comes (<out>/<part>.jsonl), so that a part that fails
or runs out of time loses nothing but its rest.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_processes import run_apart, without_engine
from benchmarks.machine import write_result

Figures = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """`share` of the time; parts that need less leave theirs to those behind. `least_s`: below it is not begun."""

    name: str
    share: float
    least_s: float


PARTS = (
    Part("ceilings", 0.12, 25),
    Part("ranks", 0.50, 60),
    Part("layers", 0.12, 30),
    Part("loop", 0.13, 40),
    Part("checkpoints", 0.07, 25),
    Part("data", 0.06, 20),
)
GRACE_S = 5


def main() -> int:
    options = read_options()
    if options.part:
        run_part(options.part, folder=options.out, tiny=options.rehearse, until=time.monotonic() + options.seconds)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(options, folder=folder)
        if not options.rehearse:
            write_result("gpu", figures)
        show(figures)  # last, where one looks first
    failed = [name for name, rows in figures["parts"].items() if "failed" in rows]
    return min(1, len(failed))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--part", help="of this program alone: the part that this process is")
    parser.add_argument("--seconds", type=float, default=0.0)
    return parser.parse_args()


def measure(options: argparse.Namespace, *, folder: Path) -> Figures:
    """One part after the other, each in the time that is left for it."""
    began, total_s, found = time.monotonic(), 60 * options.minutes, {}
    wanted = [part for part in PARTS if part.name in options.parts.split(",")]
    for number, part in enumerate(wanted):
        left_s = began + total_s - time.monotonic()
        limit_s = left_s * part.share / sum(one.share for one in wanted[number:])
        found[part.name] = measure_part(part, options=options, folder=folder, limit_s=limit_s)
    rehearsal = {"rehearsal": "tiny shapes on the CPU; no figure of a GPU"} if options.rehearse else {}
    return {**rehearsal, "took, s": round(time.monotonic() - began, 1), "parts": found}


def measure_part(part: Part, *, options: argparse.Namespace, folder: Path, limit_s: float) -> Figures:
    if limit_s < (1 if options.rehearse else part.least_s):
        return {"skipped": f"{limit_s:.0f} s were left for it, it needs {part.least_s:.0f}"}
    words = ["-m", "benchmarks.gpu", "--part", part.name, "--out", str(folder), "--seconds", str(limit_s)]
    began = time.monotonic()
    ended = run_apart(
        [*words, *["--rehearse"] * options.rehearse], limit_s=limit_s + GRACE_S, env=settings(options, folder=folder)
    )
    rows = {**read_figures(folder / f"{part.name}.jsonl"), "took, s": round(time.monotonic() - began, 1)}
    if ended.code != 0:
        rows["failed"] = ended.why
    print(f"{part.name}: {rows['took, s']} s" + (f", {rows['failed'][:200]}" if "failed" in rows else ""), flush=True)
    return rows


def settings(options: argparse.Namespace, *, folder: Path) -> dict[str, str]:
    """What a rank finds in its environment (launcher/jobs/local.py)."""
    if options.rehearse:
        hidden = without_engine(folder)
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", **hidden}
    return {
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_GRAPH_REGISTER": "0",
        "LOCAL_RANK": "0",
    }


def read_figures(path: Path) -> Figures:
    """Of a part, as far as it came; a line that was cut off is left out."""
    found: Figures = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found |= json.loads(line)
        except ValueError:
            continue
    return found


# A part, in its own process


def run_part(name: str, *, folder: Path, tiny: bool, until: float) -> None:
    path = folder / f"{name}.jsonl"
    path.unlink(missing_ok=True)

    def keep(figure: str, value: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps({figure: value}) + "\n")

    if name == "ranks":  # its cases are processes: this one leaves the device to them
        from benchmarks.gpu_ranks import measure_ranks

        measure_ranks(keep, tiny=tiny, folder=folder / "runs", until=until)
        return
    install_device(tiny=tiny)
    part_of(name, folder=folder)(keep, tiny=tiny)


def install_device(*, tiny: bool) -> None:
    import torch

    if tiny:
        from training import cpu

        cpu.install()
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device; --rehearse runs the same code without one")


def part_of(name: str, *, folder: Path) -> Callable[..., None]:
    from functools import partial

    from benchmarks.gpu_ceilings import measure_ceilings
    from benchmarks.gpu_device import describe_device
    from benchmarks.gpu_host import measure_checkpoints, measure_data
    from benchmarks.gpu_layer import measure_layers
    from benchmarks.gpu_loop import measure_loop

    def with_device(keep: Callable[[str, Any], None], *, tiny: bool) -> None:
        keep("device", describe_device())
        measure_ceilings(keep, tiny=tiny)

    parts: dict[str, Callable[..., None]] = {
        "ceilings": with_device,
        "layers": partial(measure_layers, ceilings=read_figures(folder / "ceilings.jsonl")),
        "loop": measure_loop,
        "data": measure_data,
        "checkpoints": measure_checkpoints,
    }
    return parts[name]


# The table


def show(figures: Figures) -> None:
    for name, rows in figures["parts"].items():
        print(f"\n{name}" + (f" ({figures['rehearsal']})" if "rehearsal" in figures else ""))
        for row, value in rows.items():
            for line in lines_of(value):
                print(f"  {row:<34} {line}")


def lines_of(value: Any) -> list[str]:
    """A figure on one line, or a line for each of its parts where these are figures themselves."""
    if not isinstance(value, dict):
        return [str(value)]
    nested = {name: inner for name, inner in value.items() if isinstance(inner, dict)}
    flat = ", ".join(f"{name} {shown(inner)}" for name, inner in value.items() if name not in nested)
    lines = [flat] if flat else []
    for name, inner in nested.items():
        lines.append(f"{name}: " + "; ".join(f"{key} {shown(one)}" for key, one in inner.items()))
    return lines or ["nothing"]


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['ms']} ms {value.get('tflops', '')}".rstrip() if "ms" in value else json.dumps(value)
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
