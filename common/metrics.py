"""Metrics travel as sums and counts, through the same sum as everything else, with one division at the end.

Beside accuracy, each kind of task has one more metric: macro F1 for classification, F1 of entities for token
classification, the mean log likelihood of a token in nats for language models. For all of them, more is better.

For each model, an owner adds:
    mean      (3,)      its accuracy, its metric, and 1: the total gives means in which every owner counts alike.
                        Both are rounded to thousandths, because a sum of exact fractions exposes each denominator
    pooled    (2,)      its correct predictions and its predictions ("rows": one an example, or one for each of its
                        words or tokens): the total gives the accuracy in which every prediction counts alike
    shown     (S, 3)    on test examples only: correct, rows and metric, in the row of each of the S owners whose
                        metrics may be shown by name

With several labels a row, a prediction is correct if it names exactly the row's labels. On test examples there is also
    labels    (L, 3)    by label: rows that have it and are given it, that have it, and that are given it. The total
                        gives F1 by label, and micro F1. Owners with private heads have no labels in common

If groups of rows are agreed on, there is also
    groups    (G, 3)    by group: correct, rows, and 1 from an owner that reports it; zeros from one that does not,
                        because it has too few rows of the group (client/data/groups.py)

Of texts, an owner adds once, on test examples, with its own model at home:
    cut       (2,)      how many of its test texts are cut to max_tokens, of how many it looked at

A regression has no correct predictions. Targets and predictions are put on a scale from 0 to 1, the agreed range, and
predictions beyond it count as its nearest end. An owner adds:
    targets   (T, 5)    by target: sums over rows of prediction, target, prediction^2, target^2 and their squared
                        difference, each rounded to a multiple of STEP (client/measurement/evaluation.py)
    rows      (2,)      its rows, and 1
    shown     (S, 5 T + 1)  on test examples only, by name: the sums and the rows
The total gives the mean squared error, where less is better, and Pearson's r; of several targets, their means.

With privacy.epsilon, owners add noise, and what one example adds is bounded (common/privacy/legs.py). No metrics are
shown by name. For each model, an owner adds:
    rows      (1,)      its examples, one of each person; how many there are is not hidden
    noised    (k,)      sums over examples, with noise:
                        classification       the right ones; for each label (right, wanted, found)
                        token classification an example's share of right labels; its entities (right, wanted, found) as
                                             shares of those that it has or is given, whichever are more
                        language models      an example's share of right tokens, and its mean nats over MAX_NATS
                        regression           `targets`, not rounded
The total gives metrics over all owners' examples together. Noise moves them; those that it moves out of their range
are put at its end. Macro F1 is over the labels that clearly occur.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.agreement import WORST_GROUP, Agreement, Task
from common.errors import FalseTotal
from common.privacy.legs import own_noise
from common.privacy.noise import Noise, bound_with_noise
from common.tensor_layout import TensorEntry, TensorLayout

MAX_NATS = 16.0  # a less likely token counts as this unlikely: one in nine million
STEP = 2.0**-6  # of a regression's sums; the finer it is, the more a crafted model can tell about one row
CLEARLY = 3.0  # standard deviations of noise: a label that is counted so often occurs
LOOK_TEXTS = 2000  # of which an owner says at most how many are cut
LOWER_IS_BETTER = ("mean_squared_error",)
BASE, OWN_AT_HOME = "base", "own_at_home"  # models that every evaluation on test examples has, beside the merged ones
Split = Literal["validation", "test"]
METRIC_KINDS = {
    "mean": "a model's accuracy and metric on {their} examples, in thousandths",
    "pooled": "the number of {their} predictions by a model, and how many are right",
    "labels": "how many of {their} rows have each label, how many a model gives it, and both",
    "groups": "of {their} rows, by agreed group: how many a model gets right, how many there are, and if there are any",
    "targets": "sums of a model's predictions, of {their} targets, and of their squares, on a scale from 0 to 1",
    "rows": "the number of {their} rows that a model predicts",
    "noised": "sums over {their} examples of how a model does on each, with noise",
    "cut": "how many of {their} test texts are cut to max_tokens, of how many that were looked at",
    "shown": "the same by name, for owners that agreed to it; zeros for the others",
}

Sums = tuple[tuple[float, ...], ...]  # one row for each label or target


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one model did on one owner's examples.

    `correct`: predictions, None for a regression, which has `pearson_r` instead. `sums`: by label or target, as they
    travel; empty if the task has none. `cut`: of how many texts how many were cut, (cut, texts); None where that is not
    counted. `groups`: by agreed group, as they travel.
    """

    correct: int | None
    rows: int
    metric: float
    pearson_r: float | None = None
    sums: Sums = ()
    cut: tuple[int, int] | None = None
    groups: Sums = ()

    @property
    def main(self) -> float:
        """The number that models are compared by: accuracy, or Pearson's r."""
        return compared_by(None if self.correct is None else self.correct / self.rows, self.pearson_r)

    def chosen_by(self, measure: str) -> float:
        """The number that decides a choice; more is better."""
        return decisive(self.main, self.metric, measure, self.groups)


