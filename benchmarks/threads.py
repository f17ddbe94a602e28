"""How long a forward pass takes with one thread, with all, and with all that sleep while they wait; idle and busy.

python -m benchmarks.threads

`amalgram.py` sets OMP_WAIT_POLICY=PASSIVE. With libgomp's default, threads that have nothing to do spin for a
while; if other processes need the cores, those that have something to do wait for them. Each case runs in a process of
its own, three turns side by side. Writes benchmarks/results/threads.{json,md}.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from benchmarks.published import everything, publish

CORES = len(os.sched_getaffinity(0))
CASES = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "all, libgomp's default": {"OMP_NUM_THREADS": str(CORES)},
    "all, asleep while they wait (ours)": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE"},
}
PASSES = {64: 60, 384: 4}  # width of a transformer layer: forward passes
TURNS = 3


def measure(width: int) -> None:
    """Print the seconds that the passes of one layer take, 32 texts of 32 tokens each."""
    import torch

    layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True).eval()
    texts = torch.randn(32, 32, width)
    with torch.inference_mode():
        layer(texts)
        start = time.perf_counter()
        for _ in range(PASSES[width]):
            layer(texts)
    print(time.perf_counter() - start)


def seconds(width: int, variables: dict[str, str]) -> float:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "GOMP_"))}
    command = [sys.executable, "-m", "benchmarks.threads", str(width)]
    return float(subprocess.run(command, env=inherited | variables, capture_output=True, check=True).stdout)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other processes that need a core each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    lines = [
        "# Threads",
        "",
        f"Seconds on {CORES} cores, median of {TURNS}. Busy: {2 * CORES} other processes want a core each. Made by",
        "`python -m benchmarks.threads`.",
        "",
        "| width | machine | " + " | ".join(CASES) + " |",
        "|---|---|" + "---|" * len(CASES),
    ]
    measured = []
    for width in PASSES:
        for name, processes in (("idle", 0), ("busy", 2 * CORES)):
            with busy(processes):
                turns = [[seconds(width, variables) for variables in CASES.values()] for _ in range(TURNS)]
            medians = [median(each) for each in zip(*turns, strict=True)]
            measured.append({"width": width, "machine": name, "seconds": medians})
            lines.append(f"| {width} | {name} | " + " | ".join(f"{each:.2f}" for each in medians) + " |")
            print(lines[-1], flush=True)
    publish("threads", {"cores": CORES, "measured": measured}, "\n".join(lines) + "\n", everything)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        main()
