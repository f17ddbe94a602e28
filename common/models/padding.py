"""Examples of one batch, padded to the longest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase
else:
    torch = lazy_module("torch")

PADDED = {"input_ids", "attention_mask", "token_type_ids"}


def padded(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """The inputs of some examples as tensors, (examples, tokens) int64, as `tokenizer.pad` makes them, which takes as
    long as a small model's pass. It is asked for what it may pad in a way of its own.
    """
    is_usual = type(tokenizer)._pad.__module__ == "transformers.tokenization_utils_base"
    if not is_usual or not {"input_ids", "attention_mask"} <= set(rows[0]) <= PADDED:
        return dict(tokenizer.pad(rows, return_tensors="pt"))
    fill = {
        "input_ids": tokenizer.pad_token_id,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
    }
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {name: np.full((len(rows), longest), fill[name]) for name in rows[0]}
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        tokens = slice(longest - length, longest) if tokenizer.padding_side == "left" else slice(length)
        for name, values in row.items():
            batch[name][number, tokens] = values
    return {name: torch.from_numpy(each) for name, each in batch.items()}
