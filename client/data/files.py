"""Columns of an owner's files: JSON Lines, CSV, Parquet, CoNLL, and NumPy arrays. Independent of models.

An error names the file and the row, and never quotes the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.lazy import lazy_module

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv, parquet
else:
    pa, csv, parquet = (lazy_module(name) for name in ("pyarrow", "pyarrow.csv", "pyarrow.parquet"))

Columns = dict[str, list[Any]]

MAX_UNPACKED_BYTES = 16_000_000_000  # of a compressed file, as it says itself; a few kilobytes can hold any number
BATCH_ROWS = 1024  # of a Parquet file, unpacked at once
INCOMPLETE = "check that the file is complete"
SAVE_AS_UTF8 = "save the file as UTF-8"


def read_columns(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    """The named columns of a file: every row, or the first `max_rows`. CSV values are text; others keep their type."""
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown file type", hint=f"use {', '.join(READERS)}, or .npz for images")
    _check_exists(path)
    found = reader(path, columns, max_rows)
    if not found[columns[0]]:
        raise DataError(f"{path}: holds no rows")
    return found


def read_arrays(path: Path, columns: Sequence[str], max_rows: int | None) -> list[NDArray[Any]]:
    """The named arrays of an .npz file: every row, or the first `max_rows`. All have the same number of rows."""
    _check_exists(path)
    try:
        with ZipFile(path) as archive:
            _check_size(path, sum(member.file_size for member in archive.infolist()))
        with np.load(path, allow_pickle=False) as arrays:
            _check_columns(path, columns, arrays.files)
            found = [arrays[column][:max_rows] for column in columns]
        if any(array.ndim == 0 for array in found):
            raise ValueError("a number, not an array")
    except DataError:
        raise
    except Exception:  # a broken file can make the library raise anything
        raise DataError(
            f"{path}: cannot be read as a NumPy .npz file", hint="write it with numpy.savez, as arrays of numbers"
        ) from None
    if len(found[0]) == 0:
        raise DataError(f"{path}: holds no rows")
    if len({len(array) for array in found}) > 1:
        raise DataError(f"{path}: its arrays have {' and '.join(str(len(array)) for array in found)} rows")
    return found


# --- one reader for each type of file ---


def _read_json_lines(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    found: Columns = {column: [] for column in columns}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if max_rows is not None and len(found[columns[0]]) == max_rows:
                break
            if line.strip():
                row = _parse_line(path, number, line)
                _check_columns(path, columns, list(row), f"line {number} ")
                for column in columns:
                    found[column].append(row[column])
    return found


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # also text that is not UTF-8, and lists nested too deeply
        raise DataError(f"{path}: line {number} is not one JSON object", hint=INCOMPLETE) from None
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number} is {type(row).__name__}, not a JSON object")
    return row


def _read_csv(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: holds no rows")
        table = csv.read_csv(
            path,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
        )
        return _from_table(path, table, columns, max_rows)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        if "UTF8" in str(error) or isinstance(error, UnicodeDecodeError):
            raise DataError(f"{path}: is not UTF-8", hint=SAVE_AS_UTF8) from None
        raise DataError(
            f"{path}: cannot be read as CSV",
            hint="every line needs as many values as the header, and text with commas or quotes must be quoted",
        ) from None


def _read_parquet(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    """Nothing but these columns is unpacked, and little beyond the last row that is asked for."""
    found: Columns = {column: [] for column in columns}
    unpacked = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            groups = _groups_with(file.metadata, max_rows)
            _check_size(path, sum(_declared_bytes(file.metadata.row_group(group), columns) for group in groups))
            for batch in file.iter_batches(
                min(BATCH_ROWS, max_rows or BATCH_ROWS), row_groups=groups, columns=list(columns)
            ):
                unpacked += batch.nbytes
                _check_size(path, unpacked)
                for column in columns:
                    room = None if max_rows is None else max_rows - len(found[column])
                    found[column] += batch.column(column).slice(0, room).to_pylist()
                if max_rows is not None and len(found[columns[0]]) >= max_rows:
                    break
            return found
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError):
        raise DataError(f"{path}: cannot be read as Parquet", hint=INCOMPLETE) from None


def _groups_with(metadata: parquet.FileMetaData, max_rows: int | None) -> list[int]:
    """The groups of rows that hold the first `max_rows`, as the file says itself."""
    groups, rows = [], 0
    for index in range(metadata.num_row_groups):
        if max_rows is not None and rows >= max_rows:
            break
        groups.append(index)
        rows += metadata.row_group(index).num_rows
    return groups


def _declared_bytes(group: parquet.RowGroupMetaData, columns: Sequence[str]) -> int:
    """What these columns of a group take unpacked, as the file says itself. A nested column is stored as several."""
    stored = [group.column(index) for index in range(group.num_columns)]
    return sum(each.total_uncompressed_size for each in stored if each.path_in_schema.split(".")[0] in columns)


def _from_table(path: Path, table: pa.Table, columns: Sequence[str], max_rows: int | None) -> Columns:
    _check_columns(path, columns, table.column_names)
    return {column: table.column(column).slice(0, max_rows).to_pylist() for column in columns}


def _read_conll(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    """One word per line: its first column is the word, its last the tag. A blank line or -DOCSTART- ends a sentence."""
    sentences: list[list[tuple[str, str]]] = [[]]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8", hint=SAVE_AS_UTF8) from None
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts or parts[0] == "-DOCSTART-":
            if sentences[-1]:
                sentences.append([])
        elif len(parts) == 1:
            raise DataError(f"{path}: line {number} has one column, but a word and its tag are needed")
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

# --- checks ---


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file")


def _check_size(path: Path, unpacked_bytes: int) -> None:
    if unpacked_bytes > MAX_UNPACKED_BYTES:  # check: unpacked-files-are-bounded
        raise DataError(
            f"{path}: would take {unpacked_bytes} bytes unpacked, at most {MAX_UNPACKED_BYTES} are allowed",
            hint="split the file, and name the part to use",
        )


def _check_columns(path: Path, columns: Sequence[str], found: Sequence[str], where: str = "") -> None:
    for column in columns:
        if column not in found:
            # Without a header line, the first row is read as the names, so show only what looks like a name.
            names = [name for name in found if re.fullmatch(r"[\w.-]{1,40}", name)]
            raise DataError(
                f"{path}: {where}has no column {column!r}; its columns are {', '.join(names) or 'none'}",
                hint="give the names that the file uses"
                if len(names) == len(found)
                else "check that the header line is there",
            )
        if list(found).count(column) > 1:
            raise DataError(f"{path}: {where}has two columns {column!r}", hint="rename one of them")
