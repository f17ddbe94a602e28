"""How well does a sum of predictions on a pool tell an owner's training rows from rows that it never saw?

python -m benchmarks.pool_membership --data DATA --models MODELS

DATA and MODELS are as in benchmarks/emotion.py: five MiniLM models, each trained on the first rows of its domain. Half
of the pool is rows on which some model was trained, half is test rows of the same domains. The attack sees, as a
coordinator does under `distill`, the mean of the owners' probabilities for each row. It takes a row for a training row
if the mean is sure of it: by the probability of the likeliest label, or, if it knows the row's label, of that one.
Areas under the curve, of a single owner's rows, and of all owners' together. Writes
benchmarks/results/pool_membership.{json,md}.

Stronger attacks exist, so this is a lower bound. `amalgram audit` measures single models by four of them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.emotion import IN_DOMAIN, parser_of
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import everything, publish
from client.audit.statistics import area_under_the_curve
from client.data.rows import Rows
from client.measurement.evaluation import predict_logits
from client.measurement.predictions import as_summed
from common.agreement import Task
from common.models.folders import base_labels

ROWS, MAX_TOKENS = 300, 64
OWNERS = (1, 2, 3, 5)
ATTACKS = {"label unknown": "the likeliest label", "label known": "the row's own label"}
Probabilities = NDArray[np.float32]


def rows_of(path: Path, labels: tuple[str, ...]) -> tuple[list[str], NDArray[np.int64]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()[:ROWS]]
    return [line["text"] for line in lines], np.array([labels.index(line["label"]) for line in lines])


def said_of(folder: Path, texts: list[str], task: Task) -> Probabilities:
    """What a model's owner would add to the sum: (rows, labels)."""
    model, tokenizer = (each.from_pretrained(folder) for each in (AutoModelForSequenceClassification, AutoTokenizer))
    encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)
    features = tuple({name: values[row] for name, values in encoded.items()} for row in range(len(texts)))
    rows = Rows(features=features, targets=np.zeros(len(texts), np.int64), tokenizer=tokenizer)
    logits = predict_logits(model, rows, batch_size=32)
    return as_summed(logits, np.ones(logits.shape[1], bool), task)


def sureness(total: Probabilities, labels: NDArray[np.int64] | None) -> Probabilities:
    """How sure the owners together are of each row, or of its label; (rows,)."""
    return np.asarray(total.max(axis=1) if labels is None else total[np.arange(len(labels)), labels])


def measure(data: Path, models: Path) -> dict[str, Any]:
    labels = base_labels(models / "base")
    parts = [rows_of(data / domain / f"{split}.jsonl", labels) for domain in IN_DOMAIN for split in ("train", "test")]
    texts = [text for each, _ in parts for text in each]
    truth = np.concatenate([each for _, each in parts])
    home = np.concatenate([np.full(len(each), part // 2) for part, (each, _) in enumerate(parts)])
    is_member = np.concatenate([np.full(len(each), part % 2 == 0) for part, (each, _) in enumerate(parts)])
    said = [said_of(models / domain, texts, Task(labels=labels)) for domain in IN_DOMAIN]
    found: dict[str, Any] = {"rows": len(texts), "areas": {}}
    for attack in ATTACKS:
        for owners in OWNERS:
            of_one, of_all = [], []
            for target in range(len(IN_DOMAIN)):
                asked = [(target + step) % len(IN_DOMAIN) for step in range(owners)]
                total = np.sum([said[each] for each in asked], axis=0)
                sure = sureness(total, truth if attack == "label known" else None)
                own, others = home == target, np.isin(home, asked)
                of_one.append(float(area_under_the_curve(sure[own & is_member], sure[own & ~is_member])))
                of_all.append(float(area_under_the_curve(sure[others & is_member], sure[others & ~is_member])))
            found["areas"][f"{attack}, {owners}"] = {"of_one": of_one, "of_all": of_all}
    return found


def as_markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Telling training rows from others by a sum of predictions",
        "",
        f"Area under the curve (0.5 is guessing, 1 is certainty). A pool of {found['rows']:,} rows of five domains:",
        f"{ROWS} training rows of each owner, and as many rows of its domain that no model saw. The attack sees the",
        "mean of the owners' probabilities and takes sureness for membership. *A single owner's*: whether a row of one",
        "domain is that owner's, the mean over the five and the highest of them. *Any owner's*: whether a row is any",
        "summed owner's, the mean over the choices of owners. The standard error of a single area is about 0.024.",
        "Made by",
        "",
        "    python -m benchmarks.pool_membership --data DATA --models MODELS",
        "",
        "| the attack knows the row's label | owners in the sum | a single owner's | the highest | any owner's |",
        "|---|---|---|---|---|",
    ]
    for name, areas in found["areas"].items():
        attack, owners = name.split(", ")
        one, everybody = areas["of_one"], areas["of_all"]
        known = "yes" if attack == "label known" else "no"
        lines.append(
            f"| {known} | {owners} | {np.mean(one):.2f} | {max(one):.2f} ({IN_DOMAIN[int(np.argmax(one))]}) "
            f"| {np.mean(everybody):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    quiet_on_one_thread()
    found = measure(arguments.data, arguments.models)
    publish("pool_membership", found, as_markdown(found), everything)
    print(as_markdown(found))


if __name__ == "__main__":
    main()
