"""What a whole masked merge costs with more owners, in the in-process engine.

python -m benchmarks.scale [--json] [--owners 3 10 30 100 300 1000] [--cores N]

Every owner brings the same fine-tuned tiny BERT and the same 120 rows, so only the number of owners differs. Messages
are really serialised and go through the real apps. As many processes as cores share out the owners
(deploy/simulation/crew.py); with one, owners answer one after the other. Each number of owners has its own processes.
Their processor seconds are added up, with those of starting helpers; the peak is that of the larger process. The
exponent b of cost ~ N^b is the slope of a least-squares line through the logarithms. It is fitted to the larger half of
the numbers, where fixed costs no longer count. A tenth of the owners may collude, so above 150 owners each shares masks
with only some of the others (Bell et al., CCS 2020). An agreement that does not name the number of colluders allows as
many as possible. Then each owner shares masks with all, and time and memory grow faster. Writes
benchmarks/results/scale.{json,md,svg}.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.machine import quiet_on_one_thread, this_machine
from benchmarks.memory import peak_megabytes
from benchmarks.published import RESULTS, publish, say
from common.thresholds import MAX_COMPLETE

AGREEMENT = """
title = "Scale"
base = "../example/base"
method = "regmean"
[task]
max_tokens = 16
[regmean]
alphas = [0.9]
[summation]
colluders = {colluders}
[privacy]
min_rows_per_dimension = 0.0
"""
COSTS = ("processor_seconds", "coordinator_megabytes_received", "peak_megabytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", type=int, nargs="+", default=[3, 10, 30, 100, 300, 1000])
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="amalgram-") as name:
        for count in arguments.owners:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                runs.append(process.submit(measure, Path(name), count, arguments.cores).result())
            say(f"{count} owners: {runs[-1]['seconds']:.1f} s, peak {runs[-1]['peak_megabytes']:.0f} MB")
    results = {"machine": this_machine(), "processes": arguments.cores, "runs": runs, "exponents": exponents(runs)}
    if publish("scale", results, as_markdown(results), size):
        draw(runs, RESULTS / "scale.svg")
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"owners": max(run["owners"] for run in results["runs"]), "merges": len(results["runs"])}


def measure(folder: Path, count: int, cores: int) -> dict[str, float]:
    """The costs of one merge of `count` owners."""
    from deploy.simulation.simulate import simulate

    quiet_on_one_thread()
    torch.set_num_threads(cores)  # which a simulation shares out
    write_consortium(folder, count)
    started, started_process = time.perf_counter(), time.process_time()
    report = simulate(folder / "consortium", folder / "output", with_references=False)
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - started_process
    helpers = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(folder / "output")
    return {
        "owners": count,
        "seconds": seconds,
        "processor_seconds": processor_seconds + helpers.ru_utime + helpers.ru_stime,
        "coordinator_megabytes_received": sum(step.bytes_received for step in report.steps) / 1e6,
        "peak_megabytes": max(peak_megabytes(), helpers.ru_maxrss * 1024 / 1e6),
    }


def write_consortium(folder: Path, count: int) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from deploy.example import reviews

    if not (folder / "example").exists():
        reviews.write_consortium(folder / "example")
        model = AutoModelForSequenceClassification.from_pretrained(folder / "example" / "base")
        model.classifier.bias.data += 0.1
        model.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(folder / "example" / "base").save_pretrained(folder / "model")
    shutil.rmtree(folder / "consortium", ignore_errors=True)
    (folder / "consortium").mkdir()
    names = [f"owner{number:04}" for number in range(count)]
    roster = "".join(f'[[owners]]\nname = "{name}"\n' for name in names)
    (folder / "consortium" / "agreement.toml").write_text(AGREEMENT.format(colluders=count // 10) + roster)
    for name in names:
        (folder / "consortium" / f"{name}.toml").write_text(
            f'name = "{name}"\nfine_tuned = "../model"\n[data]\ntrain = "../example/data/hotel/train.jsonl"\n'
            'test = "../example/data/hotel/test.jsonl"\nmax_train_rows = 100\nmax_test_rows = 20\n'
        )


def exponents(runs: list[dict[str, float]]) -> dict[str, float]:
    larger = runs[len(runs) // 2 - 1 if len(runs) > 3 else 0 :]
    if len(larger) < 2:
        return {}
    counts = np.log([run["owners"] for run in larger])
    return {cost: float(np.polyfit(counts, np.log([run[cost] for run in larger]), 1)[0]) for cost in COSTS}


def as_markdown(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "# What a merge costs with more owners",
        "",
        f"Owners are shared out among {results['processes']} processes of one machine. A tiny BERT, RegMean, masked; a "
        "tenth may collude. Up to "
        f"{MAX_COMPLETE} owners, all of them verify the merge. "
        f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, torch {machine['torch']}.",
        "",
        "| owners | seconds | processor seconds | per owner | MB to the coordinator | peak of a process, MB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for run in results["runs"]:
        lines.append(
            f"| {run['owners']:,} | {run['seconds']:.1f} | {run['processor_seconds']:.1f} | "
            f"{run['processor_seconds'] / run['owners']:.2f} | "
            f"{run['coordinator_megabytes_received']:.1f} | {run['peak_megabytes']:.0f} |"
        )
    fitted = results["exponents"]
    if fitted:
        lines.append("| exponent | | {:.2f} | | {:.2f} | {:.2f} |".format(*(fitted[cost] for cost in COSTS)))
    return "\n".join([*lines, "", "![cost by number of owners](scale.svg)"]) + "\n"


def draw(runs: list[dict[str, float]], path: Path) -> None:
    """Each cost, relative to that of the fewest owners, by number of owners."""
    mpl.rcParams["svg.hashsalt"] = "amalgram"  # the same numbers give the same file
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    counts = [run["owners"] for run in runs]
    for cost, label in zip(COSTS, ("time", "bytes to the coordinator", "memory of a process"), strict=True):
        axes.loglog(counts, [run[cost] / runs[0][cost] for run in runs], marker="o", label=label)
    axes.loglog(counts, [count / counts[0] for count in counts], color="#888888", linestyle=":", label="proportional")
    axes.set(xlabel="owners", ylabel=f"cost relative to {counts[0]} owners")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
