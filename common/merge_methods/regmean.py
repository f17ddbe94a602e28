"""RegMean (Jin et al., ICLR 2023, arXiv 2212.09849, section 3.2, equation 2), over deltas.

For a linear layer y = W x with input rows X_i at owner i, the W that is closest to what every owner's own layer does
on its own rows, min sum_i ||X_i W^T - X_i W_i^T||^2, is a closed form in the Gram matrices G_i = X_i^T X_i. With off-
diagonal entries scaled by alpha (their section 3.2) and for deltas (W_0 cancels exactly):

    H_i = alpha G_i + (1 - alpha) diag(G_i)
    (sum H_i) delta^T = sum H_i delta_i^T

Summed over owners: per distinct input its Gram and row count; per layer G delta^T and, when several alphas are to be
tried, diag(G) delta^T, so that the coordinator solves for every alpha without another round. What is no linear layer's
weight is averaged; biases too, unless the agreement takes them as weights of one more input that is always 1: then X
has a column of ones, and delta^T the bias's change as its last row.

Ridge. Every owner adds ridge * mean(diag G_i) to its diagonal, in the Gram and in the products alike. Their sums then
pull the solution toward the owners' mean delta, each weighted by its mean diagonal, never toward zero weights; it costs
no byte, and with ridge = 0 the equations above hold to the letter.

What a solve can meet, each reported per layer:
    solved       one Cholesky factorisation for all the layers that share the input
    singular     no owner's rows reach some directions: there the layer keeps the base's behaviour (minimum norm delta)
    indefinite   negative eigenvalues, which no honest sum of Grams has: those directions keep the base's behaviour
    empty        no rows at all, as of an expert that nobody's tokens reach: the layer keeps the base's weights
"""

