"""Merge methods. Each is one module with the same five names, and this is their registry.

    MEASUREMENTS                          what the owner must measure on its rows: of "grams", "fisher"
    knobs(agreement)                      the values of its knob to be tried; (None,) for a method without one
    layout(agreement, plan)               the tensors that are summed over owners
    contribution(agreement, plan, owner)  one owner's tensors, in that order
    solve(agreement, plan, total, knob)   the merged delta from the sums

An owner turns (its delta, its measurements) into named tensors; the coordinator sees only their total over the owners.
A method knows nothing of how the sum is made. Where several methods are compared, tensors of one name are sent once.
"""

from collections.abc import Iterator
from types import ModuleType

from numpy.typing import NDArray

from common.agreement import Agreement, AgreementDraft
from common.merge_methods import average, fisher, regmean, task_arithmetic
from common.merge_methods.terms import OwnerTerms, Solution
from common.models import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout, union

METHODS: dict[str, ModuleType] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "fisher": fisher,
    "regmean": regmean,
}


def measurements(agreement: AgreementDraft) -> frozenset[str]:
    """What an owner must measure for all agreed methods together."""
    return frozenset().union(*(METHODS[method].MEASUREMENTS for method in agreement.methods))


def contribution_layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    """The tensors of all agreed methods, each name once."""
    return union(METHODS[method].layout(agreement, plan) for method in agreement.methods)


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    """One owner's tensors, in the order of `contribution_layout`."""
    produced = set()
    for method in agreement.methods:
        for name, tensor in METHODS[method].contribution(agreement, plan, owner):
            if name not in produced:
                produced.add(name)
                yield name, tensor


def candidates(agreement: Agreement, method: str) -> dict[str, float | None]:
    """The merged models of one method by name, with the value of its knob: `regmean@0.9`, or just `average`."""
    values = METHODS[method].knobs(agreement)
    return {method if value is None or len(values) == 1 else f"{method}@{value!r}": value for value in values}


def solve(agreement: Agreement, plan: MergePlan, method: str, total: Total, knob: float | None) -> Solution:
    """The merged delta of one method."""
    solution: Solution = METHODS[method].solve(agreement, plan, total, knob)
    return solution
