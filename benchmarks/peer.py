"""FusionBench's RegMean compared with ours, on the same models and rows.

pip install fusion-bench && python -m benchmarks.peer [--json] [--data FOLDER]

    speedup              seconds of FusionBench's merge / seconds of ours: both owners' Grams, the solve, and for ours
                         also the vector that would travel
    relative_difference  between the merged weights, Frobenius norm, on texts of one length: otherwise FusionBench
                         counts padding as rows, and the two merges differ in meaning

FusionBench's part is its `regmean_merging` as published. It needs a trainer that hands out batches, and gets one. The
two owners' models differ from a random base with BERT-base's shape, but only a few of its layers. Nothing is masked or
sent. Seconds are processor seconds of one thread. The two take turns, and the median turn is reported. Writes
benchmarks/results/peer.{json,md}.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch
import transformers
from fusion_bench.method.regmean.regmean import regmean_merging
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gram import (
    BATCH_SIZE,
    SHAPES,
    drawn_lengths,
    in_order_of_the_file,
    lengths_of,
    plan_of,
    rows_of,
    tokens,
)
from benchmarks.machine import this_machine
from benchmarks.published import publish
from client.data.rows import Batch, Rows
from client.measurement.gram import measure_grams
from common.merge_methods.normal_equations import System
from common.models.plan import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout, union

LAYERS, EXAMPLES, ALPHA, TURNS = 4, 320, 0.9, 3
SHAPE = SHAPES[0]
ABOVE_THE_FLOOR = """\
Little is left to gain. A pass is a forward pass and half of each product of inputs, in float32 ([gram.md](gram.md)). In
a profile on the first processor, a solve with 3072 inputs took 1.9 seconds: a Cholesky factor (0.5), two triangular
solves (0.5), the residual (0.4) and the two solves of its refinement (0.5), where matrix products with as many
operations would take 1.3; an LU factor with its solves took 1.1 before any refinement. Refinement is what lets the
owners verify a merge to rounding. Products and solves stay in float64: in float32, no merge could be verified beyond
seven digits.

