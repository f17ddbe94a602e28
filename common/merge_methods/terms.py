"""What every merge method shares: what the agreement says, what an owner brings, what a merge returns, and the mean.

The weighted mean of the owners' deltas is sum n_i delta_i / sum n_i, where n_i is the owner's training examples, or 1
when every owner counts alike (`weighting`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import NumericalError
from common.lazy import lazy_module
from common.mapped import PIECE_NUMBERS, pieces
from common.models.disk_tensors import on_disk_if_large
from common.models.parameters import is_finite
from common.models.plan import MergePlan
from common.privacy.noise import LARGEST, Noise
from common.settings_file import Settings
from common.summation.totals import SummedTensors
from common.tensor_layout import RingBits, TensorEntry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from common.models.low_rank import LowRank
else:
    torch = lazy_module("torch")

Weighting = Literal["rows", "owners"]
# What a head puts out, in the words of transformers' configurations.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

ROUNDING = 5e-4  # of the norm of a Gram with noise: by how much more an example may move it when it is rounded

WEIGHT_KINDS = {
    "weight": "{their} weight in the mean",
    "examples": "{their} number of training examples",
    "weighted_delta": "{their} weight changes times {their} weight in the mean",
}


class Hyperparameters(Settings):
    """Base of every method's own table in the agreement."""


@dataclass(frozen=True, kw_only=True)
class MergeBounds:
    """The largest absolute values that one owner may add, on which the fixed-point encoding rests.

    `grams` (by the name of the shared input) and `fisher` (by parameter) are for one example. `changes` (by parameter):
    the largest 2-norms of a delta; empty if none were agreed on.
    """

    examples: int
    delta: float
    grams: Mapping[str, float]
    fisher: Mapping[str, float]
    changes: Mapping[str, float] = field(default_factory=dict)


def largest_noise_eigenvalue(dimension: int) -> float:
    """Of the noise on a symmetric matrix (dimension, dimension), in its standard deviations, except once in 10^10.

    AdaSSP: Wang, UAI 2018, arXiv 1803.02596; concentration of a function that no number moves by more than itself.
    """
    return float((2 * dimension) ** 0.5 + 7)


@dataclass(frozen=True, kw_only=True)
class RefitNoise:
    """What hides a row in a refit. `features`: the agreed 2-norm of the classifier's input, including its constant;
    `target`: the largest of what a row is fitted to; `own`: the standard deviation of the noise that each owner adds.
    """

    features: float
    target: float
    own: float

    @property
    def sensitivity(self) -> float:
        """By how much one row moves the Gram (in Frobenius norm) and the products together, in 2-norm: a row of the
        agreed norm, f f^T and f t^T.
        """
        return float(self.features * (self.features**2 + self.target**2) ** 0.5)  # check: rows-move-a-refit-by-so-much

    def weights(self, features: Tensor) -> Tensor:
        """(rows,): 1, or less for a row whose input is longer than agreed, so that it moves the sums by no more."""
        squares = (features**2).sum(dim=1)  # (rows,)
        moved = (squares * (squares + self.target**2)).sqrt()
        return (self.sensitivity / moved).clamp(max=1.0)  # check: long-rows-weigh-less

    def ridge(self, num_owners: int, dimension: int) -> float:
        """What the total has on its diagonal, so that it stays positive definite under the noise of all owners."""
        return float(num_owners**0.5 * self.own * largest_noise_eigenvalue(dimension))

    def rows_needed(self, num_owners: int, dimension: int) -> int:
        """How many rows all owners need together, so that their Gram's mean eigenvalue is a third of the ridge. With
        fewer, what is fitted is mostly the noise.
        """
        return ceil(self.ridge(num_owners, dimension) * dimension / (3 * self.features**2))


