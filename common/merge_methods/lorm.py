"""LoRM (Salami et al., ICLR 2025, arXiv 2410.17961, section 4.1): RegMean for LoRA owners that share one factor.

A LoRA change is delta_i = B_i A_i. Where all owners trained B_i alone, on one frozen A, every change reads the same r
directions of the layer's input. So nothing else need be summed about it: with Q an orthonormal basis of these
directions (r, d_in),

    B_i = delta_i Q^T        P_i = Q G_i Q^T        (sum P_i) B^T = sum P_i B_i^T        delta = B Q

which is RegMean (`regmean.py`, at alpha 1) among all changes that A can make. An owner sends r (r + 1) / 2 + r d_out
numbers a layer, and Q, in place of d_in (d_in + 1) / 2 + d_in d_out. Where no Gram is measured, G_i is the owner's
weight times I, and B the mean of B_i.

This is for the layers in the model's blocks. What is outside, such as a classifier, which LoRA trains whole, is merged
as RegMean merges it, and all other parameters are averaged.

Which basis. A has many for the same directions, and an owner's model shows only its own. Every owner takes the one
that is closest to a fixed random matrix S (orthogonal Procrustes problem: Schoenemann, 1966), from its own change: with
V the right singular vectors of delta_i and V S = X s Y^T,

    Q = Y X^T V

which is the same whatever basis V is. All Q have norm sqrt(r), so their mean has it only if all owners' are the same.
The coordinator refuses to merge otherwise, and an owner whose change reads more or fewer than r directions takes no
part.

Q and B travel beside the merged delta and are verified. Each owner multiplies them itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.errors import ModelError, NumericalError, SettingsError
from common.lazy import lazy_module
from common.merge_methods.data_free import DATA_FREE_KINDS
from common.merge_methods.equations import Equation, MeanEquation
from common.merge_methods.method import Measurement, SingleRoundMethod, register
from common.merge_methods.normal_equations import System, SystemEquation, add_floor, add_ridge, notes_on
from common.merge_methods.regmean import GRAM_KINDS, REGMEAN, GramPart
from common.merge_methods.terms import (
    WEIGHT_KINDS,
    Hyperparameters,
    LayerNote,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    owner_scale,
    owner_weight,
    rounded,
    to_array,
    with_unchanged,
)
from common.models.layers import Layer
from common.models.plan import MergePlan
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

UP, DOWN = "lorm_up/", "lorm_down/"  # before a parameter's name: B, (d_out, r), and Q, (r, d_in)
KIND = "lorm_"
LEAST_DIRECTION = 2.0**-10  # of the largest: a weaker one drowns in the rounding of float32 weights
TOLERANCE = 2.0**-7  # for the squared norm of the mean of all Q


class LoRMTable(Hyperparameters):
    """`rank`: of the owners' LoRA adapters. The rows that are measured, and the ridge, are those of [regmean]."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 8


