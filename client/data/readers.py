"""From the columns of an owner's file to `Rows`: one reader for each kind of task. An error names file and row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.data.chat import Written, chat_columns, write_out
from client.data.columns import columns_of, labels_of_arrays, text_columns
from client.data.labels import tag_numbers, targets_of
from client.data.reading import LostImages, check_texts
from client.data.rows import IGNORED, Rows
from client.settings import Data
from common.agreement import Reading, Task, TaskKind
from common.data.files import ARRAYS, Columns, read_arrays, read_columns, side_by_side
from common.data.images import find_images, prepared, room_for
from common.errors import DataError
from common.models.folders import image_shape
from common.models.parameters import longest_text
from common.text import SURROGATE

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("amalgram.owner")
MAX_ROW_CHARACTERS = 10_000_000  # a longer text means that a line break is missing


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What every reader needs to know."""

    data: Data
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    processor: BaseImageProcessor | None
    reading: Reading

    def read(self, path: Path, max_rows: int | None) -> Rows:
        """The examples of a file, all or the first `max_rows`, with their targets."""
        return READERS[self.task.kind](self, path, max_rows)

    def read_unlabelled(self, path: Path) -> Rows:
        """The texts of a file, whose labels, if it has any, are not read. Each target is 0."""
        if self.task.kind == "causal-lm":
            return self.read(path, max_rows=None)
        if self.task.kind != "text-classification":
            raise DataError(
                f"{path}: candidates are texts, and the task is {self.task.kind}", hint="leave --candidates out"
            )
        rows = _tokenised(self, path, read_columns(path, text_columns(self.data), max_rows=None))
        return Rows(features=rows, targets=np.zeros(len(rows), np.int64), tokenizer=self.tokenizer)

    @cached_property
    def max_tokens(self) -> int:
        """The longest text that the agreement and the model's positions allow."""
        return longest_text(self.model, self.task.max_tokens)

    def encode(self, path: Path, *texts: Any, content: Sequence[str] | None = None, **options: Any) -> BatchEncoding:
        """The tokens of every row, cut to `max_tokens`, or to fewer if the tokenizer says so.

        `content`: what the rows say, if the texts say more. Raises DataError if the tokenizer is another model's, or
        loses too much of the rows.
        """
        assert self.tokenizer is not None
        length = min(self.max_tokens, int(self.tokenizer.model_max_length))
        encoded = self.tokenizer(*texts, truncation=True, max_length=length, **options)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for index, tokens in enumerate(encoded["input_ids"]):
            if not tokens or max(tokens) >= vocabulary:
                raise DataError(
                    f"{path}: row {index + 1} gives no token, or one beyond the model's {vocabulary}",
                    hint="check that the base model's folder holds its own tokenizer",
                )
        read = [content] if content else [each for each in (*texts, options.get("text_target")) if each is not None]
        rows = read[0] if len(read) == 1 else list(zip(*read, strict=True))
        check_texts(path, rows, encoded["input_ids"], self.tokenizer, self.max_tokens, self.reading)
        return encoded


def features(encoded: BatchEncoding) -> tuple[dict[str, Any], ...]:
    """One mapping per row."""
    return tuple({name: values[row] for name, values in encoded.items()} for row in range(len(encoded["input_ids"])))


# --- one reader for each kind of task ---


def _read_texts(reader: Reader, path: Path, max_rows: int | None) -> Rows:
    found = read_columns(path, columns_of(reader.data, reader.task.kind), max_rows)
    rows = _tokenised(reader, path, found)
    targets = targets_of(path, side_by_side(found, reader.data.label), reader.task, reader.data.label)
    return Rows(features=rows, targets=targets, tokenizer=reader.tokenizer)


def _tokenised(reader: Reader, path: Path, found: Columns) -> tuple[dict[str, Any], ...]:
    data = reader.data
    texts = _check_texts(path, data.text, found[data.text])
    pairs = _check_texts(path, data.text_pair, found[data.text_pair]) if data.text_pair else None
    return features(reader.encode(path, texts, pairs))


