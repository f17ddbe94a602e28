"""Columns out of an owner's files: JSON Lines, CSV, Parquet, CoNLL, NumPy arrays. Knows nothing of models.

An error names the file and the row, never what the row says.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from common.errors import DataError

Columns = dict[str, list[Any]]


def read_columns(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    """The named columns of a file, all or the first `max_rows` rows. CSV values are text; others keep their type."""
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; allowed are {', '.join(READERS)} and, for images, .npz")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found = reader(path, columns, max_rows)
    if not found[columns[0]]:
        raise DataError(f"{path}: holds no rows")
    return found


def read_arrays(path: Path, columns: Sequence[str], max_rows: int | None) -> list[NDArray[Any]]:
    """The named arrays of an .npz file, all or the first `max_rows` rows, equally long."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            _check_columns(path, columns, arrays.files)
            found = [arrays[column][:max_rows] for column in columns]
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile):
        raise DataError(f"{path}: cannot be read as a NumPy .npz file") from None
    if len(found[0]) == 0:
        raise DataError(f"{path}: holds no rows")
    if len({len(array) for array in found}) > 1:
        raise DataError(f"{path}: its arrays have {' and '.join(str(len(array)) for array in found)} rows")
    return found


def _read_json_lines(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    found: Columns = {column: [] for column in columns}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if max_rows is not None and len(found[columns[0]]) == max_rows:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:  # also text that is not UTF-8
                raise DataError(f"{path}: line {number} is not one JSON object; is the file complete?") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} is {type(row).__name__}, a JSON object is needed")
            _check_columns(path, columns, list(row), f"line {number} ")
            for column in columns:
                found[column].append(row[column])
    return found


def _read_csv(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: holds no rows")
        table = pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
        )
    except (pa.ArrowException, OSError) as error:
        if "UTF8" in str(error):
            raise DataError(f"{path}: is not UTF-8; save it as UTF-8") from None
        raise DataError(
            f"{path}: cannot be read as CSV; has every line as many values, is text with commas or quotes quoted?"
        ) from None
    return _from_table(path, table, columns, max_rows)


def _read_parquet(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError):
        raise DataError(f"{path}: cannot be read as Parquet; is the file complete?") from None
    return _from_table(path, table, columns, max_rows)


def _from_table(path: Path, table: pa.Table, columns: Sequence[str], max_rows: int | None) -> Columns:
    _check_columns(path, columns, table.column_names)
    return {column: table.column(column).slice(0, max_rows).to_pylist() for column in columns}


def _check_columns(path: Path, columns: Sequence[str], found: Sequence[str], where: str = "") -> None:
    for column in columns:
        if column not in found:
            # A file without a header line has a row for names: show only what looks like a name.
            names = [name for name in found if re.fullmatch(r"[\w.-]{1,40}", name)]
            hint = "" if len(names) == len(found) else "; is the header line missing?"
            raise DataError(
                f"{path}: {where}has no column {column!r}; its columns are {', '.join(names) or 'none'}{hint}"
            )
        if list(found).count(column) > 1:
            raise DataError(f"{path}: {where}has two columns {column!r}")


def _read_conll(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    """One word a line, first and last column its word and tag; a blank line, or -DOCSTART-, between sentences."""
    sentences: list[list[tuple[str, str]]] = [[]]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8; save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts or parts[0] == "-DOCSTART-":
            if sentences[-1]:
                sentences.append([])
        elif len(parts) == 1:
            raise DataError(f"{path}: line {number} has one column; a word and its tag are needed")
        else:
            sentences[-1].append((parts[0], parts[-1]))
    kept = [sentence for sentence in sentences if sentence][:max_rows]
    words, tags = columns
    return {
        words: [[word for word, _ in sentence] for sentence in kept],
        tags: [[tag for _, tag in sentence] for sentence in kept],
    }


READERS: dict[str, Callable[[Path, Sequence[str], int | None], Columns]] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_conll,
    ".conll": _read_conll,
}
