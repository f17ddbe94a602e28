"""What 32 bits per number cost and save: five real models merged in 64 and in 32 bits, all else being equal.

python -m benchmarks.ring --data DATA --models MODELS [--json]

DATA and MODELS are as in benchmarks/emotion.py. Both runs are masked and try every alpha. Each candidate's relative
difference is the Frobenius norm of the difference between the two deltas over that of the delta in 64 bits, for all
tensors together and for the worst one. Macro F1 on the owners' test examples comes from the report. Bytes are what
one owner sends in the rounds that the merge is made from. Writes benchmarks/results/ring.{json,md}.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.emotion import IN_DOMAIN, parser_of, write_consortium
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import everything, publish
from benchmarks.quality import candidates_kept
from common.tensor_layout import TensorLayout
from deploy.simulation.simulate import simulate

METHODS = ("regmean", "average", "data_free")
ALPHAS = (0.5, 0.9, 1.0)
MERGED_FROM = ("sum of scales", "sum of contributions")

Candidates = dict[str, tuple[TensorLayout, NDArray[np.float32]]]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    merged = {bits: merge(arguments.data, arguments.models, bits) for bits in (64, 32)}
    results = {
        "owners": len(IN_DOMAIN),
        "runs": {str(bits): run for bits, (run, _) in merged.items()},
        "differences": differences(merged[64][1], merged[32][1]),
    }
    publish("ring", results, as_markdown(results), everything)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


def merge(data: Path, models: Path, ring_bits: int) -> tuple[dict[str, Any], Candidates]:
    """What one masked run reports, and every candidate."""
    with tempfile.TemporaryDirectory() as folder, candidates_kept() as kept:
        consortium = Path(folder) / "consortium"
        write_consortium(consortium, data, models, methods=METHODS, alphas=ALPHAS, ring_bits=ring_bits)
        report = simulate(consortium, Path(folder) / "output", with_references=False)
    run = {
        "chosen": {method: choice.candidate for method, choice in report.chosen.items()},
        "macro_f1": {method: report.evaluation.mean[method].metric for method in METHODS},
        "bytes_an_owner": sum(
            max(cost.bytes_received for cost in step.by_owner.values())
            for step in report.steps
            if step.title in MERGED_FROM
        ),
        "statuses": sorted({layer.status for layer in report.layers}),
    }
    return run, kept


def differences(at_64: Candidates, at_32: Candidates) -> dict[str, dict[str, float]]:
    """Relative differences between the merged deltas, for every candidate that both runs sent."""
    found = {}
    for name in sorted(set(at_64) & set(at_32)):
        layout, expected = at_64[name]
        of_tensors = {}
        for entry in layout.entries:
            true = layout.read(expected, entry.name).astype(np.float64)
            other = layout.read(at_32[name][1], entry.name)
            if true.any():
                of_tensors[entry.name] = float(np.linalg.norm(other - true) / np.linalg.norm(true))
        whole = np.linalg.norm(at_32[name][1].astype(np.float64) - expected) / np.linalg.norm(
            expected.astype(np.float64)
        )
        found[name] = {"whole": float(whole), "worst_tensor": max(of_tensors.values())}
    return found


def as_markdown(results: dict[str, Any]) -> str:
    runs = results["runs"]
    ratio = runs["32"]["bytes_an_owner"] / runs["64"]["bytes_an_owner"]
    lines = [
        "# Sums in 64 and in 32 bits per number",
        "",
        f"{results['owners']} owners' MiniLM models, merged twice. Made by",
        "",
        "    python -m benchmarks.ring --data DATA --models MODELS",
        "",
        "| bits | MB an owner sends | " + " | ".join(f"macro F1 {method}" for method in METHODS) + " |",
        "|---" * (2 + len(METHODS)) + "|",
    ]
    for bits, run in runs.items():
        scores = " | ".join(f"{run['macro_f1'][method]:.4f} ({run['chosen'][method]})" for method in METHODS)
        lines.append(f"| {bits} | {run['bytes_an_owner'] / 1e6:.2f} | {scores} |")
    lines += [
        "",
        f"In 32 bits an owner sends {ratio:.3f} of what it sends in 64, including the round for the scales.",
        "",
    ]
    lines += ["| candidate | relative difference between the merged deltas | for the worst tensor |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {each['whole']:.1e} | {each['worst_tensor']:.1e} |"
        for name, each in results["differences"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
