"""How long a user waits for `phidias --help` and for a whole config to be composed, checked and planned. Goals: under 0.4 s
and 0.8 s. Wall seconds of whole processes, median of 9 after a warm-up."""

import statistics
import subprocess
import sys
import time

from benchmarks.machine import write_result

COMMANDS = {
    "help": ["--help"],
    "plan_demo": ["plan", "run=demo", "out=json"],
    "plan_phi4": ["plan", "run=phi4", "out=json"],
    "refusal": ["plan", "run=demo", "model.num_layer=3"],
}


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "launcher", *arguments], capture_output=True, check=False)
    return time.perf_counter() - began


def main() -> None:
    figures = {}
    for name, arguments in COMMANDS.items():
        seconds(arguments)
        times = [seconds(arguments) for _ in range(9)]
        figures[name] = {
            "median_s": round(statistics.median(times), 3),
            "min_s": round(min(times), 3),
            "max_s": round(max(times), 3),
        }
    write_result("cli", figures)


if __name__ == "__main__":
    main()
