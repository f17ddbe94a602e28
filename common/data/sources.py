"""Which files a path in an owner's settings stands for, and how each is opened.

A path is a file, a pattern for the parts of one (`data/train-*.parquet`), or a folder that `datasets` saved. Text may
be compressed with gzip, begin with a byte-order mark, and end its lines as Windows does.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from glob import glob
from math import inf
from pathlib import Path
from typing import BinaryIO, cast

from common.errors import DataError
from common.settings_file import did_you_mean

MAX_LINE_BYTES = 100_000_000  # a longer line means that a line break is missing, or that a small file unpacks to much
MAX_TEXT_BYTES = 16_000_000_000  # of one file, unpacked
SAVE_AS_UTF8 = "save the file as UTF-8"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
STATE, SPLITS = "state.json", "dataset_dict.json"  # what `datasets` writes beside a data set, and beside its splits
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One file, and what it holds by its name: ".csv", whether or not it is compressed.

    `content`: its bytes, if they were read before; then nothing is read from the disk. `most_bytes`: what it may take
    unpacked, if that is less than every file may.
    """

    path: Path
    ending: str
    is_compressed: bool = False
    content: bytes | None = None
    most_bytes: float = inf

    def open(self) -> AbstractContextManager[BinaryIO]:
        """The file, unpacked."""
        if self.content is None:
            return cast("BinaryIO", gzip.open(self.path)) if self.is_compressed else self.path.open("rb")
        file = io.BytesIO(self.content)
        return cast("BinaryIO", gzip.open(file)) if self.is_compressed else file


def find_sources(path: Path) -> list[Source]:
    """The files that `path` stands for, in the order of their names. Raises DataError if there are none."""
    if path.is_dir():
        return _saved_dataset(path)
    if path.is_file():
        return [source_of(path)]
    if not any(mark in path.name for mark in "*?["):
        names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"{path}: no such file",
            hint=did_you_mean(path.name, names) or "check the path; one in a settings file is relative to that file",
        )
    found = sorted(map(Path, glob(str(path))))
    if not found:
        raise DataError(f"{path}: no file has such a name", hint="correct the pattern; * stands for any characters")
    return [source_of(each) for each in found]


def source_of(path: Path) -> Source:
    """One file, by its name."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings[-1:] == [".gz"]:
        return Source(path, endings[-2] if len(endings) > 1 else "", is_compressed=True)
    return Source(path, endings[-1] if endings else "")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` saved a data set, or several splits of one, in a folder."""
    return any((folder / name).is_file() for name in (STATE, SPLITS))


def _saved_dataset(folder: Path) -> list[Source]:
    """The Arrow files of a folder that `datasets.Dataset.save_to_disk` wrote."""
    if (folder / SPLITS).is_file():
        splits = sorted(each.parent.name for each in folder.glob(f"*/{STATE}"))
        raise DataError(
            f"{folder}: holds several splits: {', '.join(splits)}",
            hint=f'name the one to use: "{folder / (splits[0] if splits else "train")}"',
        )
    try:
        files = [entry["filename"] for entry in json.loads((folder / STATE).read_bytes())["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise DataError(
            f"{folder}: is a folder, but not one that `datasets` saved",
            hint='name a file, or a pattern for several: "data/train-*.parquet"',
        ) from None
    if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise DataError(f"{folder}: its {STATE} names no files of this folder", hint="save the data set again")
    return [Source(folder / name, ".arrow") for name in files]


# --- text ---


def text_lines(source: Source) -> Iterator[str]:
    """The lines of a text file with their ends. Raises DataError if it is not UTF-8 text, or takes too much room."""
    most = min(source.most_bytes, MAX_TEXT_BYTES)
    with _readable(source) as file:
        read = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            if read == 0:
                if line.startswith(UTF16):
                    raise DataError(f"{source.path}: is UTF-16, not UTF-8", hint=SAVE_AS_UTF8)
                line = line.removeprefix(BYTE_ORDER_MARK)
            read += len(line)
            if len(line) > MAX_LINE_BYTES or read > most:  # check: unpacked-text-is-bounded
                raise DataError(
                    f"{source.path}: has a line of over {MAX_LINE_BYTES} bytes, or over {most} bytes in all",
                    hint="check for missing line breaks, or split the file",
                )
            try:
                yield line.decode()
            except UnicodeDecodeError:
                raise DataError(f"{source.path}: is not UTF-8", hint=SAVE_AS_UTF8) from None


@contextmanager
def _readable(source: Source) -> Iterator[BinaryIO]:
    try:
        with source.open() as file:
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise DataError(f"{source.path}: cannot be unpacked", hint="check that the file is complete") from None
