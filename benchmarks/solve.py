"""The coordinator's solve, compared with an inverse per weight. Writes benchmarks/results/solve.{json,md}.

python -m benchmarks.solve [--json]

    seconds          for one transformer block of BERT-base, by way: processor seconds of one thread, the median turn
    relative_error   how far the merged deltas are from the planted ones, by way and by condition of the Grams

The coordinator computes one Cholesky factorisation for each distinct Gram and solves all layers that share it together,
in float64. It is timed from the packed sums to the merged deltas: with the spectra that it reports for the published
model, and without them as in a sweep. The common way inverts a Gram for every weight, in float32 (the authors' code) or
float64.

In the planted problem all owners changed a layer alike, so the merge must give exactly that change for any Grams.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import this_machine
from benchmarks.published import publish, say
from common.merge_methods.normal_equations import System
from common.models.layers import Layer
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout

TURNS = 3
CONDITIONS = (1e2, 1e4, 1e6, 1e8)
BLOCK = {
    "query_key_value": (768, (768, 768, 768)),
    "output": (768, (768,)),
    "up": (768, (3072,)),
    "down": (3072, (768,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure()
    publish("solve", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"turns": results["turns"]}


def measure() -> dict[str, Any]:
    ways: dict[str, Callable[[System, Total], dict[str, Tensor]]] = {
        "one Cholesky per Gram": lambda system, total: system.solve(total, 1.0, None, with_spectrum=False)[0],
        "the same, with spectra": lambda system, total: system.solve(total, 1.0, None, with_spectrum=True)[0],
        "inverse per weight, float64": lambda system, total: inverted(system, total, torch.float64),
        "inverse per weight, float32": lambda system, total: inverted(system, total, torch.float32),
    }
    problems = [planted(name, d_in, d_outs, condition=1e4) for name, (d_in, d_outs) in BLOCK.items()]
    turns: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(TURNS):
        for way, solve in ways.items():
            started = process_time()
            for system, total, _ in problems:
                solve(system, total)
            turns[way].append(process_time() - started)
            say(f"{way}: {turns[way][-1]:.2f} s per block")
    errors: dict[str, dict[str, float]] = {way: {} for way in ways if "spectra" not in way}
    for condition in CONDITIONS:
        system, total, delta = planted("query_key_value", *BLOCK["query_key_value"], condition)
        for way, by_condition in errors.items():
            by_condition[f"{condition:.0e}"] = relative_error(ways[way](system, total), delta)
    return {
        "turns": TURNS,
        "machine": this_machine(),
        "seconds": {way: median(seconds) for way, seconds in turns.items()},
        "relative_error": errors,
    }


def planted(name: str, d_in: int, d_outs: tuple[int, ...], condition: float) -> tuple[System, Total, dict[str, Tensor]]:
    """A summed system with a known merged delta: (system, sums, float64 deltas by weight)."""
    random = torch.Generator().manual_seed(0)
    layers = tuple(
        Layer(weight=f"{name}.{number}.weight", d_in=d_in, d_out=d_out, stored_input_first=False)
        for number, d_out in enumerate(d_outs)
    )
    system = System(name=name, kind="", gram_size=d_in, layers=layers, alphas=(1.0,))
    delta = {layer.weight: torch.randn(layer.d_out, d_in, generator=random, dtype=torch.float64) for layer in layers}
    basis, _ = torch.linalg.qr(torch.randn(d_in, d_in, generator=random, dtype=torch.float64))
    values = torch.logspace(0, -np.log10(condition), d_in, dtype=torch.float64)
    half = basis * values.sqrt()
    layout = TensorLayout(tuple(system.entries(bound=1e3, product_bound=1e3)))
    vector = np.empty(layout.size)
    layout.flatten(system.tensors(half @ half.T, delta), vector)
    return system, Total(layout=layout, vector=vector, owners=("o0", "o1"), roster_size=2), delta


def inverted(system: System, total: Total, precision: torch.dtype) -> dict[str, Tensor]:
    gram = torch.from_numpy(total[f"gram/{system.name}"]).to(precision)
    products = {layer: torch.from_numpy(total[f"gram_delta/{layer.weight}"]).to(precision) for layer in system.layers}
    return {layer.weight: (torch.inverse(gram) @ product).T.float() for layer, product in products.items()}


def relative_error(merged: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> float:
    """The largest of all layers' relative errors, in Frobenius norms."""
    return max(float((merged[name].double() - wanted).norm() / wanted.norm()) for name, wanted in delta.items())


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine, seconds = results["machine"], results["seconds"]
    floor = seconds["one Cholesky per Gram"]
    yield "# What the coordinator's solve costs"
    yield ""
    yield (
        f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, torch {machine['torch']}; "
        f"processor seconds of one thread, medians of {TURNS} turns in one run. One transformer block of BERT-base: "
        "four Grams, six weights."
    )
    yield ""
    yield "| | seconds per block | times the first |"
    yield "|---|---:|---:|"
    for way, taken in seconds.items():
        yield f"| {way} | {taken:.2f} | {taken / floor:.1f} |"
    yield ""
    yield "How far the merged deltas, rounded to float32, are from the planted ones, by condition of the Gram (768):"
    yield ""
    yield "| | " + " | ".join(f"{condition:.0e}" for condition in CONDITIONS) + " |"
    yield "|---|" + "---:|" * len(CONDITIONS)
    for way, by_condition in results["relative_error"].items():
        yield f"| {way} | " + " | ".join(f"{error:.0e}" for error in by_condition.values()) + " |"


if __name__ == "__main__":
    main()
