"""The words that all merge methods share: what an owner brings, what a solve gives back, the weighted mean."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.agreement import Agreement
from common.errors import NumericalError
from common.models.low_rank import LowRank
from common.models.plan import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry


@dataclass(frozen=True, kw_only=True)
class Gram:
    """`matrix` = sum over rows of x x^T, (gram_size, gram_size) float64; `rows` = how many rows that were."""

    matrix: Tensor
    rows: int


@dataclass(frozen=True, kw_only=True)
class HeadTerms:
    """What the classifier is fitted to, row by row; only sums over the rows leave (refit.py)."""

    features: Tensor  # (rows, d_in, and one more that is 1 where the classifier has a bias) float64
    targets: Tensor  # (rows,) int64
    scores: Tensor  # (rows, classes) float64: the owner's own model's
    start: Tensor  # (features, classes) float64: the base's classifier


@dataclass(frozen=True, kw_only=True)
class OwnerTerms:
    """What one owner knows: its delta, and sums that it measured over `measured_*` of its `examples`."""

    examples: int
    delta: Mapping[str, Tensor]
    grams: Mapping[str, Gram] = field(default_factory=dict)
    gram_examples: int = 1
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    fisher_examples: int = 1
    head: HeadTerms | None = None


@dataclass(frozen=True, kw_only=True)
class LayerNote:
    """How the solve of one Gram went. `status`: solved, singular, indefinite or empty (see normal_equations.py).

    `rows`: how many input rows are behind the Gram; None for one that is made of weight changes.
    """

    name: str
    status: str
    d_in: int
    gram_size: int
    rows: int | None
    condition: float | None
    effective_rank: float | None
    unseen_directions: int


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A merged delta by parameter name (float32), and what there is to say about it; `low_rank` if it was cut."""

    delta: Mapping[str, Tensor]
    layers: tuple[LayerNote, ...] = ()
    notes: tuple[str, ...] = ()
    low_rank: LowRank | None = None

    def followed_by(self, later: "Solution") -> "Solution":
        """This solution with what a later step gave, which takes the place of what it gave anew."""
        renewed = {note.name for note in later.layers}
        kept = tuple(note for note in self.layers if note.name not in renewed)
        return Solution(
            delta={**self.delta, **later.delta}, layers=(*kept, *later.layers), notes=(*self.notes, *later.notes)
        )

    def __post_init__(self) -> None:
        for name, tensor in self.delta.items():
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"merge: the solution for {name} is not finite; the sums are unusable")


def owner_weight(agreement: Agreement, owner: OwnerTerms) -> float:
    """How much an owner counts: by its examples, or like every other."""
    return float(owner.examples) if agreement.weighting == "rows" else 1.0


def owner_scale(agreement: Agreement, owner: OwnerTerms, gram: Gram) -> float:
    """What turns sums over the measured rows into the owner's share of the sum over owners."""
    if gram.rows == 0:
        return 0.0
    return owner.examples / owner.gram_examples if agreement.weighting == "rows" else 1 / gram.rows


def weight_bound(agreement: Agreement) -> float:
    """The most that `owner_weight` can be."""
    return float(agreement.bounds.examples) if agreement.weighting == "rows" else 1.0


def weight_entries(agreement: Agreement) -> list[TensorEntry]:
    return [
        TensorEntry(name="weight", shape=(1,), bound=weight_bound(agreement)),
        TensorEntry(name="examples", shape=(1,), bound=agreement.bounds.examples),
    ]


def weight_tensors(agreement: Agreement, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    yield "weight", np.array([owner_weight(agreement, owner)])
    yield "examples", np.array([float(owner.examples)])


def weighted_delta_entries(agreement: Agreement, plan: MergePlan, names: Iterable[str]) -> list[TensorEntry]:
    bound = weight_bound(agreement) * agreement.bounds.delta
    return [TensorEntry(name=f"weighted_delta/{name}", shape=plan.shapes[name], bound=bound) for name in names]


def weighted_delta_tensors(
    agreement: Agreement, owner: OwnerTerms, names: Iterable[str]
) -> Iterator[tuple[str, NDArray]]:
    weight = owner_weight(agreement, owner)
    for name in names:
        # float64 products of float32 numbers, without a float64 copy of them: embeddings are large
        yield f"weighted_delta/{name}", np.multiply(weight, owner.delta[name].detach().numpy(), dtype=np.float64)


def mean_delta(total: Total, name: str) -> Tensor:
    """sum n_i delta_i / sum n_i, float64."""
    return torch.from_numpy(total[f"weighted_delta/{name}"] / total["weight"][0])


def unchanged(plan: MergePlan) -> dict[str, Tensor]:
    """Zero deltas for what is left alone, which take no memory."""
    return {name: torch.zeros(()).expand(plan.shapes[name]) for name in plan.left_alone}


def to_array(tensor: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().cpu().to(torch.float64).numpy()
    return array
