"""Does merging pay? Every method on five emotion models, judged on the owners' domains and on five others.

python -m benchmarks.quality --data DATA --models MODELS [--only PART,PART...] [--json]

DATA and MODELS are as in benchmarks/emotion.py. The parts, named under PARTS below, are saved one by one. Every merged
model is a candidate that the product itself sent to its owners in a masked `simulate`. The benchmark keeps a copy and
judges it again on all ten domains. `textbook` is RegMean again in twenty lines, which use nothing of the product's
methods, sums or messages. The metric is macro F1 over the labels that occur in the first 600 test examples; predictions
are judged among the labels of the domain. Writes benchmarks/results/quality.{json,md,svg}.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import formulas
from benchmarks.emotion import IN_DOMAIN, OUT_OF_DOMAIN, parser_of, write_consortium, write_first_rows
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import RESULTS, everything, publish, published
from client.data.private_data import PrivateData
from client.data.rows import Rows, pool
from client.measurement.evaluation import predict_logits, score_logits
from client.measurement.fine_tuning import fine_tune
from client.settings import Data, Training
from common.agreement import Reading, Task
from common.merge_methods.refit import class_weights
from common.metrics import Score
from common.models.delta import APPLIED, add_delta
from common.models.folders import base_labels, load_tokenizer
from common.models.loading import load_base
from common.schedule import Delivery
from common.tensor_layout import TensorLayout
from deploy.simulation.simulate import simulate
from server.coordinator import Coordinator
from server.report.report import Report

BATCH = 32
METHODS = ("regmean", "average", "task_arithmetic", "fisher", "data_free", "regmean_plus_plus")
PULLS = ((0.1, None), (0.1, 1.0), (1.0, 1.0))  # ridge and pull of data_free
MEASURED = 500  # rows of each owner, for draws
# These see one row an example, so the product merges them data-free, whatever the method.
ONE_ROW = ("bert.pooler.dense.weight", "classifier.weight")
SCALES = (1.0, 1.5, 3.0, 6.0)  # of isotropic
FEATCALS = (  # name, how it is fitted, what it is held to, draws
    ("FeatCal", formulas.FEATCAL, "data_free", 1),
    ("RegMean++ with FeatCal's targets", formulas.Stepwise(own=0.25), "average", 1),
)
LIMITS = (50, 100, 200, 500, 1000, 2000)  # rows of each owner that a refit is fitted to
AIM = (0.48, 0.35)  # macro F1 in and out that we hoped for from a refit
AIM_OF_ONE_ROUND = (0.45, 0.32)  # and in one round without labels
AT_HOME = 1000  # rows that an owner's own classifier is fitted to
WITH_BIAS = ("regmean", "regmean_plus_plus")
RECIPE = Training(epochs=3, learning_rate=1e-4, batch_size=32)  # of the five models, without dropout
BRIEF = ("crowdflower", "emoevent")  # owners who train less, where owners change unequally
BRIEFLY = Training(epochs=1, learning_rate=2e-5, batch_size=32)

Metrics = dict[str, dict[str, float]]  # domain -> accuracy, macro_f1
Logits = Mapping[str, NDArray[np.float32]]  # domain -> (rows, labels)
Deltas = Callable[[], dict[str, Tensor]]


class Bench:
    """The base model and the test rows of all domains."""

    def __init__(self, data: Path, models: Path) -> None:
        self.data, self.models = data, models
        self.task = Task(labels=base_labels(models / "base"), max_tokens=64)
        self.base = load_base(models / "base", self.task, seed=0)
        self._rows = tempfile.TemporaryDirectory()
        write_first_rows(Path(self._rows.name), data, (*IN_DOMAIN, *OUT_OF_DOMAIN))
        self._domains = {name: self._private_data(name) for name in (*IN_DOMAIN, *OUT_OF_DOMAIN)}
        self.tests = {name: domain.test() for name, domain in self._domains.items()}
        self.allowed = {name: domain.label_set() for name, domain in self._domains.items()}
        self._features: dict[bytes, dict[str, NDArray[np.float32]]] = {}

    def _private_data(self, domain: str) -> PrivateData:
        files = Data(train=Path("train.jsonl"), validation=Path("dev.jsonl"), test=Path("test.jsonl"))
        tokenizer = load_tokenizer(self.models / "base")
        folder = Path(self._rows.name) / domain
        return PrivateData(
            data=files,
            task=self.task,
            model=self.base,
            tokenizer=tokenizer,
            folder=folder,
            seed=0,
            reading=Reading(),
        )

    def train_rows(self, domain: str) -> Rows:
        """The rows that the five models were trained on."""
        return self._domains[domain].train()

    def load(self, name: str) -> PreTrainedModel:
        return load_base(self.models / name, self.task, seed=0)

    def with_delta(self, layout: TensorLayout, vector: NDArray[np.float32]) -> PreTrainedModel:
        model = self.load("base")
        sent = {name: torch.from_numpy(np.array(tensor)) for name, tensor in layout.unflatten(vector)}
        delta = sent | {name.removeprefix(APPLIED): each for name, each in sent.items() if name.startswith(APPLIED)}
        add_delta(model, {name: delta.get(name, torch.zeros(())) for name, _ in model.named_parameters()})
        return model

    def logits(self, model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
        """By domain. Models that differ in the classifier alone share one pass."""
        tensors = (each for name, each in model.named_parameters() if not name.startswith("classifier."))
        body = hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in tensors)).digest()
        if body not in self._features:
            self._features[body] = {name: self.classifier_inputs(model, rows) for name, rows in self.tests.items()}
        with torch.no_grad():
            found = {name: model.classifier(torch.from_numpy(each)) for name, each in self._features[body].items()}
        return {name: each.numpy() for name, each in found.items()}

    @staticmethod
    def classifier_inputs(model: PreTrainedModel, rows: Rows) -> NDArray[np.float32]:
        """(rows, features), in the order of the rows."""
        classifier, model.classifier = model.classifier, torch.nn.Identity()
        features = predict_logits(model, rows, BATCH)
        model.classifier = classifier
        return features

    def judge(self, logits: Mapping[str, NDArray[np.float32]]) -> Metrics:
        return {name: self._metrics(self.score(name, each)) for name, each in logits.items()}

    def score(self, domain: str, logits: NDArray[np.float32]) -> Score:
        return score_logits(logits, self.tests[domain], self.task, self.allowed[domain])

    @staticmethod
    def _metrics(score: Score) -> dict[str, float]:
        return {"accuracy": score.main, "macro_f1": score.metric}


@contextmanager
def candidates_kept() -> Iterator[dict[str, tuple[TensorLayout, NDArray[np.float32]]]]:
    """Keep every merged candidate that a coordinator sends inside the `with` block, by name."""
    kept: dict[str, tuple[TensorLayout, NDArray[np.float32]]] = {}
    deliver = Coordinator.deliver

    def keep(
        self: Coordinator, delivery: Delivery, vector: NDArray[np.float32], model: str = "", nonces: bytes = b""
    ) -> None:
        if delivery.kind == "candidate":
            kept[model] = delivery.layout, vector.copy()
        deliver(self, delivery, vector, model, nonces)

    with patch.object(Coordinator, "deliver", keep):
        yield kept


def merged_by_the_product(bench: Bench, suffix: str = "", **consortium: Any) -> tuple[dict[str, Metrics], Report]:
    """Every candidate of one masked run, judged here on all domains, and the run's own report."""
    with tempfile.TemporaryDirectory() as folder, candidates_kept() as kept:
        write_consortium(Path(folder) / "consortium", bench.data, bench.models, **consortium)
        report = simulate(Path(folder) / "consortium", Path(folder) / "output", with_references=False)
        metrics = {}
        for name, (layout, vector) in kept.items():
            say(f"judging {name}{suffix}")
            metrics[name + suffix] = bench.judge(bench.logits(bench.with_delta(layout, vector)))
    _check_same(report, metrics, suffix)
    return metrics, report


