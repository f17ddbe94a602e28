"""The pool as one model reads it: what goes in, and which of its outputs are predictions.

Owners with other tokenizers must agree on what a prediction is about. So words are predicted at their first token, and
a row that is too long for a model is read in parts: every word of the pool has a prediction from every owner. In a
language model, which is one vocabulary for all owners, the agreed base's tokenizer decides, and a text is asked about
at some of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.data.images import prepared, room_for
from common.errors import DataError, ModelError
from common.lazy import lazy_module
from common.models.folders import image_shape, load_image_processor, load_tokenizer
from common.models.padding import padded
from common.models.parameters import longest_text
from common.pool import MAKE_IT_AGAIN, ImagePool, Pool

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from common.agreement import Task
    from common.merge_methods.distill import DistillTable
else:
    torch = lazy_module("torch")

MAX_PREPARED_BYTES = 16_000_000_000  # of all images, as a model reads them
BRING_ANOTHER = "take the row out of the pool, and complete the draft again: amalgram draft"


@dataclass(frozen=True, kw_only=True)
class PoolRows:
    """Parts of the pool, in its order: tokenised but not padded, or images (parts, channels, height, width).

    `marks`: None if each part has one prediction; else for each part one array over its tokens, true where there is a
    prediction.
    """

    features: tuple[dict[str, Any], ...] | NDArray[np.float32]
    marks: tuple[NDArray[np.bool_], ...] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(parts,): how many tokens each has; images are all of one size."""
        if isinstance(self.features, np.ndarray):
            return np.ones(len(self), np.int64)
        return np.array([len(each["input_ids"]) for each in self.features], np.int64)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(parts,): how many predictions each has."""
        if self.marks is None:
            return np.ones(len(self), np.int64)
        return np.array([each.sum() for each in self.marks], np.int64)

    def predictions_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the predictions that these parts have, among all of the pool's, in this order."""
        return np.concatenate(
            [np.arange(self._ends[index] - self.counts[index], self._ends[index]) for index in indices]
        )

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.counts)

    def batch(self, indices: NDArray[np.int64]) -> tuple[dict[str, Tensor], Tensor | None]:
        """The model's inputs for these parts, padded, and at which positions it predicts: (parts, positions) bool."""
        if isinstance(self.features, np.ndarray):
            return {"pixel_values": torch.from_numpy(self.features[indices])}, None
        assert self.tokenizer is not None
        inputs = padded([self.features[index] for index in indices], self.tokenizer)
        if self.marks is None:
            return inputs, None
        mask = inputs["attention_mask"].bool()  # padding may be on either side
        places = torch.zeros_like(mask)
        places[mask] = torch.from_numpy(np.concatenate([self.marks[index] for index in indices]))
        return inputs, places


