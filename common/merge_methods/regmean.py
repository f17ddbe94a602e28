"""RegMean (Jin et al., ICLR 2023, arXiv 2212.09849, section 3.2, equation 2), over deltas.

For a linear layer y = W x with input rows X_i at owner i, the W that is closest to what every owner's own layer does
on its own rows, min sum_i ||X_i W^T - X_i W_i^T||^2, is a closed form in the Gram matrices G_i = X_i^T X_i. With off-
diagonal entries scaled by alpha (their section 3.2) and for deltas (W_0 cancels exactly) it is the linear system of
`normal_equations.py`, which says also what is summed and what a solve can meet.

There is one system per distinct input. What is no linear layer's weight is averaged; biases too, unless the agreement
takes them as weights of one more input that is always 1: then X has a column of ones, and delta^T the bias's change as
its last row. Layers that the agreement names data-free have the Gram of `data_free.py` instead of a measured one.
"""

from collections.abc import Iterator

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.agreement import Agreement, AgreementDraft
from common.merge_methods import data_free
from common.merge_methods.normal_equations import System, add_ridge, notes_on
from common.merge_methods.terms import (
    Gram,
    OwnerTerms,
    Solution,
    mean_delta,
    owner_scale,
    to_array,
    unchanged,
    weight_bound,
    weight_entries,
    weight_tensors,
    weighted_delta_entries,
    weighted_delta_tensors,
)
from common.models.layers import join_slices
from common.models.plan import MergePlan, SharedInput
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout

MAX_ROWS_PER_EXAMPLE = 100_000  # tokens of the longest text that an agreement allows


def measurements(agreement: AgreementDraft) -> frozenset[str]:
    return frozenset({"grams"})


def knobs(agreement: Agreement) -> tuple[float, ...]:
    return agreement.regmean.alphas


def layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    entries = weight_entries(agreement)
    most_rows = agreement.bounds.examples * MAX_ROWS_PER_EXAMPLE
    for shared, one_example in zip(plan.inputs, agreement.bounds.grams, strict=True):
        # Of the products too: fine-tuning changes what a layer puts out by less than the largest that goes in.
        bound = weight_bound(agreement) * one_example
        entries.append(TensorEntry(name=f"rows/{shared.name}", shape=(1,), bound=most_rows))
        entries += _system_of(agreement, shared).entries(bound, bound)
    for layer in plan.data_free:
        entries += data_free.layer_entries(agreement, layer)
    return TensorLayout((*entries, *weighted_delta_entries(agreement, plan, plan.averaged)))


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    yield from weight_tensors(agreement, owner)
    for shared in plan.inputs:
        gram = owner.grams[shared.name]
        yield f"rows/{shared.name}", to_array(torch.tensor([float(gram.rows)]))
        yield from _system_of(agreement, shared).tensors(_weighted_gram(agreement, owner, gram), owner.delta)
    for layer in plan.data_free:
        yield from data_free.layer_tensors(agreement, layer, owner)
    yield from weighted_delta_tensors(agreement, owner, plan.averaged)


def solve(agreement: Agreement, plan: MergePlan, total: Total, knob: float, with_spectra: bool = True) -> Solution:
    merged: dict[str, Tensor] = {}
    layers = []
    for shared in plan.inputs:
        rows = round(total[f"rows/{shared.name}"][0])
        solved, note = _system_of(agreement, shared).solve(total, knob, rows, with_spectra)
        merged |= solved
        layers.append(note)
    for layer in plan.data_free:
        (alpha,) = agreement.data_free.alphas
        solved, note = data_free.system_of(agreement, layer).solve(total, alpha, None, with_spectra)
        merged |= solved
        layers.append(note)
    averaged = {name: mean_delta(total, name).float() for name in plan.averaged}
    delta = averaged | unchanged(plan) | join_slices(merged, (*plan.layers(), *plan.data_free), plan.shapes)
    return Solution(delta=delta, layers=tuple(layers), notes=notes_on(layers))


def _system_of(agreement: Agreement, shared: SharedInput) -> System:
    return System(
        name=shared.name,
        kind="",
        gram_size=shared.gram_size,
        layers=shared.layers,
        alphas=agreement.regmean.alphas,
    )


def _weighted_gram(agreement: Agreement, owner: OwnerTerms, gram: Gram) -> Tensor:
    """The owner's Gram on the scale on which owners are added up, with its ridge."""
    return add_ridge(owner_scale(agreement, owner, gram) * gram.matrix, agreement.regmean.ridge)