def compared_by(accuracy: float | None, pearson_r: float | None) -> float:
    """The one of the two that a task has."""
    value = pearson_r if accuracy is None else accuracy
    assert value is not None
    return value


def decisive(main: float, metric: float, measure: str, groups: Sums = ()) -> float:
    """The one of a model's metrics that `measure` names, so that more is better."""
    if measure == WORST_GROUP:
        return worst_accuracy(groups)
    if measure in LOWER_IS_BETTER:
        return -metric
    return main if measure in ("accuracy", "pearson_r") else metric


def worst_accuracy(groups: Sums) -> float:
    """The least share of right rows in any group that somebody reports; 0 if nobody reports any."""
    return min((correct / rows for correct, rows, _ in groups if rows > 0), default=0.0)


def metrics_layout(agreement: Agreement, split: Split, models: Sequence[str]) -> TensorLayout:
    """The layout of a metrics round over `models` on the examples of a split."""
    entries = []
    task, shows = agreement.task, shows_single(agreement, split)
    for model in models:
        rows = float(agreement.bounds.examples * task.predictions_per_example)
        if agreement.privacy.epsilon is not None:  # check: no-metric-is-exact
            entries += _noised_entries(agreement, model)
            continue
        shown = (len(agreement.shown_owners), 5 * len(task.labels) + 1 if task.is_regression else 3)
        if task.is_regression:
            entries.append(TensorEntry(name=f"{model}/targets", shape=(len(task.labels), 5), bound=rows))
            entries.append(TensorEntry(name=f"{model}/rows", shape=(2,), bound=rows))
        else:
            entries.append(TensorEntry(name=f"{model}/mean", shape=(3,), bound=MAX_NATS))
            entries.append(TensorEntry(name=f"{model}/pooled", shape=(2,), bound=rows))
        if _counts_labels(task, split):
            entries.append(TensorEntry(name=f"{model}/labels", shape=(len(task.labels), 3), bound=rows))
        if agreement.evaluation.groups:
            shape = (len(agreement.evaluation.groups), 3)
            entries.append(TensorEntry(name=f"{model}/groups", shape=shape, bound=rows))
        if counts_cut(agreement, split, model):
            entries.append(TensorEntry(name=f"{model}/cut", shape=(2,), bound=LOOK_TEXTS))
        if shows:
            entries.append(TensorEntry(name=f"{model}/shown", shape=shown, bound=rows))
    return TensorLayout(tuple(entries))


def _counts_labels(task: Task, split: Split) -> bool:
    return task.has_several_labels and task.sums_per_output > 0 and split == "test"


def _noised_entries(agreement: Agreement, model: str) -> list[TensorEntry]:
    examples, noise = float(agreement.bounds.examples), own_noise(agreement, "metrics")
    size = noised_size(agreement.task)
    return [
        TensorEntry(name=f"{model}/rows", shape=(1,), bound=examples),
        TensorEntry(name=f"{model}/noised", shape=(size,), bound=bound_with_noise(examples, noise), noise=noise),
    ]


def noised_size(task: Task) -> int:
    """How many sums of a model have noise."""
    if task.is_regression:
        return 5 * len(task.labels)
    if task.kind == "token-classification":
        return 4
    return 1 + 3 * len(task.labels) if task.has_labels else 2


