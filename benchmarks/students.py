"""What makes a student better than the owners' own models: what it is taught, where it starts, how fast it learns.

python -m benchmarks.students --data DATA --models MODELS --cache FOLDER [--json]

Owners, models, test rows and the domains of the pool are those of benchmarks/fusion.py, with seed 0. Only the formulas
run here, in one process and without a sum, so that more can be tried: students by the loss and the schedule of
server/student.py, in batches of rows of like length, without training embeddings. Two teachers are compared:

    logits         the mean of the owners' logits, as in FedDF
    probabilities  the mean of each owner's softmax: what the product sums

FOLDER keeps the small models, the merge, and what models say, so that another run trains students alone. Writes
benchmarks/results/students.{json,md} after each student.
"""

import json
import time
from collections.abc import Iterator
from math import cos, pi
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from benchmarks import fusion
from benchmarks.emotion import parser_of
from benchmarks.fusion import MAX_TOKENS, OWNERS, TEST_ROWS, TRAIN_ROWS, WITH_WEIGHTS, texts_of, write_other_base
from benchmarks.machine import quiet_on_one_thread, this_machine
from benchmarks.published import everything, publish, published
from benchmarks.quality import macro_f1
from common.models.folders import base_labels
from deploy.simulation.simulate import simulate

POOL_ROWS_PER_DOMAIN, BATCH, JUDGED_AFTER = 400, 32, (1, 3)
TRIED = [  # teacher, start, learning rate
    ("probabilities", "data_free", 1e-4),
    ("logits", "data_free", 1e-4),
    ("probabilities", "base", 5e-4),
    ("logits", "base", 5e-4),
    ("probabilities", "base", 1e-4),
    ("logits", "base", 1e-4),
]
Logits = NDArray[np.float64]


def batches(tokens: list[list[int]], random: np.random.Generator | None = None) -> Iterator[NDArray[np.int64]]:
    """Rows of like length together; in a random order, and by lengths that are a little off, to train."""
    lengths = np.array([len(each) for each in tokens], float)
    order = np.argsort(lengths if random is None else lengths + 2 * random.random(len(lengths)), kind="stable")
    parts = np.split(order, range(BATCH, len(order), BATCH))
    for index in range(len(parts)) if random is None else random.permutation(len(parts)):
        yield parts[index]


