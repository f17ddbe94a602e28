"""The order in which methods that go block by block merge a model.

A step is one sum: the Grams of the inputs in one transformer block, measured with everything before it merged already.
So each layer is solved for the inputs that it will really get. What stands before the first block belongs to the first
step; of what follows the last block (pooler, classifier) each distinct input is a step of its own. Everything that is
averaged is merged before the first step, from the sum that methods of one step share.

Every step has to be summed over the same owners: the same rows, measured in two steps and summed over two groups, would
show the difference. So these methods need all owners, in every step (`Agreement` sees to it).
"""

from dataclasses import dataclass, replace

from common.agreement import Agreement
from common.models import MergePlan, SharedInput, delta_layout, parameter_of
from common.tensor_layout import TensorLayout


@dataclass(frozen=True, kw_only=True)
class Step:
    """`number` counts from 1; `block` counts from 0, and is None after the last block."""

    number: int
    block: int | None
    inputs: tuple[SharedInput, ...]


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


def plan_of(plan: MergePlan, step: Step) -> MergePlan:
    """The plan of a method that knows nothing but this step."""
    return replace(plan, inputs=step.inputs, averaged=(), left_alone=())


def agreement_of(agreement: Agreement, plan: MergePlan, step: Step, alpha: float) -> Agreement:
    """The agreement as it reads for a RegMean of this step alone, at one alpha."""
    bounds = dict(zip((shared.name for shared in plan.inputs), agreement.bounds.grams, strict=True))
    return agreement.model_copy(
        update={
            "regmean": agreement.regmean.model_copy(update={"alphas": (alpha,)}),
            "bounds": agreement.bounds.model_copy(
                update={"grams": tuple(bounds[shared.name] for shared in step.inputs)}
            ),
        }
    )


def solved_names(plan: MergePlan, number: int) -> tuple[str, ...]:
    """The parameters that step `number` gives; those of number 0 are averaged."""
    if number == 0:
        return plan.averaged
    step = steps(plan)[number - 1]
    layers = [layer for shared in step.inputs for layer in shared.layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return tuple(dict.fromkeys([*(parameter_of(layer.weight) for layer in layers), *biases]))


def merged_layout(plan: MergePlan, number: int) -> TensorLayout:
    """How what step `number` gave travels back to the owners, as float32."""
    return delta_layout(plan, solved_names(plan, number))
