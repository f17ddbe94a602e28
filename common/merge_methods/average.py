"""The weighted mean of the owners' deltas (McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1, one round).

delta = sum n_i delta_i / sum n_i        n_i: the owner's examples, or 1 when every owner counts alike
"""

from collections.abc import Iterator

from numpy.typing import NDArray

from common.agreement import Agreement, AgreementDraft
from common.merge_methods.terms import (
    OwnerTerms,
    Solution,
    mean_delta,
    unchanged,
    weight_entries,
    weight_tensors,
    weighted_delta_entries,
    weighted_delta_tensors,
)
from common.models.plan import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout


def measurements(agreement: AgreementDraft) -> frozenset[str]:
    return frozenset()


def knobs(agreement: Agreement) -> tuple[None]:
    return (None,)


def layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    return TensorLayout((*weight_entries(agreement), *weighted_delta_entries(agreement, plan, plan.changed)))


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    yield from weight_tensors(agreement, owner)
    yield from weighted_delta_tensors(agreement, owner, plan.changed)


def solve(agreement: Agreement, plan: MergePlan, total: Total, knob: None) -> Solution:
    delta = {name: mean_delta(total, name).float() for name in plan.changed}
    return Solution(delta=delta | unchanged(plan))