@dataclass(frozen=True, kw_only=True)
class GramNoise:
    """What hides one example in the Gram matrices of layers' inputs: a text with all of its tokens, or an image.

    `norms`: by the name of the shared input, the agreed Frobenius norm of what one example adds to its Gram.
    `multiplier`: the standard deviation of the noise that each owner adds, in units of these norms. `owners`: how many
    are summed, at least.

    Each owner adds all of the noise, to its Gram alone, before anything is made of it. Shares of noise would not do,
    and neither would noise on sums. A total holds sum H_i and, for each layer, sum H_i delta_i, with H_i = G_i + Z_i +
    ridge. Weight changes are not secret here: what bounds them is their own training. Whoever knows them has d_in^2 +
    d_in d_out equations per layer about the N d_in^2 unknowns of all H_i: with enough outputs, these have one solution,
    and single H_i are known. So H_i must hide each of its owner's examples with the noise of this owner alone. It does:

        An example, added or left out, moves (G_l / norm_l), over all L Grams l as one vector, by at most sqrt(L). With
        Z_l of standard deviation multiplier * norm_l, all Grams are one Gaussian mechanism with mu = sqrt(L) /
        multiplier. What a method sums is a function of the H_i, of the weight changes, and of agreed numbers. So are
        totals, models, and what is measured on them. Processing what is private keeps it so, whatever else is known.

    This asks nothing of the other owners, or of the masks. It costs a larger noise in the total, by the root of the
    number of owners. Any two owners' Grams have independent noise.
    """

    norms: Mapping[str, float]
    multiplier: float
    owners: int

    def own(self, name: str) -> float:
        """The standard deviation of what each owner adds."""
        return self.multiplier * self.norms[name]

    def rounding(self, dimension: int, units: float) -> float:
        """By how much more than the norm, and relative to it, an example moves a Gram that is rounded to fixed point.
        `units`: in a standard deviation of the noise. Each number can move by one more: dimension in 2-norm, since the
        noise off the diagonal is smaller by sqrt(2).
        """
        return dimension * self.multiplier / units

    def ridge(self, name: str, dimension: int) -> float:
        """What each owner adds to its diagonal, so that the total stays positive definite under the noise of all, if
        no fewer than `owners` are in it: n of them add n / sqrt(owners) >= sqrt(n) times the eigenvalue of one's noise.
        """
        noise = self.own(name) * largest_noise_eigenvalue(dimension)
        return float(noise / self.owners**0.5)  # check: noised-grams-have-their-ridge

    def bound(self, name: str, dimension: int, examples: int, num_owners: int) -> float:
        """The largest number of the noised Gram of so many examples, or of all owners' together, with its ridges."""
        return self.norms[name] * examples + num_owners * (LARGEST * self.own(name) + self.ridge(name, dimension))

    def examples_needed(self, num_owners: int, dimension: int, kept: float) -> float:
        """How many examples all owners need together, so that the noise does not exceed the smallest eigenvalue of what
        a method keeps of their Gram, if examples have the agreed norm. `kept`: that eigenvalue relative to the trace,
        which is no smaller than the norm.
        """
        noise = num_owners**0.5 * self.multiplier * largest_noise_eigenvalue(dimension)
        return float(noise / kept) if kept > 0 else inf


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """All that an agreement says to a method. `tables`: every method's hyperparameters by the method's name.

    `problem_type`: what a classifier is fitted to (refit.py); `largest_target`: of a regression, by absolute value.

    `has_floors`: a merge must have exactly one value, so that owners can verify it: contributions have floors (see
    normal_equations.py and fisher.py), which follow from the rounding of a sum over `num_owners` in `ring_bits`.
    `device`: where a coordinator solves, and `scratch`: a folder where it keeps what is too large for memory, both its
    own choice. `refit_noise`, `gram_noise`: what hides single rows in a refit, and single examples in Grams.

    `num_labels`: how many the task has. `unknown_labels`: the numbers of the labels that owners' models do not know, by
    owner, where there are any. `without_weights`: the owners that give predictions only. `num_owners` leaves them out.
    """

    plan: MergePlan
    weighting: Weighting
    bounds: MergeBounds
    tables: Mapping[str, Hyperparameters]
    has_floors: bool = False
    num_owners: int = 2
    ring_bits: RingBits = 64
    device: str = "cpu"
    scratch: Path | None = None
    problem_type: ProblemType = "single_label_classification"
    largest_target: float = 1.0
    refit_noise: RefitNoise | None = None
    gram_noise: GramNoise | None = None
    num_labels: int = 2
    unknown_labels: Mapping[str, frozenset[int]] = field(default_factory=dict)
    without_weights: frozenset[str] = frozenset()

    @property
    def weight_bound(self) -> float:
        """The largest weight that one owner can have."""
        return float(self.bounds.examples) if self.weighting == "rows" else 1.0


