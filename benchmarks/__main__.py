"""The quick benchmarks, one after the other, in at most ten minutes: `make bench`.

python -m benchmarks

Says first how long it will take, by timing matrix products on this machine; then prints each number as soon as it is
measured. What would not end in time is left out, and named. Quick runs do not replace published results (published.py).
"""

import subprocess
import sys
from time import perf_counter

import torch

LIMIT_SECONDS = 600
# What each took on one core of a machine where REFERENCE took REFERENCE_SECONDS.
SECONDS = {
    "payload": 7,
    "membership": 8,
    "solve": 37,
    "masking --quick": 25,
    "gram --quick": 65,
    "demo_seeds --seeds 1": 65,
    "scale --owners 3 10 30": 65,
}
REFERENCE_SECONDS = 0.3


def main() -> None:
    started = perf_counter()
    slowness = max(reference_seconds() / REFERENCE_SECONDS, 0.5)
    say(f"{len(SECONDS)} benchmarks, about {sum(SECONDS.values()) * slowness / 60:.0f} minutes on this machine")
    left_out, failed = [], []
    for name, seconds in SECONDS.items():
        left = LIMIT_SECONDS - (perf_counter() - started)
        if seconds * slowness > left:
            left_out.append(name)
            continue
        say(f"\n--- {name}: about {seconds * slowness:.0f} s")
        try:
            done = subprocess.run([sys.executable, "-m", *f"benchmarks.{name}".split()], check=False, timeout=left)
        except subprocess.TimeoutExpired:
            left_out.append(name)
            continue
        if done.returncode != 0:
            failed.append(name)
    say(f"\n{perf_counter() - started:.0f} s")
    for name in left_out:
        say(f"not within ten minutes: python -m benchmarks.{name}")
    for name in failed:
        say(f"failed: python -m benchmarks.{name}")
    if failed:
        sys.exit(1)


def reference_seconds() -> float:
    """The better of three turns of matrix products, on one core."""
    torch.set_num_threads(1)
    square = torch.ones(1024, 1024)

    def turn() -> float:
        started = perf_counter()
        for _ in range(20):
            square @ square
        return perf_counter() - started

    return min(turn() for _ in range(3))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
