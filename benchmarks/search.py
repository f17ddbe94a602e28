"""Does a search among mixtures pay? 24 of them on five emotion models, with three seeds.

python -m benchmarks.search --data DATA --models MODELS [--seeds 0,1,2] [--json]

DATA and MODELS are as in benchmarks/emotion.py. Mixtures are of `data_free` and `average`, in three groups of blocks
and the classifier, judged by macro F1 on 400 validation rows an owner. The first seed's search is the product's own,
with five owners, a masked sum and the first validation rows of each file. The other seeds search in this process, by
the product's steps and on the merges that it sent, since only the search differs: its steps, and the validation rows,
which they draw from the whole file. What was found, and `data_free` as it is, are judged on the first 600 test rows of
the owners' domains and of five others: macro F1 over the labels that occur there, and the gain with its standard error
over bootstraps of these rows. Writes benchmarks/results/search.{json,md} after each seed.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.emotion import IN_DOMAIN, OUT_OF_DOMAIN, parser_of, write_consortium
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import publish
from benchmarks.quality import BATCH, Bench, candidates_kept, difference, mean_over, say
from client.data.private_data import PrivateData
from client.measurement.evaluation import evaluate
from client.settings import Data
from common.agreement import Reading
from common.merge_methods.search import Mixture, SearchTable, next_mixtures
from common.metrics import thousandths
from common.models.delta import MixedDelta, add_delta
from common.models.depth import by_depth
from common.models.folders import load_tokenizer
from common.models.layers import block_names
from deploy.simulation.simulate import simulate

TABLE = SearchTable(basis=("data_free", "average"), candidates=24, groups=3)
SEARCH = '\n[search]\nbasis = ["data_free", "average"]\ncandidates = 24\ngroups = 3\n'
VALIDATION_ROWS = 400

Tried = list[tuple[Mixture, float]]  # with macro F1 on validation rows
Merges = list[dict[str, Tensor]]


def search_by_the_product(bench: Bench, seed: int) -> tuple[Merges, Tried]:
    """The merges that the owners were sent, and what they tried."""
    with tempfile.TemporaryDirectory() as folder, candidates_kept() as kept:
        consortium = Path(folder) / "consortium"
        methods = ("search", *TABLE.basis)
        write_consortium(consortium, bench.data, bench.models, methods=methods, seed=seed)
        agreement = consortium / "agreement.toml"
        agreement.write_text(agreement.read_text().replace("alphas = [0.5, 0.9, 1.0]", "alphas = [1.0]") + SEARCH)
        report = simulate(consortium, Path(folder) / "output", with_references=False)
    merges = [
        {name: torch.from_numpy(np.array(tensor)) for name, tensor in layout.unflatten(vector)}
        for layout, vector in (kept[name] for name in TABLE.basis)
    ]
    return merges, [(trial.scales or (), trial.metric) for trial in report.evaluation.sweep["search"]]


def search_alone(bench: Bench, merges: Merges, seed: int) -> Tried:
    """The same search without owners, on the rows that they would draw with this seed."""
    owners = [_owner(bench, name, seed) for name in IN_DOMAIN]
    rows, allowed = [each.validation() for each in owners], [each.label_set() for each in owners]
    tried: Tried = []
    while len(tried) < TABLE.candidates:
        for mixture in next_mixtures(tried, len(_groups(bench, merges)), TABLE, seed):
            model = mixed(bench, merges, mixture)
            scores = [
                evaluate(model, each, BATCH, bench.task, labels) for each, labels in zip(rows, allowed, strict=True)
            ]
            tried = [*tried, (mixture, float(np.mean([thousandths(score.metric) for score in scores])))]
            say(f"seed {seed}: mixture {len(tried)}")
    return tried


def _owner(bench: Bench, domain: str, seed: int) -> PrivateData:
    files = Data(
        train=Path("train.jsonl"),
        validation=Path("dev.jsonl"),
        test=Path("test.jsonl"),
        max_validation_rows=VALIDATION_ROWS,
    )
    tokenizer, folder = load_tokenizer(bench.models / "base"), bench.data / domain
    return PrivateData(
        data=files,
        task=bench.task,
        model=bench.base,
        tokenizer=tokenizer,
        folder=folder,
        seed=seed,
        reading=Reading(),
    )


def _groups(bench: Bench, merges: Merges) -> tuple[tuple[str, ...], ...]:
    return by_depth(merges[0], block_names(bench.base), TABLE.groups)


def mixed(bench: Bench, merges: Merges, mixture: Mixture) -> PreTrainedModel:
    model = bench.load("base")
    delta = MixedDelta.of(merges, _groups(bench, merges), mixture)
    fixed = {name: torch.zeros(()) for name, _ in model.named_parameters() if name not in merges[0]}
    add_delta(model, {**delta, **fixed})
    return model


def judge(bench: Bench, merges: Merges, mixture: Mixture, unsearched: Mixture) -> dict[str, list[Any]]:
    """Macro F1 and accuracy on test rows, in and out of domain, and the gain in macro F1 with its standard error."""
    before, after = (bench.logits(mixed(bench, merges, each)) for each in (unsearched, mixture))
    metrics = bench.judge(after)
    domains = (IN_DOMAIN, OUT_OF_DOMAIN)
    found: dict[str, list[Any]] = {
        metric: [mean_over(metrics, each, metric) for each in domains] for metric in ("macro_f1", "accuracy")
    }
    return found | {"gain": [difference(bench, after, before, each) for each in domains]}


def as_markdown(results: dict[str, Any]) -> str:
    lines = ["# A search among 24 mixtures of two merges of five emotion models", "", "Made by", ""]
    lines += ["    python -m benchmarks.search --data DATA --models MODELS", ""]
    lines += ["Macro F1: on validation rows, and on test rows of the owners' domains / of five others. Number 1 is"]
    lines += [
        "`data_free` as it is. The gain is that on test rows: mean and standard error over bootstraps of them.",
        "",
    ]
    lines += ["| seed | chosen | validation, unsearched | searched | test, unsearched | searched | gain |"]
    lines += ["|---|---|---|---|---|---|---|"]
    before, gains = results["unsearched"]["macro_f1"], []
    for seed, found in results["seeds"].items():
        after = found["test"]["macro_f1"]
        gains.append([late - early for early, late in zip(before, after, strict=True)])
        first, best = found["tried"][0][1], found["tried"][found["chosen"]][1]
        gain = " / ".join(f"{mean:+.3f} ± {error:.3f}" for mean, error in found["test"]["gain"])
        lines.append(
            f"| {seed} | number {found['chosen'] + 1} | {first:.3f} | {best:.3f} "
            f"| {_pair(before)} | {_pair(after)} | {gain} |"
        )
    lowest, highest = np.min(gains, axis=0), np.max(gains, axis=0)
    mean = _pair(np.mean(gains, axis=0), signed=True)
    interval = f"{_pair(lowest, signed=True)} to {_pair(highest, signed=True)}"
    if len(gains) > 1:
        lines += ["", f"Mean difference on test rows over {len(gains)} seeds: {mean}; from {interval}."]
    lines += [""]
    lines += ["Scales of what was chosen, in three groups of blocks and the classifier:", ""]
    for seed, found in results["seeds"].items():
        scales = found["tried"][found["chosen"]][0]
        half = len(scales) // 2
        parts = zip(TABLE.basis, (scales[:half], scales[half:]), strict=True)
        lines.append(
            f"- seed {seed}: " + "; ".join(f"{name} {', '.join(f'{s:g}' for s in part)}" for name, part in parts)
        )
    return "\n".join(lines) + "\n"


def _pair(values: Sequence[float], *, signed: bool = False) -> str:
    return " / ".join(f"{value:+.3f}" if signed else f"{value:.3f}" for value in values)


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"seeds": len(results["seeds"])}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    bench = Bench(arguments.data, arguments.models)
    first, *others = map(int, arguments.seeds.split(","))
    merges, tried = search_by_the_product(bench, first)
    unsearched = tried[0][0]
    results: dict[str, Any] = {"unsearched": judge(bench, merges, unsearched, unsearched), "seeds": {}}
    for seed in (first, *others):
        tried = tried if seed == first else search_alone(bench, merges, seed)
        best = max(range(len(tried)), key=lambda number: tried[number][1])
        results["seeds"][str(seed)] = {
            "chosen": best,
            "test": judge(bench, merges, tried[best][0], unsearched),
            "tried": tried,
        }
        publish("search", results, as_markdown(results), size)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