def _check_same(report: Report, metrics: dict[str, Metrics], suffix: str) -> None:
    """Exit unless the product's report and this benchmark agree about the same models."""
    for owner, by_model in report.evaluation.by_owner.items():
        for method, chosen in report.chosen.items():
            here = metrics[chosen.candidate + suffix][owner]["macro_f1"]
            if abs(by_model[method].metric - here) > 1e-3:  # it travels in thousandths
                raise SystemExit(f"{method} at {owner}: {by_model[method].metric} in the report, {here} here")


def references(bench: Bench) -> dict[str, Metrics]:
    """Without any merge: the owners' models as they are, and an ensemble of all."""
    say("judging the base and the five models")
    found = {"base": bench.judge(bench.logits(bench.base))}
    by_owner = {name: bench.logits(bench.load(name)) for name in IN_DOMAIN}
    own = {name: bench.judge(logits) for name, logits in by_owner.items()}
    found["own at home"] = {name: own[name][name] for name in IN_DOMAIN}
    found["own elsewhere too"] = {
        domain: {
            metric: float(np.mean([own[name][domain][metric] for name in IN_DOMAIN]))
            for metric in ("accuracy", "macro_f1")
        }
        for domain in bench.tests
    }
    softmax = torch.nn.functional.softmax
    found["ensemble"] = bench.judge(
        {
            domain: np.mean(
                [softmax(torch.from_numpy(by_owner[name][domain]), -1).numpy() for name in IN_DOMAIN], axis=0
            )
            for domain in bench.tests
        }
    )
    return found


def multi_task(bench: Bench) -> dict[str, Metrics]:
    """One model fine-tuned on everybody's rows together. Takes half an hour."""
    model = bench.load("base")
    embeddings = model.get_input_embeddings()
    embeddings.requires_grad_(False)  # as when the five models were trained
    recipe = RECIPE.model_copy(update={"epochs": 1})
    fine_tune(model, pool([bench.train_rows(name) for name in IN_DOMAIN]), recipe, 0, "multi-task")
    return {"multi-task, one epoch": bench.judge(bench.logits(model))}


def textbook(bench: Bench) -> dict[str, Metrics]:
    return {"textbook RegMean, alpha 0.9": bench.judge(bench.logits(textbook_regmean(bench, alpha=0.9)))}


