"""Fisher-weighted averaging (Matena and Raffel, NeurIPS 2022, arXiv 2111.09832, equation 4), over deltas.

    delta = sum F_i delta_i / sum F_i        elementwise; F_i: the diagonal of the owner's Fisher information

F_i is the owner's mean over its measured examples, times its weight. An entry takes the weighted mean instead where
sum F_i is at most `floor` times the largest entry of its tensor, because nobody's loss depends on that parameter. It
does so, too, where sum F_i is so small that the sum's fixed point would show in the quotient. The report counts both.

Where owners verify the merge, every entry must solve the equation above, and none may be so light that an error in it
is lost beside the others. So each owner raises its F_i, before it is summed, to the larger of both floors and
LEAST_SHARE times the mean of its group (equations.Equation.group_rows). Where nobody's loss depends on a parameter, it
takes about the owners' mean change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.lazy import lazy_module
from common.merge_methods.equations import Equation, FisherEquation
from common.merge_methods.method import Measurement, SingleRoundMethod, register
from common.merge_methods.terms import (
    WEIGHT_KINDS,
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    mean_delta,
    owner_weight,
    rounded,
    to_array,
    weight_entries,
    weight_tensors,
    weighted_delta_entries,
    weighted_delta_tensors,
    with_unchanged,
)
from common.summation.fixed_point import fraction_bits
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

QUOTIENT_PRECISION = 2.0**20  # a merged delta is exact to a millionth
LEAST_SHARE = 2.0**-8  # of its group's mean; with less, an error in an entry could be lost beside the others
FLOOR = 2.0**18  # times the rounding of a sum, so where nobody's loss depends on a parameter it is exact to 2^-19


class FisherTable(Hyperparameters):
    """`measured_examples`: how many of an owner's training examples are measured at most."""

    floor: Annotated[float, Field(ge=0, le=1)] = 1e-12
    measured_examples: Annotated[int, Field(ge=1)] = 256


class Fisher(SingleRoundMethod[FisherTable]):
    """The mean weighted by Fisher information."""

    name = "fisher"
    title = "Fisher"
    phrase = "Fisher averaging"
    summary = "the mean of the owners' weights, each weighted by how much the owner's loss depends on it"
    paper = "Matena and Raffel, NeurIPS 2022, arXiv 2111.09832"
    order = 3
    table = FisherTable
    trust = "nobody"
    tensor_kinds = WEIGHT_KINDS | {
        "fisher": "squared gradients, summed over {their} examples (Fisher information)",
        "fisher_delta": "squared gradients times {their} weight changes",
    }

    def disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return (
            "If the model embeds tokens, squared gradients (Fisher) show which tokens occur at any of the owners, "
            "whether or not the embeddings were frozen.",
        )

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return {Measurement.FISHER: self.of(tables).measured_examples}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        plan, bounds = settings.plan, settings.bounds
        entries = [*weight_entries(settings), *weighted_delta_entries(settings, plan.changed)]
        for name in plan.changed:
            bound, shape = settings.weight_bound * bounds.fisher[name], plan.shapes[name]
            entries.append(TensorEntry(name=f"fisher/{name}", shape=shape, bound=bound))
            entries.append(TensorEntry(name=f"fisher_delta/{name}", shape=shape, bound=bound * bounds.delta))
        return TensorLayout(tuple(entries))

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        yield from weight_tensors(settings, owner)
        yield from weighted_delta_tensors(settings, owner, settings.plan.changed)
        scale = owner_weight(settings, owner) / owner.fisher_examples
        for name in settings.plan.changed:
            fisher = np.asarray(scale * to_array(owner.fisher[name]), order="C")  # of any shape, also of none
            if settings.has_floors:
                self._raise(settings, name, fisher.reshape(-1))
            yield f"fisher/{name}", fisher
            yield f"fisher_delta/{name}", fisher * to_array(owner.delta[name])

    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        floor, exact, below_floor = self.hyperparameters(settings).floor, dict[str, "Tensor"](), 0
        for name in settings.plan.changed:
            fisher = torch.from_numpy(total[f"fisher/{name}"])
            rounding = total.rounding_error(f"fisher_delta/{name}")
            if settings.has_floors:
                exact[name] = torch.from_numpy(total[f"fisher_delta/{name}"]) / fisher
                continue
            known = fisher > max(floor * float(fisher.max()), QUOTIENT_PRECISION * rounding)
            weighted = torch.from_numpy(total[f"fisher_delta/{name}"]) / torch.where(known, fisher, 1.0)
            exact[name] = torch.where(known, weighted, mean_delta(settings.plan, total, name))
            below_floor += int((~known).sum())
        parameters = sum(tensor.numel() for tensor in exact.values())
        note = f"{below_floor} of {parameters} parameters have no Fisher information above the floor and take the mean"
        notes = () if settings.has_floors else (note,)
        return with_unchanged(settings, rounded(settings, exact, notes=notes))

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        return tuple(FisherEquation.of(name, settings.plan.shapes[name]) for name in settings.plan.changed)

    def _raise(self, settings: MergeSettings, name: str, fisher: NDArray[np.float64]) -> None:
        """Raise what an owner contributes of each entry of a tensor, (entries,), to the least, in place."""
        bound = settings.weight_bound * settings.bounds.fisher[name] * settings.bounds.delta
        rounding = 0.5 ** fraction_bits(bound, settings.num_owners)
        floor = self.hyperparameters(settings).floor
        least = max(floor * float(fisher.max()), FLOOR * rounding)
        size = FisherEquation.of(name, settings.plan.shapes[name]).group_rows
        for start in range(0, len(fisher), size):
            group = fisher[start : start + size]  # whose check has one tolerance
            group.clip(max(least, LEAST_SHARE * float(group.mean())), out=group)  # check: no-entry-is-too-light


FISHER = register(Fisher())
