"""The pool: public rows without labels on which owners' models predict (common/merge_methods/distill.py).

One file, of any kind that an owner's rows may have: texts, words, or images that lie inside the file. The agreement
pins its SHA-256, because whoever could choose the rows could ask about one person's. A party that holds another file
refuses. Only the pinned bytes are ever parsed: no other file is opened, whatever a row names.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.data.files import ARRAYS, arrays_of, batches_of
from common.data.images import ImageFile
from common.data.sources import Source, source_of
from common.errors import DataError
from common.lazy import lazy_module
from common.text import SURROGATE, alike

if TYPE_CHECKING:
    from PIL import Image

    from common.agreement.tables import TaskKind
    from common.merge_methods.distill import DistillTable
else:
    Image = lazy_module("PIL.Image")

MAX_BYTES = 1_000_000_000  # of the file, and of what is in it once it is unpacked
MAX_ROWS = 1_000_000
MAX_ROW_CHARACTERS = 100_000
MAX_PIXELS = 20_000_000_000  # of all images of a pool together: decoding them takes minutes
CONLL = (".conll", ".txt")
LOST = "\ufffd"
THUMBNAIL = 16  # pixels on a side, by which images are compared
MAKE_IT_AGAIN = "correct the file, and complete the draft again: amalgram draft"
R = TypeVar("R")


@dataclass(frozen=True)
class Pool:
    """`texts`: for each row its text, or its two texts if rows are pairs; or its words if `has_words`."""

    texts: tuple[tuple[str, ...], ...]
    has_words: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def written(self) -> list[str]:
        """What each row says, for whoever looks at it."""
        return [(" " if self.has_words else " / ").join(row) for row in self.texts]

    def say(self) -> Iterator[Hashable]:
        """What each row says, the same for rows that say the same."""
        for row in self.texts:
            yield in_one_form([" ".join(row)] if self.has_words else row)


@dataclass(frozen=True)
class ImagePool:
    """Images that lie inside the pool: files of their own, or one array, (rows, channels, height, width) or without
    channels.
    """

    images: tuple[ImageFile, ...] | NDArray[Any]

    def __len__(self) -> int:
        return len(self.images)

    def say(self) -> Iterator[Hashable]:
        """The digest of each image's pixels, whatever file they are packed in."""
        for image in self.images:
            yield hashlib.sha256(image.tobytes() if isinstance(image, np.ndarray) else _pixel_bytes(image)).digest()

    @cached_property
    def thumbnails(self) -> NDArray[np.float32]:
        """(rows, 256): by which images are compared. See `thumbnail`."""
        return np.stack([thumbnail(image) for image in self.images])


def thumbnail(image: ImageFile | NDArray[Any]) -> NDArray[np.float32]:
    """An image in 16 by 16 shades of grey, row by row, (256,): numbers from 0 to 1, or on the scale of an array."""
    if isinstance(image, ImageFile):
        grey = np.asarray(image.pixels().convert("RGB"), np.float32).mean(axis=2) / np.float32(255)
    else:
        scale = np.float32(1 / 255 if image.dtype == np.uint8 else 1)
        grey = image.astype(np.float32).mean(axis=tuple(range(image.ndim - 2))) * scale
    small = Image.fromarray(grey).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1)


def _pixel_bytes(image: ImageFile) -> bytes:
    pixels = image.pixels().convert("RGB")
    return repr(pixels.size).encode() + pixels.tobytes()


def in_one_form(texts: Sequence[str], unseen: str = "") -> str:
    """A row such that rows that say the same are equal: without regard to case, width, white space, and characters that
    nobody sees. Most tokenizers drop these; `unseen` is what stands for them.
    """
    return "\n".join(" ".join(_seen(alike(text), unseen).split()) for text in texts)


def _seen(text: str, unseen: str) -> str:
    """BERT's tokenizer drops all control characters but three, and U+FFFD, which is shown where a byte was lost."""
    if text.isprintable() and LOST not in text:
        return text
    kept = (
        each if each in "\t\n\r" or (unicodedata.category(each)[0] != "C" and each != LOST) else unseen for each in text
    )
    return "".join(kept)  # check: unseen-characters-do-not-count