def added_to(gram: Tensor) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds the Gram matrix of what a layer is given."""

    def hook(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].flatten(end_dim=-2).double()
        gram.add_(rows.T @ rows)

    return hook


@torch.no_grad()
def textbook_regmean(bench: Bench, alpha: float) -> PreTrainedModel:
    """W = (sum G_i)^-1 sum G_i W_i for each linear layer, from explicit rows. The first attention and everything else
    is averaged by examples, as the product does. It uses nothing of the product's methods, sums or messages.
    """
    models = {name: bench.load(name) for name in IN_DOMAIN}
    merged = bench.load("base")
    left: dict[str, Any] = {}
    right: dict[str, Any] = {}
    examples: dict[str, int] = {}
    for name, model in models.items():
        rows = bench.train_rows(name)
        examples[name] = len(rows)
        measured = rows.take(np.random.default_rng(0).permutation(len(rows))[:500])
        linear = {
            key: module
            for key, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "layer.0.attention.self" not in key
        }
        grams = {key: torch.zeros(module.in_features, module.in_features).double() for key, module in linear.items()}
        hooks = [module.register_forward_pre_hook(added_to(grams[key])) for key, module in linear.items()]
        for index in range(len(measured)):  # one at a time: nothing is padded
            model(**measured.batch(np.array([index]))[0])
        for hook in hooks:
            hook.remove()
        for key, gram in grams.items():
            gram *= examples[name] / len(measured)
            shrunk = alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())
            left[key] = left.get(key, 0) + shrunk
            right[key] = right.get(key, 0) + shrunk @ linear[key].weight.double().T
    total = sum(examples.values())
    for key, parameter in merged.named_parameters():
        layer = key.removesuffix(".weight")
        if layer in left:
            parameter.copy_(torch.linalg.solve(left[layer], right[layer]).T)
        else:
            parameter.copy_(
                sum(examples[name] / total * dict(models[name].named_parameters())[key] for name in IN_DOMAIN)
            )
    return merged


def mean_over(metrics: Metrics, domains: tuple[str, ...], metric: str) -> float | None:
    values = [metrics[domain][metric] for domain in domains if domain in metrics]
    return float(np.mean(values)) if values else None


def run_methods(bench: Bench) -> dict[str, Any]:
    return _methods_of_one_run(bench, "", methods=METHODS)


def run_refit(bench: Bench) -> dict[str, Any]:
    return _methods_of_one_run(bench, "", methods=("refit",))


def run_refit_on_regmean(bench: Bench) -> dict[str, Any]:
    return _methods_of_one_run(bench, " on RegMean", methods=("refit",), body="regmean")


def run_bias(bench: Bench) -> dict[str, Any]:
    return _methods_of_one_run(bench, " + bias", methods=WITH_BIAS, bias_feature=True)


def run_pulls(bench: Bench) -> dict[str, Any]:
    """What data-free's ridge pulls to, and how strongly logits are adjusted: the formulas alone, without a sum.

    Macro F1 in and out, accuracy in and out, and by how much macro F1 in and out is above that of the first setting at
    strength 0, each with the standard error of this difference over bootstraps of the test rows.
    """
    models = {name: bench.load(name) for name in IN_DOMAIN}
    examples = {name: len(bench.train_rows(name)) for name in IN_DOMAIN}
    drawn = np.random.default_rng(0)
    logs = np.zeros(len(bench.task.labels))
    for name, model in models.items():
        rows = bench.train_rows(name)
        measured = rows.take(drawn.permutation(len(rows))[:500])
        logits = torch.from_numpy(predict_logits(model, measured, BATCH)).double()
        shares = logits.softmax(1).mean(0).numpy()
        logs += examples[name] / sum(examples.values()) * np.log(shares + 0.01 / len(shares))
    found: dict[str, Any] = {}
    first: dict[str, NDArray[np.float32]] = {}
    for ridge, pull in PULLS:
        say(f"judging data_free with ridge {ridge} and pull {pull}")
        logits_of = bench.logits(formulas.data_free(bench.load("base"), models, examples, ridge, pull))
        first = first or logits_of
        found[f"{ridge} {pull}"] = {}
        for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
            adjusted = {domain: (each - strength * logs).astype(np.float32) for domain, each in logits_of.items()}
            metrics = bench.judge(adjusted)
            found[f"{ridge} {pull}"][str(strength)] = [
                *_in_and_out(metrics),
                *_in_and_out(metrics, "accuracy"),
                *difference(bench, adjusted, first, IN_DOMAIN),
                *difference(bench, adjusted, first, OUT_OF_DOMAIN),
            ]
    return found


def difference(
    bench: Bench, one: Logits, other: Logits, domains: tuple[str, ...], draws: int = 200
) -> tuple[float, float]:
    """By how much macro F1 of one model is above the other's, in the mean, and the standard error of this: both are
    judged on the same bootstrapped test rows.
    """
    random = np.random.default_rng(0)
    gains = np.zeros(draws)
    for domain in domains:
        targets, allowed = np.array(bench.tests[domain].targets, dtype=np.int64), bench.allowed[domain]
        predicted = [allowed[each[domain][:, allowed].argmax(1)] for each in (one, other)]
        for draw in range(draws):
            rows = random.integers(0, len(targets), len(targets))
            ours, theirs = (macro_f1(targets[rows], each[rows]) for each in predicted)
            gains[draw] += (ours - theirs) / len(domains)
    return float(gains.mean()), float(gains.std())


def macro_f1(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """The mean of 2 TP / (2 TP + FP + FN) over the labels that occur in `targets`."""
    labels = int(max(targets.max(), predicted.max())) + 1
    right, wanted, found = (
        np.bincount(each, minlength=labels) for each in (targets[targets == predicted], targets, predicted)
    )
    occurs = wanted > 0
    return float(np.mean(2 * right[occurs] / (wanted + found)[occurs]))


def run_draws(bench: Bench) -> dict[str, Any]:
    """Three draws of the rows that logit adjustment and refit measure, on two data-free bodies: the formulas alone."""
    models = {name: bench.load(name) for name in IN_DOMAIN}
    examples = {name: len(bench.train_rows(name)) for name in IN_DOMAIN}
    found: dict[str, list[list[float | None]]] = {}
    for ridge, pull in (PULLS[0], PULLS[-1]):
        body = formulas.data_free(bench.load("base"), models, examples, ridge, pull)
        logits_of = bench.logits(body)
        for seed in range(3):
            say(f"drawing rows for ridge {ridge} and pull {pull}: seed {seed}")
            logs, left, right = np.zeros(len(bench.task.labels)), torch.zeros(()), torch.zeros(())
            for number, (name, model) in enumerate(models.items()):
                rows = bench.train_rows(name)
                measured = rows.take(np.random.default_rng([seed, number]).permutation(len(rows))[:MEASURED])
                shares = torch.from_numpy(predict_logits(model, measured, BATCH)).double().softmax(1).mean(0).numpy()
                logs += examples[name] / sum(examples.values()) * np.log(shares + 0.01 / len(shares))
                gram, products = _refit_sums(bench.classifier_inputs(body, measured), measured, len(shares))
                left, right = left + examples[name] * gram, right + examples[name] * products
            found.setdefault(f"data_free {ridge} {pull}", []).append(_four(bench.judge(logits_of)))
            for strength in (0.5, 1.0):
                adjusted = {domain: (each - strength * logs).astype(np.float32) for domain, each in logits_of.items()}
                found.setdefault(f"logit_adjusted@{strength} {ridge} {pull}", []).append(_four(bench.judge(adjusted)))
            fitted = torch.linalg.solve(left, right)  # (features and 1, labels)
            with torch.no_grad():
                body.classifier.weight.copy_(fitted[:-1].T)
                body.classifier.bias.copy_(fitted[-1])
            found.setdefault(f"refit {ridge} {pull}", []).append(_four(bench.judge(bench.logits(body))))
    return found


def run_without_rows(bench: Bench) -> dict[str, Any]:
    """Methods that read no row: the formulas alone. Each with its gain over data_free, as in `difference`."""
    models, shares, base = _owners(bench)
    others = {
        **{f"isotropic@{scale}": partial(formulas.isotropic_deltas, models, base, scale) for scale in SCALES},
        "model_stock": partial(formulas.model_stock_deltas, models, base),
    }
    return _beside_data_free(bench, models, others | _ace(models, shares, base))


def run_unequal(bench: Bench) -> dict[str, Any]:
    """What ACE is made for: owners who changed unequally. BRIEF owners are trained anew, by BRIEFLY; formulas alone."""
    models, shares, base = _owners(bench)
    for name in BRIEF:
        models[name] = _fine_tuned(bench, base, name, 0, BRIEFLY)
    changes = [formulas.deltas_of(models, base, name) for name in dict(base.named_parameters())]
    norms = {name: sum(float(each[name].square().sum()) for each in changes) ** 0.5 for name in models}
    say(f"norms of the changes: {norms}")
    own = bench.judge({name: predict_logits(model, bench.tests[name], BATCH) for name, model in models.items()})
    mean = partial(formulas.mean_deltas, models, shares, base)
    found = _beside_data_free(bench, models, {"average": mean} | _ace(models, shares, base))
    return {"own at home": _four(own), "norms": norms, "merges": found}


def _ace(models: formulas.Models, shares: formulas.Shares, base: PreTrainedModel) -> dict[str, Deltas]:
    return {
        f"data_free, {name}": partial(formulas.ace_deltas, models, shares, base, is_fair=fair, is_centred=centred)
        for name, fair, centred in (
            ("a fair ridge", True, False),
            ("centred changes", False, True),
            ("both (ACE)", True, True),
        )
    }


def _beside_data_free(bench: Bench, models: formulas.Models, others: Mapping[str, Deltas]) -> dict[str, Any]:
    """The data-free merge, and the others with their gain over it."""
    data_free = partial(formulas.data_free_deltas, models, _shares(bench), bench.load("base"))
    merges: dict[str, Deltas] = {"data_free": data_free, **others}
    found: dict[str, Any] = {}
    first: Logits = {}
    for name, deltas in merges.items():
        logits = bench.logits(formulas.at_deltas(bench.load("base"), deltas()))
        first = first or logits
        found[name] = _judged(bench, name, logits, first)
    return found


def run_drawn(bench: Bench) -> dict[str, Any]:
    """Three draws of the rows that are measured, for the methods that are solved with Gram matrices: formulas alone.

    By method: macro F1 in and out, accuracy in and out, and the gain over data_free, for each draw.
    """
    models, shares, base = _owners(bench)
    mean, data_free = (make(models, shares, base) for make in (formulas.mean_deltas, formulas.data_free_deltas))
    start = mean | {name: data_free[name] for name in mean if name in ONE_ROW}
    first = bench.logits(formulas.at_deltas(bench.load("base"), data_free))
    found: dict[str, Any] = {"data_free": [_judged(bench, "data_free", first, first)]}
    for seed in range(3):
        rows = {name: _measured(bench, name, number, seed) for number, name in enumerate(models)}
        grams = {name: formulas.grams(models[name], rows[name]) for name in models}
        for name, (held_to, anchor) in {"regmean@0.9": (start, 0.0), "anchored@0.5": (data_free, 0.5)}.items():
            deltas = formulas.regmean_deltas(models, shares, base, grams, 0.9, held_to, anchor)
            logits = bench.logits(formulas.at_deltas(bench.load("base"), deltas))
            found.setdefault(name, []).append(_judged(bench, f"{name}, draw {seed}", logits, first))
        found.setdefault("regmean_plus_plus", []).append(
            _stepwise(bench, f"regmean_plus_plus, draw {seed}", rows, start, mean, formulas.Stepwise(), first)
        )
    return found


def run_one_row(bench: Bench) -> dict[str, Any]:
    """RegMean with the Grams of layers that see one row an example, and without: the formulas alone, three draws."""
    models, shares, base = _owners(bench)
    mean, data_free = (make(models, shares, base) for make in (formulas.mean_deltas, formulas.data_free_deltas))
    start = mean | {name: data_free[name] for name in mean if name in ONE_ROW}
    first = bench.logits(formulas.at_deltas(bench.load("base"), data_free))
    found: dict[str, Any] = {}
    for seed in range(3):
        rows = {name: _measured(bench, name, number, seed) for number, name in enumerate(models)}
        for name, with_one_row in {"without": False, "with": True}.items():
            grams = {owner: formulas.grams(models[owner], rows[owner], with_one_row=with_one_row) for owner in models}
            deltas = formulas.regmean_deltas(models, shares, base, grams, 0.9, mean if with_one_row else start)
            logits = bench.logits(formulas.at_deltas(bench.load("base"), deltas))
            row = f"regmean@0.9, {name} Grams of pooler and classifier"
            found.setdefault(row, []).append(_judged(bench, f"{row}, draw {seed}", logits, first))
    return found


def run_refits(bench: Bench) -> dict[str, Any]:
    """What a refit could also be fitted to: the owners' own scores, or a body that serves other domains better."""
    models, shares, base = _owners(bench)
    rows = {name: _measured(bench, name, number, 0, max(LIMITS)) for number, name in enumerate(models)}
    labels = len(bench.task.labels)
    found: dict[str, Any] = {}
    first: Logits = {}
    for ridge, pull in (PULLS[0], PULLS[-1]):
        body = formulas.at_deltas(bench.load("base"), formulas.data_free_deltas(models, shares, base, ridge, pull))
        tests, features = _features(bench, body, bench.tests), _features(bench, body, rows)
        first = first or bench.logits(body)
        named_body = f"on data_free {ridge} {'mean' if pull is None else pull}"
        to_labels = _fitted(*_refit_system(features, rows, shares, labels), tests)
        found[f"refit {named_body}"] = [_judged(bench, f"refit {named_body}", to_labels, first)]
        scores = {name: predict_logits(models[name], rows[name], BATCH) for name in models}
        to_scores = _fitted(*_score_system(features, rows, shares, scores, base), tests)
        found[f"refit to scores {named_body}"] = [_judged(bench, f"refit to scores {named_body}", to_scores, first)]
    return found