Fewer token rows would not make it much faster. A tenth of the rows leaves 1.19 of 2.01 forward passes, because
every example still needs one, and measuring fewer examples loses as little and saves all of it
([how many rows](../README.md#how-many-rows-a-gram-matrix-needs)). So both sides get the same rows here."""


@dataclass(frozen=True)
class Trainer:
    """A trainer as FusionBench needs it: it hands out the batches as they are."""

    batches: list[Batch]
    _train_batch_size: int = BATCH_SIZE

    def get_train_dataloader(self) -> list[Batch]:
        return self.batches

    def _prepare_inputs(self, batch: Batch) -> Batch:
        return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = measure(drawn_lengths() if arguments.data is None else lengths_of(arguments.data))
    publish("peer", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"layers": results["layers"], "token rows an owner": results["rows_an_owner"]}


def measure(lengths: np.ndarray) -> dict[str, Any]:
    base = SHAPE.model(LAYERS)
    owners = [changed(base, seed) for seed in (1, 2)]
    rows = rows_of(lengths[:EXAMPLES], SHAPE.config.vocab_size)
    plan = plan_of(base, rows.batch(np.arange(2))[0])
    turns = []
    for _ in range(TURNS):
        started = process_time()
        theirs(owners, rows)
        between, parts = process_time(), Parts()
        ours(base, owners, plan, rows, parts)
        turns.append({"fusion_bench": between - started, "amalgram": process_time() - between, **vars(parts)})
    alike = rows_of(np.full(2 * BATCH_SIZE, int(np.median(lengths))), SHAPE.config.vocab_size)
    return {
        "machine": this_machine() | {"fusion_bench": version("fusion-bench")},
        "layers": LAYERS,
        "rows_an_owner": tokens(in_order_of_the_file(rows)),
        "seconds": {way: median(turn[way] for turn in turns) for way in turns[0]},
        "speedup": median(turn["fusion_bench"] / turn["amalgram"] for turn in turns),
        "relative_difference": relative_difference(theirs(owners, alike), ours(base, owners, plan, alike, Parts())),
        "turns": turns,
    }


@torch.no_grad()
def changed(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model that looks fine-tuned: each of its weights differs a little from the base's."""
    model, random = deepcopy(base), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=random) if parameter.ndim > 1 else 0
    return model


@dataclass
class Parts:
    """Seconds of our merge: both owners' passes, their products and vectors, and the solves."""

    passes: float = 0.0
    vectors: float = 0.0
    solves: float = 0.0


def theirs(owners: list[PreTrainedModel], rows: Rows) -> dict[str, Tensor]:
    """Merged weights by name."""
    trainer = Trainer(in_order_of_the_file(rows))
    merged: dict[str, Tensor] = regmean_merging(
        models_to_merge=owners,
        trainers=[trainer] * len(owners),
        exclude_param_names_regex=[],
        nums_regmean_examples=[len(rows)] * len(owners),
        reduce_non_diagonal_ratio=ALPHA,
    )
    return merged


def ours(
    base: PreTrainedModel, owners: list[PreTrainedModel], plan: MergePlan, rows: Rows, parts: Parts
) -> dict[str, Tensor]:
    """Merged weights by name, from each owner's vector, their sum, and the solve. `parts` learns how long each took."""
    systems = [
        System(name=shared.name, kind="", gram_size=shared.gram_size, layers=shared.layers, alphas=(ALPHA,))
        for shared in plan.inputs
    ]
    layout = union(TensorLayout(tuple(system.entries(bound=1e6, product_bound=1e6))) for system in systems)
    before = dict(base.named_parameters())
    total = np.zeros(layout.size)
    for model in owners:
        started = process_time()
        grams = measure_grams(model, plan, (batch for _, batch, _ in rows.batches(BATCH_SIZE)))
        measured = process_time()
        delta = {name: parameter.detach() - before[name].detach() for name, parameter in model.named_parameters()}
        vector = np.empty(layout.size)
        layout.flatten(
            (each for system in systems for each in system.tensors(grams[system.name].matrix, delta)), vector
        )
        total += vector
        parts.passes += measured - started
        parts.vectors += process_time() - measured
    started = process_time()
    summed = Total(layout=layout, vector=total, owners=("o0", "o1"), roster_size=2)
    merged: dict[str, Tensor] = {}
    for system in systems:
        solved, _ = system.solve(summed, ALPHA, None, with_spectrum=False)
        merged |= {name: before[name].detach() + delta for name, delta in solved.items()}
    parts.solves = process_time() - started
    return merged


def relative_difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> float:
    """The largest of all layers' relative differences."""
    return max(float((theirs[name] - merged).norm() / merged.norm()) for name, merged in ours.items())


def as_markdown(results: Mapping[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine, seconds = results["machine"], results["seconds"]
    yield "# RegMean by FusionBench and by Amalgram"
    yield ""
    yield (
        f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, torch {machine['torch']}, "
        f"fusion-bench {machine['fusion_bench']}; processor seconds of one thread, medians of {TURNS} turns in one "
        f"run. Two owners, models with BERT-base's shape and {results['layers']} layers, "
        f"{results['rows_an_owner']:,} token rows per owner. Nothing is masked or sent."
    )
    yield ""
    yield "| FusionBench, seconds | Amalgram, seconds | times as fast | difference between merged weights |"
    yield "|---:|---:|---:|---:|"
    yield (
        f"| {seconds['fusion_bench']:.1f} | {seconds['amalgram']:.1f} | {results['speedup']:.1f} | "
        f"{results['relative_difference']:.0e} |"
    )
    yield ""
    if "passes" in seconds:
        yield (
            f"Of ours, the owners' passes take {seconds['passes']:.1f} seconds, products and vectors "
            f"{seconds['vectors']:.1f}, solves {seconds['solves']:.1f}."
        )
        yield ""
    yield ABOVE_THE_FLOOR


if __name__ == "__main__":
    main()
