"""What the files of an owner hold, by column, before a model or a tokenizer is loaded: nothing here imports torch."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.chat import chat_columns, content_of
from client.data.files import ARRAYS, read_arrays, read_columns
from client.data.images import find_images
from client.data.labels import label_numbers, tag_numbers
from client.data.sources import find_sources
from client.settings import Data
from common.agreement import Task, TaskKind

SAME_FILE = 0.9  # share of test rows that say what a training row says; short texts of few words often do


@dataclass(frozen=True)
class FileLook:
    """What a look at one file found."""

    path: Path
    rows: int
    labels: NDArray[np.int64]  # the numbers of those that occur, once each; none for a language model


def columns_of(data: Data, kind: TaskKind) -> list[str]:
    """The columns that a task reads: the inputs first, what is to be predicted last."""
    if kind == "image-classification":
        return [data.image, data.label]
    if kind == "token-classification":
        return [data.tokens, data.tags]
    if kind == "text-classification":
        return [*text_columns(data), data.label]
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
    if task.kind == "image-classification" and path.suffix.lower() == ARRAYS:
        found = read_arrays(path, columns, max_rows)[-1].tolist()
    elif task.kind == "image-classification":
        found = list(find_images(path, columns, max_rows).labels)
    else:
        found = read_columns(path, columns, max_rows)[columns[-1]]
    numbers = [np.empty(0, np.int64)]
    if task.kind == "token-classification":
        numbers += tag_numbers(path, data.tags, found, task)
    elif task.has_labels:
        numbers += [label_numbers(path, found, task)]
    return FileLook(path=path, rows=len(found), labels=np.unique(np.concatenate(numbers)))


def look_at_files(data: Data, task: Task, folder: Path) -> dict[str, FileLook]:
    """A look at each of an owner's files, by split. Paths are relative to `folder`."""
    splits = (
        ("train", data.train, data.max_train_rows),
        ("validation", data.validation, data.max_validation_rows),
        ("test", data.test, data.max_test_rows),
    )
    return {split: look_at(data, task, folder / path, max_rows) for split, path, max_rows in splits if path is not None}


def contents_of(data: Data, task: Task, path: Path, max_rows: int | None) -> Iterator[bytes]:
    """What each example says, in bytes that depend neither on its label nor on anything that an agreement chooses.

    White space counts as one blank, and an image is its file to the byte. Nothing is tokenised.
    """
    if task.kind == "image-classification" and path.suffix.lower() == ARRAYS:
        (images,) = read_arrays(path, [data.image], max_rows)
        yield from (image.tobytes() for image in images)
        return
    if task.kind == "image-classification":
        yield from (image.read() for image in find_images(path, columns_of(data, task.kind), max_rows).images)
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