def _score_system(
    features: Mapping[str, NDArray[np.float32]],
    rows: Mapping[str, Rows],
    shares: Mapping[str, float],
    scores: Mapping[str, NDArray[np.float32]],
    base: PreTrainedModel,
) -> tuple[Tensor, Tensor]:
    """The system of refit.targets = "scores", balance 0.5, whose ridge pulls to the base's classifier."""
    start = (
        torch.cat([base.classifier.weight.T, base.classifier.bias[None]]).detach().double()
    )  # (features and 1, labels)
    left, right = torch.zeros(()), torch.zeros(())
    for name, each in rows.items():
        fed = torch.from_numpy(np.c_[features[name], np.ones(len(each))])  # (rows, features and 1) float64
        weighted = (class_weights(torch.tensor(np.array(each.targets)), 0.5)[:, None] / len(each) * fed).T
        gram = weighted @ fed
        ridge = 1e-2 * gram.diagonal().mean()
        gram.diagonal().add_(ridge)
        left = left + shares[name] * gram
        right = right + shares[name] * (weighted @ torch.from_numpy(scores[name]).double() + ridge * start)
    return left, right


def run_featcal(bench: Bench) -> dict[str, Any]:
    """FeatCal's targets and anchor in RegMean++: the formulas alone, each for draws of the measured rows."""
    models, shares, base = _owners(bench)
    mean, data_free = (make(models, shares, base) for make in (formulas.mean_deltas, formulas.data_free_deltas))
    first = bench.logits(formulas.at_deltas(bench.load("base"), data_free))
    found: dict[str, Any] = {}
    for name, how, held_to, seeds in FEATCALS:
        for seed in range(seeds):
            rows = {each: _measured(bench, each, number, seed) for number, each in enumerate(models)}
            target = data_free if held_to == "data_free" else mean
            each = _stepwise(bench, f"{name}, draw {seed}", rows, data_free, target, how, first)
            found.setdefault(name, []).append(each)
    return found