class Reader:
    """A model's tokens of some texts, padded batch by batch."""

    def __init__(self, folder: Path, texts: list[str]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokens: list[list[int]] = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        self._padding = int(tokenizer.pad_token_id)

    def batch(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        longest = max(len(self.tokens[row]) for row in rows)
        ids, mask = torch.full((len(rows), longest), self._padding), torch.zeros((len(rows), longest), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(self.tokens[row])] = torch.tensor(self.tokens[row])
            mask[place, : len(self.tokens[row])] = 1
        return {"input_ids": ids, "attention_mask": mask}

    @torch.inference_mode()
    def logits(self, model: PreTrainedModel) -> Logits:
        """What a model says of all texts, (rows, labels)."""
        model.eval()
        found = np.empty((len(self.tokens), model.config.num_labels))
        for rows in batches(self.tokens):
            found[rows] = model(**self.batch(rows)).logits.double().numpy()
        return found


class Consortium:
    """What all owners' models say of the pool and of all test rows."""

    def __init__(self, data: Path, models: Path, cache: Path) -> None:
        self.data, self.models, self.cache = data, models, cache
        cache.mkdir(parents=True, exist_ok=True)
        self.labels = base_labels(models / "base")
        with patch.object(fusion, "POOL_ROWS_PER_DOMAIN", POOL_ROWS_PER_DOMAIN):
            fusion.write_pool(cache / "pool.jsonl", data)
        pool = (cache / "pool.jsonl").read_text().splitlines()
        texts = {"pool": [json.loads(line)["text"] for line in pool]}
        self.texts = texts | {name: texts_of(data, name, "test", TEST_ROWS) for name in OWNERS}
        self.targets = {name: self.targets_of(name, "test", TEST_ROWS) for name in OWNERS}
        every = {name: [self.targets_of(name, split, 10**9) for split in ("train", "dev", "test")] for name in OWNERS}
        self.allowed = {name: np.unique(np.concatenate(each)) for name, each in every.items()}
        self.said = {name: self._said(name) for name in OWNERS}

    def targets_of(self, name: str, split: str, most: int) -> NDArray[np.int64]:
        lines = (self.data / name / f"{split}.jsonl").read_text().splitlines()[:most]
        return np.array([self.labels.index(json.loads(line)["label"]) for line in lines])

    def _said(self, name: str) -> dict[str, Logits]:
        path = self.cache / f"{name}.npz"
        if not path.exists():
            folder = self.models / name if name in WITH_WEIGHTS else self._small_model(name)
            model = AutoModelForSequenceClassification.from_pretrained(folder)
            found = {key: Reader(folder, texts).logits(model) for key, texts in self.texts.items()}
            np.savez(path, allow_pickle=False, **found)
        return dict(np.load(path))

    def _small_model(self, name: str) -> Path:
        """Trained as its owner in benchmarks/fusion.py trains it: four epochs of AdamW, with a falling rate."""
        folder, texts = self.cache / name, texts_of(self.data, name, "train", TRAIN_ROWS)
        write_other_base(folder, texts, self.labels, seed=0)
        model, reader = AutoModelForSequenceClassification.from_pretrained(folder), Reader(folder, texts)
        targets = torch.from_numpy(self.targets_of(name, "train", TRAIN_ROWS))
        optimizer, random = torch.optim.AdamW(model.parameters(), lr=1e-3), np.random.default_rng(0)
        steps = [rows for _ in range(4) for rows in batches(reader.tokens, random)]
        model.train()
        for step, rows in enumerate(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / len(steps))
            loss = cross_entropy(model(**reader.batch(rows)).logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(folder)
        return folder

    def start(self, name: str) -> Path:
        """The base, or the product's `data_free` merge of those who give weights."""
        if name == "base":
            return self.models / "base"
        folder = self.cache / f"merge-{name}"
        if not (folder / "output" / "report.json").exists():
            folder.mkdir(exist_ok=True)
            agreement = {
                "title": "Three",
                "base": str(self.models / "base"),
                "method": name,
                "owners": [{"name": owner} for owner in WITH_WEIGHTS],
                "task": {"labels": list(self.labels), "max_tokens": MAX_TOKENS},
                "summation": {"colluders": 0},
                "data_free": {"alphas": [1.0]},
            }
            (folder / "agreement.toml").write_text(tomli_w.dumps(agreement))
            for owner in WITH_WEIGHTS:
                rows = {split: str(self.data / owner / f"{split}.jsonl") for split in ("train", "test")}
                few = {"max_train_rows": 100, "max_test_rows": 20}
                settings = {"name": owner, "fine_tuned": str(self.models / owner), "data": rows | few}
                (folder / f"{owner}.toml").write_text(tomli_w.dumps(settings))
            simulate(folder, folder / "output", with_references=False)
        return folder / "output" / "model"

    def taught(self, teacher: str, key: str) -> Logits:
        """The probabilities that a teacher gives to the pool, or to an owner's test rows; (rows, labels)."""
        said = [self.said[name][key] for name in OWNERS]
        if teacher == "probabilities":
            return np.asarray(np.mean([_softmax(each) for each in said], axis=0))
        return _softmax(np.asarray(np.mean(said, axis=0)))

    def judge(self, said: dict[str, Logits]) -> tuple[float, float]:
        """Accuracy and macro F1, in the mean over the owners' test rows, each among the owner's labels."""
        found = []
        for name in OWNERS:
            allowed, wanted = self.allowed[name], self.targets[name]
            given = allowed[said[name][:, allowed].argmax(axis=1)]
            found.append([(given == wanted).mean(), macro_f1(wanted, given)])
        accuracy, metric = np.mean(found, axis=0)
        return float(accuracy), float(metric)


def _softmax(logits: Logits) -> Logits:
    found: Logits = torch.from_numpy(logits).softmax(-1).numpy()
    return found


def train(owners: Consortium, teacher: str, start: str, rate: float) -> dict[str, tuple[float, float]]:
    """Accuracy and macro F1 of a student after so many epochs, by their number."""
    folder = owners.start(start)
    torch.manual_seed(0)
    student, random = AutoModelForSequenceClassification.from_pretrained(folder), np.random.default_rng(0)
    pool = Reader(folder, owners.texts["pool"])
    tests = {name: Reader(folder, owners.texts[name]) for name in OWNERS}
    target = torch.from_numpy(owners.taught(teacher, "pool")).float()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    optimizer = torch.optim.Adam([each for each in student.parameters() if each.requires_grad], lr=rate)
    found = {}
    if start != "base":
        found["0"] = owners.judge({name: reader.logits(student) for name, reader in tests.items()})
    steps, step = JUDGED_AFTER[-1] * -(-len(pool.tokens) // BATCH), 0
    for epoch in range(JUDGED_AFTER[-1]):
        student.train()
        for rows in batches(pool.tokens, random):
            optimizer.param_groups[0]["lr"] = rate * (1 + cos(pi * step / steps)) / 2
            said = student(**pool.batch(rows)).logits.log_softmax(-1)
            loss = kl_div(said, target[rows], reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        if epoch + 1 in JUDGED_AFTER:
            found[str(epoch + 1)] = owners.judge({name: reader.logits(student) for name, reader in tests.items()})
    return found


def as_markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Teachers and students",
        "",
        f"Accuracy and macro F1 on {TEST_ROWS} test rows of each of five owners, in the mean over the owners, as in",
        f"[fusion.md](fusion.md), but by the formulas alone, with one seed and a pool of {results['pool']:,} texts.",
        "Made by",
        "",
        "    python -m benchmarks.students --data DATA --models MODELS --cache FOLDER",
        "",
        "| what answers | accuracy | macro F1 |",
        "|---|---|---|",
    ]
    for title, (accuracy, metric) in results["models"].items():
        lines.append(f"| {title} | {accuracy:.3f} | {metric:.3f} |")
    for title, by_epochs in results["students"].items():
        for epochs, (accuracy, metric) in by_epochs.items():
            lines.append(f"| student, {title}, after {epochs} epochs | {accuracy:.3f} | {metric:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    owners = Consortium(arguments.data.resolve(), arguments.models.resolve(), arguments.cache.resolve())
    results = published("students") or {"machine": this_machine(), "students": {}}
    results["pool"] = len(owners.texts["pool"])
    own = {f"{name}'s own model": owners.judge(owners.said[name]) for name in OWNERS}
    teachers = {
        f"teacher: mean of {teacher}": owners.judge({name: owners.taught(teacher, name) for name in OWNERS})
        for teacher in ("logits", "probabilities")
    }
    results["models"] = own | teachers
    for teacher, start, rate in TRIED:
        began = time.process_time()
        title = f"taught {teacher}, from {start}, learning rate {rate:g}"
        results["students"][title] = train(owners, teacher, start, rate)
        publish("students", results, as_markdown(results), everything)
        print(f"{title}: {results['students'][title]}, {time.process_time() - began:.0f} s", flush=True)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
