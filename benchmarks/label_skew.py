"""Does merging still pay if the owners of one task see its labels in different shares?

python -m benchmarks.label_skew --data DATA --base BASE [--concentrations 0.1,0.3,1.0] [--rows 1600] [--json]

DATA is a folder with {train,dev,test}.jsonl (`text`, `label`). BASE is a Hugging Face encoder; its head, if it has
one, is ignored. Each label's share of the first ROWS training rows is divided among four owners in shares drawn from a
Dirichlet distribution, as in Hsu et al. 2019 (arXiv 1909.06335). A small concentration gives owners with one or two
labels. Each owner fine-tunes the base on its own rows. The first 400 validation and 600 test rows have all labels, and
each owner judges a quarter of them: so a mean over owners is the accuracy on all. Everything runs through the product,
masked. For the smallest concentration, whose owners differ most in size, a second run counts all owners alike. Writes
benchmarks/results/label_skew.{json,md}.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from transformers import AutoModel, AutoTokenizer

from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import everything, publish, published
from deploy.simulation.simulate import simulate

OWNERS = ("north", "east", "south", "west")
METHODS = ("average", "data_free", "logit_adjusted", "regmean", "regmean_plus_plus", "refit")
MODELS = ("base", "own_at_home", *METHODS)
JUDGED = {"dev": 400, "test": 600}  # rows, of all owners together
SEED = 0
ALIKE = ", all owners alike"

Row = dict[str, str]


def split_by_label(rows: list[Row], concentration: float, seed: int) -> dict[str, list[Row]]:
    """Give every row to one owner, and each label's rows to the owners in shares ~ Dirichlet(concentration)."""
    generator = np.random.default_rng(seed)
    parts: dict[str, list[Row]] = {owner: [] for owner in OWNERS}
    for label in sorted({row["label"] for row in rows}):
        of_label = [row for row in rows if row["label"] == label]
        shares = generator.dirichlet([concentration] * len(OWNERS))
        ends = np.round(np.cumsum(shares) * len(of_label)).astype(int)
        for owner, start, end in zip(OWNERS, [0, *ends[:-1]], ends, strict=True):
            parts[owner] += of_label[start:end]
    for part in parts.values():
        generator.shuffle(part)
    return parts


def first_rows(file: Path, count: int) -> list[Row]:
    with file.open() as lines:
        return [json.loads(line) for line in islice(lines, count)]


def write_consortium(
    folder: Path, data: Path, base: Path, parts: Mapping[str, list[Row]], labels: list[str], weighting: str
) -> None:
    AutoModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    agreement = {
        "title": "One task, labels in different shares",
        "base": "base",
        "method": METHODS[0],
        "compare_with": list(METHODS[1:]),
        "seed": SEED,
        "weighting": weighting,
        "owners": [{"name": owner} for owner in OWNERS],
        "task": {"kind": "text-classification", "labels": labels, "max_tokens": 64, "label_set": "all"},
        "regmean": {"alphas": [0.1, 0.9], "measured_examples": 500},
        "evaluation": {"choose_by": "macro_f1"},
        "bounds": {"headroom": 1e7},
        "privacy": {"min_rows_per_dimension": 0.4},  # the smallest owner has 163 rows for the classifier's 384 inputs
    }
    (folder / "agreement.toml").write_text(tomli_w.dumps(agreement))
    judged = {split: first_rows(data / f"{split}.jsonl", count) for split, count in JUDGED.items()}
    for number, (owner, rows) in enumerate(parts.items()):
        quarters = {split: each[number :: len(OWNERS)] for split, each in judged.items()}
        for split, part in {"train": rows, **quarters}.items():
            (folder / f"{owner}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        settings = {
            "name": owner,
            "training": {"epochs": 3, "learning_rate": 1e-4, "batch_size": 32},
            "data": {
                "train": f"{owner}-train.jsonl",
                "validation": f"{owner}-dev.jsonl",
                "test": f"{owner}-test.jsonl",
            },
        }
        (folder / f"{owner}.toml").write_text(tomli_w.dumps(settings))


def run(data: Path, base: Path, concentration: float, count: int, weighting: str = "rows") -> dict[str, Any]:
    rows = first_rows(data / "train.jsonl", count)
    labels = sorted({row["label"] for row in rows})
    parts = split_by_label(rows, concentration, SEED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "consortium"
        folder.mkdir()
        write_consortium(folder, data, base, parts, labels, weighting)
        report = simulate(folder, Path(name) / "output", with_references=False)
    return {
        "rows": {
            owner: [sum(row["label"] == label for row in part) for label in labels] for owner, part in parts.items()
        },
        "mean": {model: scores.model_dump() for model, scores in report.evaluation.mean.items()},
        "chosen": {method: choice.model_dump() for method, choice in report.chosen.items()},
        "seconds": report.seconds,
    }


def as_markdown(results: dict[str, Any]) -> str:
    lines = ["# Four owners of one task who see its labels in different shares", ""]
    lines += ["Accuracy on 600 test rows, over all labels. Made by", ""]
    lines += ["    python -m benchmarks.label_skew --data DATA --base BASE", ""]
    lines += ["| concentration | " + " | ".join(model.replace("_", " ") for model in MODELS) + " |"]
    lines += ["|---" * (len(MODELS) + 1) + "|"]
    for concentration, result in results.items():
        accuracies = [f"{result['mean'][model]['accuracy']:.3f}" for model in MODELS]
        lines.append(f"| {concentration} | " + " | ".join(accuracies) + " |")
    lines += ["", "Training rows per label at each owner:", ""]
    for concentration, result in results.items():
        if concentration.endswith(ALIKE):
            continue
        shares = "; ".join(f"{owner} {'/'.join(map(str, counts))}" for owner, counts in result["rows"].items())
        lines.append(f"- {concentration}: {shares}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--concentrations", default="0.1,0.3,1.0")
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    results = published("label_skew")
    concentrations = arguments.concentrations.split(",")
    for name in [*concentrations, min(concentrations, key=float) + ALIKE]:
        weighting, concentration = "owners" if name.endswith(ALIKE) else "rows", float(name.removesuffix(ALIKE))
        results[name] = run(arguments.data, arguments.base, concentration, arguments.rows, weighting)
        results = dict(sorted(results.items()))
        publish("label_skew", results, as_markdown(results), everything)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
