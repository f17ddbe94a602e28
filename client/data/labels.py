"""The labels and targets in an owner's files, as numbers. An error names the file and the row, and of what it found at
most the beginning of a label. It is for the owner alone: only an error's code ever leaves.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.agreement import Task
from common.data.images import is_folder_of_images
from common.errors import DataError
from common.text import MAX_LINE, as_line, shown, some_of

SEPARATORS = {"|": "bars", ";": "semicolons", ",": "commas"}  # between the labels of a text
NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
MOST_QUOTED = 40  # characters of a label that is not agreed on
log = logging.getLogger("amalgram.owner")


def targets_of(path: Path, values: Sequence[Any], task: Task, columns: Sequence[str]) -> NDArray[Any]:
    """What the rows of a classifier or a regression should give, one entry of `values` a row.

    (rows,) int64 for one label a row; (rows, labels) float32 of 0 and 1 for several; (rows, targets) float32 for
    numbers. `columns`: where the entries come from; each is a list if there are several. Raises DataError.
    """
    has_one = task.problem_type == "single_label_classification"
    if len(columns) > 1 and (has_one or len(columns) != len(task.labels)):
        raise DataError(
            f"{path}: label names {len(columns)} columns; the agreement has {len(task.labels)} labels or targets",
            hint="one label a row comes from one column" if has_one else "name one column, or one for each of them",
        )
    if sorted(columns) == sorted(task.labels) and tuple(columns) != task.labels:
        raise DataError(
            f"{path}: label names the columns in another order than the agreed one: {', '.join(task.labels)}",
            hint="name them in the agreed order",
        )
    if task.is_regression:
        return target_values(path, values, task)
    if task.has_several_labels:
        return label_vectors(path, values, task, is_flags=len(columns) > 1)
    return label_numbers(path, values, task)


def labels_that_occur(targets: NDArray[Any]) -> NDArray[np.int64]:
    """The numbers of the labels that any row has; `targets` as `targets_of` gives them for labels."""
    return np.flatnonzero(targets.any(axis=0)) if targets.ndim > 1 else np.unique(targets)


def label_numbers(path: Path, values: Sequence[Any], task: Task, at_row: int | None = None) -> NDArray[np.int64]:
    """A label is one of the agreement's label names, or its number unless one of the names is itself a number.

    A file may write a name with other spaces, or with decomposed characters (as_line).

    `at_row`: the row that holds all the values; left out, each value is a row of its own.
    """
    numbers = {as_line(label): index for index, label in enumerate(task.labels)}
    by_number = not any(label.isdecimal() for label in numbers)
    if by_number:
        numbers |= {str(index): index for index in range(len(numbers))}

    def name_of(value: Any) -> str:
        name = as_line(_written(value))
        # pandas writes whole numbers so if a cell beside them is empty
        return re.sub(r"^(\d+)\.0+$", r"\1", name) if by_number else name

    found = [None if value is None else numbers.get(name_of(value)) for value in values]
    if None not in found:
        return np.array(found, dtype=np.int64)
    first, unknown = found.index(None), found.count(None)
    or_number = f", nor a number from 0 to {len(task.labels) - 1}" if by_number else ""
    none_of = f"is none of {some_of(task.labels)}{or_number}"
    quoted, name = _quoted(values[first]), name_of(values[first])
    if task.kind == "image-classification" and is_folder_of_images(path):
        raise DataError(f"{path}: its folder {quoted} {none_of}", hint=_how_to_name_folder(name, task))
    is_empty = values[first] is None or not name
    told = "" if is_empty else f": {quoted}{f' ({unknown} such in all)' if unknown > 1 else ''}"
    raise DataError(
        f"{path}: row {at_row or first + 1}: its label {none_of}{told}",
        hint="this row's label is empty: fill it in, or leave the row out"
        if is_empty
        else _how_to_name(name, task, is_rare=unknown < len(values)),
    )


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _quoted(value: Any) -> str:
    """The beginning of a label, which may be any text if the wrong column was named."""
    written = _written(value)
    return shown(repr(f"{written[:MOST_QUOTED]}..." if len(written) > MOST_QUOTED else written))


def _how_to_name(name: str, task: Task, *, is_rare: bool) -> str:
    """What to correct. `is_rare`: other rows have labels that are known."""
    if label := _probably_meant(name, task):
        return f"did you mean {label}? Write it as the agreement does"
    if task.head == "private":
        return 'name the labels of this owner\'s head in its settings, above the first [table]: labels = ["...", "..."]'
    if is_rare:
        return "correct this row or leave it out; or agree on this label, too (task.labels)"
    return (
        "write the labels in the file as the agreement names them; if the base's head is for another task, save the "
        "base without it (AutoModel), with its tokenizer, name that as the base, and write task.labels"
    )


def _how_to_name_folder(name: str, task: Task) -> str:
    meant = _probably_meant(name, task)
    return (
        f"did you mean {meant}? Rename the folder"
        if meant
        else "each folder holds the images of one label: rename this one, move it away, or agree on it (task.labels)"
    )


def _probably_meant(name: str, task: Task) -> str:
    """The agreed label that differs in case alone, or that is nearly the same; empty if none is."""
    by_name = {as_line(label).casefold(): label for label in task.labels}
    near = get_close_matches(name.casefold(), by_name, n=1, cutoff=0.75) if len(name) <= MAX_LINE else []
    return by_name[near[0]] if near else ""


def tag_numbers(path: Path, column: str, rows: Sequence[Any], task: Task) -> list[NDArray[np.int64]]:
    """The same for a column of tag lists: one array per row."""
    tags = []
    for index, row in enumerate(rows):
        if not isinstance(row, list):
            raise DataError(f"{path}: row {index + 1}: column {column!r} is {type(row).__name__}, not a list")
        tags.append(label_numbers(path, row, task, at_row=index + 1))
    return tags


# --- several labels a row ---


def label_vectors(path: Path, values: Sequence[Any], task: Task, *, is_flags: bool = False) -> NDArray[np.float32]:
    """(rows, labels): 1 where a row has the label. No label is an empty list or text.

    A row's labels are a list of names or numbers, or a text with a separator between them; or a list with 0 or 1 for
    each agreed label, if every row of the file is one. `is_flags`: they are such lists, perhaps of texts.
    """
    vectors = np.zeros((len(values), len(task.labels)), np.float32)
    if is_flags or all(_is_vector(value, len(task.labels)) for value in values):
        for index, row in enumerate(values):
            flags = [_flag(value) for value in row]
            if None in flags:
                label = task.labels[flags.index(None)]
                raise DataError(
                    f"{path}: row {index + 1}: its value for {label} is neither 0 nor 1",
                    hint="a column for each label says 0 or 1 in every row",
                )
            vectors[index] = flags
    else:
        for index, row in enumerate(_lists_of_labels(path, values, task)):
            numbers = label_numbers(path, row, task, at_row=index + 1)
            if len(set(numbers.tolist())) < len(numbers):
                raise DataError(f"{path}: row {index + 1}: duplicate label", hint="name each label of a row once")
            vectors[index, numbers] = 1
    if not vectors.any():
        raise DataError(f"{path}: no row has a label", hint="check the name of the column (label)")
    return vectors


def _flag(value: Any) -> bool | None:
    """A cell that says whether a label applies; None if it says something else."""
    if isinstance(value, str):
        return {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}.get(
            value.strip().lower()
        )
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _is_vector(value: Any, num_labels: int) -> bool:
    """Whether it could be a 0 or 1 for each label. With three labels or more, no list of their numbers looks so."""
    return (
        isinstance(value, list)
        and len(value) == num_labels
        and all(not isinstance(each, str) and _flag(each) is not None for each in value)
    )


def _lists_of_labels(path: Path, values: Sequence[Any], task: Task) -> Iterable[list[Any]]:
    """Each row's labels, as names or numbers that nobody has looked up yet."""
    separator = _separator(path, {value for value in values if isinstance(value, str)}, task)
    for index, value in enumerate(values):
        if isinstance(value, list):
            yield value
        elif isinstance(value, str):
            yield _split(value, separator, task)
        elif value is None or isinstance(value, dict):
            raise DataError(
                f"{path}: row {index + 1}: its labels are {'missing' if value is None else 'a table, not a list'}",
                hint="an empty list says that no label applies",
            )
        else:
            yield [value]


