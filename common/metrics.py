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
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.agreement import Agreement
from common.tensor_layout import TensorEntry, TensorLayout

MAX_NATS = 16.0  # a less likely token counts as this unlikely: one in nine million
BASE, OWN_AT_HOME = "base", "own_at_home"  # models that every evaluation on test examples has, beside the merged ones
Split = Literal["validation", "test"]
METRIC_KINDS = {
    "mean": "a model's accuracy and metric on {their} examples, in thousandths",
    "pooled": "the number of {their} predictions by a model, and how many are right",
    "shown": "the same by name, for owners that agreed to it; zeros for the others",
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one model did on one owner's examples."""

    correct: int
    rows: int
    metric: float


def metrics_layout(agreement: Agreement, split: Split, models: Sequence[str]) -> TensorLayout:
    """The layout of a metrics round over `models` on the examples of a split."""
    entries = []
    for model in models:
        rows = float(agreement.bounds.examples * agreement.task.predictions_per_example)
        entries.append(TensorEntry(name=f"{model}/mean", shape=(3,), bound=MAX_NATS))
        entries.append(TensorEntry(name=f"{model}/pooled", shape=(2,), bound=rows))
        if shows_single(agreement, split):
            entries.append(TensorEntry(name=f"{model}/shown", shape=(len(agreement.shown_owners), 3), bound=rows))
    return TensorLayout(tuple(entries))


def metric_kind(name: str) -> str:
    """Which of METRIC_KINDS the tensor `name` is."""
    return name.rpartition("/")[2]


def shows_single(agreement: Agreement, split: Split) -> bool:
    """Whether metrics of single owners are in the rounds of this split: on test examples, where somebody agreed."""
    return split == "test" and bool(agreement.shown_owners)


def contribution(
    agreement: Agreement, owner: str, split: Split, scores: Mapping[str, Score]
) -> Iterator[tuple[str, NDArray]]:
    """One owner's named tensors, in the order of `metrics_layout(agreement, split, list(scores))`."""
    for model, score in scores.items():
        yield f"{model}/mean", np.array([thousandths(score.correct / score.rows), thousandths(score.metric), 1.0])
        yield f"{model}/pooled", np.array([score.correct, score.rows], dtype=np.float64)
        if shows_single(agreement, split):
            shown = np.zeros((len(agreement.shown_owners), 3))
            if owner in agreement.shown_owners:
                shown[agreement.shown_owners.index(owner)] = score.correct, score.rows, thousandths(score.metric)
            yield f"{model}/shown", shown


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """A model's metrics over all owners, and by owner where an owner agreed."""

    accuracy: float
    metric: float
    pooled_accuracy: float
    rows: int
    by_owner: Mapping[str, Score]

    def chosen_by(self, measure: str) -> float:
        """The number that decides a sweep: `accuracy`, or the task's metric."""
        return self.accuracy if measure == "accuracy" else self.metric


def thousandths(share: float) -> float:
    return round(1000 * share) / 1000


def read_total(agreement: Agreement, split: Split, models: Sequence[str], total: NDArray) -> dict[str, MeanScore]:
    """Turn the summed vector into metrics: the only division of a metric."""
    layout = metrics_layout(agreement, split, models)
    scores = {}
    for model in models:
        accuracy, metric, owners = layout.read(total, f"{model}/mean")
        correct, rows = layout.read(total, f"{model}/pooled")
        shown = layout.read(total, f"{model}/shown") if shows_single(agreement, split) else np.empty((0, 3))
        scores[model] = MeanScore(
            accuracy=float(accuracy / owners),
            metric=float(metric / owners),
            pooled_accuracy=float(correct / rows),
            rows=round(rows),
            by_owner={
                owner: Score(correct=round(row[0]), rows=round(row[1]), metric=float(row[2]))
                for owner, row in zip(agreement.shown_owners, shown, strict=False)
                if row[1] > 0  # an owner that dropped out left its row empty
            },
        )
    return scores
