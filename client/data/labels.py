"""The numbers of the labels in an owner's files. An error names the file and the row, never the label it found."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.agreement import Task
from common.errors import DataError
from common.text import as_line


def label_numbers(path: Path, values: Sequence[Any], task: Task, at_row: int | None = None) -> NDArray[np.int64]:
    """A label is one of the agreement's label names, or its number unless one of the names is itself a number.

    A file may write a name with other spaces, or with decomposed characters (as_line).

    `at_row`: the row that holds all the values; left out, each value is a row of its own.
    """
    numbers = {as_line(label): index for index, label in enumerate(task.labels)}
    by_number = not any(label.isdecimal() for label in numbers)
    if by_number:
        numbers |= {str(index): index for index in range(len(numbers))}
    labels = np.empty(len(values), dtype=np.int64)
    for index, value in enumerate(values):
        name = json.dumps(value) if isinstance(value, bool) else as_line(str(value))
        if by_number:
            name = re.sub(r"^(\d+)\.0+$", r"\1", name)  # pandas writes whole numbers so if a cell beside them is empty
        number = None if value is None else numbers.get(name)
        if number is None:
            or_number = f", nor a number from 0 to {len(task.labels) - 1}" if by_number else ""
            raise DataError(
                f"{path}: row {at_row or index + 1}: its label is none of {', '.join(task.labels)}{or_number}",
                hint=_how_to_name(value, name, task),
            )
        labels[index] = number
    return labels


def _how_to_name(value: Any, name: str, task: Task) -> str:
    """What to correct, without a word of the row: only an agreed label is quoted."""
    if value is None or not name:
        return "this row's label is empty: fill it in, or leave the row out"
    for label in task.labels:
        if name.casefold() == as_line(label).casefold():
            return f"write it as the agreement does: {label}"
    return "write the labels in the file as the agreement names them; those of a model that has a head are fixed"


def tag_numbers(path: Path, column: str, rows: Sequence[Any], task: Task) -> list[NDArray[np.int64]]:
    """The same for a column of tag lists: one array per row."""
    tags = []
    for index, row in enumerate(rows):
        if not isinstance(row, list):
            raise DataError(f"{path}: row {index + 1}: column {column!r} is {type(row).__name__}, not a list")
        tags.append(label_numbers(path, row, task, at_row=index + 1))
    return tags
