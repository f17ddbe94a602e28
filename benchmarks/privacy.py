"""What noise costs, and what it takes from an attacker: metrics and attacks against epsilon, at owners of any size.

python -m benchmarks.privacy --data DATA --base BASE [--rows 1000,3950,19950] [--epsilons 1,2,4,8,none] [--seeds 3,1,1]

DATA has one folder per domain with {train,test}.jsonl (`text`, `label`), as for benchmarks.emotion. BASE is a Hugging
Face encoder with a head for the labels, which all owners start from. The encoder is frozen: an agreement with
merge.layers = ["classifier"]. Three owners train that classifier, by DP-SGD for each epsilon and as usual for `none`;
of 19,950 rows there is one owner, with all three domains. Everything that an owner does is the product's: training,
what it adds to a sum, the solve, the attacks. Only the classifier's inputs are computed once for all runs, and sums are
plain. Writes benchmarks/results/privacy.{json,md,svg}.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil, log
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from sklearn.metrics import f1_score
from torch import Tensor, nn

from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import RESULTS, publish, say
from client.audit.scores import gradient_scores, predict
from client.audit.statistics import area_under_the_curve, true_positive_rate
from client.data.rows import Rows
from client.measurement.fine_tuning import fine_tune
from client.measurement.gram import bounded_rows
from client.measurement.private_training import Classifier, fine_tune_privately
from client.settings import Training
from common.merge_methods import METHODS, contribution, contribution_layout
from common.merge_methods.anchored import AnchoredTable
from common.merge_methods.method import SingleRoundMethod
from common.merge_methods.refit import REFIT, RefitTable
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.terms import (
    ClassifierTerms,
    Gram,
    GramNoise,
    MergeBounds,
    MergeSettings,
    OwnerTerms,
    RefitNoise,
)
from common.models.plan import MergePlan, PlannedTensors, merge_plan
from common.privacy.gaussian import mu_of
from common.privacy.noise import Noise, fresh_secret
from common.summation import fixed_point
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout

OWNERS = ("isear", "crowdflower", "goemotions")
MAX_TOKENS, TEST_ROWS, AUDITED, DELTA = 32, 600, 600, 1e-5
# Found on 1,000 and 4,000 rows of these owners: the more steps and the higher the rate, the better, up to here.
TRAINING = {"epochs": 60, "learning_rate": 2e-2, "schedule": "linear"}
METRICS, REFITTED, GRAMS = 0.1, 0.4, 0.3  # shares of the budget: the product's
COLOURS = {"own": "#4269d0", "average": "#efb118", "data_free": "#6cc5b0", "anchored": "#97bbf5", "refit": "#ff725c"}
METHOD_NAMES = ("average", "data_free", "regmean", "anchored", "refit")


# --- owners ---


def inputs_of(base: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """The classifier's inputs, (rows, d_in)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForSequenceClassification.from_pretrained(base)
    model.eval()
    fed: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, given: fed.append(given[0]))
    found = np.zeros((len(texts), model.classifier.in_features), np.float32)
    order = np.argsort([len(text) for text in texts], kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            some = order[start : start + 32]
            fed.clear()
            batch = tokenizer(
                [texts[index] for index in some],
                truncation=True,
                max_length=MAX_TOKENS,
                padding=True,
                return_tensors="pt",
            )
            model(**batch)
            found[some] = fed[0].numpy()
    return found


def read(data: Path, base: Path, most: int) -> dict[str, Rows]:
    """`isear/train`, `isear/test`, ...: rows whose features are the classifier's inputs."""
    numbers, found = json.loads((base / "config.json").read_text())["label2id"], {}
    for owner in OWNERS:
        for split, limit in (("train", most), ("test", TEST_ROWS)):
            lines = (data / owner / f"{split}.jsonl").read_text().splitlines()[:limit]
            rows = [json.loads(line) for line in lines]
            targets = np.array([numbers[row["label"]] for row in rows])
            found[f"{owner}/{split}"] = Rows(features=inputs_of(base, [row["text"] for row in rows]), targets=targets)
            say(f"{owner}/{split}: {len(rows)} rows")
    return found


def first(rows: Rows, count: int) -> Rows:
    return rows.take(np.arange(min(count, len(rows))))


def joined(parts: Sequence[Rows]) -> Rows:
    features = np.concatenate([np.asarray(each.features) for each in parts])
    return Rows(features=features, targets=np.concatenate([np.asarray(each.targets) for each in parts]))


def classifier_of(base: Path) -> Classifier:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.config.problem_type = "single_label_classification"
    return Classifier(model.classifier, model)


def copy_of(base: Classifier, delta: Mapping[str, Tensor] | None = None) -> Classifier:
    layer = nn.Linear(base.layer.in_features, base.layer.out_features)
    layer.load_state_dict(base.layer.state_dict())
    model = Classifier(layer, SimpleNamespace(config=base.config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if delta is not None:
                parameter.add_(delta[name].reshape(parameter.shape))
    return model


def trained(base: Classifier, rows: Rows, epsilon: float | None, beside: float, seed: int) -> Classifier:
    """A classifier that was trained on the rows. `beside`: the share of the budget that sums take."""
    model = copy_of(base)
    size = ceil(len(rows) / 5)
    training = Training(**TRAINING, batch_size=size, accumulation=ceil(size / 1000))  # type: ignore[arg-type]
    if epsilon is None:
        fine_tune(model, rows, training, seed, "")
    else:
        mu = (beside**0.5) * mu_of(epsilon, DELTA)
        fine_tune_privately(model, rows, np.arange(len(rows)), training, epsilon, DELTA, seed, "", mu)
    return model


def delta_of(model: Classifier, base: Classifier) -> dict[str, Tensor]:
    start = dict(base.named_parameters())
    return {name: (each - start[name]).detach() for name, each in model.named_parameters()}


# --- merges ---


def plan_of(base: Classifier) -> MergePlan:
    tensors = PlannedTensors(merged=(("layer.weight", "layer.bias"),), averaged=(), left_alone=())
    return merge_plan(base, tensors)


def settings_of(base: Classifier, owners: Sequence[Rows], epsilon: float | None) -> MergeSettings:
    """What an agreement would say. The agreed lengths are the longest inputs, as made-up ones would give."""
    plan, length = plan_of(base), float(np.linalg.norm(np.asarray(owners[0].features), axis=1).mean())
    norm, labels = length**2 + 1, base.layer.out_features
    tables = {name: method.table() for name, method in METHODS.items()} | {
        "regmean": RegMeanTable(alphas=(0.1,) if epsilon else (0.9,), measured_examples=100_000, bias_feature=True),
        "anchored": AnchoredTable(anchors=(0.1,)),
        "refit": RefitTable(balances=(0.0,), measured_examples=100_000),
    }
    bounds = MergeBounds(examples=100_000, delta=64.0, grams={"layer": 1024 * norm}, fisher={})
    settings = MergeSettings(
        plan=plan, weighting="rows", bounds=bounds, tables=tables, num_owners=len(owners), num_labels=labels
    )
    if epsilon is None:
        return settings
    mu = mu_of(epsilon, DELTA)
    refit = RefitNoise(features=norm**0.5, target=(1 - 1 / labels) ** 0.5, own=0.0)
    share = refit.sensitivity / (REFITTED**0.5 * mu) / max(1, len(owners) - 1) ** 0.5
    grams = GramNoise(norms={"layer": norm}, multiplier=1 / (GRAMS**0.5 * mu), owners=len(owners))
    return replace(settings, refit_noise=replace(refit, own=share), gram_noise=grams)


def terms_of(rows: Rows, model: Classifier, base: Classifier, settings: MergeSettings) -> OwnerTerms:
    """Every row has one input of the classifier, which is all of a document that its Gram holds."""
    features = torch.from_numpy(np.asarray(rows.features)).double()
    ones = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    fed = ones
    if settings.gram_noise is not None:
        fed = torch.cat([bounded_rows(each[None], settings.gram_noise.norms["layer"]) for each in ones])
    (layer,) = settings.plan.inputs[0].layers
    with torch.no_grad():
        scores = model.layer(torch.from_numpy(np.asarray(rows.features))).double()
    classifier = ClassifierTerms(
        features=ones,
        targets=torch.from_numpy(np.asarray(rows.targets)),
        scores=scores,
        start=layer.take({name: each.detach() for name, each in base.named_parameters()}).double(),
    )
    return OwnerTerms(
        examples=len(rows),
        delta=delta_of(model, base),
        grams={"layer": Gram(matrix=fed.T @ fed, rows=len(rows))},
        gram_examples=len(rows),
        classifier=classifier,
    )


def summed(layout: TensorLayout, tensors: Iterator[Iterator[tuple[str, NDArray]]], count: int) -> Total:
    words = np.zeros(layout.size, dtype=layout.dtype)
    for each in tensors:
        vector = np.zeros(layout.size)
        layout.flatten(each, vector)
        words += fixed_point.encode(layout, vector, count)
    names = tuple(OWNERS[:count])
    decoded = fixed_point.decode(layout, words, count, count)
    return Total(layout=layout, vector=decoded, owners=names, roster_size=count)


def merged(name: str, settings: MergeSettings, owners: Sequence[OwnerTerms]) -> dict[str, Tensor] | None:
    """The merged change; None if so few rows are not enough for its noise, so that owners would refuse."""
    method, count = METHODS[name], len(owners)
    rows, noise, dimension = (
        sum(each.examples for each in owners),
        settings.gram_noise,
        1 + settings.plan.inputs[0].d_in,
    )
    if name in ("regmean", "anchored") and noise is not None:  # noqa: SIM102
        if rows < noise.examples_needed(count, dimension, method.least_kept(settings.tables, dimension)):
            return None
    bounded = settings.refit_noise
    if name == "refit" and bounded is not None and rows < bounded.rows_needed(count, dimension):
        return None
    secrets = [fresh_secret() for _ in owners]

    def noised(layout: TensorLayout, position: int) -> list[OwnerTerms]:
        return [
            replace(each, noise=Noise(key=key, position=position, layout=layout, num_owners=count))
            for each, key in zip(owners, secrets, strict=True)
        ]

    if name == "refit":  # its body is the frozen encoder, so only the classifier is fitted
        (step,) = REFIT.steps(settings)
        layout = REFIT.step_layout(settings, step)
        parts = (REFIT.step_contribution(settings, step, each) for each in noised(layout, 1))
        return dict(REFIT.solve_step(settings, step, summed(layout, parts, count), 0.0).delta)
    assert isinstance(method, SingleRoundMethod)
    layout = contribution_layout([name], settings)
    parts = (contribution([name], settings, each) for each in noised(layout, 0))
    (value,) = method.swept(settings.tables)[-1:]
    solved = method.solve(settings, summed(layout, parts, count), value, with_spectra=False)
    return dict(method.applied_to(settings, solved, value).published)


# --- what is measured ---


def metrics_of(model: Classifier, tests: Sequence[Rows]) -> tuple[float, float]:
    """Accuracy and macro F1, means over the tests."""
    found = []
    for rows in tests:
        with torch.no_grad():
            said = model.layer(torch.from_numpy(np.asarray(rows.features))).argmax(1).numpy()
        targets = np.asarray(rows.targets)
        found.append((float((said == targets).mean()), float(f1_score(targets, said, average="macro"))))
    return fmean(each[0] for each in found), fmean(each[1] for each in found)


def audited(model: Classifier, base: Classifier, members: Rows, strangers: Rows) -> dict[str, float]:
    """The best of three attacks, as the audit makes them; and the epsilon that they prove, at 95 % for all together."""
    count = min(AUDITED, len(members), len(strangers))
    both = joined([first(members, count), first(strangers, count)])
    own, start = (predict(each, both, 256, "").losses for each in (model, base))
    along = gradient_scores(copy_of(base), delta_of(model, base), both, 256, "")
    attacks = [(scores[:count], scores[count:]) for scores in (-own, start - own, along)]
    rates = [float(true_positive_rate(*each)) for each in attacks]
    return {
        "audit": max(float(area_under_the_curve(*each)) for each in attacks),
        "found at 1 %": max(rates),
        "shown epsilon": max(shown_epsilon(rate, count, len(attacks) * len(OWNERS)) for rate in rates),
    }


def shown_epsilon(rate: float, count: int, tries: int) -> float:
    """An epsilon that these rates prove to be exceeded, except one time in twenty over all tries.

    Clopper and Pearson's bounds on both rates: epsilon >= log((TPR - delta) / FPR).
    """
    members, taken, level = round(rate * count), count // 100, 0.05 / (2 * tries)
    true = float(beta.ppf(level, members, count - members + 1)) if members else 0.0
    false = float(beta.ppf(1 - level, taken + 1, count - taken))
    return max(0.0, log((true - DELTA) / false)) if true > DELTA else 0.0


Line = dict[str, Any]


def run(base: Classifier, rows: Mapping[str, Rows], count: int, epsilon: float | None, seed: int) -> list[Line]:
    """A line for each kind of model."""
    torch.manual_seed(seed)
    names: Sequence[str] = OWNERS
    tests = [rows[f"{owner}/test"] for owner in OWNERS]
    if count > min(len(rows[f"{owner}/train"]) for owner in OWNERS) + 100:
        names, parts = ("all",), [first(joined([rows[f"{owner}/train"] for owner in OWNERS]), count)]
    else:
        parts = [first(rows[f"{owner}/train"], count) for owner in OWNERS]
    is_alone = len(names) == 1
    settings = settings_of(base, parts, epsilon)
    own = [trained(base, each, epsilon, METRICS, seed) for each in parts]
    lines: list[Line] = []
    of_own = [metrics_of(model, tests if is_alone else [test]) for model, test in zip(own, tests, strict=False)]
    strangers = [joined(tests) if is_alone else test for test in tests][: len(parts)]
    of_base = [audited(copy_of(base), base, *each) for each in zip(parts, strangers, strict=True)]
    lines.append({"model": "base", "metrics": metrics_of(base, tests), "audits": of_base})
    lines.append(
        {
            "model": "own",
            "metrics": tuple(map(fmean, zip(*of_own, strict=True))),
            "audits": [audited(*each) for each in zip(own, [base] * len(own), parts, strangers, strict=True)],
        }
    )
    for name in () if is_alone else METHOD_NAMES:
        spent = {"refit": METRICS + REFITTED, "regmean": METRICS + GRAMS, "anchored": METRICS + GRAMS}.get(
            name, METRICS
        )
        models = own if spent == METRICS or epsilon is None else [trained(base, p, epsilon, spent, seed) for p in parts]
        terms = [terms_of(p, model, base, settings) for p, model in zip(parts, models, strict=True)]
        change = merged(name, settings, terms)
        if change is None:
            lines.append({"model": name, "metrics": None})
            continue
        model = copy_of(base, change)
        found = [audited(model, base, p, s) for p, s in zip(parts, strangers, strict=True)]
        lines.append({"model": name, "metrics": metrics_of(model, tests), "audits": found})
    return [{"rows": count, "epsilon": epsilon, "seed": seed, **line} for line in lines]


# --- the page ---


def mean_of(lines: Sequence[Line], rows: int, epsilon: float | None, model: str, what: str) -> float | None:
    """Over seeds and owners; None where it was not measured, or refused."""
    some = [each for each in lines if (each["rows"], each["epsilon"], each["model"]) == (rows, epsilon, model)]
    if what in ("accuracy", "macro F1"):
        found = [each["metrics"][what == "macro F1"] for each in some if each["metrics"] is not None]
    else:
        found = [audit[what] for each in some for audit in each.get("audits", [])]
    if not found:
        return None
    return max(found) if what == "shown epsilon" else fmean(found)


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def as_markdown(lines: Sequence[Line]) -> str:
    epsilons = list(dict.fromkeys(line["epsilon"] for line in lines))
    words = ["none" if each is None else f"{each:g}" for each in epsilons]
    parts = []
    for rows in dict.fromkeys(line["rows"] for line in lines):
        models = list(dict.fromkeys(line["model"] for line in lines if line["rows"] == rows))
        seeds = len({line["seed"] for line in lines if line["rows"] == rows})
        parts.append(f"## {rows:,} rows an owner, seeds: {seeds}\n")
        for what in ("accuracy", "macro F1", "audit", "found at 1 %", "shown epsilon"):
            table = [[what, *words], ["---", *("---:" for _ in words)]]
            for model in models:
                values = [mean_of(lines, rows, epsilon, model, what) for epsilon in epsilons]
                table.append([model, *(shown(value) or "refused" for value in values)])
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in table) + "\n")
    return HEAD + "\n" + "\n".join(parts) + "\n![accuracy and attacks against epsilon](privacy.svg)\n"


HEAD = f"""\
# Training with noise

`python -m benchmarks.privacy`: three owners ({", ".join(OWNERS)}) train the classifier of a
frozen MiniLM, an agreement with `merge.layers = ["classifier"]`: 2,695 numbers. {TRAINING["epochs"]} epochs in batches
of a fifth of the rows, a learning rate of {TRAINING["learning_rate"]:g} that falls to zero, delta {DELTA:g}. With
19,950 rows there is one owner, with the rows of all three domains. Accuracy and macro F1 are exact, on {TEST_ROWS} test
rows of each domain, among all seven labels. `own` is judged on its own domain, everything else on all three. An audit
is the area under the curve of the best of three attacks, a mean over owners and seeds: 0.5 is guessing, and the base,
which saw no row, shows by how much training and test rows differ anyway. Found at 1 % is the share of training rows
found while at most 1 % of strangers are taken for such. Shown epsilon is what the attacks prove at 95 %, the most of
any owner and seed. Refused: an owner's program says how many rows it would take.
"""


def draw(lines: Sequence[Line], path: Path) -> None:
    """Accuracy and audits against epsilon: a column for each number of rows."""
    mpl.rcParams["svg.hashsalt"] = "amalgram"  # the same numbers give the same file
    sizes = list(dict.fromkeys(line["rows"] for line in lines))
    epsilons = sorted({line["epsilon"] for line in lines if line["epsilon"] is not None})
    places = [*epsilons, None]
    figure, all_axes = plt.subplots(
        2, len(sizes), figsize=(3.2 * len(sizes), 5), layout="constrained", sharex=True, sharey="row", squeeze=False
    )
    for column, rows in enumerate(sizes):
        for axes, what in zip(all_axes[:, column], ("accuracy", "audit"), strict=True):
            for model, colour in COLOURS.items():
                values = [mean_of(lines, rows, each, model, what) for each in places]
                at = [index for index, value in enumerate(values) if value is not None]
                axes.plot(at, [values[index] for index in at], marker="o", color=colour, label=model)
            axes.set_xticks(range(len(places)), ["none" if each is None else f"{each:g}" for each in places])
            axes.grid(axis="y", color="#dddddd")
        all_axes[0, column].set_title(f"{rows:,} rows an owner")
        all_axes[1, column].set_xlabel("epsilon")
    all_axes[0, 0].set_ylabel("accuracy")
    all_axes[1, 0].set_ylabel("best attack, area")
    handles, names = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"lines": len(results["lines"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", default="1000,3950,19950")
    parser.add_argument("--epsilons", default="1,2,4,8,none")
    parser.add_argument("--seeds", default="3,1,1")
    parser.add_argument("--lines", type=Path, help="keep what is measured in this file, and go on from it")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    counts = list(map(int, arguments.rows.split(",")))
    base, rows = classifier_of(arguments.base), read(arguments.data, arguments.base, max(counts))
    kept: list[Line] = []
    if arguments.lines is not None and arguments.lines.is_file():
        kept = [json.loads(line) for line in arguments.lines.read_text().splitlines()]
    done = {(line["rows"], line["epsilon"], line["seed"]) for line in kept}
    for count, seeds in zip(counts, map(int, arguments.seeds.split(",")), strict=True):
        for word in arguments.epsilons.split(","):
            epsilon = None if word == "none" else float(word)
            for seed in range(seeds):
                if (count, epsilon, seed) in done:
                    continue
                found = run(base, rows, count, epsilon, seed)
                kept += found
                say(json.dumps(found))
                if arguments.lines is not None:
                    with arguments.lines.open("a") as file:
                        file.writelines(json.dumps(line) + "\n" for line in found)
    if publish("privacy", {"lines": kept}, as_markdown(kept), size):
        draw(kept, RESULTS / "privacy.svg")


if __name__ == "__main__":
    main()
