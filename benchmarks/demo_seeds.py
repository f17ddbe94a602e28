"""The demo over several seeds: how far its accuracies spread.

python -m benchmarks.demo_seeds [--seeds 10] [--json]

Beside the demo's own methods: `data_free` by its ridge and what it pulls to, from the formula alone. Writes
benchmarks/results/demo_seeds.{json,md} after each seed that no published run has.
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
from transformers import PreTrainedModel

from benchmarks.formulas import data_free
from benchmarks.published import publish, say
from client.holdings import Holdings
from client.measurement.evaluation import evaluate
from client.settings import OwnerSettings
from common.agreement.agreement import load_agreement
from common.settings_file import load_settings
from deploy.demo.digits import SCANNERS, TRAIN
from deploy.demo.run import run_demo
from deploy.simulation.parties import PARTIES
from server.report.report import Report

PULLS = ((0.1, 1.0), (0.3, 1.0), (1.0, None), (1.0, 0.5), (1.0, 1.0))  # ridge and pull; the demo has 0.1, None
Seed = tuple[Report, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # as each process of the command
    runs: list[Seed] = []
    for seed in range(arguments.seeds):
        runs.append(run_seed(seed))
        results = summarise(runs)
        publish("demo_seeds", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"seeds": results["seeds"]}


def run_seed(seed: int) -> Seed:
    """The demo's report for one seed, and the accuracy of `data_free` by ridge and pull."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_demo(Path(folder), seed, with_references=False)
        owners = {name: _holdings(Path(folder) / PARTIES / f"{name}.toml") for name in SCANNERS}
        models, examples = {name: each.own_model() for name, each in owners.items()}, dict.fromkeys(SCANNERS, TRAIN)
        found = {}
        for ridge, pull in PULLS:
            merged = data_free(owners["centre"].load_base(), models, examples, ridge, pull)
            accuracies = [_accuracy(each, merged) for each in owners.values()]
            found[f"data_free, ridge {ridge}, pull {pull or 'the mean'}"] = mean(accuracies)
    accuracies_of = {model: metrics.main for model, metrics in report.evaluation.mean.items()} | found
    say(f"seed {seed}: " + ", ".join(f"{model} {accuracy:.3f}" for model, accuracy in accuracies_of.items()))
    return report, found


def _holdings(path: Path) -> Holdings:
    settings = load_settings(path, OwnerSettings)
    return Holdings(settings, path.parent, load_agreement(path.parent / settings.agreement))


def _accuracy(owner: Holdings, model: PreTrainedModel) -> float:
    data, task = owner.data, owner.task
    return evaluate(model, data.test(), owner.settings.batch_size, task, data.label_set()).main


def summarise(runs: list[Seed]) -> dict[str, Any]:
    """Each model's mean accuracy over the five domains, by seed, and how often RegMean beat the average."""
    reports = [report for report, _ in runs]
    models = reports[0].evaluation.mean
    accuracies = {model: [report.evaluation.mean[model].main for report in reports] for model in models}
    accuracies |= {model: [found[model] for _, found in runs] for model in runs[0][1]}
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
        f"{results['seeds']} runs. Made by `python -m benchmarks.demo_seeds`.",
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
