"""Which of many candidate texts an attacker would take for the owner's rows, as SELECT does (arXiv 2506.15553).

The attacker has the base, the model and candidates without labels, so it takes those that the model predicts. It adds
one candidate after the other, each time the one whose gradient turns the sum of the chosen ones most towards W_0 - W*:

    next = argmax over j of cos(S + g_j, W_0 - W*),    S = sum of the g of those chosen before

over the classifier, where g_j = e_j f_j^T makes every product cheap and exact: <g_i, g_j> = (e_i . e_j)(f_i . f_j). A
model without such a classifier is attacked by the candidates with the highest gradient score.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor

from client.audit.result import Selection
from client.audit.scores import ClassifierGradients

SHARE, MOST = 0.1, 500  # of the candidates are selected


def how_many(candidates: int) -> int:
    """How many are selected."""
    return max(1, min(MOST, int(SHARE * candidates)))


def select_greedily(gradients: ClassifierGradients, delta: Mapping[str, Tensor], count: int) -> NDArray[np.int64]:
    """The indices of `count` rows, in the order in which they are chosen."""
    errors, inputs = gradients.errors.double(), gradients.inputs.double()  # (rows, labels), (rows, d_in)
    target = -gradients.layer.take(delta).double()  # (d_in, labels): W_0 - W*
    along = ((inputs @ target) * errors).sum(dim=1)  # (rows,): <g_j, W_0 - W*>
    squares = errors.square().sum(dim=1) * inputs.square().sum(dim=1)  # (rows,): |g_j|^2
    total = torch.zeros_like(target)  # S
    is_left = torch.ones(len(errors), dtype=torch.bool)
    chosen = []
    for _ in range(count):
        products = ((inputs @ total) * errors).sum(dim=1)  # (rows,): <g_j, S>
        norms = (total.square().sum() + 2 * products + squares).clamp(min=0).sqrt()
        cosines = ((total * target).sum() + along) / norms.clamp(min=torch.finfo(torch.float64).tiny)
        index = int(torch.where(is_left, cosines, -torch.inf).argmax())
        is_left[index] = False
        total += torch.outer(inputs[index], errors[index])
        chosen.append(index)
    return np.array(chosen, np.int64)


def judge(
    selected: NDArray[np.int64],
    keys: list[bytes],
    members: Collection[bytes],
    strangers: Collection[bytes],
    by: Literal["greedy", "highest"],
) -> Selection:
    """Count the owner's rows among the `selected`. `keys`: of all candidates; `members`: of the training rows."""
    mine = np.array([key in members for key in keys])
    held_out = np.array([key in strangers and key not in members for key in keys])
    found = int(mine[selected].sum())
    blind = hypergeom(len(keys), int(mine.sum()), len(selected))
    return Selection(
        candidates=len(keys),
        selected=len(selected),
        members_among_candidates=int(mine.sum()),
        strangers_among_candidates=int(held_out.sum()),
        members=found,
        strangers=int(held_out[selected].sum()),
        chance=float(blind.mean()),
        p_value=min(1.0, float(blind.sf(found - 1))),
        by=by,
    )
