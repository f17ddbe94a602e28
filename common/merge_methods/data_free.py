"""RegMean without data: Grams made of the weight changes themselves (WUDI, arXiv 2503.08099; ACTMat, arXiv 2604.01329).

The rows of a fine-tuned delta_i (d_out, d_in) are sums of gradients, hence combinations of the layer's inputs; so

    C_i = delta_i^T delta_i / ||delta_i||_F^2                    (d_in, d_in), trace 1

stands in for the Gram matrix of the inputs, and the linear system of `normal_equations.py` minimises
sum_i ||(delta - delta_i) delta_i^T||_F^2 / ||delta_i||_F^2, each owner weighted as agreed. No row is read. For every
linear layer, C and its product with delta leave; this includes layers whose measured Gram would be a table of tokens.
A layer that an owner did not change adds zeros. All other parameters are averaged.

The ridge pulls toward the owners' mean change, or toward `pull` times their sum: every owner then has ridge * pull * N
in its products where its Gram has the ridge. Owners whose changes hardly overlap all keep theirs in a sum, and a mean
keeps 1/N of each, so holding a merge to more than the mean may help (task arithmetic, arXiv 2212.04089; WUDI starts
from the sum too). The sum stays as large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import TYPE_CHECKING, Annotated

from numpy.typing import NDArray
from pydantic import Field

from common.lazy import lazy_module
from common.merge_methods.equations import Equation, mean_equations
from common.merge_methods.method import Measurement, SingleRoundMethod, register
from common.merge_methods.normal_equations import (
    ALPHA_SUMMARY,
    System,
    SystemEquation,
    add_floor,
    add_ridge,
    notes_on,
)
from common.merge_methods.terms import (
    WEIGHT_KINDS,
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    means,
    owner_weight,
    rounded,
    weight_entries,
    weight_tensors,
    weighted_delta_entries,
    weighted_delta_tensors,
    with_unchanged,
)
from common.models.layers import Layer, join_slices, parameter_of
from common.models.plan import MergePlan
from common.settings_file import Probability
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

DATA_FREE_KINDS = {
    "data_free_gram": "products of {their} weight changes with themselves, per layer; no row is in them",
    "data_free_gram_delta": "those products times {their} weight changes",
    "data_free_diagonal_delta": "diagonals of those products times {their} weight changes",
}


class DataFreeTable(Hyperparameters):
    """Several alphas are a sweep.

    The ridge is larger than RegMean's: weight changes have few large directions, and the Gram's other eigenvalues, far
    below the mean, are noise. (The demo's validation accuracy at alpha 1: 0.70 at 1e-6, 0.78 at 1e-2, 0.80 at 0.1.)
    `pull`: to how much of the sum of the owners' changes the ridge pulls; left out, to their mean, which is 1/N of it.
    """

    alphas: Annotated[tuple[Probability, ...], Field(min_length=1, max_length=20)] = (1.0,)
    ridge: Annotated[float, Field(ge=0, le=1)] = 0.1
    pull: Annotated[float, Field(gt=0, le=1)] | None = None


class DataFree(SingleRoundMethod[DataFreeTable]):
    """RegMean with the Gram matrices of weight changes."""

    name = "data_free"
    title = "data-free"
    phrase = "data-free merging"
    summary = "least squares with Gram matrices made from weight changes alone"
    paper = "WUDI, arXiv 2503.08099; ACTMat, arXiv 2604.01329"
    swept_name = "alpha"
    swept_summary = ALPHA_SUMMARY
    order = 6
    table = DataFreeTable
    trust = "nobody"
    tensor_kinds = WEIGHT_KINDS | DATA_FREE_KINDS
    fits_32_bits = True
    can_be_refitted = True

    def swept(self, tables: Mapping[str, Hyperparameters]) -> tuple[float, ...]:
        return self.of(tables).alphas

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return {}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        entries = weight_entries(settings)
        for layer in settings.plan.linear_layers:
            entries += self.layer_entries(settings, layer)
        return TensorLayout((*entries, *weighted_delta_entries(settings, _averaged(settings.plan))))

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        yield from weight_tensors(settings, owner)
        for layer in settings.plan.linear_layers:
            yield from self.layer_tensors(settings, layer, owner)
        yield from weighted_delta_tensors(settings, owner, _averaged(settings.plan))

    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        assert hyperparameter is not None
        plan, merged, layers = settings.plan, dict[str, "Tensor"](), []
        for layer in plan.linear_layers:
            system = self.system_of(settings, layer)
            solved, note = system.solve(total, hyperparameter, None, with_spectra, settings.device)
            merged |= solved
            layers.append(note)
        exact = means(plan, total, _averaged(plan)) | join_slices(merged, plan.linear_layers, plan.shapes)
        return with_unchanged(settings, rounded(settings, exact, tuple(layers), notes_on(layers)))

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        assert hyperparameter is not None
        layers = settings.plan.linear_layers
        systems = (SystemEquation.of(self.system_of(settings, layer), hyperparameter) for layer in layers)
        return (*systems, *mean_equations(settings, _averaged(settings.plan)))

    # One layer, for RegMean too, which merges some layers this way.

    def system_of(self, settings: MergeSettings, layer: Layer) -> System:
        """The linear system of one layer."""
        return System(
            name=layer.weight.removesuffix(".weight"),
            kind="data_free_",
            gram_size=layer.d_in,
            layers=(layer,),
            alphas=self.hyperparameters(settings).alphas,
        )

    def layer_entries(self, settings: MergeSettings, layer: Layer) -> Iterator[TensorEntry]:
        """What is summed for one layer."""
        return self.system_of(settings, layer).entries(*self._bounds(settings, layer))

    def _bounds(self, settings: MergeSettings, layer: Layer) -> tuple[float, float]:
        """The largest number that one owner may add to the Gram, and to its product."""
        # C has entries of at most 1, and a ridge of at most 1 / d_in is added. By Cauchy and Schwarz an entry of
        # C delta^T is at most sqrt(C_jj) times the norm of a column of delta^T.
        bound = settings.weight_bound
        return 2 * bound, bound * (sqrt(layer.d_in) + max(1.0, self.pull_of(settings))) * settings.bounds.delta

    def layer_tensors(self, settings: MergeSettings, layer: Layer, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        """One owner's part of the layer's system."""
        delta = layer.take(owner.delta).double()  # (d_in, d_out)
        squares = delta.square().sum()
        gram = delta @ delta.T / squares if squares > 0 else torch.zeros(layer.d_in, layer.d_in, dtype=torch.float64)
        weighted, ridge = owner_weight(settings, owner) * gram, self.hyperparameters(settings).ridge
        further = (self.pull_of(settings) - 1) * ridge * float(weighted.diagonal().mean())
        add_floor(add_ridge(weighted, ridge), settings, *self._bounds(settings, layer))
        yield from self.system_of(settings, layer).tensors(weighted, owner.delta, further)

    def pull_of(self, settings: MergeSettings) -> float:
        """To how many times the owners' mean change the ridge pulls."""
        pull = self.hyperparameters(settings).pull
        return 1.0 if pull is None else pull * settings.num_owners


def _averaged(plan: MergePlan) -> tuple[str, ...]:
    linear = {parameter_of(layer.weight) for layer in plan.linear_layers}
    return tuple(name for name in plan.changed if name not in linear)


DATA_FREE = register(DataFree())
