"""Iso-C (Marczak et al., ICML 2025, arXiv 2502.04959, section 4.1): the owners' summed change with a flat spectrum.

With L = scale * sum of delta_i = U S V^T of a linear layer, the paper sets every singular value to their mean, so that
directions that only one owner needs count as much as those that all share:

    delta = mean(S) U V^T                                   all other parameters: the mean change

Where L has no direction, for example because every owner's change is of low rank, U and V are arbitrary. So directions
fade out smoothly below `FADE` times the root mean square e of the singular values, and the mean is over those that are
left. With G = S^2 / (S^2 + (FADE e)^2):

    delta = (sum S / sum G) U sqrt(G) V^T

This is the paper's, to a thousandth, where all singular values are at least a tenth of e. It has one value, so every
owner can compute it: owners verify L, which is linear in what they summed, and then apply the function themselves. An
error in a direction that L lacks is enlarged sqrt(d / r) / FADE times, where r of its d singular values are not zero:
a thousand times for adapters of low rank. Honest rounding stays small; SECURITY.md says what a coordinator could hide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

from numpy.typing import NDArray
from pydantic import Field

from common.lazy import lazy_module
from common.merge_methods.average import AVERAGE
from common.merge_methods.equations import Equation, MeanEquation
from common.merge_methods.method import Measurement, SingleRoundMethod, register
from common.merge_methods.terms import (
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    means,
    rounded,
    with_unchanged,
)
from common.models.layers import join_slices, parameter_of
from common.settings_file import Positive
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

FADE = 2.0**-8


class IsotropicTable(Hyperparameters):
    """Several scales are a sweep. The best depends on how many directions the owners need (docs/which-method.md)."""

    scales: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=20)] = (1.0, 3.0)


class Isotropic(SingleRoundMethod[IsotropicTable]):
    """The sum of task vectors with equal singular values."""

    name = "isotropic"
    title = "isotropic"
    phrase = "isotropic merging"
    summary = "the base plus the sum of the owners' changes, in which every direction of a layer counts the same"
    paper = "Iso-C: Marczak et al., ICML 2025, arXiv 2502.04959"
    swept_name = "scale"
    swept_summary = "The scale is how far the base is moved, as a multiple of the sum of the owners' changes."
    order = 5
    table = IsotropicTable
    trust = "nobody"
    fits_32_bits = True

    def swept(self, tables: Mapping[str, Hyperparameters]) -> tuple[float, ...]:
        return self.of(tables).scales

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return {}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        return AVERAGE.layout(settings)

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        return AVERAGE.contribution(settings, owner)

    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        assert hyperparameter is not None
        exact = means(settings.plan, total, settings.plan.changed)
        for name in self.applied(settings):
            exact[name] *= hyperparameter * total.num_owners
        return self.applied_to(settings, with_unchanged(settings, rounded(settings, exact)), hyperparameter)

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        assert hyperparameter is not None
        shapes, flattened = settings.plan.shapes, self.applied(settings)
        return tuple(
            MeanEquation.of(name, shapes[name], scale=hyperparameter, per_owner=True)
            if name in flattened
            else MeanEquation.of(name, shapes[name])
            for name in settings.plan.changed
        )

    def applied(self, settings: MergeSettings) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parameter_of(layer.weight) for layer in settings.plan.linear_layers))

    def apply(
        self, settings: MergeSettings, solved: Mapping[str, Tensor], hyperparameter: float | None
    ) -> Iterator[tuple[str, Tensor]]:
        layers, shapes = settings.plan.linear_layers, settings.plan.shapes
        for name in self.applied(settings):
            parts: dict[str, Tensor] = {}
            of_parameter = tuple(each for each in layers if parameter_of(each.weight) == name)
            for layer in of_parameter:
                parts[layer.weight] = layer.give(flattened(layer.take(solved).double()))[layer.weight]
            yield name, join_slices(parts, of_parameter, shapes)[name]


def flattened(matrix: Tensor) -> Tensor:
    """(sum S / sum G) U sqrt(G) V^T of U S V^T (m, n) float64, with G as at the top of this file."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    squares = values.square()
    if not squares.any():
        return torch.zeros_like(matrix)
    kept = squares / (squares + FADE**2 * squares.mean())  # G
    flat: Tensor = values.sum() / kept.sum() * (left * kept.sqrt()) @ right
    return flat


ISOTROPIC = register(Isotropic())
