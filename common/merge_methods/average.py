"""The weighted mean of the owners' deltas (McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1, one round).

delta = sum n_i delta_i / sum n_i        n_i: the owner's examples, or 1 when every owner counts alike
"""

from collections.abc import Iterator, Mapping

from numpy.typing import NDArray

from common.merge_methods.equations import Equation, mean_equations
from common.merge_methods.method import Measurement, SingleRoundMethod, register
from common.merge_methods.terms import (
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    mean_delta,
    rounded,
    weight_entries,
    weight_tensors,
    weighted_delta_entries,
    weighted_delta_tensors,
    with_unchanged,
)
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorLayout


class AverageTable(Hyperparameters):
    """The average has no hyperparameters."""


class Average(SingleRoundMethod[AverageTable]):
    """The weighted mean."""

    name = "average"
    title = "average"
    phrase = "the plain average"
    summary = "the mean of the owners' weights"
    paper = "McMahan et al., AISTATS 2017, arXiv 1602.05629"
    order = 1
    table = AverageTable
    trust = "nobody"
    fits_32_bits = True
    can_be_refitted = True

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return {}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        entries = weighted_delta_entries(settings, settings.plan.changed)
        return TensorLayout((*weight_entries(settings), *entries))

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        yield from weight_tensors(settings, owner)
        yield from weighted_delta_tensors(settings, owner, settings.plan.changed)

    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        return with_unchanged(
            settings,
            rounded(settings, ((name, mean_delta(settings.plan, total, name)) for name in settings.plan.changed)),
        )

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        return mean_equations(settings, settings.plan.changed)


AVERAGE = register(Average())
