"""References of a simulation for several labels and for numbers, which need every model in one place."""

import numpy as np
import pytest

from common.agreement import Task
from common.metrics import Score
from deploy.simulation.references import _mean, _over_owners, _vote

SEVERAL = Task(problem_type="multi_label_classification", labels=("a", "b"))
NUMBER = Task(problem_type="regression", labels=("x",), target_range=(0.0, 1.0))


def test_an_ensemble_gives_a_label_whose_mean_probability_is_above_a_half_and_the_mean_number() -> None:
    logits = [np.array([[4.0, -1.0]], np.float32), np.array([[-1.0, -1.0]], np.float32)]
    votes = sum(_vote(each, SEVERAL, 2) for each in logits)
    probabilities = np.mean([1 / (1 + np.exp(-each)) for each in logits], axis=0)
    assert ((votes > 0) == (probabilities > 0.5)).all()
    assert sum(_vote(each, NUMBER, 2) for each in logits).tolist() == [[1.5, -1.0]]


def test_sums_of_owners_are_added_and_means_of_a_regression_are_over_all_rows() -> None:
    counts = {owner: Score(correct=1, rows=2, metric=0.5, sums=((1.0, 2.0, 3.0),) * 2) for owner in ("ada", "bea")}
    assert _over_owners(counts, SEVERAL).sums == ((2.0, 4.0, 6.0),) * 2
    assert _mean(list(counts.values()), SEVERAL).rows == 4
    one = Score(correct=None, rows=10, metric=0.1, pearson_r=0.0, sums=((5.0, 5.0, 3.0, 3.0, 1.0),))
    two = Score(correct=None, rows=30, metric=0.1, pearson_r=0.0, sums=((15.0, 15.0, 9.0, 9.0, 1.0),))
    both = _over_owners({"ada": one, "bea": two}, NUMBER)
    assert (both.rows, both.metric) == (40, pytest.approx(2 / 40))
    assert both.pearson_r == pytest.approx(1 - 1 / 2)  # 12 - 20^2 / 40 = 2 is each variance, and 1 the covariance