def counts_cut(agreement: Agreement, split: Split, model: str) -> bool:
    """Whether an owner says with this model how many of its texts are cut: a count of rows, which has no noise."""
    is_exact = agreement.privacy.epsilon is None
    return is_exact and agreement.task.is_text and split == "test" and model == OWN_AT_HOME


def metric_kind(name: str) -> str:
    """Which of METRIC_KINDS the tensor `name` is."""
    return name.rpartition("/")[2]


def shows_single(agreement: Agreement, split: Split) -> bool:
    """Whether metrics of single owners are in the rounds of this split: on test examples, where somebody agreed."""
    return split == "test" and bool(agreement.shown_owners)


def contribution(
    agreement: Agreement, owner: str, split: Split, scores: Mapping[str, Score], noise: Noise | None = None
) -> Iterator[tuple[str, NDArray]]:
    """One owner's named tensors, in the order of `metrics_layout(agreement, split, list(scores))`."""
    for model, score in scores.items():
        if noise is not None:
            yield f"{model}/rows", np.array([float(score.rows)])
            yield f"{model}/noised", noise.added(f"{model}/noised", np.ravel(score.sums))
            continue
        if score.correct is None:
            yield f"{model}/targets", np.array(score.sums)
            yield f"{model}/rows", np.array([score.rows, 1.0])
            by_name = [*np.ravel(score.sums), score.rows]
        else:
            by_name = [score.correct, score.rows, thousandths(score.metric)]
            yield f"{model}/mean", np.array([thousandths(score.main), by_name[-1], 1.0])
            yield f"{model}/pooled", np.array([score.correct, score.rows], dtype=np.float64)
        if _counts_labels(agreement.task, split):
            yield f"{model}/labels", np.array(score.sums)
        if agreement.evaluation.groups:
            yield f"{model}/groups", np.array(score.groups)
        if counts_cut(agreement, split, model):
            yield f"{model}/cut", np.array(score.cut, dtype=np.float64)
        if shows_single(agreement, split):
            shown = np.zeros((len(agreement.shown_owners), len(by_name)))
            if owner in agreement.shown_owners:
                shown[agreement.shown_owners.index(owner)] = by_name
            yield f"{model}/shown", shown


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """A model's metrics over all owners, and by owner where an owner agreed.

    Those of a regression are over the rows of all owners together, and it has `pearson_r` instead of accuracy. `sums`:
    by label or target, over all owners; empty if the task has none. `cut`: as of a Score. `groups`: by agreed group,
    over the owners that report it: correct, rows, and how many owners these are.
    """

    accuracy: float | None
    metric: float
    pooled_accuracy: float | None
    rows: int
    by_owner: Mapping[str, Score]
    pearson_r: float | None = None
    sums: Sums = ()
    cut: tuple[int, int] | None = None
    groups: Sums = ()

    @property
    def main(self) -> float:
        """The number that models are compared by: accuracy, or Pearson's r."""
        return compared_by(self.accuracy, self.pearson_r)

    def chosen_by(self, measure: str) -> float:
        """The number that decides a sweep; more is better."""
        return decisive(self.main, self.metric, measure, self.groups)


def thousandths(share: float) -> float:
    return round(1000 * share) / 1000


