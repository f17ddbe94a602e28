"""Can owners without labels choose a candidate, by how well its embeddings tell groups of rows apart?

python -m benchmarks.posterior --data DATA --models MODELS --cache FOLDER [--only METHOD]

DATA and MODELS are as in benchmarks/emotion.py. The criterion is that of arXiv 2401.02987: the log posterior of a row's
own group under a Gaussian of each group's embeddings. It is made of counts, sums and Gram matrices by group, which are
sums over owners. Embeddings are mean last hidden states in DIRECTIONS random directions. Groups are the five domains,
16 clusters of what the base makes of the rows, and, to see what the criterion could do at best, the labels. Beside it
stand the mean confidence of the predictions, which needs no label either, and the middle of each sweep.

Candidates are made by the product's measurements and equations, of a sum without masks. FOLDER keeps what they say;
with `--only`, those of one method, so that processes can share the work. For DRAWS draws of validation rows, each
criterion chooses one; its macro F1 on test rows is compared with that of the one that labels choose. Writes
benchmarks/results/posterior.{json,md}.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.special import log_softmax, softmax
from transformers import PreTrainedModel

from benchmarks.emotion import IN_DOMAIN, parser_of, write_consortium
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import everything, publish
from benchmarks.quality import BATCH, say
from client.data.private_data import PrivateData
from client.data.rows import Rows
from client.measurement.closeness import mean_states
from client.measurement.evaluation import predict_logits, score_logits
from client.owner import Owner
from client.settings import Data
from common.agreement import AgreementDraft, Reading, Task
from common.merge_methods import METHODS
from common.merge_methods.method import SingleRoundMethod
from common.models.delta import add_delta
from common.models.folders import base_labels, load_tokenizer
from common.models.loading import load_base
from common.settings_file import load_settings
from common.summation.protocol import Total
from deploy.complete import complete_agreement
from deploy.consortium import find_owner_files
from deploy.simulation.parties import party_keys, set_up_parties

ALPHAS = {"regmean": (0.1, 0.5, 0.9, 0.95), "data_free": (0.5, 0.9, 1.0), "task_arithmetic": (0.3, 0.5, 1.0)}
METHODS_TRIED = (*ALPHAS, "average")
VALIDATION_ROWS, TEST_ROWS, DRAWN, DRAWS = 120, 120, 80, 20
DIRECTIONS, CLUSTERS, RIDGE = 16, 16, 1e-2
Floats = NDArray[np.float64]
Criterion = Callable[[str, NDArray[np.int64]], float]  # candidate, rows -> more is better


def gaussian_posterior(embeddings: Floats, groups: NDArray[np.int64]) -> float:
    """The mean over rows of log p(own group | row): one Gaussian a group, of its count, sum and Gram.

    `embeddings`: (rows, d). A covariance has a ridge of RIDGE times the mean variance of all rows.
    """
    ridge = RIDGE * embeddings.var(axis=0).mean() * np.eye(embeddings.shape[1])
    densities = []
    for group in np.unique(groups):
        own = embeddings[groups == group]
        away = embeddings - own.mean(axis=0)
        covariance = np.cov(own.T, bias=True) + ridge
        distances = np.einsum("rd,dr->r", away, np.linalg.solve(covariance, away.T))
        densities.append(np.log(len(own)) - (distances + np.linalg.slogdet(covariance)[1]) / 2)
    own_group = np.searchsorted(np.unique(groups), groups)
    found = log_softmax(np.stack(densities, axis=1), axis=1)[np.arange(len(groups)), own_group]
    return float(found.mean())


def merges(data: Path, models: Path, method: str) -> Iterator[tuple[str, PreTrainedModel]]:
    """A method's candidates, by the product's measurements and equations, of a sum without masks."""
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "consortium"
        write_consortium(folder, data, models, methods=(method,), alphas=ALPHAS["regmean"])
        path = folder / "agreement.toml"
        scales = f"\n[task_arithmetic]\nscales = {list(ALPHAS['task_arithmetic'])}\n"
        path.write_text(path.read_text() + scales)
        draft = load_settings(path, AgreementDraft)
        keys = party_keys(draft, Path(room) / "parties", with_nodes=False)
        agreement = complete_agreement(draft, models / "base", keys.public_keys)
        files = find_owner_files(folder, draft)
        with set_up_parties(Path(room) / "output", agreement, models / "base", files, keys) as (_, paths):
            benches = [Owner(path).workbench for path in paths]
            layout = benches[0].contribution_layout()
            total = np.zeros(layout.size)
            for bench in benches:
                vector = np.empty(layout.size)
                layout.flatten(bench.contribution(), vector)
                total += vector
            settings, found = benches[0].merge_settings, METHODS[method]
            assert isinstance(found, SingleRoundMethod)
            summed = Total(layout=layout, vector=total, owners=agreement.owner_names, roster_size=len(benches))
            for name, value in agreement.agreed(found).items():
                model = benches[0].load_base()
                add_delta(model, found.solve(settings, summed, value, with_spectra=False).delta)
                yield name, model


def rows_of(data: Path, models: Path, task: Task) -> dict[str, tuple[Rows, Rows, NDArray[np.int64]]]:
    """By domain: validation rows, test rows, and the labels among which they are judged."""
    base, tokenizer = load_base(models / "base", task, seed=0), load_tokenizer(models / "base")
    found = {}
    for domain in IN_DOMAIN:
        files = Data(
            train=Path("train.jsonl"),
            validation=Path("dev.jsonl"),
            test=Path("test.jsonl"),
            max_validation_rows=VALIDATION_ROWS,
            max_test_rows=TEST_ROWS,
        )
        own = PrivateData(
            data=files, task=task, model=base, tokenizer=tokenizer, folder=data / domain, seed=0, reading=Reading()
        )
        found[domain] = own.validation(), own.test(), own.label_set()
    return found


@torch.inference_mode()
def states_and_logits(model: PreTrainedModel, rows: Rows) -> tuple[Floats, NDArray[np.float32]]:
    """What closeness.mean_states and evaluation.predict_logits give, in one pass."""
    model.eval()
    states, logits = np.empty((len(rows), model.config.hidden_size)), np.empty((len(rows), model.config.num_labels))
    for indices, batch, _ in rows.batches(BATCH):
        said = model(**batch, output_hidden_states=True)
        mask = batch["attention_mask"].double()[..., None]
        states[indices] = ((said.hidden_states[-1].double() * mask).sum(1) / mask.sum(1)).numpy()
        logits[indices] = said.logits.numpy()
    return states, logits.astype(np.float32)


class Judged:
    """What each candidate says of all validation and test rows, and how it embeds the validation rows."""

    def __init__(self, data: Path, models: Path, cache: Path, methods: Sequence[str]) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        self.task = Task(labels=base_labels(models / "base"), max_tokens=64)
        self.rows = rows_of(data, models, self.task)
        base = load_base(models / "base", self.task, seed=0)
        validation = [each[0] for each in self.rows.values()]
        self.of_base = np.concatenate([mean_states(base, each, BATCH) for each in validation])
        self.labels = np.concatenate([np.asarray(each.targets) for each in validation])
        self.domains = np.repeat(np.arange(len(validation)), [len(each) for each in validation])
        random = np.random.default_rng(0).standard_normal((self.of_base.shape[1], DIRECTIONS))
        self.directions = np.linalg.qr(random)[0]
        self.states: dict[str, Floats] = {}
        self.validation: dict[str, list[NDArray[np.float32]]] = {}
        self.test: dict[str, float] = {}
        for method in methods:
            for name in [f"{method}@{value}" for value in ALPHAS.get(method, ())] or [method]:
                path = cache / f"{name}.npz"
                if not path.exists():
                    self._judge_method(data, models, method, cache)
                kept = np.load(path)
                self.states[name], self.test[name] = kept["states"], float(kept["test"])
                self.validation[name] = np.split(kept["logits"], np.cumsum([len(each) for each in validation])[:-1])

    def _judge_method(self, data: Path, models: Path, method: str, cache: Path) -> None:
        for name, model in merges(data, models, method):
            states, logits, test = [], [], []
            for first, last, allowed in self.rows.values():
                embedded, said = states_and_logits(model, first)
                states.append(embedded)
                logits.append(said)
                test.append(score_logits(predict_logits(model, last, BATCH), last, self.task, allowed).metric)
            np.savez(
                cache / f"{name}.npz",
                states=np.concatenate(states),
                logits=np.concatenate(logits),
                test=np.array(np.mean(test)),
            )
            say(f"{name}: macro F1 {np.mean(test):.3f} on test rows")

    # --- criteria ---

    def by_labels(self, name: str, rows: NDArray[np.int64]) -> float:
        """Mean macro F1 over the owners."""
        scores, start = [], 0
        for (first, _, allowed), logits in zip(self.rows.values(), self.validation[name], strict=True):
            own = rows[(rows >= start) & (rows < start + len(first))] - start
            scores.append(score_logits(logits[own], first.take(own), self.task, allowed).metric)
            start += len(first)
        return float(np.mean(scores))

    def by_confidence(self, name: str, rows: NDArray[np.int64]) -> float:
        return float(softmax(np.concatenate(self.validation[name])[rows], axis=1).max(axis=1).mean())

    def by_groups(self, groups: NDArray[np.int64]) -> Criterion:
        return lambda name, rows: gaussian_posterior((self.states[name] @ self.directions)[rows], groups[rows])


def measure(judged: Judged) -> dict[str, Any]:
    _, clusters = kmeans2(judged.of_base, CLUSTERS, seed=0, minit="++")
    criteria: dict[str, Criterion] = {
        "labels": judged.by_labels,
        "posterior of the domain": judged.by_groups(judged.domains),
        f"posterior of {CLUSTERS} clusters": judged.by_groups(clusters.astype(np.int64)),
        "posterior of the label (for comparison)": judged.by_groups(judged.labels),
        "confidence": judged.by_confidence,
    }
    sweeps = {method: [f"{method}@{value}" for value in values] for method, values in ALPHAS.items()}
    sweeps["all candidates"] = list(judged.test)
    random, draws = np.random.default_rng(0), []
    for _ in range(DRAWS):
        own = [random.choice(np.flatnonzero(judged.domains == each), DRAWN, replace=False) for each in range(5)]
        draws.append(np.sort(np.concatenate(own)))
    found: dict[str, Any] = {"test": judged.test, "choices": {}}
    for sweep, names in sweeps.items():
        chosen = {
            criterion: [max(names, key=lambda name: value(name, rows)) for rows in draws]
            for criterion, value in criteria.items()
        }
        if sweep in ALPHAS:
            chosen["the middle of the sweep"] = [names[len(names) // 2]] * DRAWS
        found["choices"][sweep] = {
            criterion: {
                "same": float(np.mean([one == other for one, other in zip(picked, chosen["labels"], strict=True)])),
                "macro_f1": float(np.mean([judged.test[name] for name in picked])),
                "most_often": max(set(picked), key=picked.count),
            }
            for criterion, picked in chosen.items()
        }
        mean = float(np.mean([judged.test[name] for name in names]))
        found["choices"][sweep]["a candidate at random"] = {"same": 1 / len(names), "macro_f1": mean}
    return found


def as_markdown(found: Mapping[str, Any]) -> str:
    lines = [
        "# Choosing a candidate without labels",
        "",
        f"{len(found['test'])} candidates of five emotion models, {DRAWS} draws of {DRAWN} validation rows an owner.",
        "Which candidate a criterion chooses, how often it is the one that macro F1 on the labels chooses, and the",
        f"macro F1 of what it chose on {TEST_ROWS} test rows of each owner, in the mean over the draws. Embeddings in",
        f"{DIRECTIONS} random directions. Made by",
        "",
        "    python -m benchmarks.posterior --data DATA --models MODELS --cache FOLDER",
        "",
        "| among | chosen by | the same as labels | macro F1 | most often |",
        "|---|---|---|---|---|",
    ]
    for sweep, by in found["choices"].items():
        for criterion, each in by.items():
            often = each.get("most_often", "")
            lines.append(f"| {sweep} | {criterion} | {each['same']:.0%} | {each['macro_f1']:.3f} | {often} |")
    lines += ["", "| candidate | macro F1 on test rows |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in found["test"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--only", help="only keep what the candidates of this method say")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    data, models, cache = (each.resolve() for each in (arguments.data, arguments.models, arguments.cache))
    judged = Judged(data, models, cache, (arguments.only,) if arguments.only else METHODS_TRIED)
    if arguments.only:
        return
    found = measure(judged)
    publish("posterior", found, as_markdown(found), everything)
    print(json.dumps(found, indent=1) if arguments.json else as_markdown(found))


if __name__ == "__main__":
    main()
