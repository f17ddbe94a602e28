"""Rows for tests of what is done with them."""

import numpy as np
import torch

from client.data.rows import Rows
from common.metrics import Score
from deploy.example.reviews import make_tokenizer

SCORES = {
    "ada": Score(correct=8, rows=10, metric=0.5),
    "bea": Score(correct=30, rows=60, metric=0.25),
    "cyd": Score(correct=1, rows=4, metric=0.75),
}  # of one model on the test rows of three owners


def rows_of(labels: list[int], seed: int = 0) -> Rows:
    """Texts of several lengths."""
    random = np.random.default_rng(seed)
    texts = [random.integers(4, 40, 3 + index % 5).tolist() for index in range(len(labels))]
    features = tuple({"input_ids": text, "attention_mask": [1] * len(text)} for text in texts)
    return Rows(features=features, targets=np.array(labels), tokenizer=make_tokenizer())


def batch_of(lengths: list[int], padded_to: int, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (len(lengths), padded_to), generator=random)
    mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    return {"input_ids": tokens * mask, "attention_mask": mask.long()}