@dataclass(frozen=True, kw_only=True)
class Gram:
    """`matrix` = sum over token rows of x x^T, (gram_size, gram_size) float64; `rows` = how many token rows.

    Where it is to have noise, the rows of an example that moves it too far weigh less (client/measurement/gram.py).
    """

    matrix: Tensor
    rows: int


@dataclass(frozen=True, kw_only=True)
class ClassifierTerms:
    """What a classifier is fitted to, row by row; only sums over the rows leave the owner (refit.py)."""

    features: Tensor  # (rows, d_in, and one more that is 1 where the classifier has a bias) float64
    targets: Tensor  # (rows,) int64; of several labels or of numbers, (rows, outputs) float32
    scores: Tensor  # (rows, classes) float64, by the owner's own model
    start: Tensor  # (features, classes) float64, the base's classifier


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What an owner's model says of the pool: `numbers` (predictions, labels) from 0 to 1, and 0 for labels that it
    does not know; `known` (labels,), which of the labels it has; `closeness` (predictions,) to the owner's own rows, if
    that was asked for.
    """

    numbers: NDArray[np.float32]
    known: NDArray[np.bool_]
    closeness: NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True)
class OwnerTerms:
    """What one owner knows: its delta, and sums that it measured over `*_examples` of its `examples`; its noise."""

    examples: int
    delta: Mapping[str, Tensor]
    grams: Mapping[str, Gram] = field(default_factory=dict)
    gram_examples: int = 1
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    fisher_examples: int = 1
    class_shares: Tensor | None = None  # (classes,) float64, the own model's mean probability of each label
    classifier: ClassifierTerms | None = None
    noise: Noise | None = None
    predictions: Predictions | None = None


@dataclass(frozen=True, kw_only=True)
class LayerNote:
    """How the solve of one Gram went. `status`: solved, singular, indefinite or empty (see normal_equations.py).

    `rows`: how many token rows are behind the Gram, or examples if it has noise; None for one made of weight changes.
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
class MergedDelta:
    """A merged delta by parameter name (float32), with notes for the report; `low_rank` if it was cut to a rank.

    `rest`: what rounding to float32 took from each tensor, float32; empty where nothing is verified. `factor`: what its
    equations leave free (equations.Equation.is_scaled). `beside`: what is solved along with `delta`, so that owners can
    verify it. `applied`: what a fixed function makes of both, in place of some tensors of `delta` (method.py). Raises
    NumericalError if a number is not finite.
    """

    delta: Mapping[str, Tensor]
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    applied: Mapping[str, Tensor] = field(default_factory=dict)
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    layers: tuple[LayerNote, ...] = ()
    notes: tuple[str, ...] = ()
    low_rank: LowRank | None = None
    factor: float = 1.0

    @property
    def published(self) -> dict[str, Tensor]:
        """The delta that is tested and published, by parameter name."""
        return {**self.delta, **self.applied}

    def followed_by(self, later: MergedDelta) -> MergedDelta:
        """This merged delta with that of a later step, which replaces what both have."""
        renewed = {note.name for note in later.layers}
        kept = tuple(note for note in self.layers if note.name not in renewed)
        return MergedDelta(
            delta={**self.delta, **later.delta},
            rest={**self.rest, **later.rest},
            layers=(*kept, *later.layers),
            notes=(*self.notes, *later.notes),
            factor=later.factor,
        )

    def __post_init__(self) -> None:
        for name, tensor in chain(self.delta.items(), self.beside.items(), self.applied.items()):  # one at a time
            if not is_finite(tensor):
                raise NumericalError(
                    f"merge: the merged delta of {name} is not finite",
                    hint="the summed contributions are unusable; check the owners' models and bounds, and agree anew",
                )


