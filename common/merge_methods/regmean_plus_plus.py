"""RegMean++ (Nguyen et al., 2025, arXiv 2508.03121, section 3): RegMean, block after block.

Block l's Grams are those of the rows that the merged blocks before it produce, run through the owner's own block l.
Otherwise each step is a RegMean of its own (`regmean.py`), at one alpha.
"""

from collections.abc import Iterator

from numpy.typing import NDArray

from common.agreement import Agreement
from common.merge_methods import regmean
from common.merge_methods.sequence import Step, agreement_of, plan_of
from common.merge_methods.terms import (
    OwnerTerms,
    Solution,
    weight_entries,
    weight_tensors,
    weighted_delta_entries,
    weighted_delta_tensors,
)
from common.models import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout

MEASUREMENTS: frozenset[str] = frozenset()


def knobs(agreement: Agreement) -> tuple[None]:
    return (None,)


def layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    return TensorLayout((*weight_entries(agreement), *weighted_delta_entries(agreement, plan, plan.averaged)))


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    yield from weight_tensors(agreement, owner)
    yield from weighted_delta_tensors(agreement, owner, plan.averaged)


def step_layout(agreement: Agreement, plan: MergePlan, step: Step) -> TensorLayout:
    return regmean.layout(_for(agreement, plan, step), plan_of(plan, step))


def step_contribution(
    agreement: Agreement, plan: MergePlan, step: Step, owner: OwnerTerms
) -> Iterator[tuple[str, NDArray]]:
    return regmean.contribution(_for(agreement, plan, step), plan_of(plan, step), owner)


def solve_step(agreement: Agreement, plan: MergePlan, step: Step, total: Total, knob: None) -> Solution:
    alpha = agreement.regmean_plus_plus.alpha
    return regmean.solve(_for(agreement, plan, step), plan_of(plan, step), total, alpha)


def _for(agreement: Agreement, plan: MergePlan, step: Step) -> Agreement:
    return agreement_of(agreement, plan, step, agreement.regmean_plus_plus.alpha)
