"""What an owner's model says of the public pool, as it is summed (common/merge_methods/distill.py)."""

import numpy as np
from numpy.typing import NDArray

from common.agreement import Task


def as_summed(logits: NDArray[np.float32], known: NDArray[np.bool_], largest: float, task: Task) -> NDArray[np.float64]:
    """A model's outputs, (predictions, labels), within `largest` of 0; zeros for labels that it does not know."""
    if task.is_regression:
        lowest, span = task.lowest_and_span
        return _of_known(largest * (2 * (logits.astype(np.float64) - lowest) / span - 1), known, largest)
    if task.has_several_labels:
        return _of_known(logits.astype(np.float64), known, largest)
    return centred(logits, known, largest)


def _of_known(numbers: NDArray[np.float64], known: NDArray[np.bool_], largest: float) -> NDArray[np.float64]:
    return np.where(known, np.clip(numbers, -largest, largest), 0.0)  # check: outputs-are-clipped


def centred(logits: NDArray[np.float32], known: NDArray[np.bool_], largest: float) -> NDArray[np.float64]:
    """Logits (rows, labels), less their mean over the `known` labels (labels,), clipped; zeros for the others."""
    said = logits[:, known].astype(np.float64)  # (rows, known labels)
    said = np.clip(said - said.mean(axis=1, keepdims=True), -largest, largest)  # check: logits-are-clipped
    found = np.zeros(logits.shape)
    found[:, known] = said
    return found
