"""Columns of files of rows, an owner's or a public pool's: JSON, CSV, Parquet, Arrow, CoNLL, and NumPy arrays.

An error names the file and the row, and never quotes the row.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from common.data.foreign import WRITE_IT_PLAIN, check_types, plain_stream, unpacked_bytes
from common.data.sources import MAX_LINE_BYTES, Source, find_sources, text_lines
from common.errors import DataError
from common.lazy import lazy_module

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import ipc, parquet
else:
    pa, ipc, parquet = (lazy_module(name) for name in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"))

Columns = dict[str, list[Any]]  # values by column, all of the same length

MAX_UNPACKED_BYTES = 16_000_000_000  # of a compressed file, as it says itself; a few kilobytes can hold any number
MAX_JSON_BYTES = 1_000_000_000  # of a file that is one list: it has to be read as a whole
ARRAYS = ".npz"
BATCH_ROWS = 1024  # unpacked at once
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
INCOMPLETE = "check that the file is complete"
log = logging.getLogger("amalgram.owner")


def read_columns(path: Path, columns: Sequence[str], max_rows: int | None) -> Columns:
    """The named columns: every row, or `max_rows` drawn from all of them, in the order of the file.

    CSV values are text; others keep their type. A dotted name, `answer.text`, is a field of a nested column. The draw
    depends on how many rows there are, and on nothing else.
    """
    found: Columns = {column: [] for column in columns}
    draw = None if max_rows is None else Draw(max_rows)
    for source in find_sources(path):
        for batch in batches_of(source, columns, max_rows):
            count = len(batch[columns[0]])
            if draw is None:
                for column in columns:
                    found[column] += batch[column]
            else:
                draw.add({column: batch[column] for column in columns}, count)
    if draw is not None:
        found = draw.columns(columns)
    if not found[columns[0]]:
        raise DataError(f"{path}: holds no rows")
    return found


def batches_of(source: Source, columns: Sequence[str], max_rows: int | None = None) -> Iterator[Columns]:
    """The named columns of one file, some rows at a time. `max_rows`: how many of all will be kept."""
    reader = READERS.get(source.ending)
    if reader is None:
        raise DataError(f"{source.path}: unknown file type", hint=_types_hint(source.ending))
    return reader(source, columns, max_rows)


def _types_hint(ending: str) -> str:
    if ending in (".xlsx", ".xls", ".ods"):
        return "export the sheet as CSV in UTF-8"
    return f"use {', '.join(READERS)}; for images also a folder of one folder a label, or {ARRAYS}"


class Draw:
    """`count` rows drawn from a stream of any length, each set of rows with the same probability (Vitter 1985, R)."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._random = np.random.default_rng(0)  # nothing secret: the same rows at every reading
        self._seen = 0
        self._kept: list[tuple[int, tuple[Any, ...]]] = []

    def add(self, batch: Columns, rows: int) -> None:
        numbers = np.arange(self._seen, self._seen + rows)
        places = self._random.integers(0, numbers + 1)
        values = list(batch.values())
        for index in np.flatnonzero((numbers < self._count) | (places < self._count)).tolist():
            row = (self._seen + index, tuple(column[index] for column in values))
            if len(self._kept) < self._count:
                self._kept.append(row)
            else:
                self._kept[int(places[index])] = row
        self._seen += rows

    def columns(self, columns: Sequence[str]) -> Columns:
        rows = [row for _, row in sorted(self._kept, key=lambda numbered: numbered[0])]
        return {column: [row[index] for row in rows] for index, column in enumerate(columns)}


def side_by_side(found: Columns, columns: Sequence[str]) -> list[Any]:
    """The values of one column; of several, a list for each row."""
    values = [found[column] for column in columns]
    return values[0] if len(values) == 1 else [list(row) for row in zip(*values, strict=True)]


def read_arrays(path: Path, columns: Sequence[str], max_rows: int | None) -> list[NDArray[Any]]:
    """The named arrays of an .npz file: every row, or `max_rows` drawn from all of them. All have the same number of
    rows.
    """
    find_sources(path)
    found = arrays_of(Source(path, ARRAYS), columns)
    if max_rows is None or max_rows >= len(found[0]):
        return found
    drawn = np.sort(np.random.default_rng(0).choice(len(found[0]), max_rows, replace=False))
    return [array[drawn] for array in found]


def arrays_of(source: Source, columns: Sequence[str]) -> list[NDArray[Any]]:
    """The named arrays of one .npz file, whole. All have the same number of rows."""
    path, opened = source.path, source.path if source.content is None else io.BytesIO(source.content)
    try:
        with ZipFile(opened) as archive:
            _check_size(source, sum(member.file_size for member in archive.infolist()))
        with np.load(opened, allow_pickle=False) as arrays:
            _check_columns(path, columns, arrays.files)
            found = [arrays[column] for column in columns]
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