def read_total(agreement: Agreement, split: Split, models: Sequence[str], total: NDArray) -> dict[str, MeanScore]:
    """Turn the summed vector into metrics: the only division of a metric.

    Raises FalseTotal for sums over labels or targets that no rows can have.
    """
    layout, task = metrics_layout(agreement, split, models), agreement.task
    scores = {}
    for model in models:
        if agreement.privacy.epsilon is not None:
            noise = len(agreement.owners) ** 0.5 * layout.entry(f"{model}/noised").noise
            (rows,) = layout.read(total, f"{model}/rows")
            scores[model] = noised_score(task, layout.read(total, f"{model}/noised"), round(float(rows)), noise)
            continue
        shown = layout.read(total, f"{model}/shown") if shows_single(agreement, split) else np.empty((0, 3))
        cut = _read_cut(layout, total, model) if counts_cut(agreement, split, model) else None
        # An owner that dropped out left its row empty.
        by_owner = {
            owner: row
            for owner, row in zip(agreement.shown_owners, shown, strict=False)
            if row[-1 if task.is_regression else 1] > 0
        }
        if task.is_regression:
            sums, (rows, owners) = layout.read(total, f"{model}/targets"), layout.read(total, f"{model}/rows")
            _check_moments(model, sums, rows, owners)
            whole = regression_score(sums, round(rows), task, round(owners))
            scores[model] = MeanScore(
                accuracy=None,
                metric=whole.metric,
                pooled_accuracy=None,
                rows=whole.rows,
                by_owner={
                    owner: regression_score(row[:-1].reshape(-1, 5), round(row[-1]), task)
                    for owner, row in by_owner.items()
                },
                pearson_r=whole.pearson_r,
                sums=whole.sums,
                cut=cut,
            )
            continue
        accuracy, metric, owners = layout.read(total, f"{model}/mean")
        correct, rows = layout.read(total, f"{model}/pooled")
        counts: Sums = ()
        if _counts_labels(task, split):
            labels = layout.read(total, f"{model}/labels")
            _check_counts(model, labels, rows)
            counts = _as_sums(labels.round())
        groups = _read_groups(agreement, layout, total, model) if agreement.evaluation.groups else ()
        scores[model] = MeanScore(
            accuracy=float(accuracy / owners),
            metric=float(metric / owners),
            pooled_accuracy=float(correct / rows),
            rows=round(rows),
            by_owner={
                owner: Score(correct=round(row[0]), rows=round(row[1]), metric=float(row[2]))
                for owner, row in by_owner.items()
            },
            sums=counts,
            cut=cut,
            groups=groups,
        )
    _check_same_groups(scores)
    return scores


def _check_same_groups(scores: Mapping[str, MeanScore]) -> None:
    """Raise FalseTotal unless all models are judged on the same rows of each group.

    Whoever gave rows of a group to some of them alone would choose among them, and no report could compare them.
    """
    judged = [(model, [row[1:] for row in score.groups]) for model, score in scores.items()]
    for model, rows in judged:
        if rows != judged[0][1]:  # check: models-have-the-same-groups
            raise _false_total(model, "groups")


def _read_groups(agreement: Agreement, layout: TensorLayout, total: NDArray, model: str) -> Sums:
    """Raises FalseTotal unless the groups are parts of the model's rows, and no owner reports too few of one."""
    groups = layout.read(total, f"{model}/groups").round()
    correct, rows, owners = groups.T
    whole_correct, whole = layout.read(total, f"{model}/pooled").round()
    least = agreement.evaluation.least_group_rows
    fits = (correct >= 0).all() and (correct <= rows).all() and ((rows > 0) == (owners > 0)).all()
    fits = fits and (owners <= len(agreement.owners)).all() and (rows >= least * owners).all()
    fits = fits and rows.sum() <= whole and correct.sum() <= whole_correct
    fits = fits and (rows - correct).sum() <= whole - whole_correct
    if not fits:  # check: groups-are-parts-of-the-rows
        raise _false_total(model, "groups")
    return _as_sums(groups)


def _read_cut(layout: TensorLayout, total: NDArray, model: str) -> tuple[int, int]:
    cut, texts = (round(float(each)) for each in layout.read(total, f"{model}/cut"))
    if not 0 <= cut <= texts:  # check: cut-texts-are-texts
        raise _false_total(model, "cut")
    return cut, texts


# --- with noise ---


def noised_score(task: Task, sums: NDArray[np.float64], rows: int, noise: float) -> MeanScore:
    """Metrics of sums over examples, each of which `noise` moves by so much in the mean. Never NaN."""
    rows = max(rows, 1)
    if task.is_regression:
        return _noised_regression(task, sums.reshape(-1, 5), rows, noise)
    accuracy = float(np.clip(sums[0] / rows, 0.0, 1.0))  # check: noised-shares-are-shares
    if not task.has_labels:
        metric = -MAX_NATS * float(np.clip(sums[1] / rows, 0.0, 1.0))
        return MeanScore(accuracy=accuracy, metric=metric, pooled_accuracy=accuracy, rows=rows, by_owner={})
    counts = np.clip(sums[1:].reshape(-1, 3), 0.0, rows)  # (labels, 3)
    occurs = counts[:, 1] > CLEARLY * noise
    scored = [min(f1_of(each) or 0.0, 1.0) for each in counts[occurs]]
    metric = float(np.mean(scored)) if scored else 0.0
    # Readers take these for counts of rows: of each label, no more are right than have it, or are given it.
    counts[:, 0] = counts.min(axis=1)
    shown = _as_sums(counts.round()) if task.has_several_labels else ()
    return MeanScore(accuracy=accuracy, metric=metric, pooled_accuracy=accuracy, rows=rows, by_owner={}, sums=shown)


