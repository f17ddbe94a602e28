"""RegMean++ (Nguyen et al., 2025, arXiv 2508.03121, section 3): RegMean, block after block.

Block l's Grams are those of the rows that the merged blocks before it produce, run through the owner's own block l:
each layer is solved for the inputs that it will really get. Otherwise each step is a RegMean of its own (`regmean.py`),
at one alpha. What stands before the first block belongs to the first step; of what follows the last block (pooler,
classifier) each distinct input is a step of its own. What is averaged is merged before the first step.
"""

from collections.abc import Iterator
from dataclasses import replace

from numpy.typing import NDArray

from common.agreement import Agreement, AgreementDraft
from common.merge_methods import regmean
from common.merge_methods.sequence import Step, agreement_of, plan_of
from common.merge_methods.terms import OwnerTerms, Solution
from common.models.layers import parameter_of
from common.models.plan import MergePlan, SharedInput
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout


def measurements(agreement: AgreementDraft) -> frozenset[str]:
    return frozenset()


def knobs(agreement: Agreement) -> tuple[None]:
    return (None,)


# Before the first step: a RegMean of what needs no Gram of inputs.


def layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    bounds = agreement.bounds.model_copy(update={"grams": ()})
    return regmean.layout(agreement.model_copy(update={"bounds": bounds}), replace(plan, inputs=()))


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    return regmean.contribution(agreement, replace(plan, inputs=()), owner)


def start(agreement: Agreement, plan: MergePlan, total: Total) -> Solution:
    return regmean.solve(agreement, replace(plan, inputs=()), total, agreement.regmean_plus_plus.alpha)


def steps(plan: MergePlan) -> tuple[Step, ...]:
    """Every input of the plan, in the order of first use, in exactly one step."""
    by_block: dict[int, list[SharedInput]] = {}
    after: list[SharedInput] = []
    for shared in plan.inputs:
        block = next((index for index, name in enumerate(plan.blocks) if shared.name.startswith(f"{name}.")), None)
        if block is not None:
            by_block.setdefault(block, []).append(shared)
        elif by_block:
            after.append(shared)
        else:
            by_block[0] = [shared]
    parts: list[tuple[int | None, list[SharedInput]]] = [(block, by_block[block]) for block in sorted(by_block)]
    parts += [(None, [shared]) for shared in after]
    return tuple(
        Step(number=number, block=block, inputs=tuple(inputs)) for number, (block, inputs) in enumerate(parts, 1)
    )


def merged_names(plan: MergePlan, number: int) -> tuple[str, ...]:
    if number == 0:
        return tuple(dict.fromkeys([*plan.averaged, *(parameter_of(layer.weight) for layer in plan.data_free)]))
    layers = [layer for shared in steps(plan)[number - 1].inputs for layer in shared.layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return tuple(dict.fromkeys([*(parameter_of(layer.weight) for layer in layers), *biases]))


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
