"""How well a model does on an owner's held-out rows."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from transformers import PreTrainedModel

from client.private_data import Rows
from common.metrics import Score


@torch.inference_mode()
def predict_logits(model: PreTrainedModel, rows: Rows, batch_size: int) -> NDArray[np.float32]:
    """(rows, labels) float32, in the order of the rows."""
    model.eval()
    logits = np.empty((len(rows), model.config.num_labels), dtype=np.float32)
    for indices, batch in rows.batches(batch_size):
        logits[indices] = model(**batch).logits.float().numpy()
    return logits


def score_logits(logits: NDArray[np.float32], labels: NDArray[np.int64], allowed: NDArray[np.int64]) -> Score:
    """Judge predictions among the `allowed` labels; macro F1 is the mean over the labels that occur in `labels`."""
    predicted = allowed[logits[:, allowed].argmax(axis=1)]
    macro_f1 = f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)
    return Score(correct=int((predicted == labels).sum()), rows=len(labels), macro_f1=float(macro_f1))
