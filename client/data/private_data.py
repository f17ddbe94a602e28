"""An owner's private examples, by split. `files.py` opens the files, `readers.py` turns their columns into `Rows`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from client.data.columns import contents_of, digests_of, images_of, look_at_files, rows_trained_on, rows_without_labels
from client.data.lengths import count_cut, count_read_differently, cut_texts
from client.data.readers import Reader
from client.data.rows import Rows
from client.settings import Data
from common.agreement import Reading, Task
from common.data.files import read_columns
from common.data.images import ImageFile, files_left_out
from common.errors import DataError
from common.models.folders import has_tokenizer, load_image_processor, load_tokenizer
from common.pool import ImagePool, Pool
from common.pool_rows import PoolReader, PoolRows
from common.text import as_line

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from common.merge_methods.distill import DistillTable

AnySplit = Literal["train", "validation", "test"]


def prepared_by(folder: Path, task: Task) -> dict[str, Any]:
    """What prepares rows for the model in a folder, as arguments of `PrivateData`."""
    return {
        "tokenizer": load_tokenizer(folder) if task.is_text else None,
        "processor": None if task.is_text else load_image_processor(folder),
    }


@dataclass(frozen=True, kw_only=True)
class PrivateData:
    """An owner's files; paths are relative to `folder`. Reading raises DataError."""

    data: Data
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    processor: BaseImageProcessor | None = None
    folder: Path
    seed: int
    reading: Reading

    def train(self) -> Rows:
        """The examples that are measured, and trained on."""
        rows = self._read(self.data.train, self.data.max_train_rows)
        return rows if self.data.validation is not None else rows.take(self._set_aside(len(rows))[1])

    def try_reading(self, most_rows: int) -> int:
        """Read the first rows of every file as a run does; returns how many. Raises what would stop the run."""
        files = [self._file_of(split) for split in ("train", "validation", "test")]
        limits = [(file, min(limit or most_rows, most_rows)) for file, limit in files if file is not None]
        return sum(len(self._reader.read(self.folder / file, limit)) for file, limit in limits)

    def units(self, split: AnySplit = "train") -> NDArray[np.int64]:
        """For each row of a split's file, the number of its unit: rows with one value in the column `data.unit`."""
        file, column = self._file_of(split)[0], self.data.unit
        assert file is not None  # refused before: single rows of a person would be set aside
        path = self.folder / file
        if column is None:
            raise DataError(
                "owner's settings: no data.unit, and the agreement protects all rows of a unit together",
                hint="name the column that tells whose a row is, such as the patient's number",
            )
        values = self._values(split, "unit", column)
        for number, value in enumerate(values, 1):
            if not _is_name(value):
                raise DataError(
                    f"{path}: row {number}: column {column!r} does not say whose the row is",  # check: units-are-named
                    hint="fill it in, or leave the row out",
                )
        return np.unique([as_line(str(value)) for value in values], return_inverse=True)[1]

    def groups(self, split: Literal["validation", "test"]) -> list[str]:
        """For each row of a split, what the column `data.group` says; "" where it says nothing."""
        column, is_set_aside = self.data.group, split == "validation" and self.data.validation is None
        if column is None:
            return [""] * len(self.validation() if split == "validation" else self.test())
        values = self._values("train" if is_set_aside else split, "group", column)
        named = [as_line(str(value)) if _is_name(value) else "" for value in values]
        return [named[index] for index in self._set_aside(len(named))[0]] if is_set_aside else named

    def _file_of(self, split: AnySplit) -> tuple[Path | None, int | None]:
        """The file that a split names, and of how many of its rows."""
        return {
            "train": (self.data.train, self.data.max_train_rows),
            "validation": (self.data.validation, self.data.max_validation_rows),
            "test": (self.data.test, self.data.max_test_rows),
        }[split]

    def _values(self, split: AnySplit, setting: str, column: str) -> list[object]:
        """What a column that `setting` names says of each row of a split's file."""
        file, max_rows = self._file_of(split)
        assert file is not None
        values, rows = list(read_columns(self.folder / file, [column], max_rows)[column]), self._read(file, max_rows)
        if len(rows) != len(values):
            raise DataError(
                f"{self.folder / file}: {len(values) - len(rows)} of {len(values)} rows are cut before the model says "
                f"anything, so what is left cannot be matched with data.{setting}",
                hint="agree on a larger task.max_tokens, or leave these rows out",
            )
        return values

    def training_contents(self) -> Iterator[bytes]:
        """What every example of the training file says, without its label, none set aside."""
        return contents_of(self.data, self.task, self.folder / self.data.train, self.data.max_train_rows)

    def judged_contents(self) -> Iterator[bytes]:
        """The same of the validation and test files."""
        data = self.data
        if data.validation is not None:
            yield from contents_of(data, self.task, self.folder / data.validation, data.max_validation_rows)
        yield from contents_of(data, self.task, self.folder / data.test, data.max_test_rows)

    def contents(self) -> Iterator[bytes]:
        """The same of all files."""
        for path in (self.data.train, self.data.validation, self.data.test):
            if path is not None:
                yield from contents_of(self.data, self.task, self.folder / path, max_rows=None)

    def images(self) -> Iterator[ImageFile | NDArray[Any]]:
        """The images of all files."""
        for path in (self.data.train, self.data.validation, self.data.test):
            if path is not None:
                yield from images_of(self.data, self.task, self.folder / path)

    def oddities(self) -> Iterator[str]:
        """What is odd about the files but no error, in words with counts: for this owner's eyes alone."""
        data, task = self.data, self.task
        if trained_on := rows_trained_on(data, task, self.folder):
            yield f"{data.test}: {trained_on}"
        if task.has_several_labels:
            yield from rows_without_labels(look_at_files(data, task, self.folder).values())
        paths = [self.folder / path for path in (data.train, data.validation, data.test) if path is not None]
        if task.kind == "image-classification":
            yield from files_left_out(paths)
        if self.tokenizer is not None:
            yield from cut_texts(data, task, paths, self.tokenizer)

    def cut_test_texts(self) -> tuple[int, int]:
        """How many of the test texts are cut, of how many that were looked at."""
        assert self.tokenizer is not None  # only texts are cut
        return count_cut(self.data, self.task, self.folder / self.data.test, self.tokenizer)

    def read_otherwise(self, folder: Path) -> str:
        """How many training texts the tokenizer in a model's folder splits otherwise, in words; empty if none."""
        if self.tokenizer is None or not has_tokenizer(folder):
            return ""
        texts, other = self.folder / self.data.train, load_tokenizer(folder)
        try:
            differently, looked_at = count_read_differently(self.data, self.task, texts, self.tokenizer, other)
        except DataError:
            raise
        except Exception:  # one that was saved for other texts, say not for single words, can raise anything
            return f"{folder}: its tokenizer cannot read the training texts; the base's reads them"
        if not differently:
            return ""
        return (
            f"{folder}: its tokenizer splits {differently:,} of {looked_at:,} training texts otherwise than the "
            "base's, which reads the rows; if the model was fine-tuned with its own, it sees other tokens here"
        )

    def digest(self) -> str:
        """SHA-256 of everything that a model depends on which is made from these files."""
        found = hashlib.sha256()
        for path in (self.data.train, self.data.validation):
            if path is not None:
                for content in digests_of(self.data, self.task, self.folder / path):
                    found.update(content)
        return found.hexdigest()

    def validation(self) -> Rows:
        """The examples that decide a sweep."""
        if self.data.validation is not None:
            return self._read(self.data.validation, self.data.max_validation_rows)
        rows = self._read(self.data.train, self.data.max_train_rows)
        return rows.take(self._set_aside(len(rows))[0])

    def test(self) -> Rows:
        """The examples behind the reported metrics."""
        return self._read(self.data.test, self.data.max_test_rows)

    def candidates(self, path: Path) -> Rows:
        """Texts that may or may not be this owner's, without labels, in the columns that its own rows have."""
        return self._reader.read_unlabelled(path)

    def pool_rows(self, pool: Pool | ImagePool, table: DistillTable) -> PoolRows:
        """The rows of the public pool, as this owner's model reads them. Raises DataError or ModelError."""
        return PoolReader.of(self.model, self.task, table, self.tokenizer, self.processor).read(pool)

    def label_set(self) -> NDArray[np.int64]:
        """The labels among which this owner's examples are judged: all, or those that occur in its files."""
        if self.task.label_set == "all" or not self.task.has_labels or self.task.is_regression:
            return np.arange(len(self.task.labels))
        return self._labels_found

    def _set_aside(self, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A tenth of the training examples for validation, and the rest, as indices."""
        if rows < 10:
            raise DataError(
                f"{self.folder / self.data.train}: {rows} rows; without a validation file at least 10 are needed, "
                "because a tenth is set aside",
                hint="add rows, or name a validation file",
            )
        order = np.random.default_rng(self.seed).permutation(rows)
        return order[: rows // 10], order[rows // 10 :]

    def _read(self, path: Path, max_rows: int | None) -> Rows:
        """The examples of a file. The last ones that were read are kept: a sweep scores each candidate on the same."""
        if (path, max_rows) not in self._last_read:
            self._last_read.clear()
            self._last_read[path, max_rows] = self._reader.read(self.folder / path, max_rows)
        return self._last_read[path, max_rows]

    @cached_property
    def _last_read(self) -> dict[tuple[Path, int | None], Rows]:
        return {}

    @cached_property
    def _labels_found(self) -> NDArray[np.int64]:
        looks = look_at_files(self.data, self.task, self.folder).values()  # reads every file, and each score asks
        return np.unique(np.concatenate([each.labels for each in looks]))

    @cached_property
    def _reader(self) -> Reader:
        return Reader(
            data=self.data,
            task=self.task,
            model=self.model,
            tokenizer=self.tokenizer,
            processor=self.processor,
            reading=self.reading,
        )


def _is_name(value: object) -> bool:
    """Whether a value of a column says whose a row is, or of which group."""
    return isinstance(value, str | int) and not isinstance(value, bool) and bool(str(value).strip())