def _noised_regression(task: Task, sums: NDArray[np.float64], rows: int, noise: float) -> MeanScore:
    _, span = task.lowest_and_span
    sums = np.clip(sums, 0.0, rows)
    error = float(sums[:, 4].mean()) * span**2 / rows
    r = float(np.mean([pearson_r(each, rows, noise=noise) for each in sums]))
    shown = _as_sums(sums)
    return MeanScore(accuracy=None, metric=error, pooled_accuracy=None, rows=rows, by_owner={}, pearson_r=r, sums=shown)


# --- several labels ---


def f1_of(counts: Sequence[float]) -> float | None:
    """F1 of a label: right, wanted and found rows. None if no row has the label or is given it."""
    right, wanted, found = counts
    return 2 * right / (wanted + found) if wanted + found else None


def micro_f1(counts: Sums) -> float | None:
    """F1 over all labels together; None if there are no counts."""
    return f1_of([sum(column) for column in zip(*counts, strict=True)]) if counts else None


def _check_counts(model: str, counts: NDArray[np.float64], rows: float) -> None:
    """Raise FalseTotal unless the counts of each label can be of so many rows."""
    right, wanted, found = counts.T
    half = 0.5  # honest counts are whole
    fits = (right > -half) & (right < np.minimum(wanted, found) + half) & (np.maximum(wanted, found) < rows + half)
    if not fits.all():  # check: label-counts-fit-the-rows
        raise _false_total(model, "labels")


# --- regressions ---


def regression_score(sums: NDArray[np.float64], rows: int, task: Task, owners: int = 1) -> Score:
    """Mean squared error, in squared units of the targets, and Pearson's r; of several targets, their means.

    `sums`: (targets, 5), each rounded by `owners`.
    """
    _, span = task.lowest_and_span
    error = float(sums[:, 4].mean()) * span**2 / max(rows, 1)
    r = float(np.mean([pearson_r(each, rows, owners) for each in sums]))
    return Score(correct=None, rows=rows, metric=max(error, 0.0), pearson_r=r, sums=_as_sums(sums))


def pearson_r(sums: Sequence[float] | NDArray[np.float64], rows: int, owners: int = 1, noise: float = 0.0) -> float:
    """The correlation of predictions and targets. 0 if either varies by no more than rounding or noise explains."""
    predicted, target, predicted_squares, target_squares, squared_errors = map(float, sums)
    rows = max(rows, 1)
    variances = [predicted_squares - predicted**2 / rows, target_squares - target**2 / rows]
    if min(variances) <= 4 * STEP * owners + 4 * noise:
        return 0.0
    covariance = (predicted_squares + target_squares - squared_errors) / 2 - predicted * target / rows
    return float(np.clip(covariance / np.sqrt(variances[0] * variances[1]), -1.0, 1.0))


def _check_moments(model: str, sums: NDArray[np.float64], rows: float, owners: float) -> None:
    """Raise FalseTotal unless the sums can be of so many numbers between 0 and 1, up to each owner's rounding."""
    room = 4 * STEP * owners
    values, squares, errors = sums[:, :2], sums[:, 2:4], sums[:, 4]
    fits = rows >= 1 and owners >= 1 and (squares >= values**2 / max(rows, 1) - room).all()
    fits = fits and (squares <= values + room).all() and (values <= rows + room).all()
    fits = fits and (errors >= -room).all() and (errors <= squares.sum(axis=1) + room).all()
    if not fits:  # check: moments-fit-the-rows
        raise _false_total(model, "targets")


def _as_sums(array: NDArray[np.float64]) -> Sums:
    return tuple(tuple(map(float, row)) for row in array)


def _false_total(model: str, kind: str) -> FalseTotal:
    return FalseTotal(
        f"sum: {model}/{kind} is of no rows that owners can have: an owner sent a false vector, and the sum hides who "
        "it was",
        hint="owners contribute once: find out together, then make a new agreement",
    )