@dataclass(frozen=True, kw_only=True)
class PoolReader:
    """How one model reads a pool. `max_tokens`: the longest text; `embeddings`: how many tokens the model knows."""

    task: Task
    table: DistillTable
    tokenizer: PreTrainedTokenizerBase | None = None
    processor: BaseImageProcessor | None = None
    shape: tuple[int, int, int] | None = None  # of images
    max_tokens: int = 0
    embeddings: int = 0

    @classmethod
    def of(
        cls,
        outline: PreTrainedModel,
        task: Task,
        table: DistillTable,
        tokenizer: PreTrainedTokenizerBase | None,
        processor: BaseImageProcessor | None,
    ) -> PoolReader:
        """For a model that is made like `outline`, with what prepares its rows."""
        if tokenizer is None:
            return cls(task=task, table=table, processor=processor, shape=image_shape(outline.config))
        return cls(
            task=task,
            table=table,
            tokenizer=tokenizer,
            max_tokens=min(longest_text(outline, task.max_tokens), int(tokenizer.model_max_length)),
            embeddings=outline.get_input_embeddings().num_embeddings,
        )

    @classmethod
    def of_folder(cls, folder: Path, outline: PreTrainedModel, task: Task, table: DistillTable) -> PoolReader:
        """For the model in a folder. Raises ModelError."""
        if task.is_text:
            return cls.of(outline, task, table, load_tokenizer(folder), None)
        return cls.of(outline, task, table, None, load_image_processor(folder))

    def read(self, pool: Pool | ImagePool) -> PoolRows:
        """The pool's rows. Raises DataError if there is a row or a word of which this model reads nothing."""
        if isinstance(pool, ImagePool):
            return PoolRows(features=self._images(pool))
        if pool.has_words:
            return self._words(pool)
        assert self.tokenizer is not None
        texts, *pairs = (list(column) for column in zip(*pool.texts, strict=True))
        encoded = self.tokenizer(texts, *pairs, truncation=True, max_length=self.max_tokens)
        features = tuple({name: values[row] for name, values in encoded.items()} for row in range(len(pool)))
        for number, row in enumerate(features, 1):
            self._check(number, row)
        if self.task.kind != "causal-lm":
            return PoolRows(features=features, tokenizer=self.tokenizer)
        marks = tuple(_spread(len(row["input_ids"]), self.table.positions) for row in features)
        return PoolRows(features=features, marks=marks, tokenizer=self.tokenizer)

    # --- words ---

    def _words(self, pool: Pool) -> PoolRows:
        if self.tokenizer is None or not self.tokenizer.is_fast:
            raise ModelError(
                "pool: this model has no fast tokenizer (tokenizer.json), needed to match words with tokens",
                hint="save the model with a fast tokenizer",
            )
        features: list[dict[str, Any]] = []
        marks: list[NDArray[np.bool_]] = []
        whole = self.tokenizer([list(row) for row in pool.texts], is_split_into_words=True, verbose=False)
        for index, row in enumerate(pool.texts):
            fits = len(whole["input_ids"][index]) <= self.max_tokens
            for words in [row] if fits else self._parts(row):
                encoded = whole if fits else self._encode(words)
                place = index if fits else 0
                marks.append(self._first_tokens(index + 1, words, encoded.word_ids(place)))
                features.append({name: values[place] for name, values in encoded.items()})
                self._check(index + 1, features[-1])
        return PoolRows(features=tuple(features), marks=tuple(marks), tokenizer=self.tokenizer)

    def _encode(self, words: Sequence[str]) -> Any:
        assert self.tokenizer is not None
        return self.tokenizer([list(words)], is_split_into_words=True, truncation=True, max_length=self.max_tokens)

    def _parts(self, words: Sequence[str]) -> Iterator[Sequence[str]]:
        """Halves of a row that is too long, or halves of these. Of a single word that is too long, the end is cut."""
        assert self.tokenizer is not None
        length = len(self.tokenizer([list(words)], is_split_into_words=True, verbose=False)["input_ids"][0])
        if length <= self.max_tokens or len(words) == 1:
            yield words
            return
        yield from self._parts(words[: len(words) // 2])
        yield from self._parts(words[len(words) // 2 :])

    def _first_tokens(self, number: int, words: Sequence[str], word_of_token: list[int | None]) -> NDArray[np.bool_]:
        """(tokens,): true at the first token of each word. Raises DataError for a word without any."""
        marks = np.zeros(len(word_of_token), bool)
        seen = dict[int, int]()
        for place, word in enumerate(word_of_token):
            if word is not None:
                seen.setdefault(word, place)
        lost = next((place for place in range(len(words)) if place not in seen), None)
        if lost is not None:  # check: every-word-is-read
            raise DataError(
                f"pool: row {number}: this model's tokenizer drops {words[lost]!r:.60} entirely; the sum for this "
                "word would be about the other owners alone",
                hint=BRING_ANOTHER,
            )
        marks[list(seen.values())] = True
        return marks

    # --- what goes in ---

    def _check(self, number: int, row: dict[str, Any]) -> None:
        tokens = row["input_ids"]
        if not tokens:
            raise DataError(f"pool: row {number} gives the model no token", hint=MAKE_IT_AGAIN)
        if max(tokens) >= self.embeddings:
            raise DataError(
                f"pool: row {number} gives a token beyond the model's {self.embeddings}",
                hint="check that the model's folder holds its own tokenizer",
            )

    def _images(self, pool: ImagePool) -> NDArray[np.float32]:
        assert self.shape is not None
        needed = 4 * len(pool) * prod(self.shape)
        if needed > MAX_PREPARED_BYTES:  # check: prepared-pools-are-bounded
            raise DataError(
                f"pool: its {len(pool):,} images take {needed} bytes as this model reads them, at most "
                f"{MAX_PREPARED_BYTES} are allowed",
                hint="agree on a smaller pool",
            )
        if isinstance(pool.images, np.ndarray):
            images = pool.images if pool.images.ndim == 4 else pool.images[:, None]
            if images.shape[1:] != self.shape:
                raise DataError(
                    f"pool: its arrays are {images.shape[1:]}, and this model takes {self.shape}",
                    hint="make the pool of image files, which each model fits to its own size",
                )
            return images.astype(np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)
        features = room_for((len(pool), *self.shape))
        for index, image in enumerate(pool.images):
            features[index] = prepared(image.pixels(), self.shape, self.processor)
        return features


def pinned_for(table: DistillTable, pool: Pool | ImagePool, reader: PoolReader, vocabulary: int) -> DistillTable:
    """The table of a language model with what its base decides: how many predictions there are, and of which tokens."""
    found = {"predictions": int(reader.read(pool).counts.sum()), "vocabulary": vocabulary}
    return table.model_copy(update={name: getattr(table, name) or value for name, value in found.items()})


def vocabulary_of(folder: Path, outline: PreTrainedModel) -> int:
    """How many tokens a language model's tokenizer has; its outputs may be padded to more. Raises ModelError."""
    tokens: int = max(load_tokenizer(folder).get_vocab().values()) + 1
    layer = outline.get_output_embeddings()
    outputs = 0 if layer is None else int(layer.weight.shape[0])
    if outputs < tokens:
        raise ModelError(
            f"model {folder}: predicts {outputs} tokens, and its tokenizer has {tokens}",
            hint="check that the model's folder holds its own tokenizer",
        )
    return tokens


def check_counts(rows: PoolRows, table: DistillTable) -> None:
    """Raise DataError unless the pool has as many predictions as were agreed on."""
    count = int(rows.counts.sum())
    if count != table.asked:
        raise DataError(
            f"pool: has {count:,} predictions as this model reads it, the agreement says {table.asked:,}",
            hint="check that your base model is the agreed one, or complete the draft again: amalgram draft",
        )


def _spread(length: int, most: int) -> NDArray[np.bool_]:
    """(length,): true at up to `most` positions, evenly spread over those that have a next token."""
    marks = np.zeros(length, bool)
    last = max(0, length - 2)
    marks[np.unique(np.linspace(0, last, min(most, last + 1)).round().astype(np.int64))] = True
    return marks
