"""What every result carries: date, machine, versions; and where results lie."""

import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Date, processor, cores, memory, the load as the result is written (the benchmark's own included), and versions."""
    cpu = next(
        (line.split(":")[1].strip() for line in read("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    memory_kib = next((int(line.split()[1]) for line in read("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20),
        "load_at_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "hydra-core")},
    }


def read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_result(name: str, figures: dict[str, Any]) -> None:
    """Writes results/<date>_<name>.json and prints it."""
    machine = describe()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine['date']}_{name}.json"
    text = json.dumps({"machine": machine, **figures}, indent=1)
    path.write_text(text + "\n")
    print(text, f"\n-> {path}")
