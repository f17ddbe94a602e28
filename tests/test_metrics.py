"""Metrics travel as sums and counts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from client.data.rows import IGNORED, Rows
from client.measurement.evaluation import score_logits
from common.agreement import Agreement, OwnerEntry, Task
from common.metrics import Score, Split, contribution, metrics_layout, read_total

SCORES = {
    "ada": Score(correct=8, rows=10, metric=0.5),
    "bea": Score(correct=30, rows=60, metric=0.25),
    "cyd": Score(correct=1, rows=4, metric=0.75),
}


def total_for(agreement: Agreement, owners: dict[str, Score], split: Split = "test") -> np.ndarray:
    layout = metrics_layout(agreement, split, ["m"])
    total = np.zeros(layout.size)
    for owner, score in owners.items():
        vector = np.empty(layout.size)
        layout.flatten(contribution(agreement, owner, split, {"m": score}), vector)
        total += vector
    return total


def test_means_come_from_one_division_of_sums(agreement: Agreement) -> None:
    mean = read_total(agreement, "test", ["m"], total_for(agreement, SCORES))["m"]
    assert mean.accuracy == pytest.approx((0.8 + 0.5 + 0.25) / 3)
    assert mean.metric == pytest.approx(0.5)
    assert mean.pooled_accuracy == pytest.approx(39 / 74)
    assert mean.rows == 74
    assert mean.by_owner == SCORES


def test_an_owner_that_dropped_out_has_no_metrics_of_its_own(agreement: Agreement) -> None:
    mean = read_total(agreement, "test", ["m"], total_for(agreement, {"bea": SCORES["bea"]}))["m"]
    assert mean.by_owner == {"bea": SCORES["bea"]}
    assert mean.accuracy == 0.5


def test_owners_that_refuse_appear_only_in_the_sums(agreement: Agreement) -> None:
    hiding = tuple(OwnerEntry(name=name, metrics="shown" if name == "bea" else "summed") for name in SCORES)
    hidden = agreement.model_copy(update={"owners": hiding})
    total = total_for(hidden, SCORES)
    mean = read_total(hidden, "test", ["m"], total)["m"]
    assert mean.by_owner == {"bea": SCORES["bea"]}
    assert mean.rows == 74
    # only the sum of the two others travels: swapping them changes nothing
    swapped = total_for(hidden, {"ada": SCORES["cyd"], "cyd": SCORES["ada"], "bea": SCORES["bea"]})
    np.testing.assert_allclose(total, swapped)


def test_metrics_on_validation_examples_are_never_shown_by_owner(agreement: Agreement) -> None:
    total = total_for(agreement, SCORES, "validation")
    assert len(total) == 5
    assert read_total(agreement, "validation", ["m"], total)["m"].by_owner == {}


def test_ratios_travel_in_thousandths_so_that_no_sum_exposes_a_denominator(agreement: Agreement) -> None:
    """A sum of three exact fractions, known to 50 bits, has one solution in correct and total rows of each owner."""
    thirds = {"ada": Score(correct=137, rows=412, metric=1 / 3), "bea": SCORES["bea"], "cyd": SCORES["cyd"]}
    total = total_for(agreement, thirds, "validation")
    for ratio in total[:2]:
        assert ratio == pytest.approx(round(ratio * 1000) / 1000, abs=1e-15)


def rows_of(targets: Any) -> Rows:
    return Rows(features=np.zeros((len(targets), 1, 1, 1), np.float32), targets=targets)


def test_entities_count_as_a_whole_as_in_conll_s_own_script() -> None:
    labels = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    task = Task(kind="token-classification", labels=labels)
    wanted = rows_of((np.array([1, 2, 0, 3]), np.array([IGNORED, 1, IGNORED, 1, 2])))
    found = np.array(
        [1, 2, 0, 4, 1, 2, 2]
    )  # PER is right; LOC, begun by I-, too; the last PER has three words instead of two
    score = score_logits(np.eye(5, dtype=np.float32)[found], wanted, task, np.arange(5))
    assert (score.correct, score.rows) == (5, 7)
    assert score.metric == pytest.approx(2 * 2 / (4 + 3))


def test_predictions_are_judged_among_the_allowed_labels_only() -> None:
    logits = np.array([[9, 1, 0], [9, 0, 1]], dtype=np.float32)
    rows = rows_of(np.array([1, 2]))
    assert score_logits(logits, rows, Task(), np.arange(3)).correct == 0
    assert score_logits(logits, rows, Task(), np.array([1, 2])).correct == 2


def test_macro_f1_is_the_mean_over_the_labels_that_occur() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]]
    score = score_logits(logits, rows_of(np.array([0, 0, 1, 0])), Task(), np.arange(3))
    assert score.metric == pytest.approx((0.8 + 2 / 3) / 2)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_scikit_learn_s(pairs: list[tuple[int, int]]) -> None:
    targets, predicted = np.array(pairs).T
    score = score_logits(np.eye(5, dtype=np.float32)[predicted], rows_of(targets), Task(), np.arange(5))
    expected = f1_score(targets, predicted, labels=np.unique(targets), average="macro", zero_division=0)
    assert score.metric == pytest.approx(float(expected), abs=1e-12)
