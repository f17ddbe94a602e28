"""Which differences of two shares are called more than chance."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report.chance import Correlation, Share, are_apart

shares = st.tuples(st.integers(1, 500), st.floats(0, 1)).map(
    lambda each: Share(accuracy=round(each[0] * each[1]) / each[0], predictions=each[0])
)


def share(correct: int, predictions: int) -> Share:
    return Share(accuracy=correct / predictions, predictions=predictions)


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [
        (share(4, 4), share(2, 4), False),  # without the added predictions, 0.5 > 1.96 sqrt(0.25 / 4) = 0.49
        (share(300, 400), share(274, 400), True),  # 0.065 > 1.96 sqrt((0.1875 + 0.2158) / 400) = 0.062
        (share(300, 400), share(277, 400), False),
        (share(20, 20), share(20, 20), False),
        (share(100, 100), share(90, 100), True),
        (share(3, 3), share(0, 3), True),
    ],
)
def test_differences_that_were_computed_by_hand(first: Share, second: Share, apart: bool) -> None:
    assert are_apart([first], [second]) == are_apart([second], [first]) == apart


@given(shares)
def test_a_share_is_not_apart_from_itself(one: Share) -> None:
    assert not are_apart([one], [one])


@given(shares, shares, st.integers(2, 5))
def test_the_mean_of_several_owners_is_surer_than_one_owner(one: Share, other: Share, owners: int) -> None:
    if are_apart([one], [other]):
        assert are_apart([one] * owners, [other] * owners)


@pytest.mark.parametrize("predictions", [5, 20, 60])
@pytest.mark.parametrize("accuracy", [0.5, 0.8, 0.95])
def test_chance_alone_sets_two_equal_models_apart_in_one_of_twenty_repetitions_at_most(
    predictions: int, accuracy: float
) -> None:
    """Exactly, over all pairs of counts; 0.055 because Agresti and Caffo's interval is an approximation."""
    counts = range(predictions + 1)
    weights = np.array([comb(predictions, k) * accuracy**k * (1 - accuracy) ** (predictions - k) for k in counts])
    apart = np.array([[are_apart([share(a, predictions)], [share(b, predictions)]) for b in counts] for a in counts])
    assert weights @ apart @ weights < 0.055


@pytest.mark.parametrize(
    ("first", "second", "rows", "apart"),
    [
        (0.5, 0.6, 103, False),  # z: 0.549 and 0.693, apart by 0.144 < 1.96 sqrt(2 / 100) = 0.277
        (0.5, 0.6, 403, True),  # 0.144 > 1.96 sqrt(2 / 400) = 0.139
        (0.9, 1.0, 53, True),
        (1.0, -1.0, 2, True),
        (0.0, 0.9, 3, False),
    ],
)
def test_correlations_are_compared_on_fisher_s_scale(first: float, second: float, rows: int, apart: bool) -> None:
    one, other = (Correlation(r=r, rows=rows) for r in (first, second))
    assert are_apart([one], [other]) == apart
    assert not are_apart([one], [one])