class LoRM(SingleRoundMethod[LoRMTable]):
    """RegMean among the changes that the owners' common LoRA factor can make."""

    name = "lorm"
    title = "LoRM"
    phrase = "LoRM"
    summary = "least squares for the second factor of LoRA adapters that share the first one"
    paper = "Salami et al., ICLR 2025, arXiv 2410.17961"
    order = 13
    table = LoRMTable
    trust = "nobody"
    tensor_kinds = (
        WEIGHT_KINDS
        | DATA_FREE_KINDS
        | GRAM_KINDS
        | {
            "lorm_gram": "Gram matrices of a layer's inputs in the few directions that the adapters read",
            "lorm_gram_delta": "those Gram matrices times {their} weight changes in these directions",
            "lorm_down": "these directions, times {their} weight in the mean",
        }
    )

    def disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return REGMEAN.disclosures(tables)

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return REGMEAN.measurements(tables)

    def layout(self, settings: MergeSettings) -> TensorLayout:
        entries = list(_outside(settings).layout(settings).entries)
        for layer in _layers(settings.plan):
            down = (self._rank(settings, layer), layer.d_in)
            entries.append(TensorEntry(name=DOWN + layer.weight, shape=down, bound=settings.weight_bound))
            entries += self._system(settings, layer).entries(*self._bounds(settings, layer))
        return TensorLayout(tuple(entries))

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        yield from _outside(settings).contribution(settings, owner)
        weight, ridge, inputs = (
            owner_weight(settings, owner),
            REGMEAN.hyperparameters(settings).ridge,
            _inputs(settings),
        )
        for layer in _layers(settings.plan):
            change = layer.take(owner.delta).double()  # (d_in, d_out)
            down = directions(change, self._rank(settings, layer), layer.weight)  # (r, d_in)
            yield DOWN + layer.weight, to_array(weight * down)
            gram = weight * torch.eye(len(down), dtype=torch.float64)
            if layer.weight in inputs:
                measured = owner.grams[inputs[layer.weight]]
                features = measured.matrix[: layer.d_in, : layer.d_in]  # without the constant, if there is one
                gram = owner_scale(settings, owner, measured) * down @ features.to(down) @ down.T
            add_floor(add_ridge(gram, ridge), settings, *self._bounds(settings, layer))
            own = {layer.weight: layer.from_input_first(down @ change)}
            yield from self._system(settings, layer).tensors(gram, own)

    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        outside = _outside(settings)
        merged = outside.solve(settings, total, max(outside.alphas), with_spectra=with_spectra)
        exact, notes = dict[str, "Tensor"](), list[LayerNote]()
        for layer in _layers(settings.plan):
            down = torch.from_numpy(total[DOWN + layer.weight] / total["weight"][0])  # (r, d_in)
            if abs(float(down.square().sum()) / len(down) - 1) > TOLERANCE:  # check: owners-share-a-factor
                raise NumericalError(
                    f"merge: {layer.weight}: the owners' adapters do not share their first factor",
                    hint="train the second factors alone, on one frozen first factor; or agree on method = "
                    '"data_free" or "regmean"',
                )
            solved, note = self._system(settings, layer).solve(total, 1.0, None, with_spectra, settings.device)
            notes.append(note)
            exact[UP + layer.weight] = layer.to_input_first(solved[layer.weight]).T.contiguous()  # (d_out, r)
            exact[DOWN + layer.weight] = down
            exact[layer.weight] = torch.zeros(settings.plan.shapes[layer.weight], dtype=torch.float64)
        inside = rounded(settings, exact, tuple(notes), notes_on(notes))
        both = replace(
            merged,
            delta={**merged.delta, **inside.delta},
            beside=inside.beside,
            rest={**merged.rest, **inside.rest},
            layers=(*merged.layers, *inside.layers),
            notes=(*merged.notes, *inside.notes),
        )
        return self.applied_to(settings, with_unchanged(settings, both), hyperparameter)

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        outside, found = _outside(settings), list[Equation]()
        for layer in _layers(settings.plan):
            name, shape = DOWN + layer.weight, (self._rank(settings, layer), layer.d_in)
            found.append(MeanEquation.of(name, shape, weighted=name))
            found.append(UpEquation.of(self._system(settings, layer), 1.0))
            found.append(ZeroEquation.about(layer.weight, settings.plan.shapes[layer.weight]))
        return (*outside.equations(settings, max(outside.alphas)), *found)

    def beside(self, settings: MergeSettings) -> tuple[TensorEntry, ...]:
        entries = []
        for layer in _layers(settings.plan):
            rank = self._rank(settings, layer)
            entries.append(TensorEntry(name=UP + layer.weight, shape=(layer.d_out, rank), bound=inf))
            entries.append(TensorEntry(name=DOWN + layer.weight, shape=(rank, layer.d_in), bound=inf))
        return tuple(entries)

    def applied(self, settings: MergeSettings) -> tuple[str, ...]:
        return tuple(layer.weight for layer in _layers(settings.plan))

    def apply(
        self, settings: MergeSettings, solved: Mapping[str, Tensor], hyperparameter: float | None
    ) -> Iterator[tuple[str, Tensor]]:
        for layer in _layers(settings.plan):
            up, down = solved[UP + layer.weight].double(), solved[DOWN + layer.weight].double()
            yield layer.weight, layer.from_input_first((up @ down).T).contiguous()

    def _rank(self, settings: MergeSettings, layer: Layer) -> int:
        return min(self.hyperparameters(settings).rank, layer.d_in)

    def _system(self, settings: MergeSettings, layer: Layer) -> System:
        rank = self._rank(settings, layer)
        name = layer.weight.removesuffix(".weight")
        return System(name=name, kind=KIND, gram_size=rank, layers=(replace(layer, d_in=rank),), alphas=(1.0,))

    def _bounds(self, settings: MergeSettings, layer: Layer) -> tuple[float, float]:
        """The largest number that one owner may add to P, and to its product with B^T."""
        # |Q x| <= |x|: an entry of P is at most the trace of G, and one of Q G delta^T at most the norm of a column of
        # G delta^T, whose entries are bounded as in RegMean, or by the change's if G = I. The ridge has the other half.
        name = _inputs(settings).get(layer.weight)
        largest = 1.0 if name is None else settings.bounds.grams[name]
        product = sqrt(layer.d_in) * max(largest, settings.bounds.delta)
        return 2 * settings.weight_bound * layer.d_in * largest, 2 * settings.weight_bound * product


