"""Task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089, section 2): add the task vectors, scaled.

delta = scale * sum delta_i              every owner counts alike; the scale is swept
"""

from collections.abc import Iterator

import torch
from numpy.typing import NDArray

from common.agreement import Agreement, AgreementDraft
from common.merge_methods.terms import OwnerTerms, Solution, to_array, unchanged
from common.models import MergePlan
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout


def measurements(agreement: AgreementDraft) -> frozenset[str]:
    return frozenset()


def knobs(agreement: Agreement) -> tuple[float, ...]:
    return agreement.task_arithmetic.scales


def layout(agreement: Agreement, plan: MergePlan) -> TensorLayout:
    bound = agreement.bounds.delta
    entries = (TensorEntry(name=f"delta/{name}", shape=plan.shapes[name], bound=bound) for name in plan.changed)
    return TensorLayout(tuple(entries))


def contribution(agreement: Agreement, plan: MergePlan, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    for name in plan.changed:
        yield f"delta/{name}", to_array(owner.delta[name])


def solve(agreement: Agreement, plan: MergePlan, total: Total, knob: float) -> Solution:
    delta = {name: torch.from_numpy(knob * total[f"delta/{name}"]).float() for name in plan.changed}
    return Solution(delta=delta | unchanged(plan))
