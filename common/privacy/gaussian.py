"""The Gaussian mechanism, exactly: what noise with standard deviation sigma on sums of sensitivity s promises.

With mu = s / sigma, it is (epsilon, delta)-differentially private exactly if

    delta >= Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)

(Balle and Wang, ICML 2018, arXiv 1805.06530, theorem 8). Several such releases about the same unit, each perhaps chosen
by those before it, are one with mu^2 = sum of mu_j^2 (Dong, Roth and Su, JRSS-B 2022, arXiv 1905.02383, corollary 3.3).
So a budget is shared out in squares of mu: shares that add up to 1 use it up.
"""

from functools import lru_cache
from math import erfc, exp, sqrt


def delta_of(epsilon: float, mu: float) -> float:
    """The least delta, for an epsilon of at most 100."""
    return _phi(mu / 2 - epsilon / mu) - exp(epsilon) * _phi(-mu / 2 - epsilon / mu)


@lru_cache(maxsize=64)  # the layout of every round asks
def mu_of(epsilon: float, delta: float) -> float:
    """The largest mu with which noise keeps (epsilon, delta): sigma is s / mu. Rounded down by 1e-9 at most."""
    low, high = 0.0, 1.0
    while delta_of(epsilon, high) <= delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(epsilon, middle) <= delta else (low, middle)
    return low


def epsilon_of(delta: float, mu: float) -> float:
    """The least epsilon that goes with a delta, rounded up by 1e-9 at most."""
    low, high = 0.0, 1.0
    while delta_of(high, mu) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle, mu) <= delta else (middle, high)
    return high


def _phi(x: float) -> float:
    """The distribution function of a standard normal."""
    return erfc(-x / sqrt(2)) / 2
