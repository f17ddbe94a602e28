"""What an owner's model says of the public pool, as it is summed (common/merge_methods/distill.py)."""

import numpy as np
import torch
from numpy.typing import NDArray

from common.agreement import Task


def as_summed(logits: NDArray[np.float32], known: NDArray[np.bool_], task: Task) -> NDArray[np.float32]:
    """A model's outputs, (predictions, labels), as numbers from 0 to 1; zeros for labels that it does not know.

    They are the probabilities of its `known` labels, (labels,), or a regression's shares of the agreed range.
    """
    if task.is_regression:
        lowest, span = task.lowest_and_span
        shares = ((logits - lowest) / span).astype(np.float32)
        return np.where(known, np.clip(shares, 0, 1), np.float32(0))  # check: outputs-are-clipped
    outputs = torch.from_numpy(np.where(known, logits, np.float32(-np.inf)))
    found = outputs.sigmoid() if task.has_several_labels else outputs.softmax(-1)
    return np.asarray(found.numpy())