def _separator(path: Path, cells: set[str], task: Task) -> str:
    """What separates the labels in most of these cells, said to the owner if it separates any."""
    known = {as_line(label) for label in task.labels} | {str(number) for number in range(len(task.labels))}
    joined = [cell for cell in cells if cell.strip() and as_line(cell) not in known and _json_list(cell) is None]

    def readable(separator: str) -> int:
        return sum(all(as_line(part) in known for part in cell.split(separator)) for cell in joined)

    found = max(SEPARATORS, key=readable)
    if joined and readable(found):
        _say_separator(path, SEPARATORS[found])
    return found


@cache
def _say_separator(path: Path, separators: str) -> None:
    log.info("%s: the labels of a row are separated by %s", path, separators)


def _split(cell: str, separator: str, task: Task) -> list[Any]:
    listed = _json_list(cell)
    if listed is not None:
        return listed
    if not cell.strip():
        return []
    is_one = as_line(cell) in {as_line(label) for label in task.labels}  # whatever its name is made of
    return [cell] if is_one else cell.split(separator)


def _json_list(cell: str) -> list[Any] | None:
    """The list that a cell of a CSV file holds as JSON; None if it holds none."""
    if not cell.lstrip().startswith("["):
        return None
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


# --- numbers ---


def target_values(path: Path, values: Sequence[Any], task: Task) -> NDArray[np.float32]:
    """(rows, targets), each within the agreed range. A row's targets are a number, or a list with one for each."""
    low, span = task.lowest_and_span
    targets = np.empty((len(values), len(task.labels)), np.float32)
    for index, value in enumerate(values):
        where = f"{path}: row {index + 1}"
        listed = _json_list(value) if isinstance(value, str) else value if isinstance(value, list) else None
        row = [value] if listed is None else listed
        if len(row) != len(task.labels):
            raise DataError(
                f"{where}: has {len(row)} targets, and {len(task.labels)} are agreed: {', '.join(task.labels)}",
                hint="give a number for each, or leave the row out",
            )
        numbers = [_number(each) for each in row]
        if None in numbers:
            raise DataError(
                f"{where}: its target {task.labels[numbers.index(None)]} is not a finite number",
                hint="write numbers with a decimal point, or leave the row out",
            )
        for number, name in zip(numbers, task.labels, strict=True):
            if not low <= number <= low + span:  # type: ignore[operator]  # check: targets-are-in-range
                raise DataError(
                    f"{where}: its target {name} is outside the agreed range, from {low:g} to {low + span:g}",
                    hint="correct the row or leave it out, or agree on a wider task.target_range",
                )
        targets[index] = numbers
    return targets


def _number(value: Any) -> float | None:
    """A finite number; None for anything else, such as true."""
    if isinstance(value, bool) or not (
        isinstance(value, int | float) or (isinstance(value, str) and NUMBER.fullmatch(value))
    ):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
