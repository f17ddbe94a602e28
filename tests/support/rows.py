"""Rows for tests of what is done with them."""

import numpy as np

from client.data.rows import Rows
from deploy.example.reviews import make_tokenizer


def rows_of(labels: list[int], seed: int = 0) -> Rows:
    """Texts of several lengths."""
    random = np.random.default_rng(seed)
    texts = [random.integers(4, 40, 3 + index % 5).tolist() for index in range(len(labels))]
    features = tuple({"input_ids": text, "attention_mask": [1] * len(text)} for text in texts)
    return Rows(features=features, targets=np.array(labels), tokenizer=make_tokenizer())
