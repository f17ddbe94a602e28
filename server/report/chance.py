"""Whether chance explains a difference between two models' shares of correct predictions, or between correlations.

A report knows how many predictions of a model were right, not which, so no paired test such as McNemar's can be made.
Predictions are taken as independent instead. The interval is that of Agresti and Caffo (The American Statistician 54,
2000), which holds for few predictions too: with k of n right,

    p = (k + 1) / (n + 2),   var = p (1 - p) / (n + 2),   apart if |p_1 - p_2| > z sqrt(var_1 + var_2)

For means over owners, each counting alike, p is the mean of the owners' and var the sum of theirs over owners^2.

Noise that was added to a sum of right predictions adds its own variance, (noise / n)^2.

A correlation r of n rows is compared as z = atanh(r), whose variance is 1 / (n - 3) (Fisher, Metron 1, 1921).

Two models that judge the same rows tend to be right on the same ones, so their difference varies less than this says:
the test is cautious. Words and tokens of one text depend on each other, so for them it is bolder than it should be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import atanh, sqrt
from statistics import NormalDist

MOST = 0.9999  # of a correlation, so that its z is finite
QUANTILE = NormalDist().inv_cdf(0.975)  # z = 1.96: two-sided, 5 %


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of correct predictions among all. `noise`: the standard deviation of what was added to their number."""

    accuracy: float
    predictions: int
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Pearson's r over rows."""

    r: float
    rows: int


Estimate = Share | Correlation


def estimate_of(accuracy: float | None, pearson_r: float | None, predictions: int, noise: float = 0.0) -> Estimate:
    """What models of a task are compared by: the one of the two that it has."""
    if pearson_r is not None:
        return Correlation(r=pearson_r, rows=predictions)
    assert accuracy is not None
    return Share(accuracy=accuracy, predictions=predictions, noise=noise)


def are_apart(first: Sequence[Estimate], second: Sequence[Estimate]) -> bool:
    """Whether two models' mean shares differ by more than chance explains. Each has one share, or one per owner.

    Chance alone does this in about one of twenty repetitions, so with one of twenty owners that are compared singly.
    """
    (first_mean, first_variance), (second_mean, second_variance) = _mean_and_variance(first), _mean_and_variance(second)
    return abs(first_mean - second_mean) > QUANTILE * sqrt(first_variance + second_variance)


def _mean_and_variance(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """The mean of the estimates, on the scale on which they are compared, and its variance."""
    means, variances = zip(*map(_on_scale, estimates), strict=True)
    return sum(means) / len(estimates), sum(variances) / len(estimates) ** 2


def _on_scale(estimate: Estimate) -> tuple[float, float]:
    """A share with one right and one wrong prediction added, or a correlation's z; and the variance."""
    if isinstance(estimate, Correlation):
        return atanh(min(max(estimate.r, -MOST), MOST)), 1 / max(estimate.rows - 3, 1)
    p = (estimate.accuracy * estimate.predictions + 1) / (estimate.predictions + 2)
    return p, p * (1 - p) / (estimate.predictions + 2) + (estimate.noise / max(estimate.predictions, 1)) ** 2
