"""Merge methods. Each is one module with the same names, and this is their registry.

    measurements(agreement)               what the owner must measure on its rows: of "grams", "fisher"
    knobs(agreement)                      the values of its knob to be tried; (None,) for a method without one
    layout(agreement, plan)               the tensors that are summed over owners
    contribution(agreement, plan, owner)  one owner's tensors, in that order
    solve(agreement, plan, total, knob)   the merged delta from the sums

A method of several steps (sequence.py) has, instead of `solve`,

    start(agreement, plan, total)         what is merged before the first step
    steps(plan)
    merged_names(plan, number)            the parameters that step `number` gives; number 0 is `start`
    step_layout(agreement, plan, step)
    step_contribution(agreement, plan, step, owner)
    solve_step(agreement, plan, step, total, knob)    the knob matters in the last step

An owner turns (its delta, its measurements) into named tensors; the coordinator sees only their total over the owners.
Deltas are computed, and Grams measured, when a method asks for them (client/measurement/gram_stream.py): it asks for
each Gram once, in the plan's order, so that one block's are in memory.
A method knows nothing of how the sum is made. Where several methods are compared, tensors of one name are sent once.
"""

from collections.abc import Iterator
from types import ModuleType

from numpy.typing import NDArray

from common.agreement import SEQUENTIAL, Agreement, AgreementDraft
from common.errors import SettingsError
from common.merge_methods import average, data_free, fisher, refit, regmean, regmean_plus_plus, task_arithmetic
from common.merge_methods.sequence import Step
from common.merge_methods.terms import OwnerTerms, Solution
from common.models.delta import delta_layout
from common.models.plan import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout, union

METHODS: dict[str, ModuleType] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "fisher": fisher,
    "regmean": regmean,
    "refit": refit,
    "regmean_plus_plus": regmean_plus_plus,
    "data_free": data_free,
}
HAVE_SPECTRA = ("regmean", "data_free")  # methods of one sum whose notes tell condition and rank of each Gram


def measurements(agreement: AgreementDraft) -> frozenset[str]:
    """What an owner must measure for all agreed methods together."""
    return frozenset().union(*(METHODS[method].measurements(agreement) for method in agreement.methods))


def contribution_layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    """The tensors of all agreed methods, each name once. Raises SettingsError where bounds are of another plan."""
    if len(agreement.bounds.grams) != len(plan.inputs):
        raise SettingsError(
            f"agreement: bounds.grams has {len(agreement.bounds.grams)} values, the base model's tensors make "
            f"{len(plan.inputs)} Grams; complete the draft again"
        )
    return union(METHODS[method].layout(agreement, plan) for method in agreement.methods)


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    """One owner's tensors, in the order of `contribution_layout`."""
    produced: set[str] = set()
    for method in agreement.methods:
        names = {entry.name for entry in METHODS[method].layout(agreement, plan).entries}
        if names <= produced:
            continue  # nothing of it is measured again
        for name, tensor in METHODS[method].contribution(agreement, plan, owner):
            if name not in produced:
                produced.add(name)
                yield name, tensor


def candidates(agreement: Agreement, method: str) -> dict[str, float | None]:
    """The merged models of one method by name, with the value of its knob: `regmean@0.9`, or just `average`."""
    values = METHODS[method].knobs(agreement)
    return {method if value is None or len(values) == 1 else f"{method}@{value!r}": value for value in values}


def steps(plan: MergePlan, method: str) -> tuple[Step, ...]:
    """The steps of a method that has several, after the sum that all methods share."""
    of_method: tuple[Step, ...] = METHODS[method].steps(plan)
    return of_method


def start(agreement: Agreement, plan: MergePlan, method: str, total: Total) -> Solution:
    """What such a method merges before its first step."""
    solution: Solution = METHODS[method].start(agreement, plan, total)
    return solution


def merged_layout(plan: MergePlan, method: str, number: int) -> TensorLayout:
    """How what step `number` gave (0: `start`) travels back to the owners, as float32."""
    return delta_layout(plan, METHODS[method].merged_names(plan, number))


def step_named(agreement: Agreement, plan: MergePlan, statistic: str) -> tuple[str, Step] | None:
    """The method and step that a statistic is about, `regmean_plus_plus 3`; None if it is no agreed one."""
    method, _, number = statistic.partition(" ")
    agreed = method in SEQUENTIAL and method in agreement.methods and number.isdecimal()
    if not agreed or not 1 <= int(number) <= len(steps(plan, method)):
        return None
    return method, steps(plan, method)[int(number) - 1]


def step_statistic(method: str, step: Step) -> str:
    """What the sum of one step is called."""
    return f"{method} {step.number}"


def step_layout(agreement: Agreement, plan: MergePlan, method: str, step: Step) -> TensorLayout:
    """The tensors that are summed in one step of a method that has several."""
    layout: TensorLayout = METHODS[method].step_layout(agreement, plan, step)
    return layout


def step_contribution(
    agreement: Agreement, plan: MergePlan, method: str, step: Step, owner: OwnerTerms
) -> Iterator[tuple[str, NDArray]]:
    """One owner's tensors, in the order of `step_layout`."""
    yield from METHODS[method].step_contribution(agreement, plan, step, owner)


def solve_step(
    agreement: Agreement, plan: MergePlan, method: str, step: Step, total: Total, knob: float | None
) -> Solution:
    """The merged delta of the parameters that one step is about."""
    solution: Solution = METHODS[method].solve_step(agreement, plan, step, total, knob)
    return solution


def solve(
    agreement: Agreement, plan: MergePlan, method: str, total: Total, knob: float | None, with_spectra: bool = True
) -> Solution:
    """The merged delta of one method. A sweep goes without the spectra of Grams, which cost more than its solves."""
    without = {"with_spectra": False} if method in HAVE_SPECTRA and not with_spectra else {}
    solution: Solution = METHODS[method].solve(agreement, plan, total, knob, **without)
    return solution
