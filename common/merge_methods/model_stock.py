"""Model Stock (Jang et al., ECCV 2024, arXiv 2403.19522, section 4): the average, as far as the owners agree.

Per tensor, delta = t * mean of delta_i, t = N c / (1 + (N - 1) c), where c is the cosine between the owners' changes:

    c = (||sum delta_i||^2 - sum ||delta_i||^2) / ((N - 1) sum ||delta_i||^2)

This is the mean inner product of pairs over the mean squared length: the cosine, if all lengths are equal. With m the
mean change and q the mean squared length, all of this is

    t = (N ||m||^2 - q) / ((N - 1) ||m||^2)

Below 0 the changes point away from each other, and the base's tensor stays as it is. m, q and N are linear in what the
owners sum, so owners verify them; then each computes t itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.errors import SettingsError
from common.lazy import lazy_module
from common.merge_methods.average import AVERAGE
from common.merge_methods.equations import Equation, MeanEquation
from common.merge_methods.method import Measurement, SingleRoundMethod, register
from common.merge_methods.terms import (
    WEIGHT_KINDS,
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    means,
    rounded,
    to_array,
    with_unchanged,
)
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

LENGTH, OWNERS = "squared_length/", "owners"
LEAST_FACTOR = 2.0**-20  # a smaller t is rounding, where the changes are orthogonal


class ModelStockTable(Hyperparameters):
    """Model Stock has no hyperparameters."""


class ModelStock(SingleRoundMethod[ModelStockTable]):
    """The mean, pulled toward the base where the owners' changes disagree."""

    name = "model_stock"
    title = "Model Stock"
    phrase = "Model Stock"
    summary = "the mean of the owners' weights, as far as their changes point the same way"
    paper = "Jang et al., ECCV 2024, arXiv 2403.19522"
    order = 4
    table = ModelStockTable
    trust = "nobody"
    tensor_kinds = WEIGHT_KINDS | {"squared_length": "the squared length of {their} weight change, per tensor"}

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return {}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        if settings.weighting != "owners":
            raise SettingsError("model_stock: every owner must count alike", hint='set weighting = "owners"')
        lengths = []
        for name in settings.plan.changed:
            longest = prod(settings.plan.shapes[name]) * settings.bounds.delta**2  # every entry at its bound
            lengths.append(TensorEntry(name=LENGTH + name, shape=(1,), bound=longest))
        return TensorLayout((*AVERAGE.layout(settings).entries, *lengths))

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        yield from AVERAGE.contribution(settings, owner)
        for name in settings.plan.changed:
            yield LENGTH + name, np.array([np.square(to_array(owner.delta[name])).sum()])

    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        exact = means(settings.plan, total, settings.plan.changed)
        for name in settings.plan.changed:
            exact[LENGTH + name] = torch.from_numpy(total[LENGTH + name] / total.num_owners)
        exact[OWNERS] = torch.tensor([total.num_owners], dtype=torch.float64)
        return self.applied_to(settings, with_unchanged(settings, rounded(settings, exact)), hyperparameter)

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        changes = AVERAGE.equations(settings, hyperparameter)
        names = [LENGTH + name for name in settings.plan.changed]
        lengths = (MeanEquation.of(name, (1,), weighted=name) for name in names)
        return (*changes, *lengths, CountEquation(name=OWNERS, shape=(1, 1)))

    def beside(self, settings: MergeSettings) -> tuple[TensorEntry, ...]:
        names = (*(LENGTH + name for name in settings.plan.changed), OWNERS)
        return tuple(TensorEntry(name=name, shape=(1,), bound=inf) for name in names)

    def applied(self, settings: MergeSettings) -> tuple[str, ...]:
        return settings.plan.changed

    def apply(
        self, settings: MergeSettings, solved: Mapping[str, Tensor], hyperparameter: float | None
    ) -> Iterator[tuple[str, Tensor]]:
        owners = float(solved[OWNERS])
        for name in settings.plan.changed:
            mean, squared_length = solved[name].double(), float(solved[LENGTH + name])
            square = float(mean.square().sum())
            factor = (owners * square - squared_length) / ((owners - 1) * square) if square > 0 else 0.0
            yield name, (factor if factor > LEAST_FACTOR else 0.0) * mean


@dataclass(frozen=True, kw_only=True)
class CountEquation(Equation):
    """D = N: every owner adds 1 / N on the left, and 1 on the right."""

    def part_of(self, delta: Mapping[str, Tensor]) -> Tensor:
        return delta[OWNERS][None]

    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        ones = torch.ones(1, 1, dtype=torch.float64)
        return ones / summed.num_owners, ones


MODEL_STOCK = register(ModelStock())
