"""What `amalgram personal` gains each of five emotion owners at home, and what its model loses elsewhere.

python -m benchmarks.personal --data DATA --models MODELS [--json]

DATA and MODELS are as in benchmarks/emotion.py. The product merges by `data_free`; then each owner makes its personal
model with the product's own code, on its validation rows alone. The benchmark judges it on the first 600 test rows of
all five domains, which no owner could: macro F1 over the labels that occur there. `elsewhere` is the mean over the four
other domains. Writes benchmarks/results/personal.{json,md}.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.emotion import IN_DOMAIN, parser_of, write_consortium
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import everything, publish
from benchmarks.quality import BATCH, Bench, say
from client.holdings import Holdings
from client.measurement.evaluation import predict_logits
from client.personal import personalise
from client.settings import OwnerSettings
from common.agreement import load_agreement
from common.models.loading import load_base
from common.settings_file import load_settings
from deploy.simulation.simulate import simulate

MODELS = ("own", "merged", "personal")


def measure(bench: Bench) -> dict[str, Any]:
    """By owner: what its personal model is made of, and macro F1 of the three models at home and elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        consortium, output = Path(folder) / "consortium", Path(folder) / "output"
        write_consortium(consortium, bench.data, bench.models, methods=("data_free",))
        simulate(consortium, output, with_references=False)
        return {owner: personal_of(bench, owner, output) for owner in IN_DOMAIN}


def personal_of(bench: Bench, owner: str, output: Path) -> dict[str, Any]:
    say(f"personal model of {owner}")
    settings = load_settings(output / "parties" / f"{owner}.toml", OwnerSettings)
    holdings = Holdings(settings, output / "parties", load_agreement(output / "parties" / settings.agreement))
    made = personalise(holdings, holdings.model_of_base(output / "model"))
    models = {
        "own": bench.load(owner),
        "merged": load_base(output / "model", bench.task, seed=0),
        "personal": made.model,
    }
    found: dict[str, Any] = {"kind": made.recipe.kind, "shares": made.recipe.shares, "tried": len(made.tried)}
    for name, model in models.items():
        logits = {domain: predict_logits(model, bench.tests[domain], BATCH) for domain in IN_DOMAIN}
        macro_f1 = {domain: each["macro_f1"] for domain, each in bench.judge(logits).items()}
        elsewhere = float(np.mean([macro_f1[domain] for domain in IN_DOMAIN if domain != owner]))
        found[name] = {"at home": macro_f1[owner], "elsewhere": elsewhere}
        if abs(made.test[name].metric - macro_f1[owner]) > 1e-6:
            raise SystemExit(f"{name} at {owner}: {made.test[name].metric} in the product, {macro_f1[owner]} here")
    return found


def as_markdown(found: dict[str, Any]) -> str:
    lines = ["# Personal models of five emotion owners", "", "Macro F1 on test rows. Made by", ""]
    lines += ["    python -m benchmarks.personal --data DATA --models MODELS", ""]
    lines += ["| owner | made of | own at home | merged | personal | own elsewhere | merged | personal |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    places = [(place, model) for place in ("at home", "elsewhere") for model in MODELS]
    for owner, each in found.items():
        numbers = " | ".join(f"{each[model][place]:.3f}" for place, model in places)
        lines.append(f"| {owner} | {each['kind']} {_shares(each['shares'])}| {numbers} |")
    means = [np.mean([each[model][place] for each in found.values()]) for place, model in places]
    lines.append("| mean | | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    lines += ["", "Shares are of the owner's own weights, from the embeddings over the six blocks to the classifier."]
    return "\n".join(lines) + "\n"


def _shares(shares: list[float]) -> str:
    return ", ".join(f"{share:g}" for share in shares) + " " if shares else ""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    found = measure(Bench(arguments.data, arguments.models))
    publish("personal", found, as_markdown(found), everything)
    print(json.dumps(found, indent=1) if arguments.json else as_markdown(found))


if __name__ == "__main__":
    main()
