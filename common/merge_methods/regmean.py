"""RegMean (Jin et al., ICLR 2023, arXiv 2212.09849, section 3.2, equation 2), over deltas.

For a linear layer y = W x with input rows X_i at owner i, RegMean looks for the W that is closest to what every owner's
own layer does on its own rows: min sum_i ||X_i W^T - X_i W_i^T||^2. The solution is a closed form in the Gram matrices
G_i = X_i^T X_i. With off-diagonal entries scaled by alpha (their section 3.2), and for deltas (W_0 cancels exactly), it
is the linear system of `normal_equations.py`, which also says what is summed and what a solve can meet.

There is one system per distinct input. All other parameters are averaged, and so are biases, unless the agreement
treats a bias as the weight of one more input that is always 1: then X has a column of ones, and delta^T has the bias's
change as its last row. Layers that the agreement names data-free have the Gram of `data_free.py` instead.

With privacy.epsilon, an owner adds noise to its G_i before anything else, and products are made of what it then has
(terms.GramNoise has the reason, and the proof). Its ridge is the agreed one of that noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Annotated

from numpy.typing import NDArray
from pydantic import Field

from common.errors import NumericalError, RuleError, SettingsError
from common.lazy import lazy_module
from common.merge_methods.data_free import DATA_FREE, DATA_FREE_KINDS
from common.merge_methods.equations import Equation, mean_equations
from common.merge_methods.method import Measurement, NoisedSum, SingleRoundMethod, register
from common.merge_methods.normal_equations import (
    ALPHA_SUMMARY,
    System,
    SystemEquation,
    add_floor,
    add_ridge,
    gram_room,
    notes_on,
)
from common.merge_methods.terms import (
    ROUNDING,
    WEIGHT_KINDS,
    Gram,
    GramNoise,
    Hyperparameters,
    LayerNote,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    ProblemType,
    Weighting,
    mean_delta,
    owner_scale,
    owner_weight,
    rounded,
    to_array,
    weight_entries,
    weight_tensors,
    weighted_delta_entries,
    weighted_delta_tensors,
    with_unchanged,
)
from common.models.layers import Layer, joined
from common.models.plan import SharedInput
from common.privacy.noise import bound_with_noise
from common.settings_file import Line, Probability
from common.summation.fixed_point import fraction_bits
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

MAX_ROWS_PER_EXAMPLE = 100_000  # tokens of the longest text that an agreement allows
GRAM_KINDS = {
    "gram": "Gram matrices: sums over {their} rows of products of a layer's inputs",
    "gram_delta": "Gram matrices times {their} weight changes",
    "diagonal_delta": "diagonals of Gram matrices times {their} weight changes",
    "rows": "the number of rows behind each Gram matrix",
}


class RegMeanTable(Hyperparameters):
    """Several alphas are a sweep, decided by the owners' summed metric.

    `bias_feature`: solve a bias with its weight, as the weight of one more input that is always 1, where every layer
    that shares the input has a bias. Otherwise biases are averaged. `data_free_layers`: weights of linear layers that
    are merged with the Gram of `data_free.py`, as [data_free] says: names, the beginnings of names up to a dot, or
    patterns (`*.attention.*`), at the largest of data_free.alphas. So are layers that see one row an example and may
    have too few (deploy/complete.py). `largest_gram`: a layer with more inputs than this is merged in blocks of its
    inputs, as if the inputs of different blocks were uncorrelated: fewer bytes, a coarser merge.
    """

    alphas: Annotated[tuple[Probability, ...], Field(min_length=1, max_length=20)] = (0.1, 0.5, 0.9, 0.95, 0.99)
    ridge: Annotated[float, Field(ge=0, le=1)] = 1e-4
    measured_examples: Annotated[int, Field(ge=1)] = 1000
    bias_feature: bool = False
    data_free_layers: tuple[Line, ...] = ()
    largest_gram: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class GramPart:
    """Some of a plan's parameters, merged as RegMean merges: all of them, or those of one step of a method.

    `alphas`: several leave separate products for each alpha to be tried; one folds alpha in before anything leaves.
    """

    inputs: tuple[SharedInput, ...]
    alphas: tuple[float, ...]
    ridge: float
    data_free: tuple[Layer, ...] = ()
    averaged: tuple[str, ...] = ()

    def layout(self, settings: MergeSettings) -> TensorLayout:
        entries = weight_entries(settings)
        most_rows = settings.bounds.examples * MAX_ROWS_PER_EXAMPLE
        for shared in self.inputs:
            # For the products too: fine-tuning changes a layer's outputs by less than the largest of its inputs.
            bound, noise = _bound(settings, shared), 0.0
            if settings.gram_noise is not None:
                noise = settings.gram_noise.own(shared.name)  # check: grams-of-inputs-have-noise
                _check_rounding(settings, settings.gram_noise, shared)
            entries.append(TensorEntry(name=f"rows/{shared.name}", shape=(1,), bound=most_rows))
            entries += self._system_of(shared).entries(bound, bound, noise)
        for layer in self.data_free:
            entries += DATA_FREE.layer_entries(settings, layer)
        return TensorLayout((*entries, *weighted_delta_entries(settings, self.averaged)))

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        yield from weight_tensors(settings, owner)
        for shared in self.inputs:
            gram = owner.grams[shared.name]
            bound, is_noised = _bound(settings, shared), settings.gram_noise is not None
            rows = owner.gram_examples if is_noised else gram.rows  # check: noised-grams-count-no-tokens
            yield f"rows/{shared.name}", to_array(torch.tensor([float(rows)]))
            if is_noised:
                weighted = _noised(settings, owner, shared.name, gram, self.ridge)
            else:
                weighted = add_ridge(owner_scale(settings, owner, gram) * gram.matrix, self.ridge)
            add_floor(weighted, settings, bound, bound)
            if not is_noised:
                _check_size(settings, owner, shared.name, weighted)
            yield from self._system_of(shared).tensors(weighted, owner.delta)
        for layer in self.data_free:
            yield from DATA_FREE.layer_tensors(settings, layer, owner)
        yield from weighted_delta_tensors(settings, owner, self.averaged)

    def solve(self, settings: MergeSettings, total: SummedTensors, alpha: float, *, with_spectra: bool) -> MergedDelta:
        notes: list[LayerNote] = []

        def solved() -> Iterator[tuple[str, Tensor]]:
            for shared in self.inputs:
                rows = round(total[f"rows/{shared.name}"][0])
                merged, note = self._system_of(shared).solve(total, alpha, rows, with_spectra, settings.device)
                notes.append(note)
                yield from merged.items()
            for layer in self.data_free:
                system = DATA_FREE.system_of(settings, layer)
                merged, note = system.solve(total, max(system.alphas), None, with_spectra, settings.device)
                notes.append(note)
                yield from merged.items()

        layers = (*(layer for shared in self.inputs for layer in shared.layers), *self.data_free)
        averaged = ((name, mean_delta(settings.plan, total, name)) for name in self.averaged)
        merged = rounded(settings, chain(averaged, joined(solved(), layers, settings.plan.shapes)))
        return replace(merged, layers=tuple(notes), notes=notes_on(notes))

    def equations(self, settings: MergeSettings, alpha: float) -> tuple[Equation, ...]:
        systems = [SystemEquation.of(each, alpha) for each in self.systems()]
        for layer in self.data_free:
            system = DATA_FREE.system_of(settings, layer)
            systems.append(SystemEquation.of(system, max(system.alphas)))
        return (*systems, *mean_equations(settings, self.averaged))

    def systems(self) -> tuple[System, ...]:
        """One linear system for each distinct input, in order."""
        return tuple(self._system_of(shared) for shared in self.inputs)

    def _system_of(self, shared: SharedInput) -> System:
        return System(name=shared.name, kind="", gram_size=shared.gram_size, layers=shared.layers, alphas=self.alphas)


def _bound(settings: MergeSettings, shared: SharedInput) -> float:
    """The largest number that one owner may add to a Gram or its products."""
    noise = settings.gram_noise
    if noise is None:
        return settings.weight_bound * settings.bounds.grams[shared.name]
    measured = min(settings.bounds.examples, REGMEAN.hyperparameters(settings).measured_examples)
    largest = noise.bound(shared.name, shared.gram_size, measured, 1)
    ridge = REGMEAN.hyperparameters(settings).ridge * noise.norms[shared.name] * measured
    return bound_with_noise(largest + ridge, noise.own(shared.name))


def _noised(settings: MergeSettings, owner: OwnerTerms, name: str, gram: Gram, ridge: float) -> Tensor:
    """One owner's Gram with its noise and ridge: nothing else is made of the Gram.

    Every example that was measured counts alike. The ridge is relative to the agreed norm, not to what was measured.
    """
    noise = settings.gram_noise
    assert noise is not None
    assert owner.noise is not None  # there is one in every round with noise
    noised = torch.from_numpy(owner.noise.added(f"gram/{name}", to_array(gram.matrix)))  # check: products-follow-noise
    relative = ridge * noise.norms[name] * owner.gram_examples / len(noised)
    noised.diagonal().add_(noise.ridge(name, len(noised)) + relative)
    return noised


def _check_rounding(settings: MergeSettings, noise: GramNoise, shared: SharedInput) -> None:
    """Raise SettingsError if fixed point is so coarse that one example moves a Gram by more than is accounted for."""
    bits = fraction_bits(_bound(settings, shared), settings.num_owners + len(settings.without_weights))
    moved = noise.rounding(shared.gram_size, noise.own(shared.name) * 2.0**bits)
    if moved > ROUNDING:  # check: noised-grams-are-rounded-finely
        raise SettingsError(
            f"gram/{shared.name}: rounding to fixed point would let one example move it by {moved:.2g} of its norm of "
            f"{noise.norms[shared.name]:g} more, at most {ROUNDING:g} is accounted for",
            hint="agree on larger bounds.gram_norms, fewer owners, fewer merge.layers or a larger privacy.epsilon",
        )


def _check_size(settings: MergeSettings, owner: OwnerTerms, name: str, weighted: Tensor) -> None:
    """Raise NumericalError for a Gram that the others would take for a false one (server/bounds.py)."""
    largest, bound = float(weighted.diagonal().max()) / owner_weight(settings, owner), settings.bounds.grams[name]
    if largest > gram_room(settings) * bound:  # check: own-grams-fit-the-weights
        raise NumericalError(
            f"gram/{name}: {largest:g} for each example is outside the agreed bound {bound:g}; nothing has left",
            hint="a larger bound needs a new agreement: see headroom in its [bounds]",
        )


def check_weighting(weighting: Weighting) -> None:
    """Raise RuleError for Grams whose sensitivity depends on how many examples an owner has."""
    if weighting != "rows":  # check: noised-grams-weigh-by-rows
        raise RuleError(
            f'weighting = "{weighting}": how far one example moves a Gram would depend on how many the owner has',
            hint='agree on weighting = "rows"',
        )


class RegMean(SingleRoundMethod[RegMeanTable]):
    """Least squares with the owners' Gram matrices."""

    name = "regmean"
    title = "RegMean"
    phrase = "RegMean"
    summary = "least squares with the summed Gram matrices of the layers' inputs"
    paper = "Jin et al., ICLR 2023, arXiv 2212.09849"
    swept_name = "alpha"
    swept_summary = ALPHA_SUMMARY
    order = 7
    table = RegMeanTable
    trust = "nobody"
    tensor_kinds = WEIGHT_KINDS | DATA_FREE_KINDS | GRAM_KINDS
    fits_32_bits = True
    can_be_refitted = True

    def swept(self, tables: Mapping[str, Hyperparameters]) -> tuple[float, ...]:
        return self.of(tables).alphas

    def noised_sums(self, tables: Mapping[str, Hyperparameters]) -> frozenset[NoisedSum]:
        return frozenset({"grams"})

    def least_kept(self, tables: Mapping[str, Hyperparameters], dimension: int) -> float:
        """The diagonal, of which 1 - alpha is kept whatever the rows are."""
        return (1 - min(self.of(tables).alphas)) / dimension

    def check_noised(
        self, tables: Mapping[str, Hyperparameters], weighting: Weighting, problem: ProblemType | None
    ) -> None:
        check_weighting(weighting)

    def noised_disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return (
            "Gram matrices have noise before anything is made of them, all of it added by {their} own program. It "
            "hides any one example, with all of its tokens, but not what the inputs of many are on average.",
        )

    def disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        if not self.of(tables).bias_feature:
            return ()
        return (
            "A constant 1 is among the inputs of layers with a bias, so their Gram matrices also hold the sum of the "
            "inputs.",
        )

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return {Measurement.GRAMS: self.of(tables).measured_examples}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        return self._part(settings).layout(settings)

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        return self._part(settings).contribution(settings, owner)

    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        assert hyperparameter is not None
        merged = self._part(settings).solve(settings, total, hyperparameter, with_spectra=with_spectra)
        return with_unchanged(settings, merged)

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        assert hyperparameter is not None
        return self._part(settings).equations(settings, hyperparameter)

    def systems(self, settings: MergeSettings) -> tuple[System, ...]:
        """The linear systems of measured Grams, one for each distinct input, in order."""
        return self._part(settings).systems()

    def _part(self, settings: MergeSettings) -> GramPart:
        table, plan = self.hyperparameters(settings), settings.plan
        return GramPart(
            inputs=plan.inputs,
            alphas=table.alphas,
            ridge=table.ridge,
            data_free=plan.data_free,
            averaged=plan.averaged,
        )


REGMEAN = register(RegMean())
