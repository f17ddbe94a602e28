"""What a report advises: another method, and what to try after a sweep that ends where it is best."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.merge_methods import METHODS
from common.metrics import MeanScore
from server.report.outcome import MethodChoice, Tried, beyond_the_sweep, further_values, what_did_better


def swept(method: str, shares: dict[float, float], rows: int = 1000) -> list[str]:
    """What is advised if these values gave these shares of correct predictions on validation rows."""
    sweep = {
        f"{method}@{value}": Tried(
            hyperparameter=value,
            score=MeanScore(accuracy=share, metric=share, pooled_accuracy=share, rows=rows, by_owner={}),
        )
        for value, share in shares.items()
    }
    best = max(sweep, key=lambda candidate: sweep[candidate].score.accuracy)
    choice = MethodChoice(candidate=best, hyperparameter=sweep[best].hyperparameter, sweep=sweep)
    return list(beyond_the_sweep(METHODS[method], choice))


@pytest.mark.parametrize(
    ("method", "shares", "values"),
    [
        ("task_arithmetic", {0.3: 0.8, 0.5: 0.7, 1.0: 0.6}, "scale 0.15 and 0.075"),
        ("task_arithmetic", {1.0: 0.6, 0.3: 0.8, 0.5: 0.7}, "scale 0.15 and 0.075"),
        ("task_arithmetic", {1.0: 0.6, 2.0: 0.7, 4.0: 0.8}, "scale 6 and 8"),
        ("regmean", {0.1: 0.6, 0.5: 0.7, 0.9: 0.8}, "alpha 0.95 and 0.975"),
        ("refit", {0.25: 0.8, 0.5: 0.7, 0.75: 0.6}, "balance of classes 0.125 and 0.0625"),
    ],
)
def test_the_end_of_a_sweep_names_what_to_try(method: str, shares: dict[float, float], values: str) -> None:
    (advice,) = swept(method, shares)
    assert advice.endswith(f"Next time, also try {values}.")


@pytest.mark.parametrize(
    ("shares", "rows", "why"),
    [
        ({0.1: 0.6, 0.5: 0.8, 0.9: 0.7}, 1000, "the best is within the sweep"),
        ({0.1: 0.6, 0.5: 0.79, 0.9: 0.80}, 1000, "chance explains the difference"),
        ({0.1: 0.6, 0.5: 0.7, 0.9: 0.8}, 20, "chance explains the difference of so few"),
        ({0.5: 0.6, 0.9: 0.7, 1.0: 0.8}, 1000, "nothing is beyond 1"),
        ({0.0: 0.8, 0.5: 0.7, 1.0: 0.6}, 1000, "nothing is beyond 0"),
        ({0.1: 0.6, 0.9: 0.8}, 1000, "of two values each is an end"),
        ({0.1: 1.0, 0.5: 1.0, 0.9: 1.0}, 1000, "nothing is left to gain"),
    ],
)
def test_nothing_is_advised_without_reason(shares: dict[float, float], rows: int, why: str) -> None:
    assert swept("regmean", shares, rows) == [], why


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_what_is_advised_for_a_share_is_a_share_beyond_the_end(end: float, beside: float) -> None:
    further = further_values(end, beside)
    assert further is not None
    assert 0 < min(further) <= max(further) < 1
    assert all((value < end) if end < beside else (value > end) for value in further)


@pytest.mark.parametrize(
    ("published", "other", "rows", "said"),
    [
        (
            0.846,
            0.848,
            1191,
            "refit is ahead of data_free on the test rows, accuracy 0.848 against 0.846, which may be",
        ),
        (
            0.846,
            0.900,
            1191,
            "refit did better than data_free on the test rows: accuracy 0.900 against 0.846. To publish",
        ),
        (0.846, 0.846, 1191, None),
        (0.846, 0.700, 1191, None),
    ],
)
def test_another_method_is_advised_if_chance_does_not_explain_why_it_is_ahead(
    published: float, other: float, rows: int, said: str | None
) -> None:
    scores = {
        method: MeanScore(accuracy=share, metric=share / 2, pooled_accuracy=share, rows=rows, by_owner={})
        for method, share in {"data_free": published, "refit": other}.items()
    }
    found = list(what_did_better("data_free", scores, "accuracy"))
    assert [line[: len(said)] for line in found] == [said] if said else found == []


def test_chance_is_not_judged_for_a_metric_whose_chance_is_unknown() -> None:
    scores = {
        method: MeanScore(accuracy=0.8, metric=metric, pooled_accuracy=0.8, rows=100, by_owner={})
        for method, metric in {"data_free": 0.40, "refit": 0.45}.items()
    }
    (found,) = what_did_better("data_free", scores, "macro_f1")
    assert found.startswith("refit did better than data_free on the test rows: macro F1 0.450 against 0.400. To")
