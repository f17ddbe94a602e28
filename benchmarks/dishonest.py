"""What one dishonest owner of three does to the merge, and what the checks say.

python -m benchmarks.dishonest

The example consortium (`amalgram simulate --init`), masked. The program of one owner is changed: it contributes other
numbers than it measured, within the agreed bounds. The agreement's `sign_above` is 0.75: each owner's own model does
better than that on its own rows. Prints a table.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.workbench import Workbench
from common.errors import AmalgramError
from common.privacy.noise import Noise
from deploy.example import reviews
from deploy.simulation.simulate import simulate

LIAR, SIGN_ABOVE = "hotel", 0.75
Change = Callable[[str, NDArray], NDArray]


def times(factor: float, *kinds: str) -> Change:
    """Multiply all tensors of these kinds."""
    return lambda name, tensor: factor * tensor if name.partition("/")[0] in kinds else tensor


def claims(examples: float, *, consistently: bool) -> Change:
    """Claim another weight for the same weight changes; `consistently`: also as many examples."""

    def change(name: str, tensor: NDArray) -> NDArray:
        if name == "weight" or (name == "examples" and consistently):
            return np.full_like(tensor, examples)
        return tensor * examples / 200 if name.startswith("weighted_delta/") else tensor  # it has 200

    return change


ATTACKS: dict[str, tuple[str, Change]] = {
    "none": ("average", times(1)),
    "weight changes times 5": ("average", times(5, "weighted_delta")),
    "weight changes times -300": ("average", times(-300, "weighted_delta")),
    "a weight of a million": ("average", claims(1e6, consistently=False)),
    "a weight of a million, and as many examples": ("average", claims(1e6, consistently=True)),
    "none (RegMean)": ("regmean", times(1)),
    "Grams and products times 30 (RegMean)": ("regmean", times(30, "gram", "gram_delta", "diagonal_delta")),
}


def outcome_of(method: str, change: Change, sign_above: float | None) -> str:
    """The accuracy of the merge over the owners, or why nothing was published."""
    honest = Workbench.contribution

    def contribution(self: Workbench, noise: Noise | None = None) -> Iterator[tuple[str, NDArray]]:
        for name, tensor in honest(self, noise):
            yield name, change(name, tensor) if self.name == LIAR else tensor

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workbench, "contribution", contribution)
        consortium = Path(folder) / "consortium"
        reviews.write_consortium(consortium)
        path = consortium / "agreement.toml"
        text = path.read_text().replace('method = "data_free"', f'method = "{method}"')
        text = text.replace('["average", "task_arithmetic", "regmean"]', "[]")
        text = text.replace("alphas = [0.1, 0.5, 0.9, 0.95, 0.99]", "alphas = [0.9]")
        if sign_above is not None:
            text = text.replace("[evaluation]\n", f"[evaluation]\nsign_above = {sign_above}\n")
        path.write_text(text)
        try:
            report = simulate(consortium, Path(folder) / "output", with_references=False)
        except AmalgramError as error:
            return f"nothing is published: {error.message}"
        mean = report.evaluation.mean
        return f"accuracy {mean[method].accuracy:.3f}, base {mean['base'].accuracy:.3f}, {report.examples} examples"


def main() -> None:
    print("| attack | without `sign_above` | with it |\n|---|---|---|")
    for name, (method, change) in ATTACKS.items():
        row = [outcome_of(method, change, sign_above) for sign_above in (None, SIGN_ABOVE)]
        print(f"| {name} | {row[0]} | {row[1]} |", flush=True)


if __name__ == "__main__":
    main()