def _stepwise(
    bench: Bench,
    name: str,
    rows: Mapping[str, Rows],
    start: Mapping[str, Tensor],
    held_to: Mapping[str, Tensor],
    how: formulas.Stepwise,
    first: Logits,
) -> list[Any]:
    models, shares, base = _owners(bench)
    measured = {f"{layer}.weight" for layer in formulas.measured_layers(base)}
    others = {each: delta for each, delta in start.items() if each not in measured}
    merged = formulas.at_deltas(bench.load("base"), others)
    formulas.stepwise_deltas(models, shares, base, merged, rows, held_to, how)
    return _judged(bench, name, bench.logits(merged), first)


def _owners(bench: Bench) -> tuple[dict[str, PreTrainedModel], dict[str, float], PreTrainedModel]:
    """The owners' models, their shares of all examples, and the base."""
    return {name: bench.load(name) for name in IN_DOMAIN}, _shares(bench), bench.load("base")


def _shares(bench: Bench) -> dict[str, float]:
    """Of all examples, by owner."""
    examples = {name: len(bench.train_rows(name)) for name in IN_DOMAIN}
    return {name: count / sum(examples.values()) for name, count in examples.items()}


def _measured(bench: Bench, owner: str, number: int, seed: int, count: int = MEASURED) -> Rows:
    rows = bench.train_rows(owner)
    return rows.take(np.random.default_rng([seed, number]).permutation(len(rows))[:count])


def _judged(bench: Bench, name: str, logits: Logits, first: Logits) -> list[Any]:
    """Macro F1 in and out, accuracy in and out, gain over `first` in and out."""
    gains = [difference(bench, logits, first, domains) for domains in (IN_DOMAIN, OUT_OF_DOMAIN)]
    found = [*_four(bench.judge(logits)), *gains]
    say(f"{name}: {found}")
    return found


def run_start(bench: Bench, seed: int) -> dict[str, Any]:
    """Five models by the recipe of the five, from another head of the base; merged by the formulas alone.

    By model: macro F1 in and out, accuracy in and out. Takes half an hour.
    """
    base = bench.load("base")
    torch.manual_seed(seed)
    torch.nn.init.normal_(base.classifier.weight, std=base.config.initializer_range)
    torch.nn.init.zeros_(base.classifier.bias)
    models = {name: _fine_tuned(bench, base, name, seed) for name in IN_DOMAIN}
    shares = _shares(bench)
    rows = {name: _measured(bench, name, number, seed) for number, name in enumerate(models)}
    own = {name: bench.judge(bench.logits(model)) for name, model in models.items()}
    found: dict[str, Any] = {"own at home": _four({name: own[name][name] for name in IN_DOMAIN})}

    mean, data_free = (make(models, shares, base) for make in (formulas.mean_deltas, formulas.data_free_deltas))
    start = mean | {name: data_free[name] for name in mean if name in ONE_ROW}
    grams = {name: formulas.grams(models[name], rows[name]) for name in models}
    body = formulas.at_deltas(deepcopy(base), data_free)
    for name, deltas in {
        "average": mean,
        "data_free": data_free,
        "regmean@0.9": formulas.regmean_deltas(models, shares, base, grams, 0.9, start),
    }.items():
        found[name] = _four(bench.judge(bench.logits(formulas.at_deltas(deepcopy(base), deltas))))
    system = _refit_system(_features(bench, body, rows), rows, shares, len(bench.task.labels))
    found["refit"] = _four(bench.judge(_fitted(*system, _features(bench, body, bench.tests))))
    say(f"start {seed}: {found}")
    return found


def _fine_tuned(
    bench: Bench, base: PreTrainedModel, domain: str, seed: int, recipe: Training = RECIPE
) -> PreTrainedModel:
    model = deepcopy(base)
    model.base_model.embeddings.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    fine_tune(model, bench.train_rows(domain), recipe, seed, domain)
    say(f"fine-tuned {domain} from start {seed}")
    return model


