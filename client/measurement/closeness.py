"""How close public rows are to an owner's own (Synthetic Model Combination, arXiv 2210.05320), by the agreed base.

A feature is the base's last hidden state, averaged over a row's tokens or an image's patches, in the directions in
which the pool varies most. Every owner finds the same directions. Its own rows are one Gaussian there.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from client.data.rows import Rows
from client.measurement.passes import ON_CPU, Passes

DIRECTIONS = 32
RIDGE = 1e-3  # of the mean variance, on each: rows may be fewer than directions


@torch.inference_mode()
def mean_states(model: PreTrainedModel, rows: Rows, batch_size: int, passes: Passes = ON_CPU) -> NDArray[np.float64]:
    """(rows, hidden size): each row's last hidden states, averaged over its tokens."""
    model.eval()
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(rows)
    with passes.running(model):
        for indices, batch, _ in rows.batches(batch_size):
            states = model.base_model(**passes.inputs(batch)).last_hidden_state.double().cpu()
            states = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states  # (batch, d, height, width)
            mask = batch.get("attention_mask", torch.ones(states.shape[:2])).double()[..., None]
            means = (states * mask).sum(1) / mask.sum(1)  # (batch, d)
            for index, mean in zip(indices, means.numpy(), strict=True):
                found[index] = mean
    return np.stack(found)


def closeness(rows: NDArray[np.float64], own: NDArray[np.float64], pool: NDArray[np.float64]) -> NDArray[np.float64]:
    """The density of each of `rows` (rows, d) under a Gaussian of `own` (own rows, d), relative to what an own row has
    in the mean, at most 1: exp((k - D^2) / 2) for the squared Mahalanobis distance D^2 in k directions of `pool`.
    """
    middle = pool.mean(axis=0)
    _, sizes, directions = np.linalg.svd(pool - middle, full_matrices=False)
    kept = directions[: min(DIRECTIONS, int((sizes > 1e-6 * sizes.max(initial=0.0)).sum()))]  # (k, d)
    rows, mine = (rows - middle) @ kept.T, (own - middle) @ kept.T  # (rows, k), (own rows, k)
    away = mine - mine.mean(axis=0)
    covariance = away.T @ away / len(mine)  # (k, k)
    covariance += RIDGE * max(covariance.trace() / max(len(kept), 1), np.finfo(np.float64).tiny) * np.eye(len(kept))
    from_mine = rows - mine.mean(axis=0)
    distances = np.einsum("rk,kr->r", from_mine, np.linalg.solve(covariance, from_mine.T))  # D^2, (rows,)
    found: NDArray[np.float64] = np.exp(np.minimum((len(kept) - distances) / 2, 0.0))
    return found
