"""Anchored RegMean: least squares on the owners' rows, held to the data-free solution (BMM, FeatCal).

RegMean trusts the rows everywhere, though they say little in most directions; the data-free solution keeps each owner's
change whole, and has seen no row. With D_A the data-free merged delta (`data_free.py`), G_i and its product as RegMean
sums them (`regmean.py`), t_i the trace of G_i:

    (sum G_i + anchor * sum t_i I) delta^T = sum G_i delta_i^T + anchor * sum t_i D_A^T

So the ridge pulls to D_A instead of the owners' mean (BMM, arXiv 2605.12843; FeatCal, arXiv 2605.13030, whose merged
model plays the part of D_A). anchor = 0 is RegMean, and a large anchor the data-free merge. The papers divide each G_i
by its Frobenius norm, and take 0.02 to 0.5 of that. Here owners count as in RegMean, whose tensors these are: whoever
compares both sends nothing more. And the trace, unlike the norm, can be read from a sum. It is at least the norm, and
not much more where one direction dominates, as in the inputs of transformers.

D_A travels with the merged delta and is verified with it. Then the equation above is linear in the total, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from numpy.typing import NDArray
from pydantic import Field

from common.lazy import lazy_module
from common.merge_methods.data_free import DATA_FREE, DATA_FREE_KINDS
from common.merge_methods.equations import Equation, MeanEquation
from common.merge_methods.method import Measurement, NoisedSum, SingleRoundMethod, register
from common.merge_methods.normal_equations import System, SystemEquation, notes_on
from common.merge_methods.regmean import GRAM_KINDS, REGMEAN, check_weighting
from common.merge_methods.terms import (
    WEIGHT_KINDS,
    Hyperparameters,
    LayerNote,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    ProblemType,
    Weighting,
    rounded,
    with_unchanged,
)
from common.models.layers import join_slices, parameter_of
from common.models.plan import MergePlan
from common.settings_file import Positive, Probability
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout, union

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

ANCHOR = "anchor/"  # before the name of a parameter of D_A


class AnchoredTable(Hyperparameters):
    """Several `anchors` are a sweep. `alpha` is one of regmean.alphas: left out, the largest. What else is measured and
    solved is as [regmean] and [data_free] say.
    """

    anchors: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=20)] = (0.5,)
    alpha: Probability | None = None


class Anchored(SingleRoundMethod[AnchoredTable]):
    """RegMean, pulled to the data-free solution."""

    name = "anchored"
    title = "anchored RegMean"
    phrase = "RegMean anchored at the data-free merge"
    summary = "least squares with the summed Gram matrices, held to what the weight changes alone give"
    paper = "BMM, arXiv 2605.12843; FeatCal, arXiv 2605.13030"
    swept_name = "anchor"
    swept_summary = "The anchor is how firmly the merge is held to the data-free one: 0 is RegMean."
    order = 8
    table = AnchoredTable
    trust = "nobody"
    tensor_kinds = WEIGHT_KINDS | DATA_FREE_KINDS | GRAM_KINDS
    fits_32_bits = True

    def swept(self, tables: Mapping[str, Hyperparameters]) -> tuple[float, ...]:
        return self.of(tables).anchors

    def check(self, tables: Mapping[str, Hyperparameters]) -> None:
        alpha, alphas = self.of(tables).alpha, REGMEAN.swept(tables)
        if alpha is not None and alpha not in alphas:
            raise ValueError(f"anchored.alpha = {alpha}: must be one of regmean.alphas = {list(alphas)}")

    def noised_sums(self, tables: Mapping[str, Hyperparameters]) -> frozenset[NoisedSum]:
        return REGMEAN.noised_sums(tables)

    def least_kept(self, tables: Mapping[str, Hyperparameters], dimension: int) -> float:
        """The diagonal and the anchor, which is relative to the trace."""
        alpha = self.of(tables).alpha
        return (1 - (max(REGMEAN.swept(tables)) if alpha is None else alpha)) / dimension + max(self.of(tables).anchors)

    def check_noised(
        self, tables: Mapping[str, Hyperparameters], weighting: Weighting, problem: ProblemType | None
    ) -> None:
        check_weighting(weighting)

    def noised_disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return REGMEAN.noised_disclosures(tables)

    def disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return REGMEAN.disclosures(tables)

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return REGMEAN.measurements(tables)

    def layout(self, settings: MergeSettings) -> TensorLayout:
        return union((REGMEAN.layout(settings), DATA_FREE.layout(settings)))

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        yield from REGMEAN.contribution(settings, owner)
        both = {entry.name for entry in REGMEAN.layout(settings).entries}
        for name, tensor in DATA_FREE.contribution(settings, owner):
            if name not in both:
                yield name, tensor

    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        plan, names = settings.plan, _anchored(settings.plan)
        data_free = DATA_FREE.solve(settings, total, _data_free_alpha(settings), with_spectra=False)
        beside = {ANCHOR + name: data_free.delta[name] for name in names}
        merged, notes = dict[str, "Tensor"](), list[LayerNote]()
        for shared, equation in zip(plan.inputs, self._systems(settings, hyperparameter), strict=True):
            rows = round(total[f"rows/{shared.name}"][0])
            solved, note = equation.given(beside).solve(total, rows, with_spectra, settings.device)
            merged |= solved
            notes.append(note)
        exact = join_slices(merged, plan.layers(), plan.shapes)
        anchored = rounded(settings, exact)
        rest = {(ANCHOR + name if name in names else name): tensor for name, tensor in data_free.rest.items()}
        kept = [note for note in data_free.layers if parameter_of(f"{note.name}.weight") not in names]
        notes += kept
        return with_unchanged(
            settings,
            MergedDelta(
                delta={**data_free.delta, **anchored.delta},
                beside=beside,
                rest={**rest, **anchored.rest},
                layers=tuple(notes),
                notes=notes_on(notes),
            ),
        )

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        names = set(_anchored(settings.plan))
        of_data_free = DATA_FREE.equations(settings, _data_free_alpha(settings))
        moved = (BesideEquation.of(each) if _subject(each) in names else each for each in of_data_free)
        return (*self._systems(settings, hyperparameter), *moved)

    def beside(self, settings: MergeSettings) -> tuple[TensorEntry, ...]:
        shapes = settings.plan.shapes
        return tuple(
            TensorEntry(name=ANCHOR + name, shape=shapes[name], bound=float("inf")) for name in _anchored(settings.plan)
        )

    def _systems(self, settings: MergeSettings, anchor: float | None) -> tuple[AnchoredEquation, ...]:
        assert anchor is not None
        alpha = self.hyperparameters(settings).alpha
        alphas = REGMEAN.hyperparameters(settings).alphas
        return tuple(
            AnchoredEquation.anchored(each, max(alphas) if alpha is None else alpha, anchor)
            for each in REGMEAN.systems(settings)
        )


@dataclass(frozen=True, kw_only=True)
class AnchoredEquation(SystemEquation):
    """(sum H_i + anchor * sum t_i I) D = sum H_i delta_i^T + anchor * sum t_i D_A^T; `at`: D_A^T as it was sent."""

    anchor: float
    at: Tensor | None = None

    @classmethod
    def anchored(cls, system: System, alpha: float, anchor: float) -> AnchoredEquation:
        plain = SystemEquation.of(system, alpha)
        return cls(name=plain.name, shape=plain.shape, system=system, alpha=alpha, anchor=anchor)

    def given(self, delta: Mapping[str, Tensor]) -> AnchoredEquation:
        return replace(self, at=self.part_of(Anchors(delta)).double())

    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        left, right = super().sides(summed, factor)
        pull = self.anchor * left.trace()
        left.diagonal().add_(pull)
        return left, right + pull * self._at

    def right_size(self, right: Tensor, summed: SummedTensors, factor: float) -> Tensor:
        left, products = super().sides(summed, factor)
        return products.abs() + self.anchor * left.trace() * self._at.abs()

    def solve(
        self, total: SummedTensors, rows: int, with_spectrum: bool, device: str
    ) -> tuple[dict[str, Tensor], LayerNote]:
        error = torch.from_numpy(total.diagonal_error(f"{self.system.kind}gram/{self.system.name}"))
        return self.system.solve_sides(*self.sides(total, 1.0), error, rows, with_spectrum, device)

    @property
    def _at(self) -> Tensor:
        assert self.at is not None  # `given` comes first
        return self.at


@dataclass(frozen=True, kw_only=True)
class BesideEquation(Equation):
    """An equation of the data-free merge, about D_A."""

    inner: Equation

    @classmethod
    def of(cls, inner: Equation) -> BesideEquation:
        return cls(name=ANCHOR + inner.name, shape=inner.shape, is_diagonal=inner.is_diagonal, inner=inner)

    def part_of(self, delta: Mapping[str, Tensor]) -> Tensor:
        return self.inner.part_of(Anchors(delta))

    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        return self.inner.sides(summed, factor)


class Anchors(Mapping[str, "Tensor"]):
    """D_A by parameter name, among all that was sent."""

    def __init__(self, sent: Mapping[str, Tensor]) -> None:
        self._sent = sent

    def __getitem__(self, name: str) -> Tensor:
        return self._sent[ANCHOR + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(ANCHOR) for name in self._sent if name.startswith(ANCHOR))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _anchored(plan: MergePlan) -> tuple[str, ...]:
    """The parameters that are solved with measured Grams; all others are those of the data-free merge."""
    return tuple(dict.fromkeys(name for layer in plan.layers() for name in layer.parameters))


def _subject(equation: Equation) -> str:
    """The parameter that an equation of the data-free merge is about."""
    if isinstance(equation, SystemEquation):
        (layer,) = equation.system.layers
        return parameter_of(layer.weight)
    assert isinstance(equation, MeanEquation)
    return equation.parameter


def _data_free_alpha(settings: MergeSettings) -> float:
    return max(DATA_FREE.hyperparameters(settings).alphas)


ANCHORED = register(Anchored())
