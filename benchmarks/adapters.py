"""Which merge suits classifiers with LoRA adapters, and what does each send?

python -m benchmarks.adapters --data DATA --models MODELS [--rows 2000] [--json]

DATA and MODELS are as in benchmarks/emotion.py; of MODELS, only the base is used. Three emotion owners fine-tune it
with LoRA on queries and values, and the classifier whole: once with factors of their own, once on one frozen factor
that all share (`[training] lora_shared`), which `lorm` needs. Everything runs through the product, masked, with one
draw of rows and one seed. Each own model is judged on its owner's test rows and on the two others'. Bytes are those of
one owner's contribution if that method runs alone. Writes benchmarks/results/adapters.{json,md}.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from benchmarks.emotion import parser_of, write_first_rows
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import publish, say
from client.holdings import Holdings
from client.settings import OwnerSettings
from common.agreement import load_agreement
from common.merge_methods import contribution_layout
from common.settings_file import load_settings
from deploy.simulation.simulate import simulate

OWNERS = ("isear", "crowdflower", "emoevent")
RANK, EPOCHS, RATE, BATCH, MAX_TOKENS = 8, 4, 2e-3, 16, 48
JUDGED = {"dev": 40, "test": 150}  # rows of each owner
SHARED = "one frozen factor"
METHODS = {
    SHARED: ("average", "regmean", "data_free", "lorm"),
    "factors of their own": ("average", "regmean", "data_free"),
}


def write_consortium(folder: Path, data: Path, base: Path, factors: str, rows: int) -> None:
    methods = METHODS[factors]
    agreement = {
        "title": f"Adapters with {factors}",
        "base": str(base.resolve()),
        "method": methods[0],
        "compare_with": list(methods[1:]),
        "owners": [{"name": owner} for owner in OWNERS],
        "task": {"kind": "text-classification", "max_tokens": MAX_TOKENS},
        "merge": {"layers": ["*.query", "*.value", "classifier"]},
        "regmean": {"alphas": [0.9], "measured_examples": 500},
        "lorm": {"rank": RANK},
        "evaluation": {"choose_by": "macro_f1"},
    }
    (folder / "agreement.toml").write_text(tomli_w.dumps(agreement))
    write_first_rows(folder / "data", data, OWNERS, {"train": rows, **JUDGED})
    for owner in OWNERS:
        lora = {"lora_rank": RANK, "lora_layers": ["query", "value"], "lora_shared": factors == SHARED}
        files = {"train": "train", "validation": "dev", "test": "test"}
        settings = {
            "name": owner,
            "training": {"epochs": EPOCHS, "learning_rate": RATE, "batch_size": BATCH, "schedule": "linear", **lora},
            "data": {split: f"data/{owner}/{file}.jsonl" for split, file in files.items()},
        }
        (folder / f"{owner}.toml").write_text(tomli_w.dumps(settings))


def run(data: Path, base: Path, factors: str, rows: int) -> dict[str, Any]:
    """Accuracy and macro F1 by model, in the mean over owners, and the bytes of each method."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as room:
        folder, output = Path(room) / "consortium", Path(room) / "output"
        folder.mkdir()
        write_consortium(folder, data, base, factors, rows)
        report = simulate(folder, output, with_references=False)
        owners = [holdings_of(owner, output / "parties") for owner in OWNERS]
        mean: dict[str, Any] = {model: [each.accuracy, each.metric] for model, each in report.evaluation.mean.items()}
        mean["own_elsewhere"] = own_elsewhere(owners)
        settings = owners[0].agreement.merge_settings(owners[0].plan)
        sent = {method: contribution_layout((method,), settings).num_bytes for method in METHODS[factors]}
    return {"mean": mean, "bytes": sent, "processor_seconds": round(time.process_time() - began)}


def holdings_of(owner: str, parties: Path) -> Holdings:
    settings = load_settings(parties / f"{owner}.toml", OwnerSettings)
    return Holdings(settings, parties, load_agreement(parties / settings.agreement))


def own_elsewhere(owners: list[Holdings]) -> list[float]:
    """Accuracy and macro F1 of own models on the other owners' test rows, in the mean.

    A finished run keeps no own model, so each is made again, which repeats bit for bit.
    """
    scores = []
    for owner in owners:
        model = owner.own_model()
        scores += [other.score(model, "test") for other in owners if other is not owner]
    return [float(np.mean([getattr(each, key) for each in scores])) for key in ("main", "metric")]


def as_markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Three classifiers with LoRA adapters",
        "",
        f"MiniLM, rank {RANK} on queries and values, {results['rows']} training rows of {', '.join(OWNERS[:-1])} and",
        f"{OWNERS[-1]} each, {EPOCHS} epochs at {RATE:g}. Accuracy and macro F1 on {JUDGED['test']} test rows of each",
        "owner, in the mean over the owners; one seed. Sent: one owner's contribution. Made by",
        "",
        f"    python -m benchmarks.adapters --data DATA --models MODELS --rows {results['rows']}",
        "",
        "| factors | model | accuracy | macro F1 | sent |",
        "|---|---|---|---|---|",
    ]
    for factors, found in results["runs"].items():
        for model in ("base", "own_at_home", "own_elsewhere", *METHODS[factors]):
            accuracy, metric = found["mean"][model]
            sent = f"{found['bytes'][model] / 1e6:.2f} MB" if model in found["bytes"] else ""
            lines.append(f"| {factors} | {model.replace('_', ' ')} | {accuracy:.3f} | {metric:.3f} | {sent} |")
    return "\n".join(lines) + "\n"


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"training rows": results["rows"], "kinds of factors": len(results["runs"])}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    results: dict[str, Any] = {"rows": arguments.rows, "runs": {}}
    for factors in METHODS:
        say(f"adapters with {factors}")
        results["runs"][factors] = run(arguments.data, arguments.models / "base", factors, arguments.rows)
        publish("adapters", results, as_markdown(results), size)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
