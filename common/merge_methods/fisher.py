"""Fisher-weighted averaging (Matena and Raffel, NeurIPS 2022, arXiv 2111.09832, equation 4), over deltas.

    delta = sum F_i delta_i / sum F_i        elementwise; F_i: the diagonal of the owner's Fisher information

F_i is the owner's mean over its measured examples times its weight. Where sum F_i is not above `floor` times the
largest entry of its tensor, nobody's loss depends on the parameter and the weighted mean is taken; likewise where it is
so small that the sum's fixed point would show in the quotient. How many entries that were is reported.
"""

from collections.abc import Iterator

import torch
from numpy.typing import NDArray

from common.agreement import Agreement, AgreementDraft
from common.merge_methods.terms import (
    OwnerTerms,
    Solution,
    mean_delta,
    owner_weight,
    to_array,
    unchanged,
    weight_bound,
    weight_entries,
    weight_tensors,
    weighted_delta_entries,
    weighted_delta_tensors,
)
from common.models.plan import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout

QUOTIENT_PRECISION = 2.0**20  # a merged delta is exact to a millionth


def measurements(agreement: AgreementDraft) -> frozenset[str]:
    return frozenset({"fisher"})


def knobs(agreement: Agreement) -> tuple[None]:
    return (None,)


def layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    entries = [*weight_entries(agreement), *weighted_delta_entries(agreement, plan, plan.changed)]
    for name, squared_gradient in zip(plan.changed, agreement.bounds.fisher, strict=True):
        bound, shape = weight_bound(agreement) * squared_gradient, plan.shapes[name]
        entries.append(TensorEntry(name=f"fisher/{name}", shape=shape, bound=bound))
        entries.append(TensorEntry(name=f"fisher_delta/{name}", shape=shape, bound=bound * agreement.bounds.delta))
    return TensorLayout(tuple(entries))


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    yield from weight_tensors(agreement, owner)
    yield from weighted_delta_tensors(agreement, owner, plan.changed)
    scale = owner_weight(agreement, owner) / owner.fisher_examples
    for name in plan.changed:
        fisher = scale * to_array(owner.fisher[name])
        yield f"fisher/{name}", fisher
        yield f"fisher_delta/{name}", fisher * to_array(owner.delta[name])


def solve(agreement: Agreement, plan: MergePlan, total: Total, knob: None) -> Solution:
    delta = {}
    below_floor = 0
    for name in plan.changed:
        fisher = torch.from_numpy(total[f"fisher/{name}"])
        rounding = total.rounding_error(f"fisher_delta/{name}")
        known = fisher > max(agreement.fisher.floor * float(fisher.max()), QUOTIENT_PRECISION * rounding)
        weighted = torch.from_numpy(total[f"fisher_delta/{name}"]) / torch.where(known, fisher, 1.0)
        delta[name] = torch.where(known, weighted, mean_delta(total, name)).float()
        below_floor += int((~known).sum())
    parameters = sum(tensor.numel() for tensor in delta.values())
    note = f"{below_floor} of {parameters} parameters have no Fisher information above the floor and take the mean"
    return Solution(delta=delta | unchanged(plan), notes=(note,))
