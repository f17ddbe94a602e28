"""Do the merges hold for words with tags, and for owners whose tasks differ?

python -m benchmarks.tasks --data DATA --base BASE [--only tags,heads] [--rows 800] [--seeds 1] [--json]

BASE is a Hugging Face encoder; its head, if it has one, is ignored. For each table, three owners fine-tune it.

tags   owners of tweets, Wikipedia and other social media find persons, places, organisations and other names.
       DATA/ner/{btc,wikigold,wnut17}/{train,dev,test}.txt: a word and its tag a line, a blank line after a sentence
heads  owners of questions, news and film reviews share the body, and each keeps a head over labels of its own.
       DATA/{topics/trec,topics/ag_news,sentiment/sst2}/{train,dev,test}.jsonl: `text`, `label`

Everything runs through the product, masked, once for each seed, which draws the rows and decides how training starts.
No method has a sweep, so nothing is chosen. With fewer than some 130 ROWS, owners refuse to measure Gram matrices.
Writes benchmarks/results/tasks.{json,md}.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from transformers import AutoModel, AutoTokenizer

from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import publish, published, say
from deploy.simulation.simulate import simulate
from server.report.report import Report

OWNERS = {  # by table and owner: its folder in DATA
    "tags": {"btc": "ner/btc", "wikigold": "ner/wikigold", "wnut17": "ner/wnut17"},
    "heads": {"questions": "topics/trec", "news": "topics/ag_news", "reviews": "sentiment/sst2"},
}
TASKS: dict[str, dict[str, Any]] = {
    "tags": {
        "kind": "token-classification",
        "labels": ["O", *(f"{place}-{kind}" for kind in ("PER", "LOC", "ORG", "MISC") for place in "BI")],
    },
    "heads": {"kind": "text-classification", "head": "private"},
}
TITLES = {
    "tags": "Words with tags: entity F1 on test sentences",
    "heads": "Private heads over labels of one's own: accuracy on test rows",
}
MAIN = {"tags": 1, "heads": 0}  # which of the two metrics comes first
METRICS = {"tags": ("accuracy per word", "entity F1"), "heads": ("accuracy", "macro F1")}
METHODS = ("average", "data_free", "regmean", "regmean_plus_plus")
MODELS = ("base", "own_at_home", "own_elsewhere", *METHODS, "ensemble", "multi_task")
LABELS = {
    "questions": ["abbreviation", "description", "entity", "human", "location", "number"],
    "news": ["business", "scitech", "sports", "world"],
    "reviews": ["negative", "positive"],
}
EPOCHS, RATE, BATCH, MAX_TOKENS, TESTED, ALPHA = 3, 1e-4, 16, 64, 300, 0.9


def write_consortium(folder: Path, data: Path, base: Path, table: str, rows: int, seed: int) -> None:
    AutoModel.from_pretrained(base).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    agreement = {
        "title": TITLES[table],
        "base": "base",
        "method": METHODS[0],
        "compare_with": list(METHODS[1:]),
        "seed": seed,
        "owners": [{"name": owner} for owner in OWNERS[table]],
        "task": {"max_tokens": MAX_TOKENS, **TASKS[table]},
        "regmean": {"alphas": [ALPHA]},
    }
    (folder / "agreement.toml").write_text(tomli_w.dumps(agreement))
    for owner, path in OWNERS[table].items():
        ending = "txt" if table == "tags" else "jsonl"
        files = {"train": "train", "validation": "dev", "test": "test"}
        settings = {
            "name": owner,
            "training": {"epochs": EPOCHS, "learning_rate": RATE, "batch_size": BATCH, "schedule": "linear"},
            "data": {
                **{split: str((data / path / f"{file}.{ending}").resolve()) for split, file in files.items()},
                "max_train_rows": rows,
                "max_test_rows": TESTED,
            },
        }
        if owner in LABELS:
            settings["labels"] = LABELS[owner]
        (folder / f"{owner}.toml").write_text(tomli_w.dumps(settings))


def run(data: Path, base: Path, table: str, rows: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "consortium"
        folder.mkdir()
        write_consortium(folder, data, base, table, rows, seed)
        return scores_of(simulate(folder, Path(room) / "output"))


def scores_of(report: Report) -> dict[str, dict[str, list[float]]]:
    """By model and owner: accuracy and the task's second metric, on the owner's test rows."""
    by_owner = report.evaluation.by_owner
    scores = {
        model: {owner: [each[model].main, each[model].metric] for owner, each in by_owner.items()}
        for model in report.evaluation.mean
    }
    if "own" in scores:
        # On an owner's rows, `own` is the mean over all owners' own models, its own included.
        own, home, models = scores.pop("own"), scores["own_at_home"], len(by_owner)
        scores["own_elsewhere"] = {
            owner: list((models * np.array(own[owner]) - home[owner]) / (models - 1)) for owner in by_owner
        }
    return scores


def as_markdown(results: Mapping[str, Any]) -> str:
    lines = ["# Words with tags, and private heads", ""]
    lines += [
        f"Three owners fine-tune MiniLM, {EPOCHS} epochs at {RATE:g}, and the product merges their models, masked."
    ]
    lines += [
        f"RegMean and RegMean++ have alpha {ALPHA:g}. Each owner judges on {TESTED} test rows, drawn for each seed."
    ]
    lines += [
        "Own elsewhere: the two other owners' models on an owner's rows. Means over seeds; with several, the lowest"
    ]
    lines += ["and the highest are in brackets. Made by", ""]
    lines += ["    python -m benchmarks.tasks --data DATA --base BASE"]
    for table, found in results.items():
        runs, owners, main = list(found["seeds"].values()), list(OWNERS[table]), MAIN[table]
        headings = ["model", METRICS[table][main], *owners, METRICS[table][1 - main]]
        lines += ["", f"## {TITLES[table]}", ""]
        lines += [f"{found['rows']} training rows an owner, {len(runs)} seed{'s' if len(runs) > 1 else ''}.", ""]
        lines += ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        lines += [_line(model, runs, owners, main) for model in MODELS if model in runs[0]]
    return "\n".join(lines) + "\n"


def _line(model: str, runs: list[dict[str, Any]], owners: list[str], main: int) -> str:
    by_seed = np.array([[run[model][owner] for owner in owners] for run in runs])  # (seeds, owners, 2)
    means = by_seed.mean(axis=1)
    spread = f" ({means[:, main].min():.3f} to {means[:, main].max():.3f})" if len(runs) > 1 else ""
    numbers = [*by_seed.mean(axis=0)[:, main], means[:, 1 - main].mean()]
    shown = " | ".join(f"{each:.3f}" for each in numbers)
    return f"| {model.replace('_', ' ')} | {means[:, main].mean():.3f}{spread} | {shown} |"


def size(results: Mapping[str, Any]) -> dict[str, float]:
    rows = {f"training rows in {table}": found["rows"] for table, found in results.items()}
    return rows | {f"seeds of {table}": len(found["seeds"]) for table, found in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--only", default="tags,heads")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    results = published("tasks")
    for table in arguments.only.split(","):
        results[table] = {"rows": arguments.rows, "seeds": {}}
        for seed in range(arguments.seeds):
            say(f"{table}, seed {seed}")
            results[table]["seeds"][str(seed)] = run(arguments.data, arguments.base, table, arguments.rows, seed)
            publish("tasks", results, as_markdown(results), size)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