def _read_images(reader: Reader, path: Path, max_rows: int | None) -> Rows:
    """Arrays as they are; image files as the base's image processor prepares them, or else fitted to the model."""
    if path.suffix.lower() == ARRAYS:
        return _read_arrays(reader, path, max_rows)
    table = find_images(path, columns_of(reader.data, reader.task.kind), max_rows)
    targets = targets_of(path, table.labels, reader.task, reader.data.label)
    shape = image_shape(reader.model.config)
    features = room_for((len(table.images), *shape))
    if reader.processor is None:
        _say_fitted(path, shape)
    lost = LostImages()
    for index, image in enumerate(table.images):
        pixels = image.pixels()
        features[index] = prepared(pixels, shape, reader.processor)
        lost.count(pixels, features[index])
    lost.check(path, reader.reading)
    return Rows(features=features, targets=targets)


@cache
def _say_fitted(path: Path, shape: tuple[int, int, int]) -> None:
    log.info("%s: the base has no preprocessor_config.json; images are fitted to %d by %d pixels", path, *shape[:0:-1])


def _read_arrays(reader: Reader, path: Path, max_rows: int | None) -> Rows:
    images, *labels = read_arrays(path, columns_of(reader.data, reader.task.kind), max_rows)
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    if images.ndim == 3:  # (n, height, width): one channel
        images = images[:, None]
    expected = image_shape(reader.model.config)
    most = 2 if len(labels) == 1 and reader.task.problem_type != "single_label_classification" else 1
    if images.shape[1:] != expected or any(each.ndim > most for each in labels):
        raise DataError(
            f"{path}: images have shape {images.shape} and labels {labels[0].shape}; the model needs "
            f"(n, {', '.join(map(str, expected))}) and (n,)"
        )
    if not np.isfinite(images).all():
        raise DataError(f"{path}: an image holds a number that is not finite")
    targets = targets_of(path, labels_of_arrays(labels), reader.task, reader.data.label)
    return Rows(features=images.astype(np.float32), targets=targets)


def _read_tagged_words(reader: Reader, path: Path, max_rows: int | None) -> Rows:
    """A word is judged at its first token. Words beyond max_tokens are not judged."""
    data, tokenizer = reader.data, reader.tokenizer
    found = read_columns(path, columns_of(data, reader.task.kind), max_rows)
    words = _check_words(path, data.tokens, found[data.tokens])
    tags = tag_numbers(path, data.tags, found[data.tags], reader.task)
    for index, (row, row_tags) in enumerate(zip(words, tags, strict=True)):
        if len(row) != len(row_tags):
            raise DataError(f"{path}: row {index + 1} has {len(row)} words and {len(row_tags)} tags")
    if tokenizer is None or not tokenizer.is_fast:
        raise DataError(
            f"{path}: the base model has no fast tokenizer (tokenizer.json), needed to match words with tokens",
            hint="save the base model with a fast tokenizer, or agree on another base",
        )
    encoded = reader.encode(path, words, is_split_into_words=True)
    targets = tuple(_targets_at_words(encoded.word_ids(index), row_tags) for index, row_tags in enumerate(tags))
    return Rows(features=features(encoded), targets=targets, tokenizer=tokenizer)


def _targets_at_words(word_of_token: list[int | None], tags: NDArray[np.int64]) -> NDArray[np.int64]:
    """(tokens,): a word's tag at the word's first token, IGNORED elsewhere. Special tokens belong to no word."""
    before = [None, *word_of_token]
    return np.array(
        [
            tags[word] if word is not None and word != last else IGNORED
            for last, word in zip(before, word_of_token, strict=False)
        ],
        np.int64,
    )


def _read_plain_texts(reader: Reader, path: Path, max_rows: int | None) -> Rows:
    """The target at each token is the next token."""
    if columns := chat_columns(reader.data):
        return _read_chat(reader, path, columns, max_rows)
    texts = _check_texts(path, reader.data.text, read_columns(path, [reader.data.text], max_rows)[reader.data.text])
    encoded = reader.encode(path, texts)
    targets = tuple(np.array([*tokens[1:], IGNORED], np.int64) for tokens in encoded["input_ids"])
    return Rows(features=features(encoded), targets=targets, tokenizer=reader.tokenizer)


