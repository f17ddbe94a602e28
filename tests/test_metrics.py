"""Metrics travel as sums and counts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from client.data.rows import IGNORED, Rows
from client.measurement.evaluation import score_logits
from common.agreement import Agreement, OwnerEntry, Task
from common.errors import FalseTotal
from common.metrics import STEP, Score, Split, contribution, metrics_layout, micro_f1, read_total
from tests.support.rows import SCORES


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


# --- several labels a row ---

MOODS = Task(problem_type="multi_label_classification", labels=("a", "b", "c"))
flags = st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=3), min_size=1, max_size=20)


@given(flags.filter(lambda rows: any(wanted for row in rows for wanted, _ in row)))
def test_scores_of_several_labels_are_scikit_learn_s(rows: list[list[tuple[bool, bool]]]) -> None:
    wanted, found = np.moveaxis(np.array(rows), 2, 0)
    score = score_logits(found - np.float32(0.5), rows_of(wanted.astype(np.float32)), MOODS, np.arange(3))
    assert score.main == pytest.approx(accuracy_score(wanted, found))
    occurs = np.flatnonzero(wanted.any(axis=0))
    assert score.metric == pytest.approx(f1_score(wanted, found, labels=occurs, average="macro", zero_division=0))
    assert micro_f1(score.sums) == pytest.approx(f1_score(wanted, found, average="micro", zero_division=0))


def test_labels_that_an_owner_never_has_are_not_judged() -> None:
    wanted, found = np.array([[1, 0, 0]], np.float32), np.array([[1, -1, 1]], np.float32)
    assert score_logits(found, rows_of(wanted), MOODS, np.arange(3)).correct == 0
    assert score_logits(found, rows_of(wanted), MOODS, np.array([0, 1])).correct == 1


def with_task(agreement: Agreement, task: Task) -> Agreement:
    return agreement.model_copy(update={"task": task})


def test_label_counts_are_summed_on_test_examples_alone_and_never_by_name(agreement: Agreement) -> None:
    moods = with_task(agreement, MOODS)
    counts = {"ada": ((2.0, 3.0, 4.0),) * 3, "bea": ((0.0, 0.0, 1.0),) * 3, "cyd": ((1.0, 1.0, 1.0),) * 3}
    scores = {owner: Score(correct=1, rows=9, metric=0.5, sums=sums) for owner, sums in counts.items()}
    mean = read_total(moods, "test", ["m"], total_for(moods, scores))["m"]
    assert mean.sums == ((3.0, 4.0, 6.0),) * 3
    assert all(score.sums == () for score in mean.by_owner.values())
    assert read_total(moods, "validation", ["m"], total_for(moods, scores, "validation"))["m"].sums == ()
    private = with_task(agreement, MOODS.model_copy(update={"head": "private"}))
    assert "m/labels" not in metrics_layout(private, "test", ["m"])


@pytest.mark.parametrize("counts", [(4, 3, 4), (4, 4, 3), (-1, 3, 4), (0, 28, 0), (0, 0, 28)])
def test_136_label_counts_that_no_rows_have_are_no_total(agreement: Agreement, counts: tuple[float, ...]) -> None:
    """Of 27 rows."""
    moods, honest = with_task(agreement, MOODS), ((0.0, 0.0, 0.0),) * 3
    scores = {owner: Score(correct=1, rows=9, metric=0.5, sums=honest) for owner in SCORES}
    total = total_for(moods, scores)
    layout = metrics_layout(moods, "test", ["m"])
    position = next(place for entry, place in layout.positions() if entry.name == "m/labels")
    total[position.start : position.start + 3] = counts
    with pytest.raises(FalseTotal, match="m/labels is of no rows that owners can have"):
        read_total(moods, "test", ["m"], total)


# --- numbers ---

RATING = Task(problem_type="regression", labels=("x", "y"), target_range=(-2.0, 6.0))


def numbers(seed: int, rows: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    wanted = random.uniform(-2, 6, (rows, 2)).astype(np.float32)
    return wanted, (wanted + random.normal(0, noise, wanted.shape)).astype(np.float32)


def test_a_regression_s_metrics_come_from_sums_over_all_rows_of_all_owners(agreement: Agreement) -> None:
    rating, parts = with_task(agreement, RATING), [numbers(seed, 200 + 50 * seed, 1.0 + seed) for seed in range(3)]
    scores = {
        owner: score_logits(found, rows_of(wanted), RATING, np.arange(2))
        for owner, (wanted, found) in zip(SCORES, parts, strict=True)
    }
    mean = read_total(rating, "test", ["m"], total_for(rating, scores))["m"]
    wanted, found = (
        np.concatenate([each[0] for each in parts]),
        np.clip(np.concatenate([each[1] for each in parts]), -2, 6),
    )
    assert mean.rows == 750
    assert mean.metric == pytest.approx(np.square(wanted - found).mean(), abs=3 * STEP * 64 / 750)
    expected = np.mean([np.corrcoef(wanted[:, target], found[:, target])[0, 1] for target in range(2)])
    assert mean.pearson_r == pytest.approx(expected, abs=0.002)
    assert mean.by_owner == scores
    assert mean.accuracy is None


def test_predictions_that_are_no_numbers_or_beyond_the_range_are_clipped() -> None:
    wanted = np.array([[-2, 6], [6, 2]], np.float32)
    odd = np.array([[-1e38, np.inf], [7, np.nan]], np.float32)
    clipped = np.array([[-2, 6], [6, 2]], np.float32)
    one, other = (score_logits(found, rows_of(wanted), RATING, np.arange(2)) for found in (odd, clipped))
    assert one == other
    assert one.metric == 0.0


def test_a_constant_prediction_has_no_correlation() -> None:
    wanted, _ = numbers(0, 100, 1.0)
    score = score_logits(np.full_like(wanted, 2.0), rows_of(wanted), RATING, np.arange(2))
    assert score.pearson_r == 0.0


@pytest.mark.parametrize(
    ("index", "value"),
    [(0, 31.0), (0, -1.0), (2, 20.0), (2, 1.0), (3, 0.0), (4, -1.0), (4, 30.0), (5, 40.0)],
)
def test_136_sums_that_no_numbers_have_are_no_total(agreement: Agreement, index: int, value: float) -> None:
    """Of 30 rows, which all have target 0.5 and prediction 0.5 but for the one that is changed."""
    one = with_task(agreement, RATING)
    sums = (5.0, 5.0, 2.5, 2.5, 0.0)
    scores = {owner: Score(correct=None, rows=10, metric=0.0, pearson_r=0.0, sums=(sums, sums)) for owner in SCORES}
    total = total_for(one, scores)
    read_total(one, "test", ["m"], total)
    total[index] = value
    with pytest.raises(FalseTotal, match="m/targets is of no rows that owners can have"):
        read_total(one, "test", ["m"], total)


# --- cut texts ---


def cut_total(agreement: Agreement, counts: dict[str, tuple[int, int]]) -> np.ndarray:
    layout = metrics_layout(agreement, "test", ["own_at_home"])
    total = np.zeros(layout.size)
    for owner, cut in counts.items():
        vector = np.empty(layout.size)
        score = Score(correct=1, rows=9, metric=0.5, cut=cut)
        layout.flatten(contribution(agreement, owner, "test", {"own_at_home": score}), vector)
        total += vector
    return total


def test_cut_texts_are_counted_over_all_owners_and_never_by_name(agreement: Agreement) -> None:
    total = cut_total(agreement, {"ada": (0, 100), "bea": (40, 2000), "cyd": (10, 20)})
    mean = read_total(agreement, "test", ["own_at_home"], total)["own_at_home"]
    assert mean.cut == (50, 2120)
    assert all(score.cut is None for score in mean.by_owner.values())
    names = [entry.name for entry in metrics_layout(agreement, "test", ["base", "own_at_home", "m"]).entries]
    assert [name for name in names if name.endswith("/cut")] == ["own_at_home/cut"]
    assert "own_at_home/cut" not in metrics_layout(agreement, "validation", ["own_at_home"])
    images = with_task(agreement, Task(kind="image-classification", labels=("a", "b", "c")))
    assert "own_at_home/cut" not in metrics_layout(images, "test", ["own_at_home"])


def test_136_more_cut_texts_than_texts_are_no_total(agreement: Agreement) -> None:
    for counts in ((3, 2), (-1, 2)):
        with pytest.raises(FalseTotal, match="own_at_home/cut is of no rows"):
            read_total(agreement, "test", ["own_at_home"], cut_total(agreement, {"ada": counts}))
