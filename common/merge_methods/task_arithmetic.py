"""Task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089, section 2): add the task vectors, scaled.

delta = scale * N * sum n_i delta_i / sum n_i        N owners; the scale is swept

Where every owner counts alike (n_i = 1) this is the paper's scale * sum delta_i. Where owners count by their rows it is
the same sum that the average is made of: two sums of the same deltas with two kinds of weights would tell, of three
owners, each the others' deltas (tests/attacks/test_leaks.py).
"""

from common.agreement import Agreement
from common.merge_methods.average import contribution, layout, measurements
from common.merge_methods.terms import Solution, mean_delta, unchanged
from common.models.plan import MergePlan
from common.summation.protocol import Total

__all__ = ["contribution", "layout", "measurements"]


def knobs(agreement: Agreement) -> tuple[float, ...]:
    return agreement.task_arithmetic.scales


def solve(agreement: Agreement, plan: MergePlan, total: Total, knob: float) -> Solution:
    delta = {name: (knob * total.num_owners * mean_delta(total, name)).float() for name in plan.changed}
    return Solution(delta=delta | unchanged(plan))
