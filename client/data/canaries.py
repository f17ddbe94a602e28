"""Canaries: random rows that an owner plants in its own training, to measure later how well a model remembers them.

Carlini et al., The Secret Sharer (arXiv 1802.08232). The rows follow from the agreement's seed and the owner's name, so
an audit knows them again and no file holds them. They are fine-tuned on but never measured: no Gram matrix has them.
Only the line `[training] canaries` plants them.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from client.data.readers import features
from client.data.rows import IGNORED, Rows
from common.agreement import Task
from common.errors import SettingsError

DRAWN_TOKENS = 12  # of a canary; written out and read again, they may be a few more or fewer
MOST_TOKENS = 24


def canaries_of(owner: str, seed: int, count: int, like: Rows, task: Task) -> Rows:
    """The owner's `count` canaries. `like`: any rows of the owner, which have the form that its model takes."""
    drawn = hashlib.sha256(f"amalgram canaries v1\0{owner}\0{seed}".encode()).digest()
    return random_rows(np.random.default_rng(int.from_bytes(drawn)), count, like, task)


def random_rows(random: np.random.Generator, count: int, like: Rows, task: Task) -> Rows:
    """Rows as canaries are drawn: random tokens or noise, each with a target drawn from all. Raises SettingsError."""
    if task.problem_type != "single_label_classification":
        raise SettingsError(f"training.canaries: not for {task.problem_type} yet", hint="leave the line out")
    if isinstance(like.features, np.ndarray):
        noise = random.standard_normal((count, *like.features.shape[1:])).astype(np.float32)
        return Rows(features=noise, targets=_labels(random, count, task))
    tokenizer = like.tokenizer
    assert tokenizer is not None
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(len(tokenizer)) if token not in special])
    texts = tokenizer.batch_decode(random.choice(ordinary, (count, DRAWN_TOKENS)).tolist())
    rows = features(tokenizer(texts, truncation=True, max_length=min(task.max_tokens, MOST_TOKENS)))
    if task.kind == "text-classification":
        return Rows(features=rows, targets=_labels(random, count, task), tokenizer=tokenizer)
    tokens = [np.array(row["input_ids"], np.int64) for row in rows]
    if task.kind == "token-classification":
        targets = [np.where(np.isin(row, list(special)), IGNORED, _labels(random, len(row), task)) for row in tokens]
    elif task.kind == "causal-lm":
        targets = [np.append(row[1:], IGNORED) for row in tokens]
    else:
        raise SettingsError(f"training.canaries: not for {task.kind} yet", hint="leave the line out")
    return Rows(features=rows, targets=tuple(targets), tokenizer=tokenizer)


def _labels(random: np.random.Generator, count: int, task: Task) -> NDArray[np.int64]:
    return random.integers(0, len(task.labels), count)
