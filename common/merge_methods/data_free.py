"""RegMean without data: Grams made of the weight changes themselves (WUDI, arXiv 2503.08099; ACTMat, arXiv 2604.01329).

The rows of a fine-tuned delta_i (d_out, d_in) are sums of gradients, hence combinations of the layer's inputs; so

    C_i = delta_i^T delta_i / ||delta_i||_F^2                    (d_in, d_in), trace 1

stands in for the Gram matrix of the inputs, and the linear system of `normal_equations.py` minimises
sum_i ||(delta - delta_i) delta_i^T||_F^2 / ||delta_i||_F^2, each owner weighted as agreed. No row is read: per layer C
and its product with delta leave, of all linear layers, also those whose measured Gram would be a table of tokens. A
layer that an owner did not change adds zeros. What is no linear layer's weight is averaged.
"""

from collections.abc import Iterator
from math import sqrt

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.agreement import Agreement, AgreementDraft
from common.merge_methods.normal_equations import System, add_ridge, notes_on
from common.merge_methods.terms import (
    OwnerTerms,
    Solution,
    mean_delta,
    owner_weight,
    unchanged,
    weight_bound,
    weight_entries,
    weight_tensors,
    weighted_delta_entries,
    weighted_delta_tensors,
)
from common.models.layers import Layer, join_slices, parameter_of
from common.models.plan import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout


def measurements(agreement: AgreementDraft) -> frozenset[str]:
    return frozenset()


def knobs(agreement: Agreement) -> tuple[float, ...]:
    return agreement.data_free.alphas


def layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    entries = weight_entries(agreement)
    for layer in plan.linear_layers:
        entries += layer_entries(agreement, layer)
    return TensorLayout((*entries, *weighted_delta_entries(agreement, plan, _averaged(plan))))


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    yield from weight_tensors(agreement, owner)
    for layer in plan.linear_layers:
        yield from layer_tensors(agreement, layer, owner)
    yield from weighted_delta_tensors(agreement, owner, _averaged(plan))


def solve(agreement: Agreement, plan: MergePlan, total: Total, knob: float, with_spectra: bool = True) -> Solution:
    merged: dict[str, Tensor] = {}
    layers = []
    for layer in plan.linear_layers:
        solved, note = system_of(agreement, layer).solve(total, knob, None, with_spectra)
        merged |= solved
        layers.append(note)
    averaged = {name: mean_delta(total, name).float() for name in _averaged(plan)}
    delta = averaged | unchanged(plan) | join_slices(merged, plan.linear_layers, plan.shapes)
    return Solution(delta=delta, layers=tuple(layers), notes=notes_on(layers))


def system_of(agreement: Agreement, layer: Layer) -> System:
    """The linear system of one layer."""
    return System(
        name=layer.weight.removesuffix(".weight"),
        kind="data_free_",
        gram_size=layer.d_in,
        layers=(layer,),
        alphas=agreement.data_free.alphas,
    )


def layer_entries(agreement: Agreement, layer: Layer) -> Iterator[TensorEntry]:
    """What is summed for one layer."""
    # C has entries of at most 1, and a ridge of at most 1 / d_in is added. By Cauchy and Schwarz an entry of C delta^T
    # is at most sqrt(C_jj) times the norm of a column of delta^T.
    bound = weight_bound(agreement)
    product_bound = bound * (sqrt(layer.d_in) + 1) * agreement.bounds.delta
    return system_of(agreement, layer).entries(2 * bound, product_bound)


def layer_tensors(agreement: Agreement, layer: Layer, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    """One owner's part of the layer's system."""
    delta = layer.take(owner.delta).double()  # (d_in, d_out)
    squares = delta.square().sum()
    gram = delta @ delta.T / squares if squares > 0 else torch.zeros(layer.d_in, layer.d_in, dtype=torch.float64)
    weighted = add_ridge(owner_weight(agreement, owner) * gram, agreement.data_free.ridge)
    yield from system_of(agreement, layer).tensors(weighted, owner.delta)


def _averaged(plan: MergePlan) -> tuple[str, ...]:
    linear = {parameter_of(layer.weight) for layer in plan.linear_layers}
    return tuple(name for name in plan.changed if name not in linear)
