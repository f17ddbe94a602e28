"""What training with noise costs, and what it takes from an attacker: metrics and audits against epsilon.

python -m benchmarks.privacy --data DATA --base BASE [--epsilons 1,8,100,none] [--rows 1000] [--epochs 10]

DATA has one folder per domain with {train,dev,test}.jsonl (`text`, `label`), as for benchmarks.emotion. BASE is a
Hugging Face encoder with a head for the labels. Three owners fine-tune it on their own rows, by DP-SGD for each epsilon
and as usual for `none`, and the models are merged, masked. Then each owner audits its own model and the merge. Writes
benchmarks/results/privacy.{json,md}.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def strongest(model: AuditedModel) -> float:
    """The share of pairs of a member and a stranger that the best attack tells apart."""
    return model.strongest.area.value


def run(data: Path, base: Path, epsilon: float | None, rows: int, epochs: int) -> dict[str, float | None]:
    """One line of the table; means over the owners."""
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "consortium"
        write_consortium(folder, data, base, epsilon, rows, epochs)
        report = simulate(folder, with_references=False)
        own, merged = [], []
        for name in OWNERS:
            home = folder / "output" / "parties"
            settings = load_settings(home / f"{name}.toml", OwnerSettings)
            holdings = Holdings(settings, home, load_agreement(home / settings.agreement))
            model = holdings.model_to_audit(folder / "output" / "model")
            found = {each.name: strongest(each) for each in audit(holdings, model, None, 600).models}
            own.append(found["own"])
            merged.append(found["model"])
    mean = report.evaluation.mean
    return {
        "epsilon": epsilon,
        **{f"accuracy of {name}": mean[name].accuracy for name in ("base", "own_at_home", "average", "data_free")},
        **{f"macro F1 of {name}": mean[name].metric for name in ("own_at_home", "average", "data_free")},
        "audit of own": sum(own) / len(own),
        "audit of average": sum(merged) / len(merged),
    }


def as_markdown(lines: list[dict[str, float | None]], rows: int, epochs: int) -> str:
    columns = [name for name in lines[0] if name != "epsilon"]
    table = [["epsilon", *columns], ["---"] * (len(columns) + 1)]
    for line in lines:
        epsilon = line["epsilon"]
        table.append(["none" if epsilon is None else f"{epsilon:g}", *(f"{line[name]:.3f}" for name in columns)])
    return (
        "# Training with noise\n\n"
        f"`python -m benchmarks.privacy`: three owners with {rows} rows each, delta 1e-5, LoRA of rank 8, {epochs} "
        "epochs, one seed. An audit's number is the area under the curve of the best of its attacks, a mean over the "
        "owners: 0.5 is guessing, and the best of four attacks on rows that nobody trained on is a little above.\n\n"
        + "\n".join(f"| {' | '.join(row)} |" for row in table)
        + "\n"
    )


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"rows": results["rows"], "epochs": results["epochs"], "epsilons": len(results["lines"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--epsilons", default="1,8,100,none")
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
