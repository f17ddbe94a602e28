"""What (epsilon, delta) means, and how it adds up."""

from collections.abc import Iterable
from math import exp


def most_right_guesses(epsilon: float, delta: float) -> float:
    """The largest probability with which anybody tells, from what is bounded, two equally likely cases apart.

    Kairouz, Oh and Viswanath, ICML 2015, arXiv 1311.0776: the errors of a test obey a + e^epsilon b >= 1 - delta.
    """
    return (1 + delta * exp(-epsilon)) / (1 + exp(-epsilon))


def together(budgets: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(epsilon, delta) of several releases about the same rows (Dwork et al., 2006: basic composition)."""
    epsilon = delta = 0.0
    for one, other in budgets:
        epsilon, delta = epsilon + one, delta + other
    return epsilon, min(delta, 1.0)
