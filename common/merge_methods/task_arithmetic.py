"""Task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089, section 2): add the task vectors, scaled.

delta = scale * N * sum n_i delta_i / sum n_i        N owners; the scale is swept

When every owner counts alike (n_i = 1) this is the paper's scale * sum delta_i. When owners count by their examples it
uses the same sum as the average. Two sums of the same deltas with two kinds of weights would expose, among three
owners, the others' deltas to each (tests/attacks/test_leaks.py).
"""

from collections.abc import Iterator, Mapping
from typing import Annotated

from numpy.typing import NDArray
from pydantic import Field

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
from common.settings_file import Positive
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorLayout


class TaskArithmeticTable(Hyperparameters):
    """Several scales are a sweep."""

    scales: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=20)] = (0.3, 0.5, 1.0)


class TaskArithmetic(SingleRoundMethod[TaskArithmeticTable]):
    """The scaled sum of task vectors."""

    name = "task_arithmetic"
    title = "task arithmetic"
    phrase = "task arithmetic"
    summary = "the base plus a multiple of the owners' mean change"
    paper = "Ilharco et al., ICLR 2023, arXiv 2212.04089"
    swept_name = "scale"
    swept_summary = "The scale is how far the base is moved: with N owners, 1/N is the average."
    order = 2
    table = TaskArithmeticTable
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
        scale = hyperparameter * total.num_owners
        exact = {name: scale * mean for name, mean in means(settings.plan, total, settings.plan.changed).items()}
        return with_unchanged(settings, rounded(settings, exact))

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        assert hyperparameter is not None
        shapes = settings.plan.shapes
        return tuple(
            MeanEquation.of(name, shapes[name], scale=hyperparameter, per_owner=True) for name in settings.plan.changed
        )


TASK_ARITHMETIC = register(TaskArithmetic())