def run_limits(bench: Bench) -> dict[str, Any]:
    """What limits a merge: its classifier, its encoder or its rows? The formulas alone, on the body of data_free.

    `refit`: the classifier fitted to LIMITS rows of each owner, three draws; `balance`: to MEASURED rows. `at home`: a
    classifier for each owner, fitted to AT_HOME rows, on the merged body and on the owner's own; macro F1 and accuracy
    on its own test rows.
    """
    models, shares, base = _owners(bench)
    body = formulas.at_deltas(bench.load("base"), formulas.data_free_deltas(models, shares, base))
    tests, labels = _features(bench, body, bench.tests), len(bench.task.labels)
    rows = {name: _measured(bench, name, number, 0, max(LIMITS)) for number, name in enumerate(models)}
    features = _features(bench, body, rows)

    def refitted(count: int, balance: float, seed: int) -> list[float | None]:
        chosen = {
            name: np.random.default_rng([seed, number]).permutation(len(rows[name]))[:count]
            for number, name in enumerate(models)
        }
        fed = {name: features[name][some] for name, some in chosen.items()}
        measured = {name: rows[name].take(some) for name, some in chosen.items()}
        judged = _four(bench.judge(_fitted(*_refit_system(fed, measured, shares, labels, balance), tests)))
        say(f"refit on {count} rows, balance {balance}: {judged}")
        return judged

    found: dict[str, Any] = {
        "refit": {
            str(count): [refitted(count, 0.5, seed) for seed in range(3 if 2 * count <= max(LIMITS) else 1)]
            for count in LIMITS
        },
        "balance": {str(each): [refitted(MEASURED, each, seed) for seed in range(3)] for each in (0.0, 0.5, 1.0)},
        "at home": {},
    }
    for name in models:
        few = rows[name].take(np.arange(AT_HOME))
        own = _features(bench, models[name], {"train": few, name: bench.tests[name]})
        judged = {
            of: bench.judge(_fitted(*_refit_sums(train, few, labels), {name: test}))[name]
            for of, (train, test) in {
                "merged": (features[name][:AT_HOME], tests[name]),
                "own": (own["train"], own[name]),
            }.items()
        }
        say(f"{name}: {judged}")
        found["at home"][name] = judged
    return found


def _features(bench: Bench, model: PreTrainedModel, rows: Mapping[str, Rows]) -> dict[str, NDArray[np.float32]]:
    return {name: bench.classifier_inputs(model, each) for name, each in rows.items()}


def _fitted(left: Tensor, right: Tensor, features: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Logits of the classifier that solves this system, on the features of each domain."""
    weights = torch.linalg.solve(left, right).numpy()  # (features and 1, labels)
    return {name: (each @ weights[:-1] + weights[-1]).astype(np.float32) for name, each in features.items()}


def _refit_system(
    features: Mapping[str, NDArray[np.float32]],
    rows: Mapping[str, Rows],
    shares: Mapping[str, float],
    labels: int,
    balance: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The system of common/merge_methods/refit.py, for all owners' rows: each owner counts by its share of examples."""
    left, right = torch.zeros(()), torch.zeros(())
    for name, each in rows.items():
        gram, products = _refit_sums(features[name], each, labels, balance)
        left, right = left + shares[name] * gram, right + shares[name] * products
    return left, right


def _refit_sums(features: NDArray[np.float32], rows: Rows, labels: int, balance: float = 0.5) -> tuple[Tensor, Tensor]:
    """What one owner's rows add to the system of common/merge_methods/refit.py, per row."""
    fed = torch.from_numpy(np.c_[features, np.ones(len(features))])  # (rows, features and 1) float64
    targets = torch.tensor(np.array(rows.targets))
    weights = class_weights(targets, balance)[:, None] / len(targets)
    gram = (weights * fed).T @ fed
    gram.diagonal().add_(1e-2 * gram.diagonal().mean())
    return gram, (weights * fed).T @ (torch.nn.functional.one_hot(targets, labels).double() - 1 / labels)


def _four(metrics: Metrics) -> list[float | None]:
    """Macro F1 in and out, accuracy in and out."""
    return _in_and_out(metrics) + _in_and_out(metrics, "accuracy")


def _in_and_out(metrics: Metrics, metric: str = "macro_f1") -> list[float | None]:
    return [mean_over(metrics, domains, metric) for domains in (IN_DOMAIN, OUT_OF_DOMAIN)]


def run_blocks(bench: Bench) -> dict[str, Any]:
    """RegMean with the widest layers (1536 inputs) whole, in two blocks, and in four, the others (384 inputs) whole."""
    found: dict[str, Any] = {}
    for largest in (1536, 768, 384):
        metrics, report = merged_by_the_product(bench, methods=("regmean",), alphas=(0.9,), largest_gram=largest)
        both = [mean_over(metrics["regmean"], domains, "macro_f1") for domains in (IN_DOMAIN, OUT_OF_DOMAIN)]
        found[str(largest)] = {"macro_f1": both, "numbers": report.rounds[0].numbers}
    return found


def _methods_of_one_run(bench: Bench, suffix: str, **consortium: Any) -> dict[str, Any]:
    metrics, report = merged_by_the_product(bench, suffix, **consortium)
    chosen = [choice.candidate + suffix for choice in report.chosen.values()]
    return {"metrics": metrics, "chosen": chosen, "seconds": report.seconds, "versions": report.versions}


def run_owners(bench: Bench) -> dict[str, Any]:
    """The first 2, 3, 4 and 5 owners, judged on the domains of those that take part."""
    found: dict[str, Any] = {}
    for count in range(2, len(IN_DOMAIN) + 1):
        owners = IN_DOMAIN[:count]
        methods = ("regmean", "average", "data_free", "refit")
        _, report = merged_by_the_product(bench, methods=methods, alphas=(0.9,), owners=owners)
        mean = report.evaluation.mean
        found[str(count)] = {model: mean[model].metric for model in ("own_at_home", *methods)}
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "references": references,
    "multi_task": multi_task,
    "textbook": textbook,
    "methods": run_methods,
    "bias": run_bias,
    "refit": run_refit,
    "refit_on_regmean": run_refit_on_regmean,
    "owners": run_owners,
    "blocks": run_blocks,
    "pulls": run_pulls,
    "draws": run_draws,
    "without_rows": run_without_rows,
    "unequal": run_unequal,
    "drawn": run_drawn,
    "one_row": run_one_row,
    "refits": run_refits,
    "featcal": run_featcal,
    "limits": run_limits,
    "start 1": partial(run_start, seed=1),
    "start 2": partial(run_start, seed=2),
}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    bench = Bench(arguments.data, arguments.models)
    for part in arguments.only.split(","):
        results = published("quality") | {part: PARTS[part](bench)}  # because the parts may be run one by one
        publish("quality", results, as_markdown(results), everything)
    draw(results, RESULTS / "quality.svg")
    if "limits" in results:
        draw_limits(results, RESULTS / "limits.svg")
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