def pool_path(own_copy: Path | None, home: Path, table: DistillTable, agreement_path: Path) -> Path:
    """A party's copy of the pool, relative to its settings in `home`, or else the file beside the agreement."""
    return agreement_path.parent / (table.pool or "") if own_copy is None else home / own_copy


def read_pool(path: Path, table: DistillTable, kind: TaskKind) -> Pool | ImagePool:
    """The agreed pool. Raises DataError for any other file, and for a row that is missing, empty or said twice."""
    content = _read(path)
    _check_digest(path, hashlib.sha256(content).hexdigest(), table)
    pool = _parsed(path, content, table, kind)
    _check_rows(path, len(pool), table)
    return pool


def pin_pool(path: Path, table: DistillTable, kind: TaskKind) -> DistillTable:
    """The table with what the file decides, where it left it out: its SHA-256, and how many rows and words it has.

    Raises DataError.
    """
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    if table.pool_sha256 is not None:
        _check_digest(path, digest, table)
    pool = _parsed(path, content, table, kind)
    if table.rows is not None:
        _check_rows(path, len(pool), table)
    found: dict[str, Any] = {"pool_sha256": digest, "rows": len(pool)}
    if isinstance(pool, Pool) and pool.has_words and table.predictions is None:
        found["predictions"] = sum(map(len, pool.texts))
    return table.model_copy(update=found)


def _check_digest(path: Path, digest: str, table: DistillTable) -> None:
    if digest != table.pool_sha256:  # check: pool-is-the-agreed-one
        raise DataError(
            f"pool {path}: its SHA-256 is {digest[:16]}..., the agreement's is {(table.pool_sha256 or 'none')[:16]}...",
            hint="get the file that was agreed on; whoever chooses its rows chooses what is asked about",
        )


def _check_rows(path: Path, rows: int, table: DistillTable) -> None:
    if rows != table.rows:
        raise DataError(f"pool {path}: has {rows} rows, the agreement says {table.rows}", hint=MAKE_IT_AGAIN)


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(
            f"pool {path}: is a folder, and a pool is one file",
            hint='save a data set of `datasets` as one: dataset.to_parquet("pool.parquet")',
        )
    try:
        if path.exists() and not path.is_file():  # check: pools-are-files
            raise DataError(f"pool {path}: is a pipe or a device, and a pool is a file", hint=MAKE_IT_AGAIN)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"pool {path}: cannot be read ({error.strerror})",
            hint='put the agreed file beside the agreement, or name your copy in your settings: pool = "..."',
        ) from None
    if len(content) > MAX_BYTES:
        raise DataError(f"pool {path}: a pool has at most {MAX_BYTES} bytes", hint=MAKE_IT_AGAIN)
    return content


def _parsed(path: Path, content: bytes, table: DistillTable, kind: TaskKind) -> Pool | ImagePool:
    pool: Pool | ImagePool
    if kind == "image-classification":
        pool = ImagePool(_images(path, content, table))
    elif kind == "token-classification":
        # A CoNLL file has a tag beside each word, which nobody reads.
        source = _source(path, content, table)
        columns = [table.tokens, "tags"] if source.ending in CONLL else [table.tokens]
        pool = Pool(tuple(_rows(source, columns, _words)), has_words=True)
    else:
        columns = [table.text, *filter(None, [table.text_pair])]
        pool = Pool(tuple(_rows(_source(path, content, table), columns, _texts)))
    if not len(pool):
        raise DataError(f"pool {path}: has no rows", hint=MAKE_IT_AGAIN)
    first: dict[Hashable, int] = {}
    for number, said in enumerate(pool.say(), 1):
        if first.setdefault(said, number) != number:  # check: pool-rows-are-said-once
            raise DataError(
                f"pool {path}: row {number} says the same as row {first[said]}; no row may count twice",
                hint=MAKE_IT_AGAIN,
            )
    return pool


