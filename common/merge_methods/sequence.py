"""Methods of several steps: each step is one sum, measured with what the steps before it merged.

Every step has to be summed over the same owners: the same rows, measured in two steps and summed over two groups, would
show the difference. So these methods need all owners, in every step (`Agreement` sees to it).
"""

from dataclasses import dataclass, replace

from common.agreement import Agreement
from common.models.plan import MergePlan, SharedInput


@dataclass(frozen=True, kw_only=True)
class Step:
    """`number` counts from 1; `block` counts from 0, and is None after the last block."""

    number: int
    block: int | None
    inputs: tuple[SharedInput, ...]


def plan_of(plan: MergePlan, step: Step) -> MergePlan:
    """The plan of a method that knows nothing but this step."""
    return replace(plan, inputs=step.inputs, data_free=(), averaged=(), left_alone=())


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
