"""The demo over several seeds: how far its accuracies spread. Writes benchmarks/results/demo_seeds.{json,md}.

python -m benchmarks.demo_seeds [--seeds 5] [--json]
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers

from benchmarks.published import publish, say
from deploy.demo.run import run_demo
from server.report.report import Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # as the command does
    results = summarise([run_seed(seed) for seed in range(arguments.seeds)])
    publish("demo_seeds", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"seeds": results["seeds"]}


def run_seed(seed: int) -> Report:
    """The demo's report for one seed."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_demo(Path(folder), seed)
    mean = report.evaluation.mean
    say(f"seed {seed}: " + ", ".join(f"{model} {metrics.main:.3f}" for model, metrics in mean.items()))
    return report


def summarise(reports: list[Report]) -> dict[str, Any]:
    """Each model's mean accuracy over the five domains, by seed, and how often RegMean beat the average."""
    models = reports[0].evaluation.mean
    accuracies = {model: [report.evaluation.mean[model].main for report in reports] for model in models}
    return {
        "seeds": len(reports),
        "regmean_beats_average": sum(
            regmean > average for regmean, average in zip(accuracies["regmean"], accuracies["average"], strict=True)
        ),
        "seconds": [report.seconds for report in reports],
        "chosen_alpha": [report.chosen["regmean"].hyperparameter for report in reports],
        "accuracy": {
            model: {
                "mean": mean(values),
                "standard_deviation": stdev(values) if len(values) > 1 else 0.0,
                "by_seed": values,
            }
            for model, values in accuracies.items()
        },
        "versions": reports[0].versions,
    }


def as_markdown(results: dict[str, Any]) -> str:
    lines = [
        f"# The demo over {results['seeds']} seeds",
        "",
        f"Mean accuracy over the five domains. RegMean beat the average in {results['regmean_beats_average']} of "
        f"{results['seeds']} runs. Made by `make bench`.",
        "",
        "| model | mean | standard deviation | by seed |",
        "|---|---|---|---|",
    ]
    for model, accuracy in results["accuracy"].items():
        by_seed = ", ".join(f"{value:.3f}" for value in accuracy["by_seed"])
        lines.append(f"| {model} | {accuracy['mean']:.3f} | {accuracy['standard_deviation']:.3f} | {by_seed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