# --- one reader for each type of file; each gives batches of rows ---


def _read_json_lines(source: Source, columns: Sequence[str], max_rows: int | None) -> Iterator[Columns]:
    batch: list[dict[str, Any]] = []
    for number, line in enumerate(text_lines(source), 1):
        if line.strip():
            batch.append(_parse_line(source.path, number, line))
            _check_fields(source.path, columns, batch[-1], f"line {number} ")
        if len(batch) == BATCH_ROWS:
            yield _columns_of(batch, columns)
            batch = []
    yield _columns_of(batch, columns)


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # also lists nested too deeply
        raise DataError(f"{path}: line {number} is not one JSON object", hint=INCOMPLETE) from None
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number} is {type(row).__name__}, not a JSON object")
    return row


def _read_json(source: Source, columns: Sequence[str], max_rows: int | None) -> Iterator[Columns]:
    """One list of objects; or JSON Lines, which many files of this name are."""
    lines: list[str] = []
    size = 0
    for line in text_lines(source):
        if not lines and line.lstrip().startswith("{") and _is_json(line):
            yield from _read_json_lines(source, columns, max_rows)
            return
        lines.append(line)
        size += len(line)
        if size > MAX_JSON_BYTES:
            raise DataError(
                f"{source.path}: a list of over {MAX_JSON_BYTES} characters",
                hint="write JSON Lines (.jsonl), one row per line",
            )
    try:
        rows = json.loads("".join(lines))
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{source.path}: is not one list of JSON objects", hint="write [{...}, {...}] or JSON Lines")
    for number, row in enumerate(rows, 1):
        _check_fields(source.path, columns, row, f"row {number} ")
    yield _columns_of(rows, columns)


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _columns_of(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Columns:
    return {column: [row[column] if column in row else _field(row, column) for row in rows] for column in columns}


def _field(row: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        row = row[name]
    return row


def _read_csv(source: Source, columns: Sequence[str], max_rows: int | None) -> Iterator[Columns]:
    """Values are text. What separates them is what gives the header the columns that are asked for."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = text_lines(source)
    header_line = next(lines, "")
    if not header_line.strip():
        raise DataError(f"{source.path}: holds no rows")
    try:
        delimiter = _delimiter(source, header_line, columns)
        header = next(csv.reader([header_line], delimiter=delimiter))
        _check_columns(source.path, columns, header)
        places = [header.index(column) for column in columns]
        batch: Columns = {column: [] for column in columns}
        for row in csv.reader(lines, delimiter=delimiter, strict=True):
            if not row:
                continue
            if len(row) != len(header):
                raise csv.Error
            for column, place in zip(columns, places, strict=True):
                batch[column].append(row[place])
            if len(batch[columns[0]]) == BATCH_ROWS:
                yield batch
                batch = {column: [] for column in columns}
        yield batch
    except csv.Error:
        raise DataError(
            f"{source.path}: cannot be read as CSV",
            hint="every line needs as many values as the header, and text with commas or quotes must be quoted",
        ) from None


def _delimiter(source: Source, header_line: str, columns: Sequence[str]) -> str:
    """Where nothing gives these columns, what gives the most: an error names those that it finds."""
    usual = "\t" if source.ending == ".tsv" else ","
    headers = {each: next(csv.reader([header_line], delimiter=each), []) for each in (usual, *DELIMITERS)}
    for delimiter, header in headers.items():
        if set(columns) <= set(header):
            if delimiter != usual:
                _say_delimiter(source.path, DELIMITERS[delimiter])
            return delimiter
    return max(headers, key=lambda each: len(headers[each]))


@cache
def _say_delimiter(path: Path, delimiters: str) -> None:
    log.info("%s: its values are separated by %s", path, delimiters)


def _read_parquet(source: Source, columns: Sequence[str], max_rows: int | None) -> Iterator[Columns]:
    """Nothing but these columns is unpacked, a few rows at a time."""
    try:
        with parquet.ParquetFile(source.path if source.content is None else pa.BufferReader(source.content)) as file:
            names = file.schema_arrow.names
            roots = _roots(source.path, columns, names)
            if source.content is not None:
                check_types(source.path, [file.schema_arrow.field(root) for root in roots])
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            declared = [_declared_bytes(group, roots) for group in groups]
            # A draw keeps few of the rows, but a group may be unpacked at once.
            _check_size(source, sum(declared) if max_rows is None else max(declared, default=0))
            batches = file.iter_batches(
                min(_rows_at_once(source, declared), max_rows or BATCH_ROWS), columns=sorted(set(roots))
            )
            yield from _record_batches(source, batches, columns, keeps_all=max_rows is None)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError):
        raise DataError(f"{source.path}: cannot be read as Parquet", hint=INCOMPLETE) from None


def _rows_at_once(source: Source, declared: Sequence[int]) -> int:
    """Of another party's file so few that they are no more than a few times what is allowed, although each may hold
    all that its group says once: a group's dictionary can name one large value in every row.
    """
    if source.content is None:
        return BATCH_ROWS
    at_once = 4 * int(source.most_bytes) // max([1, *declared])
    return max(1, min(BATCH_ROWS, at_once))  # check: what-is-said-once-is-not-unpacked-often


def _read_arrow(source: Source, columns: Sequence[str], max_rows: int | None) -> Iterator[Columns]:
    """Arrow's stream, which `datasets` saves, or its file."""
    try:
        content = None if source.content is None else plain_stream(source.content)
        with pa.memory_map(str(source.path)) if content is None else pa.BufferReader(content) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            opened = ipc.open_file(file) if is_file else ipc.open_stream(file)
            roots = _roots(source.path, columns, opened.schema.names)
            if content is not None:
                check_types(source.path, [opened.schema.field(root) for root in roots])
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches)) if is_file else opened
            yield from _record_batches(source, batches, columns, keeps_all=max_rows is None)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError):
        raise DataError(
            f"{source.path}: cannot be read as Arrow",
            hint=INCOMPLETE
            if source.content is None
            else f"check that it is complete and not compressed; or {WRITE_IT_PLAIN}",
        ) from None


