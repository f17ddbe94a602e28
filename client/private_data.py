"""An owner's private rows: checked, tokenised, batched. `row_files.py` opens the files, nothing else does."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from client.row_files import read_arrays, read_columns
from client.settings import Data
from common.agreement import Task
from common.errors import DataError
from common.models import image_shape

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Inputs and labels of one split. Text is tokenised but not padded; images are (n, channels, h, w) float32."""

    features: tuple[Mapping[str, Any], ...] | NDArray[np.float32]
    labels: NDArray[np.int64]  # (n,)
    tokenizer: PreTrainedTokenizerBase | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "Rows":
        """The rows at `indices`, in that order."""
        if isinstance(self.features, np.ndarray):
            features: Any = self.features[indices]
        else:
            features = tuple(self.features[index] for index in indices)
        return Rows(features=features, labels=self.labels[indices], tokenizer=self.tokenizer)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The model's inputs for these rows, padded to the longest; labels are not among them."""
        rows = self.take(indices)
        if isinstance(rows.features, np.ndarray):
            return {"pixel_values": torch.from_numpy(rows.features)}
        assert self.tokenizer is not None
        return dict(self.tokenizer.pad(list(rows.features), return_tensors="pt"))

    def batches(self, batch_size: int) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """All rows as (indices, inputs), rows of like length together so that little is padded."""
        order = np.arange(len(self))
        if not isinstance(self.features, np.ndarray):
            lengths = [len(row["input_ids"]) for row in self.features]
            order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices, self.batch(indices)


@dataclass(frozen=True, kw_only=True)
class PrivateData:
    """An owner's files, relative to `folder`. Reading raises DataError with one line."""

    data: Data
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path
    seed: int

    def train(self) -> Rows:
        """The rows that are measured, and trained on."""
        rows = self._read(self.data.train, self.data.max_train_rows)
        return rows if self.data.validation is not None else rows.take(self._set_aside(rows)[1])

    def validation(self) -> Rows:
        """The rows that decide a sweep."""
        if self.data.validation is not None:
            return self._read(self.data.validation, self.data.max_validation_rows)
        rows = self._read(self.data.train, self.data.max_train_rows)
        return rows.take(self._set_aside(rows)[0])

    def test(self) -> Rows:
        """The rows that give the figures."""
        return self._read(self.data.test, self.data.max_test_rows)

    def label_set(self) -> NDArray[np.int64]:
        """The labels among which this owner's rows are judged: those that occur in its files, or all."""
        if self.task.label_set == "all":
            return np.arange(len(self.task.labels))
        splits = (
            (self.data.train, self.data.max_train_rows),
            (self.data.validation, self.data.max_validation_rows),
            (self.data.test, self.data.max_test_rows),
        )
        return np.unique(
            np.concatenate([self._read_labels(path, max_rows) for path, max_rows in splits if path is not None])
        )

    def _set_aside(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A tenth of the training rows for validation, and the rest."""
        if len(rows) < 10:
            raise DataError(
                f"{self.folder / self.data.train}: {len(rows)} rows; without a validation file at least 10 are needed, "
                "of which a tenth is set aside"
            )
        order = np.random.default_rng(self.seed).permutation(len(rows))
        return order[: len(rows) // 10], order[len(rows) // 10 :]

    def _read(self, path: Path, max_rows: int | None) -> Rows:
        if self.task.kind == "image-classification":
            return _read_images(self.folder / path, self.data, self.task, self.model, max_rows)
        assert self.tokenizer is not None
        return _read_texts(self.folder / path, self.data, self.task, self.model, self.tokenizer, max_rows)

    def _read_labels(self, path: Path, max_rows: int | None) -> NDArray[np.int64]:
        if self.task.kind == "image-classification":
            return self._read(path, max_rows).labels
        values = read_columns(self.folder / path, [self.data.label], max_rows)[self.data.label]
        return _labels(self.folder / path, values, self.task)


def _read_texts(
    path: Path, data: Data, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_rows: int | None
) -> Rows:
    columns = [data.text, data.label] + ([data.text_pair] if data.text_pair else [])
    found = read_columns(path, columns, max_rows)
    texts = _check_texts(path, data.text, found[data.text])
    pairs = _check_texts(path, data.text_pair, found[data.text_pair]) if data.text_pair else None
    labels = _labels(path, found[data.label], task)
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    max_tokens = min(task.max_tokens, tokenizer.model_max_length, positions if positions > 0 else task.max_tokens)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_tokens)
    vocabulary = model.get_input_embeddings().num_embeddings
    features = []
    for index in range(len(texts)):
        row = {name: values[index] for name, values in encoded.items()}
        if not row["input_ids"] or max(row["input_ids"]) >= vocabulary:
            raise DataError(
                f"{path}: row {index + 1} gives no token, or one beyond the model's {vocabulary}; "
                "is this the base model's tokenizer?"
            )
        features.append(row)
    return Rows(features=tuple(features), labels=labels, tokenizer=tokenizer)


def _check_texts(path: Path, column: str, values: list[Any]) -> list[str]:
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{path}: row {index + 1}: column {column!r} is {type(value).__name__}, text is needed")
    if not any(value.strip() for value in values):
        raise DataError(f"{path}: column {column!r} is empty in every row")
    return values


def _labels(path: Path, values: list[Any], task: Task) -> NDArray[np.int64]:
    """A label is one of the agreement's label names; or its number, unless a name is itself a number."""
    numbers = {label: index for index, label in enumerate(task.labels)}
    by_number = not any(label.isdecimal() for label in numbers)
    if by_number:
        numbers |= {str(index): index for index in range(len(numbers))}
    labels = np.empty(len(values), dtype=np.int64)
    for index, value in enumerate(values):
        name = json.dumps(value) if isinstance(value, bool) else str(value).strip()
        if by_number:
            name = re.sub(r"^(\d+)\.0+$", r"\1", name)  # what pandas makes of whole numbers beside an empty cell
        number = None if value is None else numbers.get(name)
        if number is None:
            or_number = f", nor a number from 0 to {len(task.labels) - 1}" if by_number else ""
            raise DataError(
                f"{path}: row {index + 1}: its label is none of {', '.join(task.labels)}{or_number}; "
                "task.labels of the agreement names others"
            )
        labels[index] = number
    return labels


def _read_images(path: Path, data: Data, task: Task, model: PreTrainedModel, max_rows: int | None) -> Rows:
    images, labels = read_arrays(path, [data.image, data.label], max_rows)
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    if images.ndim == 3:  # (n, height, width): one channel
        images = images[:, None]
    expected = image_shape(model.config)
    if images.shape[1:] != expected or labels.ndim != 1:
        raise DataError(
            f"{path}: images have shape {images.shape} and labels {labels.shape}; the model needs "
            f"(n, {', '.join(map(str, expected))}) and (n,)"
        )
    if not np.isfinite(images).all():
        raise DataError(f"{path}: an image holds a number that is not finite")
    return Rows(features=images.astype(np.float32), labels=_labels(path, labels.tolist(), task))