def rounded(
    settings: MergeSettings,
    exact: dict[str, Tensor] | Iterator[tuple[str, Tensor]],
    layers: tuple[LayerNote, ...] = (),
    notes: tuple[str, ...] = (),
) -> MergedDelta:
    """A merged delta as it travels, from float64 tensors with their names. It empties a dict and overwrites all, and
    takes one tensor at a time, to need less memory.

    What is not a parameter of the plan was solved beside it.
    """
    delta, beside, rest = dict[str, "Tensor"](), dict[str, "Tensor"](), dict[str, "Tensor"]()
    for name, tensor in _taken_out(exact) if isinstance(exact, dict) else exact:
        sent = tensor.float()
        if settings.has_floors:
            _subtract(sent, tensor)
            rest[name] = on_disk_if_large(tensor.float(), settings.scratch)
        (delta if name in settings.plan.shapes else beside)[name] = on_disk_if_large(sent, settings.scratch)
    return MergedDelta(delta=delta, beside=beside, rest=rest, layers=layers, notes=notes)


def _subtract(taken: Tensor, tensor: Tensor) -> None:
    """tensor - taken, in place, some rows at a time, because torch makes a float64 copy of what it subtracts."""
    size = max(1, PIECE_NUMBERS * len(torch.atleast_1d(tensor)) // max(1, tensor.numel()))  # rows
    for some, rows in zip(torch.atleast_1d(taken).split(size), torch.atleast_1d(tensor).split(size), strict=True):
        rows.sub_(some)


def _taken_out(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in list(tensors):
        yield name, tensors.pop(name)


def owner_weight(settings: MergeSettings, owner: OwnerTerms) -> float:
    """How much an owner counts: by its examples, or like every other owner."""
    return float(owner.examples) if settings.weighting == "rows" else 1.0


def owner_scale(settings: MergeSettings, owner: OwnerTerms, gram: Gram) -> float:
    """The factor that turns a sum over the measured rows into the owner's share of the sum over owners."""
    if gram.rows == 0:
        return 0.0
    return owner.examples / owner.gram_examples if settings.weighting == "rows" else 1 / gram.rows


def weight_entries(settings: MergeSettings) -> list[TensorEntry]:
    return [
        TensorEntry(name="weight", shape=(1,), bound=settings.weight_bound),
        TensorEntry(name="examples", shape=(1,), bound=settings.bounds.examples),
    ]


def weight_tensors(settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    yield "weight", np.array([owner_weight(settings, owner)])
    yield "examples", np.array([float(owner.examples)])


def weighted_delta_entries(settings: MergeSettings, names: Iterable[str]) -> list[TensorEntry]:
    bound = settings.weight_bound * settings.bounds.delta
    shapes = settings.plan.shapes
    return [TensorEntry(name=f"weighted_delta/{name}", shape=shapes[name], bound=bound) for name in names]


def weighted_delta_tensors(
    settings: MergeSettings, owner: OwnerTerms, names: Iterable[str]
) -> Iterator[tuple[str, NDArray]]:
    weight = owner_weight(settings, owner)
    for name in names:
        # float64 products of float32 numbers, without a float64 copy of them: embeddings are large
        yield f"weighted_delta/{name}", np.multiply(weight, owner.delta[name].detach().numpy(), dtype=np.float64)


def mean_delta(plan: MergePlan, total: SummedTensors, name: str) -> Tensor:
    """sum n_i delta_i / sum n_i, float64. Embeddings are large: besides the result, there is one piece in memory."""
    weight, summed = total["weight"][0], f"weighted_delta/{name}"
    mean, start = np.empty(plan.shapes[name]), 0
    for piece in pieces(mean.reshape(-1)):
        np.divide(total.some_of(summed, slice(start, start + len(piece))), weight, out=piece)
        start += len(piece)
    return torch.from_numpy(mean)


def means(plan: MergePlan, total: SummedTensors, names: Iterable[str]) -> dict[str, Tensor]:
    """The mean delta of each parameter, float64."""
    return {name: mean_delta(plan, total, name) for name in names}


def unchanged(plan: MergePlan, names: Iterable[str]) -> dict[str, Tensor]:
    """Zero deltas, which take no memory, for the parameters `names`."""
    return {name: torch.zeros(()).expand(plan.shapes[name]) for name in names}


def with_unchanged(settings: MergeSettings, merged: MergedDelta) -> MergedDelta:
    """A whole merged delta: that of every changed parameter, and zeros for those that are left alone."""
    return replace(merged, delta={**merged.delta, **unchanged(settings.plan, settings.plan.left_alone)})


def to_array(tensor: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().cpu().to(torch.float64).numpy()
    return array
