"""Examples ready for a model: tokenised texts or images with their targets, in batches. An example is a row of a file.

A *target* belongs to each prediction that a model makes on an example. A classified text or image has one, token
classification one per word, language modelling one per token. Positions that are not judged hold IGNORED. An example
with several labels has a vector of 0 and 1 as its one target, a regression a vector of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.models.padding import padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.pool_rows import PoolRows

Batch = dict[str, Tensor]
IGNORED = -100  # what torch's cross entropy ignores

Features = tuple[Mapping[str, Any], ...] | NDArray[np.float32]
Targets = NDArray[np.int64] | NDArray[np.float32] | tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The examples of one split. Texts are tokenised but not padded; images are (n, channels, height, width) float32.

    `targets` is (n,) int64, or (n, labels or targets) float32, or for each example one array with a target for every
    position of the model's output. `are_apart`: each is a batch of its own, so that none decides, by its length or by
    what a crafted model makes of it, what the model says of another.
    """

    features: Features
    targets: Targets
    tokenizer: PreTrainedTokenizerBase | None = None
    are_apart: bool = False

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: NDArray[np.int64]) -> Rows:
        """The examples at `indices`, in that order."""
        return replace(self, features=_take(self.features, indices), targets=_take(self.targets, indices))

    def batch(self, indices: NDArray[np.int64]) -> tuple[Batch, Tensor]:
        """The model's inputs for these examples, padded to the longest, and the targets for its logits.

        Targets are (examples,) or (examples, positions), with IGNORED where nothing is judged (`judged`), or
        (examples, labels or targets) float32.
        """
        rows = self.take(indices)
        if isinstance(rows.features, np.ndarray):
            return {"pixel_values": torch.from_numpy(rows.features)}, _single(rows.targets)
        assert self.tokenizer is not None
        encoder = [{name: row[name] for name in row if name != "decoder_input_ids"} for row in rows.features]
        inputs = padded(encoder, self.tokenizer)
        if "decoder_input_ids" in rows.features[0]:
            inputs |= _decoder_inputs(rows.features, self.tokenizer, other_than=inputs["input_ids"].shape[1])
        if isinstance(rows.targets, np.ndarray):
            return inputs, _single(rows.targets)
        mask = inputs["decoder_attention_mask" if "decoder_attention_mask" in inputs else "attention_mask"].bool()
        targets = torch.full(mask.shape, IGNORED)
        targets[mask] = torch.from_numpy(np.concatenate(rows.targets))  # padding may be on either side
        return inputs, targets

    def batches(self, batch_size: int) -> Iterator[tuple[NDArray[np.int64], Batch, Tensor]]:
        """Every example, as (indices, inputs, targets) batch by batch."""
        for indices in self.batch_indices(batch_size):
            yield indices, *self.batch(indices)

    def batch_indices(self, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """The examples of each batch. Examples of similar length go together, so that little is padded.

        A batch holds `batch_size` of the longest examples. Shorter ones fill the same padded size, because every
        forward pass has a fixed cost, and so does every measurement in it.
        """
        if self.are_apart:  # check: noised-rows-are-alone
            yield from np.arange(len(self))[:, None]
            return
        if isinstance(self.features, np.ndarray):
            lengths = np.ones(len(self), np.int64)
        else:
            lengths = np.array([len(row["input_ids"]) for row in self.features], np.int64)
        order = np.argsort(lengths, kind="stable")
        room = batch_size * int(lengths.max(initial=0))  # positions
        start = 0
        while start < len(order):
            # Examples ascend in length, so a batch is padded to its last one.
            most = order[start : start + room // int(lengths[order[start]])]
            padded = lengths[most] * np.arange(1, len(most) + 1)
            end = start + int(np.searchsorted(padded, room, side="right"))
            yield order[start:end]
            start = end


def unlabelled(rows: PoolRows) -> Rows:
    """The parts of a public pool. Each target is 0 where a model predicts."""
    targets: Targets = np.zeros(len(rows), np.int64)
    if rows.marks is not None:
        targets = tuple(np.where(marks, 0, IGNORED) for marks in rows.marks)
    return Rows(features=rows.features, targets=targets, tokenizer=rows.tokenizer)


def judged(targets: Tensor) -> Tensor:
    """Which predictions of a batch are judged: (examples,) or (examples, positions) bool, from the batch's targets."""
    return targets.new_ones(len(targets), dtype=torch.bool) if targets.is_floating_point() else targets != IGNORED


def pool(parts: list[Rows]) -> Rows:
    """The examples of several owners together. Only a simulation has them in one place."""
    first = parts[0]
    if isinstance(first.features, np.ndarray):
        features: Features = np.concatenate([rows.features for rows in parts])
    else:
        features = tuple(row for rows in parts for row in rows.features)
    if isinstance(first.targets, np.ndarray):
        targets: Targets = np.concatenate([rows.targets for rows in parts])
    else:
        targets = tuple(target for rows in parts for target in rows.targets)
    return Rows(features=features, targets=targets, tokenizer=first.tokenizer)


def _take(values: Any, indices: NDArray[np.int64]) -> Any:
    return values[indices] if isinstance(values, np.ndarray) else tuple(values[index] for index in indices)


def _single(targets: Targets) -> Tensor:
    assert isinstance(targets, np.ndarray)
    return torch.from_numpy(targets)


def _decoder_inputs(
    features: tuple[Mapping[str, Any], ...], tokenizer: PreTrainedTokenizerBase, other_than: int
) -> Batch:
    """What the decoder reads, padded to another length than the encoder's input.

    So the shape of a hidden state shows which of the two it belongs to, and which mask marks its padding.
    """
    tokens = [torch.tensor(row["decoder_input_ids"]) for row in features]
    length = max(map(len, tokens))
    length += length == other_than
    ids = torch.full((len(tokens), length), int(tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, each in enumerate(tokens):
        ids[row, : len(each)] = each
        mask[row, : len(each)] = 1
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}
