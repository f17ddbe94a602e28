"""Metrics travel as sums and counts, through the same sum as everything else; one division at the end.

A *figure* stands beside accuracy, by the kind of task: macro F1 for classification, F1 of entities for token
classification, mean log likelihood of a token in nats for language models. More is better, for all of them.

Per model, an owner adds:
    mean      (3,)      its accuracy, its figure, and 1: the total gives means in which every owner counts alike.
                        Both are rounded to thousandths: a sum of exact fractions tells each one's denominator
    pooled    (2,)      its correct predictions and its predictions ("rows": one a row, or one a word or token of it):
                        the total gives the accuracy in which every prediction counts alike
    shown     (S, 3)    on test rows only: correct, rows, figure, in the row of each of the S owners whose figures
                        may be shown singly
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.agreement import Agreement
from common.tensor_layout import TensorEntry, TensorLayout

MAX_NATS = 100.0  # a token less likely than that counts as this unlikely


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one model did on one owner's rows."""

    correct: int
    rows: int
    figure: float


def metrics_layout(agreement: Agreement, split: str, models: Sequence[str]) -> TensorLayout:
    """The layout of a metrics sum over `models` on the rows of a split."""
    entries = []
    for model in models:
        rows = float(agreement.bounds.examples * agreement.task.predictions_per_row)
        entries.append(TensorEntry(name=f"{model}/mean", shape=(3,), bound=MAX_NATS))
        entries.append(TensorEntry(name=f"{model}/pooled", shape=(2,), bound=rows))
        if shows_single(agreement, split):
            entries.append(TensorEntry(name=f"{model}/shown", shape=(len(agreement.shown_owners), 3), bound=rows))
    return TensorLayout(tuple(entries))


def shows_single(agreement: Agreement, split: str) -> bool:
    """Whether figures of single owners are in the sums of this split: of test rows, where somebody agreed."""
    return split == "test" and bool(agreement.shown_owners)


def contribution(
    agreement: Agreement, owner: str, split: str, scores: Mapping[str, Score]
) -> Iterator[tuple[str, NDArray]]:
    """One owner's named tensors, in the order of `metrics_layout(agreement, split, list(scores))`."""
    for model, score in scores.items():
        yield f"{model}/mean", np.array([_thousandths(score.correct / score.rows), _thousandths(score.figure), 1.0])
        yield f"{model}/pooled", np.array([score.correct, score.rows], dtype=np.float64)
        if shows_single(agreement, split):
            shown = np.zeros((len(agreement.shown_owners), 3))
            if owner in agreement.shown_owners:
                shown[agreement.shown_owners.index(owner)] = score.correct, score.rows, score.figure
            yield f"{model}/shown", shown


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """A model's figures over all owners, and singly where an owner agreed."""

    accuracy: float
    figure: float
    pooled_accuracy: float
    rows: int
    by_owner: Mapping[str, Score]

    def chosen_by(self, measure: str) -> float:
        """What a sweep is decided by: `accuracy`, or the task's figure."""
        return self.accuracy if measure == "accuracy" else self.figure


def _thousandths(share: float) -> float:
    return round(1000 * share) / 1000


def read_total(agreement: Agreement, split: str, models: Sequence[str], total: NDArray) -> dict[str, MeanScore]:
    """Turn the summed vector into figures: the only division of a metric."""
    layout = metrics_layout(agreement, split, models)
    scores = {}
    for model in models:
        accuracy, figure, owners = layout.read(total, f"{model}/mean")
        correct, rows = layout.read(total, f"{model}/pooled")
        shown = layout.read(total, f"{model}/shown") if shows_single(agreement, split) else np.empty((0, 3))
        scores[model] = MeanScore(
            accuracy=float(accuracy / owners),
            figure=float(figure / owners),
            pooled_accuracy=float(correct / rows),
            rows=round(rows),
            by_owner={
                owner: Score(correct=round(row[0]), rows=round(row[1]), figure=float(row[2]))
                for owner, row in zip(agreement.shown_owners, shown, strict=False)
                if row[1] > 0  # an owner that dropped out left its row empty
            },
        )
    return scores
