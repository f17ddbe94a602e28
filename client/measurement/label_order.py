"""Whether a model's outputs are in the agreed order of labels, judged by its owner's own rows.

A model whose labels are numbered differently loads, runs and is merged like any other, and spoils the merge. On its own
rows it is worse than the base, and good once its outputs are put into another order. How good it is, is how often it is
right; with several labels or targets a row, the mean correlation of each output with its label or target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

# By how much another order must be better, in accuracy or correlation: by this, and by this many standard errors. The
# order that fits best is chosen among many, so a model that guesses seems to gain too, by more the fewer the rows are.
CLEAR_GAIN, CLEAR_ERRORS = 0.2, 3.0


@dataclass(frozen=True)
class LabelOrder:
    """How good a model is on its owner's rows, as its outputs are and in the order that fits best."""

    own: float
    base: float
    best: float
    order: tuple[str, ...]  # the label of each output that fits best
    rows: int

    @property
    def is_another(self) -> bool:
        """Whether the outputs are clearly in another order than the agreed one."""
        clear_gain = max(CLEAR_GAIN, CLEAR_ERRORS / self.rows**0.5)
        return self.own < self.base and self.best > max(self.base, self.own + clear_gain)


def label_order(
    own: NDArray[np.int64], base: NDArray[np.int64], targets: NDArray[np.int64], labels: Sequence[str]
) -> LabelOrder:
    """`own`, `base`: (rows,), the labels that the two models predict; `targets`: (rows,), the true ones."""
    counts = np.zeros((len(labels), len(labels)), np.int64)  # (predicted, true)
    np.add.at(counts, (own, targets), 1)
    predicted, true = linear_sum_assignment(counts, maximize=True)
    return LabelOrder(
        own=float((own == targets).mean()),
        base=float((base == targets).mean()),
        best=float(counts[predicted, true].sum() / len(targets)),
        order=tuple(labels[index] for index in true[np.argsort(predicted)]),
        rows=len(targets),
    )


def output_order(
    own: NDArray[np.float32], base: NDArray[np.float32], targets: NDArray[np.float32], labels: Sequence[str]
) -> LabelOrder:
    """The same for several labels or targets a row. All (rows, outputs): what the two models put out, and the truth."""
    fits = _correlations(own, targets)
    outputs, true = linear_sum_assignment(fits, maximize=True)
    return LabelOrder(
        own=float(np.diag(fits).mean()),
        base=float(np.diag(_correlations(base, targets)).mean()),
        best=float(fits[outputs, true].mean()),
        order=tuple(labels[index] for index in true),
        rows=len(targets),
    )


def _correlations(outputs: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """(outputs, targets): Pearson's r of each with each, 0 where one of them is constant."""
    centred = [each.astype(np.float64) - each.mean(axis=0, dtype=np.float64) for each in (outputs, targets)]
    products = centred[0].T @ centred[1]
    sizes = np.outer(*(np.linalg.norm(each, axis=0) for each in centred))
    found: NDArray[np.float64] = np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 1e-9)
    return found