def _read_chat(reader: Reader, path: Path, columns: list[str], max_rows: int | None) -> Rows:
    """The target at each token is the next token, if it is one that the model should say (chat.py).

    A row that is cut before the model says anything is left out.
    """
    tokenizer = reader.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        raise DataError(
            f"{path}: the base model has no fast tokenizer (tokenizer.json), which is needed to trace tokens",
            hint="agree on a base model with a fast tokenizer, or on plain texts",
        )
    found = read_columns(path, columns, max_rows)
    rows = write_out(path, [found[column] for column in columns], tokenizer)
    encoded: dict[int, Mapping[str, Any]] = {}  # by row
    targets: dict[int, NDArray[np.int64]] = {}
    for special in (True, False):  # what a template writes has its special tokens already
        numbers = [number for number, row in enumerate(rows) if row.has_special_tokens == special]
        some = [rows[number] for number in numbers]
        if some:
            tokens = reader.encode(
                path,
                [row.text for row in some],
                content=[row.content for row in some],
                add_special_tokens=not special,
                return_offsets_mapping=True,
            )
            offsets = tokens.pop("offset_mapping")
            encoded |= zip(numbers, features(tokens), strict=True)
            said = [_said(*row) for row in zip(tokens["input_ids"], offsets, some, strict=True)]
            targets |= zip(numbers, said, strict=True)
    kept = [number for number in range(len(rows)) if (targets[number] != IGNORED).any()]
    if not kept:
        raise DataError(
            f"{path}: every row is cut before the model says anything, at {reader.max_tokens} tokens",
            hint="agree on a larger task.max_tokens",
        )
    return Rows(
        features=tuple(encoded[index] for index in kept),
        targets=tuple(targets[index] for index in kept),
        tokenizer=tokenizer,
    )


def _said(tokens: Sequence[int], offsets: Sequence[tuple[int, int]], row: Written) -> NDArray[np.int64]:
    """(tokens,): the next token where it lies in what the model should say, IGNORED elsewhere."""
    judged = [any(first <= start < end <= last for first, last in row.said) for start, end in offsets]
    wanted = [token if is_said else IGNORED for token, is_said in zip(tokens, judged, strict=True)]
    return np.array([*wanted[1:], IGNORED], np.int64)


def _read_text_targets(reader: Reader, path: Path, max_rows: int | None) -> Rows:
    """The decoder reads the target one token late, as it was trained to."""
    data = reader.data
    found = read_columns(path, columns_of(data, reader.task.kind), max_rows)
    encoded = reader.encode(path, _check_texts(path, data.text, found[data.text]))
    wanted = reader.encode(path, text_target=_check_texts(path, data.target, found[data.target]))["input_ids"]
    start = reader.model.config.decoder_start_token_id
    if start is None:
        raise DataError(
            f"{path}: the base model's config.json has no decoder_start_token_id",
            hint="agree on a base model that names it",
        )
    rows = tuple(
        row | {"decoder_input_ids": [start, *tokens[:-1]]}
        for row, tokens in zip(features(encoded), wanted, strict=True)
    )
    targets = tuple(np.array(tokens, np.int64) for tokens in wanted)
    return Rows(features=rows, targets=targets, tokenizer=reader.tokenizer)


READERS: dict[TaskKind, Callable[[Reader, Path, int | None], Rows]] = {
    "text-classification": _read_texts,
    "image-classification": _read_images,
    "token-classification": _read_tagged_words,
    "causal-lm": _read_plain_texts,
    "sequence-to-sequence": _read_text_targets,
}

# --- checks ---


def _check_texts(path: Path, column: str, values: list[Any]) -> list[str]:
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{path}: row {index + 1}: column {column!r} is {type(value).__name__}, not text")
        if len(value) > MAX_ROW_CHARACTERS:
            raise DataError(
                f"{path}: row {index + 1}: column {column!r} has {len(value)} characters, at most {MAX_ROW_CHARACTERS} "
                "are allowed",
                hint="check for a missing line break",
            )
        _check_characters(path, column, index, value)
    if not any(value.strip() for value in values):
        raise DataError(f"{path}: column {column!r} is empty in every row")
    return values


def _check_words(path: Path, column: str, values: list[Any]) -> list[list[str]]:
    for index, words in enumerate(values):
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise DataError(f"{path}: row {index + 1}: column {column!r} must be a list of words, none of them empty")
        for word in words:
            _check_characters(path, column, index, word)
    return values


def _check_characters(path: Path, column: str, index: int, text: str) -> None:
    """JSON can write half of a surrogate pair, which is not a character, and no tokenizer takes it."""
    if SURROGATE.search(text):  # check: texts-are-unicode
        raise DataError(
            f"{path}: row {index + 1}: column {column!r} holds half of a surrogate pair",
            hint="write the whole character, or remove the half",
        )
