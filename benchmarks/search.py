"""Does a search among mixtures pay? 24 of them on five emotion models, with three seeds.

python -m benchmarks.search --data DATA --models MODELS [--seeds 0,1,2] [--json]

DATA and MODELS are as in benchmarks/emotion.py. The product searches mixtures of `data_free` and `average` in three
groups of blocks and the classifier, by macro F1 on 400 validation rows an owner. A seed decides the steps of the search
and which validation rows are drawn. Both models, the unsearched `data_free` and what was found, are judged on the first
600 test rows of the owners' domains and of five others: macro F1 over the labels that occur there. Writes
benchmarks/results/search.{json,md} after each seed.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.emotion import IN_DOMAIN, OUT_OF_DOMAIN, write_consortium
from benchmarks.machine import quiet_on_one_thread
from benchmarks.quality import Bench, candidates_kept, mean_over, say
from common.models.loading import load_base
from deploy.simulation.simulate import simulate

RESULTS = Path(__file__).parent / "results"
BASIS = ("data_free", "average")
SEARCH = """
[search]
basis = ["data_free", "average"]
candidates = 24
groups = 3
"""


def measure(bench: Bench, seed: int) -> dict[str, Any]:
    """One search: macro F1 in and out of domain without and with it, and every mixture with its validation metric."""
    with tempfile.TemporaryDirectory() as folder, candidates_kept() as kept:
        consortium, output = Path(folder) / "consortium", Path(folder) / "output"
        write_consortium(
            consortium,
            bench.data,
            bench.models,
            methods=("search", *BASIS),
            data_free="alphas = [1.0]",
            seed=seed,
        )
        agreement = consortium / "agreement.toml"
        agreement.write_text(agreement.read_text() + SEARCH)
        report = simulate(consortium, output, with_references=False)
        say(f"seed {seed}: judging")
        models = {
            "unsearched": bench.with_delta(*kept["data_free"]),
            "searched": load_base(output / "model", bench.task, seed=0),
        }
        found: dict[str, Any] = {"seconds": report.seconds, "chosen": report.chosen["search"].candidate}
        for name, model in models.items():
            metrics = bench.judge(bench.logits(model))
            found[name] = {
                metric: [mean_over(metrics, domains, metric) for domains in (IN_DOMAIN, OUT_OF_DOMAIN)]
                for metric in ("macro_f1", "accuracy")
            }
        found["tried"] = [[trial.candidate, trial.scales, trial.metric] for trial in report.evaluation.sweep["search"]]
        return found


def as_markdown(results: dict[str, Any]) -> str:
    lines = ["# A search among 24 mixtures of two merges of five emotion models", "", "Made by", ""]
    lines += ["    python -m benchmarks.search --data DATA --models MODELS", ""]
    lines += ["Macro F1: on validation rows, and on test rows of the owners' domains / of five others.", ""]
    lines += ["| seed | chosen | validation, unsearched | searched | test, unsearched | searched | gain |"]
    lines += ["|---|---|---|---|---|---|---|"]
    gains = []
    for seed, found in results.items():
        metrics = {name: metric for name, _, metric in found["tried"]}
        before, after = (found[name]["macro_f1"] for name in ("unsearched", "searched"))
        gains.append([late - early for early, late in zip(before, after, strict=True)])
        lines.append(
            f"| {seed} | {found['chosen']} | {metrics['search@1']:.3f} | {metrics[found['chosen']]:.3f} "
            f"| {_pair(before)} | {_pair(after)} | {_pair(gains[-1], signed=True)} |"
        )
    mean, spread = np.mean(gains, axis=0), np.ptp(gains, axis=0)
    lines += ["", f"Mean gain on test rows: {_pair(mean, signed=True)}; from lowest to highest: {_pair(spread)}.", ""]
    lines += ["What was chosen, from the embeddings to the classifier (the last number of each four):", ""]
    for seed, found in results.items():
        scales = next(scales for name, scales, _ in found["tried"] if name == found["chosen"])
        half = len(scales) // 2
        of_basis = (
            f"{name} {', '.join(f'{each:g}' for each in part)}"
            for name, part in zip(BASIS, (scales[:half], scales[half:]), strict=True)
        )
        lines.append(f"- seed {seed}: {'; '.join(of_basis)}; {found['seconds']:.0f} s")
    return "\n".join(lines) + "\n"


def _pair(values: Any, *, signed: bool = False) -> str:
    return " / ".join(f"{value:+.3f}" if signed else f"{value:.3f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    bench = Bench(arguments.data, arguments.models)
    results: dict[str, Any] = {}
    for seed in arguments.seeds.split(","):
        results[seed] = measure(bench, int(seed))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "search.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "search.md").write_text(as_markdown(results))
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
