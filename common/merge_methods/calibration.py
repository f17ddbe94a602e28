"""Calibration: block after block, every layer is fitted to what the owners' own models put out on their own rows.

RegMean++ (regmean_plus_plus.py) makes a layer do to merged inputs what the owners' layers would do to the same inputs.
But an own layer never saw merged inputs, and the error grows from block to block. Here the target is the output of the
owner's untouched model: with X_i the rows of block l's inputs on the merged blocks before it, Y_i the outputs of the
same layer in the owner's own model, over owners and rows

    min over delta  sum_i || X_i (W_0 + delta)^T - Y_i ||^2    (layer-wise distillation in closed form; as in
                                                                FeatCal, arXiv 2605.13030)

With C_i = X_i^T (Y_i - X_i W_0^T), G_i = X_i^T X_i and the RegMean++ solution delta_0 as the anchor:

    delta^T = delta_0^T + H^-1 (C - G delta_0^T)        G = sum G_i, C = sum C_i,
                                                        H = shrink G + (1 - shrink) diag(G)

Biases: where they are features (regmean.bias_feature), they are fitted too; else Y_i is taken without its bias.

The classifier comes last. With head = "labels" it is fitted to the owners' labels (ridge regression to one-hot targets,
t = onehot - 1/K), each class of an owner weighted by (its share)^-balance, the weights of an owner adding up to its
rows; several balances are a sweep. The scores are then scaled so that they are as large, in the mean over the rows, as
those of the owners' own models: the same decisions, and probabilities that are not flat.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.agreement import Agreement
from common.merge_methods import regmean
from common.merge_methods.regmean_plus_plus import contribution, layout
from common.merge_methods.sequence import Step, agreement_of, plan_of, steps
from common.merge_methods.terms import HeadTerms, LayerNote, OwnerTerms, Solution, owner_scale, to_array, weight_bound
from common.models import Layer, MergePlan, join_experts
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout

__all__ = ["MEASUREMENTS", "contribution", "knobs", "layout", "solve_step", "step_contribution", "step_layout"]

MEASUREMENTS: frozenset[str] = frozenset()
HEAD_RIDGE = 1e-2  # on the scale of the mean diagonal
LARGEST_LOGIT = 1000.0


def knobs(agreement: Agreement) -> tuple[float, ...] | tuple[None]:
    return agreement.calibration.balances if agreement.calibration.head == "labels" else (None,)


def fits_labels(agreement: Agreement, plan: MergePlan, step: Step) -> bool:
    """Whether this is the step of the classifier, and it is fitted to labels."""
    return agreement.calibration.head == "labels" and step.number == len(steps(plan))


def step_layout(agreement: Agreement, plan: MergePlan, step: Step) -> TensorLayout:
    if fits_labels(agreement, plan, step):
        return TensorLayout(tuple(_head_entries(agreement, plan, step)))
    adapted = _for(agreement, plan, step)
    entries = list(regmean.layout(adapted, plan_of(plan, step)).entries)
    for shared, one_example in zip(step.inputs, adapted.bounds.grams, strict=True):
        bound = weight_bound(agreement) * one_example
        entries += [
            TensorEntry(name=f"cross/{layer.weight}", shape=(shared.gram_size, layer.d_out), bound=bound)
            for layer in shared.layers
        ]
    return TensorLayout(tuple(entries))


def step_contribution(
    agreement: Agreement, plan: MergePlan, step: Step, owner: OwnerTerms
) -> Iterator[tuple[str, NDArray]]:
    if fits_labels(agreement, plan, step):
        yield from _head_tensors(agreement, owner)
        return
    yield from regmean.contribution(_for(agreement, plan, step), plan_of(plan, step), owner)
    for shared in step.inputs:
        scale = owner_scale(agreement, owner, owner.grams[shared.name])
        for layer in shared.layers:
            yield f"cross/{layer.weight}", to_array(scale * owner.crosses[layer.weight])


def solve_step(agreement: Agreement, plan: MergePlan, step: Step, total: Total, knob: float | None) -> Solution:
    if fits_labels(agreement, plan, step):
        return _solve_head(plan, step, total, knob or 0.0)
    alpha, shrink = agreement.calibration.alpha, agreement.calibration.shrink
    anchor = regmean.solve(_for(agreement, plan, step), plan_of(plan, step), total, alpha)
    fitted: dict[str, Tensor] = {}
    for shared in step.inputs:
        gram = torch.from_numpy(total[f"gram/{shared.name}"])  # (gram_size, gram_size) float64
        start = torch.cat([layer.take(anchor.delta).double() for layer in shared.layers], dim=1)
        cross = torch.cat([torch.from_numpy(total[f"cross/{layer.weight}"]) for layer in shared.layers], dim=1)
        error = shared.gram_size * total.rounding_error(f"gram/{shared.name}")
        correction, _, _ = regmean.solve_symmetric(regmean.shrunk(gram, shrink), cross - gram @ start, error)
        parts = (start + correction).split([layer.d_out for layer in shared.layers], dim=1)
        for layer, part in zip(shared.layers, parts, strict=True):
            fitted |= layer.give(part.float())
    return Solution(delta=dict(anchor.delta) | join_experts(fitted), layers=anchor.layers, notes=anchor.notes)


def _for(agreement: Agreement, plan: MergePlan, step: Step) -> Agreement:
    return agreement_of(agreement, plan, step, agreement.calibration.alpha)


# --- the classifier, from labels --------------------------------------------------------------------------------------


def classifier(plan: MergePlan) -> Layer:
    """The last layer of the plan, with its bias if it has one: here it is fitted whether it is a feature or not."""
    (layer,) = plan.inputs[-1].layers
    bias = f"{plan.inputs[-1].name}.bias"
    return replace(layer, bias=bias if bias in plan.shapes else None)


def _head_entries(agreement: Agreement, plan: MergePlan, step: Step) -> Iterator[TensorEntry]:
    layer = classifier(plan)
    features = layer.d_in + (layer.bias is not None)
    weight = weight_bound(agreement)
    bound = weight * max(1.0, _for(agreement, plan, step).bounds.grams[0])
    yield TensorEntry(name="head_rows", shape=(1,), bound=weight * regmean.MAX_ROWS_PER_EXAMPLE)
    for balance in agreement.calibration.balances:
        yield TensorEntry(name=f"head_gram@{balance!r}", shape=(features, features), bound=bound, packing="symmetric")
        yield TensorEntry(name=f"head_start@{balance!r}", shape=(features, layer.d_out), bound=bound)
        yield TensorEntry(name=f"head_labels@{balance!r}", shape=(features, layer.d_out), bound=bound)
        yield TensorEntry(name=f"head_scores@{balance!r}", shape=(1,), bound=weight * LARGEST_LOGIT**2)


def _head_tensors(agreement: Agreement, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    terms: HeadTerms | None = owner.head
    assert terms is not None  # measured in this step
    rows = len(terms.targets)
    by_rows = agreement.weighting == "rows"
    scale = owner.examples / owner.gram_examples if by_rows else 1 / rows
    yield "head_rows", to_array(torch.tensor([scale * rows]))
    classes = terms.start.shape[1]
    onehot = torch.nn.functional.one_hot(terms.targets, classes).double() - 1 / classes  # (rows, classes)
    centred = terms.scores - terms.scores.mean(dim=1, keepdim=True)
    for balance in agreement.calibration.balances:
        weights = scale * class_weights(terms.targets, classes, balance)  # (rows,)
        weighted = weights[:, None] * terms.features
        gram = weighted.T @ terms.features  # (features, features) float64
        gram.diagonal().add_(HEAD_RIDGE * gram.diagonal().mean())
        yield f"head_gram@{balance!r}", to_array(gram)
        yield f"head_start@{balance!r}", to_array(gram @ terms.start)
        yield f"head_labels@{balance!r}", to_array(weighted.T @ onehot)
        yield f"head_scores@{balance!r}", to_array((weights * (centred**2).sum(dim=1)).sum()[None])


def class_weights(targets: Tensor, classes: int, balance: float) -> Tensor:
    """(rows,) float64: proportional to (share of the row's class)^-balance, adding up to the number of rows."""
    shares = torch.bincount(targets, minlength=classes).double() / len(targets)
    weights = shares[targets] ** -balance
    return weights * len(targets) / weights.sum()


def _solve_head(plan: MergePlan, step: Step, total: Total, balance: float) -> Solution:
    layer = classifier(plan)
    gram = torch.from_numpy(total[f"head_gram@{balance!r}"])
    start = torch.from_numpy(total[f"head_start@{balance!r}"])
    labels = torch.from_numpy(total[f"head_labels@{balance!r}"])
    error = len(gram) * total.rounding_error(f"head_gram@{balance!r}")
    solution, status, unseen = regmean.solve_symmetric(gram, torch.cat([labels, start], dim=1), error)
    fitted, before = solution.split(layer.d_out, dim=1)  # (features, classes) each; `before` is the base's head
    size = float((fitted * (gram @ fitted)).sum())  # of the fitted scores, squared and summed over rows
    wanted = float(total[f"head_scores@{balance!r}"][0])
    delta = (wanted / size) ** 0.5 * fitted - before if size > 0 and wanted > 0 else fitted - before
    condition, effective_rank = regmean.spectrum(gram)
    note = LayerNote(
        name=step.inputs[0].name,
        status=status,
        d_in=layer.d_in,
        gram_size=len(gram),
        rows=round(float(total["head_rows"][0])),
        condition=condition,
        effective_rank=effective_rank,
        unseen_directions=unseen,
    )
    return Solution(delta=layer.give(delta.float()), layers=(note,))