from collections.abc import Iterator

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.agreement import Agreement
from common.merge_methods.terms import (
    Gram,
    LayerNote,
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
from common.models import MergePlan, SharedInput, join_experts
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout

MEASUREMENTS = frozenset({"grams"})
MAX_ROWS_PER_EXAMPLE = 100_000  # tokens of the longest text that an agreement allows


def knobs(agreement: Agreement) -> tuple[float, ...]:
    return agreement.regmean.alphas


def is_sweep(agreement: Agreement) -> bool:
    return len(agreement.regmean.alphas) > 1


def layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    entries = weight_entries(agreement)
    for shared, one_example in zip(plan.inputs, agreement.bounds.grams, strict=True):
        # Of the products too: fine-tuning changes what a layer puts out by less than the largest that goes in.
        bound = weight_bound(agreement) * one_example
        square = (shared.gram_size, shared.gram_size)
        most_rows = agreement.bounds.examples * MAX_ROWS_PER_EXAMPLE
        entries.append(TensorEntry(name=f"rows/{shared.name}", shape=(1,), bound=most_rows))
        entries.append(TensorEntry(name=f"gram/{shared.name}", shape=square, bound=bound, packing="symmetric"))
        for layer in shared.layers:
            shape = (shared.gram_size, layer.d_out)
            entries.append(TensorEntry(name=f"gram_delta/{layer.weight}", shape=shape, bound=bound))
            if is_sweep(agreement):
                entries.append(TensorEntry(name=f"diagonal_delta/{layer.weight}", shape=shape, bound=bound))
    return TensorLayout((*entries, *weighted_delta_entries(agreement, plan, plan.averaged)))


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    yield from weight_tensors(agreement, owner)
    for shared in plan.inputs:
        gram = owner.grams[shared.name]
        matrix = _weighted_gram(agreement, owner, gram)  # (gram_size, gram_size) float64
        diagonal = matrix.diagonal()[:, None]  # (gram_size, 1)
        yield f"rows/{shared.name}", to_array(torch.tensor([float(gram.rows)]))
        yield f"gram/{shared.name}", to_array(matrix)
        for layer in shared.layers:
            delta = layer.take(owner.delta).double()  # (gram_size, d_out)
            if is_sweep(agreement):
                yield f"gram_delta/{layer.weight}", to_array(matrix @ delta)
                yield f"diagonal_delta/{layer.weight}", to_array(diagonal * delta)
            else:
                (alpha,) = agreement.regmean.alphas
                yield f"gram_delta/{layer.weight}", to_array(alpha * (matrix @ delta) + (1 - alpha) * diagonal * delta)
    yield from weighted_delta_tensors(agreement, owner, plan.averaged)


def _weighted_gram(agreement: Agreement, owner: OwnerTerms, gram: Gram) -> Tensor:
    """The owner's Gram on the scale on which owners are added up, with its ridge."""
    matrix = owner_scale(agreement, owner, gram) * gram.matrix
    matrix.diagonal().add_(agreement.regmean.ridge * matrix.diagonal().mean())
    return matrix


def solve(agreement: Agreement, plan: MergePlan, total: Total, knob: float) -> Solution:
    merged: dict[str, Tensor] = {}
    layers = []
    for shared in plan.inputs:
        solved, note = _solve_input(agreement, shared, total, knob)
        merged |= solved
        layers.append(note)
    averaged = {name: mean_delta(total, name).float() for name in plan.averaged}
    delta = averaged | unchanged(plan) | join_experts(merged)
    notes = tuple(
        f"{note.name}: {note.status}; {note.unseen_directions} of {note.gram_size} directions keep the base's behaviour"
        for note in layers
        if note.status != "solved"
    )
    return Solution(delta=delta, layers=tuple(layers), notes=notes)


def _solve_input(
    agreement: Agreement, shared: SharedInput, total: Total, alpha: float
) -> tuple[dict[str, Tensor], LayerNote]:
    gram = shrunk(torch.from_numpy(total[f"gram/{shared.name}"]), alpha)  # (gram_size, gram_size) float64
    products = []
    for layer in shared.layers:
        product = torch.from_numpy(total[f"gram_delta/{layer.weight}"])  # (gram_size, d_out)
        if is_sweep(agreement):
            product = alpha * product + (1 - alpha) * torch.from_numpy(total[f"diagonal_delta/{layer.weight}"])
        products.append(product)
    error = shared.gram_size * total.rounding_error(f"gram/{shared.name}")  # of the matrix, in the spectral norm
    solution, status, unseen = solve_symmetric(gram, torch.cat(products, dim=1), error)  # (gram_size, sum of d_out)
    condition, effective_rank = spectrum(gram)
    note = LayerNote(
        name=shared.name,
        status=status,
        d_in=shared.d_in,
        gram_size=shared.gram_size,
        rows=round(total[f"rows/{shared.name}"][0]),
        condition=condition,
        effective_rank=effective_rank,
        unseen_directions=unseen,
    )
    parts = solution.split([layer.d_out for layer in shared.layers], dim=1)
    merged: dict[str, Tensor] = {}
    for layer, part in zip(shared.layers, parts, strict=True):
        merged |= layer.give(part.float())
    return merged, note


def shrunk(gram: Tensor, alpha: float) -> Tensor:
    """alpha G + (1 - alpha) diag(G), a new (d, d)."""
    matrix = alpha * gram
    matrix.diagonal().copy_(gram.diagonal())
    return matrix


def solve_symmetric(matrix: Tensor, right: Tensor, error: float = 0.0) -> tuple[Tensor, str, int]:
    """Solve matrix @ x = right, float64, and say how it went: (x, status, directions left out).

    One Cholesky factorisation where the matrix is numerically positive definite. Otherwise the minimum norm solution
    over the directions whose eigenvalue is clearly positive: exact for a singular sum of Grams, whose products lie in
    those directions, and harmless for anything else. `error`: how far the matrix may be from the true one (2-norm).
    """
    dimension = len(matrix)
    tolerance = dimension * torch.finfo(matrix.dtype).eps
    diagonal = matrix.diagonal()
    if not matrix.any():
        return torch.zeros_like(right), "empty", dimension
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # L_jj^2 is what of direction j the directions before it leave unexplained.
    if not failed and (factor.diagonal() ** 2 > tolerance * diagonal + error).all():
        return torch.cholesky_solve(right, factor), "solved", 0
    values, vectors = torch.linalg.eigh(matrix)
    noise = 10 * tolerance * values.abs().max() + error
    kept = values > noise
    indefinite = bool((values < -noise).any())
    basis = vectors[:, kept]
    solution = basis @ ((basis.T @ right) / values[kept, None])
    return solution, "indefinite" if indefinite else "singular", int((~kept).sum())


def spectrum(matrix: Tensor) -> tuple[float | None, float | None]:
    """Condition number, and effective rank (Roy and Vetterli, 2007: the exponential of the spectrum's entropy)."""
    values = torch.linalg.eigvalsh(matrix)
    condition = float(values[-1] / values[0]) if values[0] > 0 else None
    shares = values.clamp(min=0) / values.clamp(min=0).sum()
    shares = shares[shares > 0]
    effective_rank = float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else None
    return condition, effective_rank
