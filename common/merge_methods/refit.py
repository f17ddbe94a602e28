"""A body merged by another method, then one more sum: the classifier is refitted on it.

What a merge loses it loses mostly in the classifier: heads of owners with other labels and other shares of them do not
average. But for the classifier alone the whole problem is a least squares whose terms are sums over rows. With f the
classifier's input on the merged body, and 1 after it for the bias, each owner adds

    G_i = sum w f f^T      C_i = sum w f t^T

and the coordinator solves (sum G_i) W^T = sum C_i. The targets t are

    labels    onehot - 1/K. A row's weight w is (the share of its class at the owner)^-balance, scaled so that an
              owner's weights add up to its rows; several balances are a sweep. The scores are then scaled to be as
              large, in the mean, as those of the owners' own models: the same decisions, and probabilities that mean
              something
    scores    what the owner's own model puts out on the row; w = 1. No label is used

Ridge: every owner adds HEAD_RIDGE * mean(diag G_i) to its diagonal. It pulls to zero for labels, and for scores to the
base's classifier, whose terms G_i W_0^T travel too, since merged models are told as deltas.

The body (refit.body) is any merge that needs one sum and gives one model for a value of alpha.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.agreement import Agreement, AgreementDraft
from common.merge_methods import average, data_free, regmean
from common.merge_methods.normal_equations import add_ridge, solve_symmetric, spectrum
from common.merge_methods.sequence import Step
from common.merge_methods.terms import HeadTerms, LayerNote, OwnerTerms, Solution, to_array, weight_bound
from common.models.layers import Layer
from common.models.plan import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout

BODIES: dict[str, ModuleType] = {"average": average, "data_free": data_free, "regmean": regmean}
HEAD_RIDGE = 1e-2
LEAST_COUNT = 3  # a class of fewer rows weighs as if it had so many
LARGEST_SCORE = 1000.0


def knobs(agreement: Agreement) -> tuple[float, ...] | tuple[None]:
    return agreement.refit.balances if agreement.refit.targets == "labels" else (None,)


def measurements(agreement: AgreementDraft) -> frozenset[str]:
    of_body: frozenset[str] = _body(agreement).measurements(agreement)
    return of_body


def layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    of_body: TensorLayout = _body(agreement).layout(agreement, plan)
    return of_body


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    yield from _body(agreement).contribution(agreement, plan, owner)


def start(agreement: Agreement, plan: MergePlan, total: Total) -> Solution:
    merged: Solution = _body(agreement).solve(agreement, plan, total, agreement.refit_alpha)
    return merged


def _body(agreement: AgreementDraft) -> ModuleType:
    return BODIES[agreement.refit.body]


def steps(plan: MergePlan) -> tuple[Step, ...]:
    return (Step(number=1, block=None, inputs=plan.inputs[-1:]),)


def merged_names(plan: MergePlan, number: int) -> tuple[str, ...]:
    return plan.changed


def classifier(plan: MergePlan) -> Layer:
    """The last layer of the plan, with its bias if it has one: here it is fitted whether it is a feature or not."""
    (layer,) = plan.inputs[-1].layers
    bias = f"{plan.inputs[-1].name}.bias"
    return replace(layer, bias=bias if bias in plan.shapes else None)


def step_layout(agreement: Agreement, plan: MergePlan, step: Step) -> TensorLayout:
    layer = classifier(plan)
    features = layer.d_in + (layer.bias is not None)
    weight = weight_bound(agreement)
    bound = weight * max(1.0, agreement.bounds.grams[-1])
    entries = [TensorEntry(name="head_rows", shape=(1,), bound=weight * regmean.MAX_ROWS_PER_EXAMPLE)]
    for balance in _balances(agreement):
        square, rectangle = (features, features), (features, layer.d_out)
        entries += [
            TensorEntry(name=f"head_gram@{balance!r}", shape=square, bound=bound, packing="symmetric"),
            TensorEntry(name=f"head_start@{balance!r}", shape=rectangle, bound=bound),
            TensorEntry(name=f"head_targets@{balance!r}", shape=rectangle, bound=bound),
            TensorEntry(name=f"head_scores@{balance!r}", shape=(1,), bound=weight * LARGEST_SCORE**2),
        ]
    return TensorLayout(tuple(entries))


def step_contribution(
    agreement: Agreement, plan: MergePlan, step: Step, owner: OwnerTerms
) -> Iterator[tuple[str, NDArray]]:
    terms = owner.head
    assert terms is not None  # measured in this step
    rows, classes = terms.scores.shape
    scale = owner.examples / rows if agreement.weighting == "rows" else 1 / rows
    yield "head_rows", to_array(torch.tensor([scale * rows]))
    centred = terms.scores - terms.scores.mean(dim=1, keepdim=True)  # (rows, classes); decisions do not see the mean
    for balance in _balances(agreement):
        weights = scale * class_weights(terms.targets, balance)  # (rows,)
        weighted = weights[:, None] * terms.features
        gram = add_ridge(weighted.T @ terms.features, HEAD_RIDGE)  # (features, features) float64
        yield f"head_gram@{balance!r}", to_array(gram)
        yield f"head_start@{balance!r}", to_array(gram @ terms.start)
        yield f"head_targets@{balance!r}", to_array(_towards(agreement, terms, weighted, gram, classes))
        yield f"head_scores@{balance!r}", to_array((weights * (centred**2).sum(dim=1)).sum()[None])


def _towards(agreement: Agreement, terms: HeadTerms, weighted: Tensor, gram: Tensor, classes: int) -> Tensor:
    """The right-hand side, (features, classes) float64, the ridge's part of it included."""
    if agreement.refit.targets == "labels":
        onehot = torch.nn.functional.one_hot(terms.targets, classes).double() - 1 / classes
        return weighted.T @ onehot
    without_ridge = weighted.T @ terms.features
    return weighted.T @ terms.scores + (gram - without_ridge) @ terms.start