@dataclass(frozen=True, kw_only=True)
class UpEquation(SystemEquation):
    """(sum P_i) B^T = sum P_i B_i^T, about B as it is sent."""

    def part_of(self, delta: Mapping[str, Tensor]) -> Tensor:
        (layer,) = self.system.layers
        return delta[UP + layer.weight].T


@dataclass(frozen=True, kw_only=True)
class ZeroEquation(MeanEquation):
    """w D = 0: what is published in this parameter's place is made of what is sent beside it."""

    @classmethod
    def about(cls, parameter: str, shape: tuple[int, ...]) -> ZeroEquation:
        mean = MeanEquation.of(parameter, shape)
        return cls(name=mean.name, shape=mean.shape, is_diagonal=True, parameter=parameter, weighted="")

    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        weight = torch.from_numpy(summed["weight"]).expand(self.shape[0])[:, None]
        return weight, torch.zeros(self.shape, dtype=torch.float64)


def directions(change: Tensor, rank: int, name: str) -> Tensor:
    """Q, (rank, d_in) float64: the basis of the directions that a change (d_in, d_out) reads. `name`: of the layer.

    Raises ModelError if it does not read just `rank` directions.
    """
    d_in = len(change)
    basis = torch.eye(d_in, dtype=torch.float64)  # if the rank is the whole space
    if rank < d_in:
        vectors, values, _ = torch.linalg.svd(change, full_matrices=False)
        counted = int((values > LEAST_DIRECTION * values[0]).sum()) if values[0] > 0 else 0
        if counted != rank:
            raise ModelError(
                f"{name}: its change reads {counted} directions of the layer's inputs, and the agreement says "
                f"lorm.rank = {rank}",
                hint="bring a model that was fine-tuned by LoRA of this rank, its first factor frozen",
            )
        basis = vectors[:, :rank].T  # (rank, d_in)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    fixed = torch.from_numpy(np.random.default_rng(seed).standard_normal((d_in, rank)))
    left, _, right = torch.linalg.svd(basis @ fixed)  # X, s, Y^T of (rank, rank)
    closest: Tensor = (left @ right).T @ basis
    return closest


def _layers(plan: MergePlan) -> tuple[Layer, ...]:
    """The layers that adapters change."""
    found = tuple(layer for layer in plan.linear_layers if _is_inside(plan, layer.weight))
    for layer in found:
        if layer.expert is not None:
            raise SettingsError(
                f"lorm: {layer.weight} is one of a mixture's experts, which share a parameter",
                hint="name the layers that adapters change in [merge] layers, without experts",
            )
    return found


def _is_inside(plan: MergePlan, name: str) -> bool:
    return not plan.blocks or any(name.startswith(f"{block}.") for block in plan.blocks)


def _outside(settings: MergeSettings) -> GramPart:
    """Everything else, as RegMean merges it."""
    plan, table = settings.plan, REGMEAN.hyperparameters(settings)
    inside = {layer.weight for layer in _layers(plan)}
    inputs = (
        replace(shared, layers=tuple(layer for layer in shared.layers if layer.whole not in inside))
        for shared in plan.inputs
    )
    part = GramPart(
        inputs=tuple(shared for shared in inputs if shared.layers),
        alphas=table.alphas,
        ridge=table.ridge,
        data_free=tuple(layer for layer in plan.data_free if layer.weight not in inside),
    )
    layers = (*(layer for shared in part.inputs for layer in shared.layers), *part.data_free)
    solved = {name for layer in layers for name in layer.parameters}
    return replace(part, averaged=tuple(name for name in plan.changed if name not in solved | inside))


def _inputs(settings: MergeSettings) -> dict[str, str]:
    """The name of the measured input of each layer that has one. A layer that is merged in blocks has none."""
    found = ((layer, shared.name) for shared in settings.plan.inputs for layer in shared.layers)
    return {layer.weight: name for layer, name in found if layer.features is None}


LORM = register(LoRM())