def rows_of_table(results: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """(name, macro F1 in, out, accuracy in, out). Bold: what the owners' validation examples chose."""
    merged = [results[part] for part in ("methods", "bias", "refit_on_regmean", "refit") if part in results]
    chosen = {name for part in merged for name in part["chosen"]}
    found = results.get("references", {}) | results.get("multi_task", {}) | results.get("textbook", {})
    for part in merged:
        found |= part["metrics"]
    rows = []
    for name, metrics in found.items():
        values = [
            mean_over(metrics, domains, metric)
            for metric in ("macro_f1", "accuracy")
            for domains in (IN_DOMAIN, OUT_OF_DOMAIN)
        ]
        rows.append((f"**{name}**" if name in chosen else name, values))
    return rows


def as_markdown(results: dict[str, Any]) -> str:
    lines = ["# Five emotion models merged, on the owners' domains and on five others", ""]
    lines += ["Means over five domains each. **Bold**: what the owners' validation examples chose. Made by", ""]
    lines += ["    python -m benchmarks.quality --data DATA --models MODELS", ""]
    lines += ["| model | macro F1 in | out | accuracy in | out |", "|---|---|---|---|---|"]
    for name, values in rows_of_table(results):
        lines.append(f"| {name} | " + " | ".join("-" if value is None else f"{value:.3f}" for value in values) + " |")
    if "draws" in results:
        lines += [
            "",
            f"`logit_adjusted` by strength and `refit`, on `data_free` of this ridge and pull: mean and range of three "
            f"draws of the {MEASURED} rows of each owner that they measure, from the formulas alone:",
            "",
            "| model | macro F1 in | out | accuracy in | out |",
            "|---|---|---|---|---|",
        ]
        for name, draws in results["draws"].items():
            shown = name.replace("None", "mean")
            lines.append(f"| {shown} | " + " | ".join(map(spread, zip(*draws, strict=True))) + " |")
    for part in (drawn_as_markdown, unequal_as_markdown, starts_as_markdown, limits_as_markdown):
        lines += part(results)
    if "owners" in results:
        lines += ["", "The first N owners, on their own domains (macro F1):", ""]
        models = list(next(iter(results["owners"].values())))
        lines += ["| N | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
        for count, metrics in results["owners"].items():
            lines.append(f"| {count} | " + " | ".join(f"{metrics[model]:.3f}" for model in models) + " |")
    if "blocks" in results:
        lines += [
            "",
            "RegMean at alpha 0.9, with Grams in blocks of at most this many inputs (`regmean.largest_gram`):",
            "",
        ]
        lines += ["| inputs | macro F1 in | out | numbers that an owner sends |", "|---|---|---|---|"]
        for largest, found in results["blocks"].items():
            inside, outside = found["macro_f1"]
            lines.append(f"| {largest} | {inside:.3f} | {outside:.3f} | {found['numbers']:,} |")
    if "pulls" in results:
        lines += [
            "",
            "`data_free` by its ridge and what it pulls to (`pull` times the sum of changes), and `logit_adjusted` on "
            "it by strength, from the formulas alone. Macro F1 in / out; in brackets, accuracy in / out:",
            "",
            "| ridge | pull | data_free | strength 0.25 | 0.5 | 0.75 | 1 |",
            "|---|---|---|---|---|---|---|",
        ]
        for setting, found in results["pulls"].items():
            shown = ["{:.3f} / {:.3f} ({:.3f} / {:.3f})".format(*each[:4]) for each in found.values()]
            lines.append(f"| {named(setting)} | " + " | ".join(shown) + " |")
        lines += [
            "",
            "The same, as the gain in macro F1 over the first of these, with its standard error over bootstraps of the "
            "test rows:",
            "",
            "| ridge | pull | data_free | strength 0.25 | 0.5 | 0.75 | 1 |",
            "|---|---|---|---|---|---|---|",
        ]
        for setting, found in results["pulls"].items():
            shown = ["{:+.3f} ± {:.3f} / {:+.3f} ± {:.3f}".format(*each[4:]) for each in found.values()]
            lines.append(f"| {named(setting)} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def drawn_as_markdown(results: dict[str, Any]) -> list[str]:
    """The methods that were tried by their formulas, one row each."""
    found = {name: [judged] for name, judged in results.get("without_rows", {}).items()}
    for part in ("drawn", "one_row", "featcal", "refits"):
        found |= results.get(part, {})
    if not found:
        return []
    lines = [
        "",
        f"Other methods, from the formulas alone, on {MEASURED} rows of each owner, refits on {max(LIMITS)}: mean and "
        "range over the draws of these rows, and the gain over data_free in macro F1, in / out: mean and standard "
        "error over bootstraps of the test rows:",
        "",
        "| model | draws | macro F1 in | out | accuracy in | out | gain |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [_gained(name, draws) for name, draws in found.items()]


def _gained(name: str, draws: list[list[Any]]) -> str:
    """One row of a table: `draws` are those of `_judged`."""
    *values, inside, outside = zip(*draws, strict=True)
    gain = " / ".join("{:+.3f} ± {:.3f}".format(*np.mean(each, axis=0)) for each in (inside, outside))
    return f"| {name} | {len(draws)} | " + " | ".join(map(spread, values)) + f" | {gain} |"


def unequal_as_markdown(results: dict[str, Any]) -> list[str]:
    """Owners who changed unequally."""
    if "unequal" not in results:
        return []
    norms, (inside, _, accuracy, _) = results["unequal"]["norms"], results["unequal"]["own at home"]
    return [
        "",
        f"The same five, but {' and '.join(BRIEF)} trained for {BRIEFLY.epochs} epoch at a learning rate of "
        f"{BRIEFLY.learning_rate:g}, so that owners change unequally: norms of "
        f"{', '.join(f'{norm:.1f} ({name})' for name, norm in norms.items())}. Own at home: {inside:.3f}, accuracy "
        f"{accuracy:.3f}. From the formulas alone:",
        "",
        "| model | draws | macro F1 in | out | accuracy in | out | gain |",
        "|---|---|---|---|---|---|---|",
        *(_gained(name, [judged]) for name, judged in results["unequal"]["merges"].items()),
    ]


def starts_as_markdown(results: dict[str, Any]) -> list[str]:
    """The same recipe from other heads of the base."""
    starts = {part: found for part, found in results.items() if part.startswith("start ")}
    if not starts:
        return []
    lines = ["", "Five other models by the same recipe, from another head of the base, by the formulas alone:", ""]
    lines += ["| start | model | macro F1 in | out | accuracy in | out |", "|---|---|---|---|---|---|"]
    for start, found in starts.items():
        for name, values in found.items():
            shown = " | ".join("-" if value is None else f"{value:.3f}" for value in values)
            lines.append(f"| {start.removeprefix('start ')} | {name} | {shown} |")
    return lines


def limits_as_markdown(results: dict[str, Any]) -> list[str]:
    """How far labels take the merged body, and what a classifier of its own makes of it at each owner."""
    if "limits" not in results:
        return []
    lines = ["", "A classifier refitted on the body of `data_free`, by the rows that each owner measures:", ""]
    lines += ["| rows | draws | macro F1 in | out | accuracy in | out |", "|---|---|---|---|---|---|"]
    for rows, draws in results["limits"]["refit"].items():
        lines.append(f"| {rows} | {len(draws)} | " + " | ".join(map(spread, zip(*draws, strict=True))) + " |")
    lines += ["", f"The same on {MEASURED} rows, by `refit.balances`:", ""]
    lines += ["| balance | draws | macro F1 in | out | accuracy in | out |", "|---|---|---|---|---|---|"]
    for balance, draws in results["limits"]["balance"].items():
        lines.append(f"| {balance} | {len(draws)} | " + " | ".join(map(spread, zip(*draws, strict=True))) + " |")
    lines += ["", f"A classifier for each owner, fitted to {AT_HOME} of its own rows, on its own test rows:", ""]
    lines += ["| owner | macro F1 on the merged body | on its own | accuracy on the merged body | on its own |"]
    lines += ["|---|---|---|---|---|"]
    rows_of = {
        owner: [each[body][metric] for metric in ("macro_f1", "accuracy") for body in ("merged", "own")]
        for owner, each in results["limits"]["at home"].items()
    }
    for owner, values in (*rows_of.items(), ("mean", np.mean(list(rows_of.values()), axis=0))):
        lines.append(f"| {owner} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return lines


def named(setting: str) -> str:
    """The ridge and pull of a row."""
    return setting.replace(" ", " | ").replace("None", "the mean")


def spread(values: tuple[float, ...]) -> str:
    """The mean of some draws, and their range if they differ."""
    mean, low, high = sum(values) / len(values), min(values), max(values)
    return f"{mean:.3f}" if high - low < 0.0005 else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def draw(results: dict[str, Any], path: Path) -> None:
    """Macro F1 in domain against out of domain, one point per model."""
    mpl.rcParams["svg.hashsalt"] = "amalgram"  # the same numbers give the same file
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    shown = [
        (inside, outside, name)
        for name, (inside, outside, *_) in rows_of_table(results)
        if inside is not None and outside is not None and (name.startswith("**") or "@" not in name)
        if "bias" not in name and "textbook" not in name  # the same point as RegMean
    ]
    for number, (inside, outside, name) in enumerate(sorted(shown)):  # neighbours have their names on opposite sides
        axes.scatter(inside, outside, s=28, color="#0b6fb8" if name.startswith("**") else "#888888")
        offset, side = ((6, -3), "left") if number % 2 else ((-6, -3), "right")
        axes.annotate(
            name.strip("*"), (inside, outside), xytext=offset, textcoords="offset points", ha=side, fontsize=8
        )
    axes.margins(x=0.2, y=0.08)
    axes.set(xlabel="macro F1 on the owners' domains", ylabel="macro F1 on five other domains")
    figure.savefig(path, metadata={"Date": None})


def draw_limits(results: dict[str, Any], path: Path) -> None:
    """Macro F1 of a refit by the rows that it is fitted to, beside what needs no label or all models or data."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    judged = {name.strip("*"): values for name, values in rows_of_table(results)}
    lines = {"data-free": "data_free@1.0", "multi-task": "multi-task, one epoch", "ensemble": "ensemble"}
    adjusted = results["pulls"]["1.0 1.0"]["0.5"]
    for side, (axes, place) in enumerate(zip(panels, ("the owners' domains", "five other domains"), strict=True)):
        rows = [int(count) for count in results["limits"]["refit"]]
        draws = [[draw[side] for draw in each] for each in results["limits"]["refit"].values()]
        means = [float(np.mean(each)) for each in draws]
        axes.plot(rows, means, color="#0b6fb8", marker="o", label="refit")
        axes.fill_between(
            rows, [min(each) for each in draws], [max(each) for each in draws], color="#0b6fb8", alpha=0.2
        )
        levels = {name: judged[model][side] for name, model in lines.items()} | {"logit-adjusted": adjusted[side]}
        for style, (name, level) in zip((":", "-", "--", "-."), levels.items(), strict=True):
            axes.axhline(level, color="#666666", linestyle=style, linewidth=1, label=name)
        axes.axhline(AIM[side], color="#c0392b", linewidth=1, label="aim of a refit")
        axes.axhline(AIM_OF_ONE_ROUND[side], color="#c0392b", linestyle=":", linewidth=1, label="aim of one round")
        axes.set(xscale="log", xlabel="rows with labels, for each owner", ylabel=f"macro F1 on {place}")
    panels[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