def _source(path: Path, content: bytes, table: DistillTable) -> Source:
    """The bytes, as a file of the type that the agreed name says: a party may have its copy under another one."""
    named = source_of(Path(table.pool or path))
    return replace(named, path=path, content=content, most_bytes=MAX_BYTES)


def _rows(source: Source, columns: Sequence[str], row_of: Callable[[Path, int, dict[str, Any]], R]) -> Iterator[R]:
    """What `row_of` makes of each row's values."""
    number = 0
    for batch in batches_of(source, columns):
        for values in zip(*batch.values(), strict=True):
            number += 1
            if number > MAX_ROWS:
                raise DataError(f"pool {source.path}: a pool has at most {MAX_ROWS:,} rows", hint=MAKE_IT_AGAIN)
            yield row_of(source.path, number, dict(zip(columns, values, strict=True)))


def _texts(path: Path, number: int, row: dict[str, Any]) -> tuple[str, ...]:
    for column, text in row.items():
        if not _is_text(text):
            raise DataError(
                f"pool {path}: row {number}: {column!r} must be a text of 1 to {MAX_ROW_CHARACTERS} characters",
                hint=MAKE_IT_AGAIN,
            )
    return tuple(map(str, row.values()))


def _words(path: Path, number: int, row: dict[str, Any]) -> tuple[str, ...]:
    column, words = next(iter(row.items()))
    if not (isinstance(words, list) and words and all(map(_is_text, words))) or sum(map(len, words)) > (
        MAX_ROW_CHARACTERS
    ):
        raise DataError(
            f"pool {path}: row {number}: {column!r} must be a list of words, none of them empty, with at most "
            f"{MAX_ROW_CHARACTERS} characters together",
            hint=MAKE_IT_AGAIN,
        )
    unseen = next((place for place, word in enumerate(words, 1) if not in_one_form([word]).strip()), None)
    if unseen is not None:  # check: words-are-seen
        raise DataError(f"pool {path}: row {number}: word {unseen} has no visible characters", hint=MAKE_IT_AGAIN)
    return tuple(words)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value.strip()) <= MAX_ROW_CHARACTERS and not SURROGATE.search(value)


# --- images ---


def _images(path: Path, content: bytes, table: DistillTable) -> tuple[ImageFile, ...] | NDArray[Any]:
    source = _source(path, content, table)
    if source.ending == ARRAYS:
        (images,) = arrays_of(source, [table.image])
        if len(images) > MAX_ROWS:  # check: arrays-have-not-too-many-rows
            raise DataError(f"pool {path}: a pool has at most {MAX_ROWS:,} rows", hint=MAKE_IT_AGAIN)
        is_of_numbers = images.ndim in (3, 4) and images.size > 0 and images.dtype.kind in "uif"
        if is_of_numbers and images.dtype != np.uint8:
            with np.errstate(over="ignore"):
                images = images.astype(np.float32)
        if not is_of_numbers or not np.isfinite(images).all():  # check: as-models-read-them-arrays-are-finite
            raise DataError(
                f"pool {path}: {table.image!r} must be an array of images, (rows, height, width) or (rows, channels, "
                "height, width), of numbers that are finite in 32 bits",
                hint=MAKE_IT_AGAIN,
            )
        return images
    files = tuple(_rows(source, [table.image], _image))
    pixels = 0
    for image in files:
        pixels += prod(image.size())
        if pixels > MAX_PIXELS:  # check: pool-pixels-are-bounded
            raise DataError(f"pool {path}: its images have more than {MAX_PIXELS:,} pixels", hint=MAKE_IT_AGAIN)
    return files


def _image(path: Path, number: int, row: dict[str, Any]) -> ImageFile:
    (value,) = row.values()
    if isinstance(value, dict):  # as `datasets` saves an image
        value = value.get("bytes")
    if not isinstance(value, bytes) or not value:  # check: pool-images-are-inside
        raise DataError(
            f"pool {path}: row {number}: must hold the bytes of its image; a path is not followed, because only the "
            "pool's own bytes are agreed on",
            hint="save the images into the table, as `datasets` does, or as an .npz array",
        )
    return ImageFile(f"pool {path}: row {number}", value)
