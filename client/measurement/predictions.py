"""What an owner's model says of the public pool, as it is summed (common/merge_methods/distill.py)."""

import numpy as np
from numpy.typing import NDArray


def centred(logits: NDArray[np.float32], known: NDArray[np.bool_], largest: float) -> NDArray[np.float64]:
    """Logits (rows, labels), less their mean over the `known` labels (labels,), clipped; zeros for the others."""
    said = logits[:, known].astype(np.float64)  # (rows, known labels)
    said = np.clip(said - said.mean(axis=1, keepdims=True), -largest, largest)  # check: logits-are-clipped
    found = np.zeros(logits.shape)
    found[:, known] = said
    return found
