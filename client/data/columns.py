"""What the files of an owner hold, by column, before a model or a tokenizer is loaded: nothing here imports torch."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.chat import chat_columns, content_of
from client.data.labels import labels_that_occur, tag_numbers, targets_of
from client.settings import Data
from common.agreement import Task, TaskKind
from common.agreement.tables import CLASSIFYING
from common.data.files import ARRAYS, read_arrays, read_columns, side_by_side
from common.data.images import ImageFile, find_images
from common.data.sources import find_sources

SAME_FILE = 0.9  # share of test rows that say what a training row says; short texts of few words often do


@dataclass(frozen=True)
class FileLook:
    """What a look at one file found."""

    path: Path
    rows: int
    unlabelled: int  # rows without a label, where a row may have several
    labels: NDArray[np.int64]  # the numbers of those that occur, once each; none for a language model or numbers


def columns_of(data: Data, kind: TaskKind) -> list[str]:
    """The columns that a task reads: the inputs first, what is to be predicted last."""
    if kind == "image-classification":
        return [data.image, *data.label]
    if kind == "token-classification":
        return [data.tokens, data.tags]
    if kind == "text-classification":
        return [*text_columns(data), *data.label]
    if kind == "causal-lm":
        return chat_columns(data) or [data.text]
    return [data.text, data.target]


def text_columns(data: Data) -> list[str]:
    """The columns of a classified text, or pair of texts."""
    return [data.text, *filter(None, [data.text_pair])]


def look_at(data: Data, task: Task, path: Path, max_rows: int | None) -> FileLook:
    """Look at a file: it can be read, and has the task's columns and no other labels than the agreed ones.

    Nothing is tokenised. Raises DataError.
    """
    columns = columns_of(data, task.kind)
    last = data.label if task.kind in CLASSIFYING else columns[-1:]
    if task.kind == "image-classification" and path.suffix.lower() == ARRAYS:
        found = labels_of_arrays(read_arrays(path, columns, max_rows)[1:])
    elif task.kind == "image-classification":
        found = list(find_images(path, columns, max_rows).labels)
    else:
        found = side_by_side(read_columns(path, columns, max_rows), last)
    numbers, unlabelled = [np.empty(0, np.int64)], 0
    if task.kind == "token-classification":
        numbers += tag_numbers(path, data.tags, found, task)
    elif task.has_labels:
        targets = targets_of(path, found, task, last)
        numbers += [] if task.is_regression else [labels_that_occur(targets)]
        unlabelled = int((~targets.any(axis=1)).sum()) if task.has_several_labels else 0
    return FileLook(path=path, rows=len(found), unlabelled=unlabelled, labels=np.unique(np.concatenate(numbers)))


def labels_of_arrays(arrays: Sequence[NDArray[Any]]) -> list[Any]:
    """The labels or targets of every row of an .npz file, from one array, or from one for each."""
    return list((arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1)).tolist())


def look_at_files(data: Data, task: Task, folder: Path) -> dict[str, FileLook]:
    """A look at each of an owner's files, by split. Paths are relative to `folder`."""
    splits = (
        ("train", data.train, data.max_train_rows),
        ("validation", data.validation, data.max_validation_rows),
        ("test", data.test, data.max_test_rows),
    )
    return {split: look_at(data, task, folder / path, max_rows) for split, path, max_rows in splits if path is not None}


def rows_without_labels(looks: Iterable[FileLook]) -> Iterator[str]:
    """How many rows of each file have no label, in words, if any: none may apply, or nobody filled it in."""
    for look in looks:
        if look.unlabelled:
            yield f"{look.path.name}: {look.unlabelled:,} of {look.rows:,} rows have no label, and count as such"


def contents_of(data: Data, task: Task, path: Path, max_rows: int | None) -> Iterator[bytes]:
    """What each example says, in bytes that depend neither on its label nor on anything that an agreement chooses.

    White space counts as one blank, and an image is its file to the byte. Nothing is tokenised.
    """
    if task.kind == "image-classification":
        for image in images_of(data, task, path, max_rows):
            yield image.read() if isinstance(image, ImageFile) else image.tobytes()
        return
    words = task.kind == "token-classification"
    # CoNLL files have both columns of a word.
    asked = [data.tokens, data.tags] if words else text_columns(data)
    chat = chat_columns(data) if task.kind == "causal-lm" else []
    asked = chat or asked
    found = list(read_columns(path, asked, max_rows).values())
    for values in zip(*(found[:1] if words else found), strict=True):
        texts = (content_of(value) if chat else " ".join(value) if words else str(value) for value in values)
        yield "\n".join(" ".join(text.split()) for text in texts).encode(errors="surrogatepass")


def images_of(data: Data, task: Task, path: Path, max_rows: int | None = None) -> Iterator[ImageFile | NDArray[Any]]:
    """The images of a file or a folder, none of which is opened yet, or its arrays."""
    if path.suffix.lower() == ARRAYS:
        yield from read_arrays(path, [data.image], max_rows)[0]
    else:
        yield from find_images(path, columns_of(data, task.kind), max_rows).images


def digests_of(data: Data, task: Task, path: Path) -> Iterator[bytes]:
    """SHA-256 of every file that `path` stands for and, if a table or a folder names images, of each of these."""
    if task.kind == "image-classification" and path.suffix.lower() != ARRAYS:
        table = find_images(path, columns_of(data, task.kind), max_rows=None)
        for image, label in zip(table.images, table.labels, strict=True):
            yield hashlib.sha256(image.read()).digest() + hashlib.sha256(str(label).encode()).digest()
        return
    for source in find_sources(path):
        with source.path.open("rb") as file:
            yield hashlib.file_digest(file, "sha256").digest()


def rows_trained_on(data: Data, task: Task, folder: Path) -> str:
    """How many test rows say what a training row says, in words, if nearly all do; otherwise empty."""
    training = {hash(content) for content in contents_of(data, task, folder / data.train, data.max_train_rows)}
    shared = [hash(each) in training for each in contents_of(data, task, folder / data.test, data.max_test_rows)]
    if sum(shared) <= SAME_FILE * len(shared):
        return ""
    rows = f"{sum(shared):,} of {len(shared):,} test rows"
    return f"{rows} are training rows, too, so metrics on them say little about others"