def _balances(agreement: Agreement) -> tuple[float, ...]:
    return agreement.refit.balances if agreement.refit.targets == "labels" else (0.0,)


def class_weights(targets: Tensor, balance: float) -> Tensor:
    """(rows,) float64: (share of the row's class)^-balance, scaled to add up to the number of rows."""
    counts = torch.bincount(targets).clamp(min=LEAST_COUNT).double()
    weights = (counts[targets] / len(targets)) ** -balance
    return weights * len(targets) / weights.sum()


def solve_step(agreement: Agreement, plan: MergePlan, step: Step, total: Total, knob: float | None) -> Solution:
    layer, balance = classifier(plan), 0.0 if knob is None else knob
    gram = torch.from_numpy(total[f"head_gram@{balance!r}"])
    targets = torch.from_numpy(total[f"head_targets@{balance!r}"])
    before = torch.from_numpy(total[f"head_start@{balance!r}"])
    error = torch.from_numpy(total.diagonal_error(f"head_gram@{balance!r}"))
    solution, status, unseen = solve_symmetric(gram, torch.cat([targets, before], dim=1), error)
    fitted, base = solution.split(layer.d_out, dim=1)  # (features, classes) each: the new classifier, and the base's
    if agreement.refit.targets == "labels":
        fitted = fitted * _scale(gram, fitted, float(total[f"head_scores@{balance!r}"][0]))
    condition, effective_rank = spectrum(gram)
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
    return Solution(delta=layer.give((fitted - base).float()), layers=(note,))


def _scale(gram: Tensor, fitted: Tensor, squared_scores: float) -> float:
    """What makes the fitted scores, squared and summed over all rows, as large as the owners' own models'."""
    size = float((fitted * (gram @ fitted)).sum())
    return float((squared_scores / size) ** 0.5) if size > 0 and squared_scores > 0 else 1.0