def _record_batches(
    source: Source, batches: Iterator[pa.RecordBatch], columns: Sequence[str], *, keeps_all: bool
) -> Iterator[Columns]:
    unpacked = 0
    for batch in batches:
        taken = batch.nbytes
        if source.content is not None:  # another party's
            roots = set(_roots(source.path, columns, batch.schema.names))
            taken = sum(unpacked_bytes(batch.column(root)) for root in roots)
        unpacked = taken + (unpacked if keeps_all else 0)
        _check_size(source, unpacked)
        yield {column: _values(source.path, batch, column) for column in columns}


def _values(path: Path, batch: pa.RecordBatch, column: str) -> list[Any]:
    if column in batch.schema.names:
        found: list[Any] = batch.column(column).to_pylist()
        return found
    root, _, rest = column.partition(".")
    try:
        return [_field(value, rest) for value in batch.column(root).to_pylist()]
    except (LookupError, TypeError):
        raise DataError(f"{path}: column {root!r} has no field {rest!r} in every row") from None


def _roots(path: Path, columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns of a table that hold the columns asked for, which may be fields of nested ones."""
    roots = [column if column in names else column.partition(".")[0] for column in columns]
    for column, root in zip(columns, roots, strict=True):
        _check_columns(path, [root if root in names else column], names)
    return roots


def _declared_bytes(group: parquet.RowGroupMetaData, columns: Sequence[str]) -> int:
    """What these columns of a group take unpacked, as the file says itself. A nested column is stored as several."""
    stored = [group.column(index) for index in range(group.num_columns)]
    return sum(each.total_uncompressed_size for each in stored if each.path_in_schema.split(".")[0] in columns)


def _read_conll(source: Source, columns: Sequence[str], max_rows: int | None) -> Iterator[Columns]:
    """One word per line: its first column is the word, its last the tag. A blank line or -DOCSTART- ends a sentence."""
    words, tags = columns
    sentence: list[tuple[str, str]] = []
    for number, line in enumerate(text_lines(source), 1):
        parts = line.split()
        if not parts or parts[0] == "-DOCSTART-":
            if sentence:
                yield {words: [[word for word, _ in sentence]], tags: [[tag for _, tag in sentence]]}
            sentence = []
        elif len(parts) == 1:
            raise DataError(f"{source.path}: line {number} has one column, but a word and its tag are needed")
        else:
            sentence.append((parts[0], parts[-1]))
    if sentence:
        yield {words: [[word for word, _ in sentence]], tags: [[tag for _, tag in sentence]]}


READERS: dict[str, Callable[[Source, Sequence[str], int | None], Iterator[Columns]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_conll,
    ".conll": _read_conll,
}

# --- checks ---


def _check_size(source: Source, unpacked_bytes: int) -> None:
    most = min(source.most_bytes, MAX_UNPACKED_BYTES)
    if unpacked_bytes > most:  # check: unpacked-files-are-bounded
        raise DataError(
            f"{source.path}: would take {unpacked_bytes} bytes unpacked, at most {most} are allowed",
            hint="split the file, and name the part to use",
        )


def _check_fields(path: Path, columns: Sequence[str], row: dict[str, Any], where: str) -> None:
    """Raise DataError unless a JSON object has every column, by its name or as a field of a nested object."""
    for column in columns:
        if column not in row:
            try:
                _field(row, column)
            except (LookupError, TypeError):
                _check_columns(path, [column], list(row), where)


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
