"""Whether chance explains a difference between two models' shares of correct predictions.

A report knows how many predictions of a model were right, not which, so no paired test such as McNemar's can be made.
Predictions are taken as independent instead. The interval is that of Agresti and Caffo (The American Statistician 54,
2000), which holds for few predictions too: with k of n right,

    p = (k + 1) / (n + 2),   var = p (1 - p) / (n + 2),   apart if |p_1 - p_2| > z sqrt(var_1 + var_2)

For means over owners, each counting alike, p is the mean of the owners' and var the sum of theirs over owners^2.

Two models that judge the same rows tend to be right on the same ones, so their difference varies less than this says:
the test is cautious. Words and tokens of one text depend on each other, so for them it is bolder than it should be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

QUANTILE = NormalDist().inv_cdf(0.975)  # z = 1.96: two-sided, 5 %


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of correct predictions among all."""

    accuracy: float
    predictions: int


def are_apart(first: Sequence[Share], second: Sequence[Share]) -> bool:
    """Whether two models' mean shares differ by more than chance explains. Each has one share, or one per owner.

    Chance alone does this in about one of twenty repetitions, so with one of twenty owners that are compared singly.
    """
    (first_mean, first_variance), (second_mean, second_variance) = _estimate(first), _estimate(second)
    return abs(first_mean - second_mean) > QUANTILE * sqrt(first_variance + second_variance)


def _estimate(shares: Sequence[Share]) -> tuple[float, float]:
    """The mean of the shares, each with one right and one wrong prediction added, and its variance."""
    adjusted = [(share.accuracy * share.predictions + 1) / (share.predictions + 2) for share in shares]
    variances = [p * (1 - p) / (share.predictions + 2) for p, share in zip(adjusted, shares, strict=True)]
    return sum(adjusted) / len(shares), sum(variances) / len(shares) ** 2
