"""What training with noise costs, and what it takes from an attacker: metrics and audits against epsilon.

python -m benchmarks.privacy --data DATA --base BASE [--epsilons 1,2,4,8,none] [--rows 1000] [--epochs 10]

DATA has one folder per domain with {train,dev,test}.jsonl (`text`, `label`), as for benchmarks.emotion. BASE is a
Hugging Face encoder with a head for the labels. Three owners fine-tune it on their own rows, by DP-SGD for each epsilon
and as usual for `none`, and the models are merged, masked, with noise on the metrics. Then each owner audits its own
model and the merge. Writes benchmarks/results/privacy.{json,md}.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import beta

from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import publish
from client.audit.audit import audit
from client.audit.result import AuditedModel
from client.holdings import Holdings
from client.settings import OwnerSettings
from common.agreement.agreement import load_agreement
from common.settings_file import load_settings
from deploy.simulation.simulate import simulate

OWNERS = ("isear", "crowdflower", "goemotions")
AGREEMENT = """\
title = "Training with noise"
base = "{base}"
method = "average"
compare_with = ["data_free"]

[task]
kind = "text-classification"
max_tokens = 32
label_set = "all"

[privacy]
{epsilon}
"""
AUDITED = 600  # rows of each kind
DELTA = 1e-5
OWNER = """\
name = "{name}"

[training]
epochs = {epochs}
learning_rate = {learning_rate}
batch_size = {batch_size}
accumulation = {passes}
lora_rank = 8

[data]
train = "{data}/train.jsonl"
validation = "{data}/dev.jsonl"
test = "{data}/test.jsonl"
max_train_rows = {rows}
max_validation_rows = 200
max_test_rows = 600
"""


def write_consortium(folder: Path, data: Path, base: Path, epsilon: float | None, rows: int, epochs: int) -> None:
    """Batches of a fifth of the rows: the larger they are, the less each step's noise weighs."""
    line = "" if epsilon is None else f"epsilon = {epsilon}"
    owners = "".join(f'\n[[owners]]\nname = "{name}"\n' for name in OWNERS)
    folder.mkdir()
    (folder / "agreement.toml").write_text(AGREEMENT.format(base=base.resolve(), epsilon=line) + owners)
    batch_size = 32 if epsilon is None else rows // 5
    for name in OWNERS:
        text = OWNER.format(
            name=name,
            data=(data / name).resolve(),
            rows=rows,
            epochs=epochs,
            learning_rate=1e-3 if epsilon is None else 5e-3,
            batch_size=batch_size,
            passes=-(-batch_size // 32),
        )
        (folder / f"{name}.toml").write_text(text)


def found_at_one_percent(model: AuditedModel) -> float:
    """The share of members that some attack finds while it takes at most 1 % of the strangers for members."""
    return max(attack.true_positives.value for attack in model.attacks if attack.true_positives is not None)


def shown_epsilon(model: AuditedModel, tries: int) -> float:
    """An epsilon that the attacks on a model prove it to exceed, except one time in twenty over all `tries`.

    Clopper and Pearson's bounds on both rates, for each attack: epsilon >= log((TPR - delta) / FPR).
    """
    members = round(found_at_one_percent(model) * AUDITED)
    level = 0.05 / (2 * tries * len(model.attacks))
    true = float(beta.ppf(level, members, AUDITED - members + 1)) if members else 0.0
    taken = AUDITED // 100
    false = float(beta.ppf(1 - level, taken + 1, AUDITED - taken))
    return max(0.0, log((true - DELTA) / false)) if true > DELTA else 0.0


def run(data: Path, base: Path, epsilon: float | None, rows: int, epochs: int) -> dict[str, float | None]:
    """One line of the table; means over the owners."""
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "consortium"
        write_consortium(folder, data, base, epsilon, rows, epochs)
        report = simulate(folder, with_references=False)
        audits: dict[str, list[AuditedModel]] = {"own": [], "model": []}
        for name in OWNERS:
            home = folder / "output" / "parties"
            settings = load_settings(home / f"{name}.toml", OwnerSettings)
            holdings = Holdings(settings, home, load_agreement(home / settings.agreement))
            model = holdings.model_of_base(folder / "output" / "model")
            for each in audit(holdings, model, None, AUDITED).models:
                if each.name in audits:
                    audits[each.name].append(each)
    mean = report.evaluation.mean
    figures = {
        f"{what} of {name}": value
        for name in ("base", "own_at_home", "average", "data_free")
        for what, value in (("accuracy", mean[name].accuracy), ("macro F1", mean[name].metric))
    }
    for name, models in audits.items():
        told = "own" if name == "own" else "average"
        figures[f"exact accuracy of {told}"] = fmean(each.fit.accuracy_strangers for each in models)
        figures[f"audit of {told}"] = fmean(each.strongest.area.value for each in models)
        figures[f"found at 1 % of {told}"] = fmean(map(found_at_one_percent, models))
        figures[f"epsilon shown of {told}"] = max(shown_epsilon(each, len(OWNERS)) for each in models)
    return {"epsilon": epsilon, **figures}


def as_markdown(lines: list[dict[str, float | None]], rows: int, epochs: int) -> str:
    settings = ["none" if line["epsilon"] is None else f"{line['epsilon']:g}" for line in lines]
    table = [["epsilon", *settings], ["---", *("---:" for _ in lines)]]
    table += [[name, *(f"{line[name]:.3f}" for line in lines)] for name in lines[0] if name != "epsilon"]
    return (
        "# Training with noise\n\n"
        f"`python -m benchmarks.privacy`: three owners with {rows} rows each, delta {DELTA:g}, LoRA of "
        f"rank 8, {epochs} epochs, one seed. Accuracy and macro F1 are those of the report, so with noise except for "
        "none; exact accuracies are those that the owners measured at home, a mean over them. An audit is the area "
        "under the curve of the best of four attacks, a mean over the owners: 0.5 is guessing, and the best of four "
        "attacks on rows that nobody trained on is a little above. Found at 1 % is the share of training rows found "
        "while at most 1 % of strangers are taken for such. Epsilon shown is what the attacks prove at 95 %, the most "
        "of any owner.\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"
    )


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"rows": results["rows"], "epochs": results["epochs"], "epsilons": len(results["lines"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--epsilons", default="1,2,4,8,none")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    quiet_on_one_thread()
    lines = []
    for word in arguments.epsilons.split(","):
        epsilon = None if word == "none" else float(word)
        lines.append(run(arguments.data, arguments.base, epsilon, arguments.rows, arguments.epochs))
        print(json.dumps(lines[-1]), flush=True)
        results = {"rows": arguments.rows, "epochs": arguments.epochs, "lines": lines}
        publish("privacy", results, as_markdown(lines, arguments.rows, arguments.epochs), size)


if __name__ == "__main__":
    main()
