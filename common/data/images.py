"""Image files, an owner's or a pool's: which there are, their labels, how they are read, and prepared for a model.

Images come as a folder with one folder for each label (`photos/cat/1.png`), or as a table with a column of paths, which
are relative to the table's folder, or of the files' bytes, as `datasets` saves them. `.npz` arrays hold pixels that are
ready for the model (files.py).

PNG, JPEG, TIFF, WebP, BMP and GIF (its first frame) are read as people see them: turned as their EXIF data says, a
palette as its colours, 16-bit grey as 8-bit grey, and transparency left out.
"""

import io
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.data.files import read_columns, side_by_side
from common.data.sources import find_sources, is_saved_dataset
from common.errors import DataError, ModelError, first_line
from common.lazy import lazy_module

if TYPE_CHECKING:
    from PIL import Image, ImageOps
    from transformers import BaseImageProcessor
else:
    Image, ImageOps = lazy_module("PIL.Image"), lazy_module("PIL.ImageOps")

PREPARES_OTHERWISE = (
    "agree on a base whose preprocessor_config.json belongs to it; without one, images are only resized"
)
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
}  # what Pillow calls it -> endings
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # which Windows leaves in folders of images
MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 1_000_000_000
LARGE_BYTES = 256_000_000
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True)
class ImageFile:
    """One image: its file, or what a table holds of it. `where`: what an error says of it."""

    where: str
    content: Path | bytes

    def read(self) -> bytes:
        """The bytes of the file. Raises DataError."""
        if isinstance(self.content, bytes):
            return self.content
        try:
            if (size := self.content.stat().st_size) > MAX_FILE_BYTES:  # check: image-files-are-bounded
                raise DataError(f"{self.where}: has {size} bytes, at most {MAX_FILE_BYTES} are allowed")
            return self.content.read_bytes()
        except OSError as error:
            raise DataError(f"{self.where}: cannot be read ({error.strerror})") from None

    def size(self) -> tuple[int, int]:
        """The width and height that it says it has; nothing is unpacked. Raises DataError."""
        with self._refusing():
            width, height = self._opened().size
            return width, height

    def pixels(self) -> "Image.Image":
        """The image in 8 bits a channel, grey ("L") or colour ("RGB"). Raises DataError."""
        with self._refusing():
            return _in_eight_bits(ImageOps.exif_transpose(self._opened()))

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """While open, the decoder runs. It warns of large images, whose bound is ours, and quotes broken EXIF data."""
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        except DataError:
            raise
        except Exception:  # a broken file can make the decoder raise anything
            raise DataError(
                f"{self.where}: cannot be read as an image",
                hint=f"images are {', '.join(FORMATS)}; check that the file is complete",
            ) from None

    def _opened(self) -> "Image.Image":
        """The image, of which nothing is unpacked yet."""
        try:
            image = Image.open(io.BytesIO(self.read()), formats=tuple(FORMATS))  # check: only-these-decoders-run
            too_large = image.width * image.height > MAX_PIXELS  # check: images-are-bounded
        except Image.DecompressionBombError:
            too_large = True
        if too_large:
            raise DataError(f"{self.where}: has more than {MAX_PIXELS:,} pixels", hint="make the image smaller")
        return image


@dataclass(frozen=True)
class ImageTable:
    """The images that a path stands for, with their labels. `left_out`: how many other files a folder has, by the
    ending of their names.
    """

    images: Sequence[ImageFile]
    labels: Sequence[Any]
    left_out: Counter[str]


def find_images(path: Path, columns: Sequence[str], max_rows: int | None) -> ImageTable:
    """The images of a folder or a table: all, or `max_rows` drawn from them. `columns`: the image's and the labels'.

    Raises DataError; no image is opened.
    """
    if is_folder_of_images(path):
        return _in_folder(path, max_rows)
    image, *labels = columns
    found = read_columns(path, columns, max_rows)
    folder = find_sources(path)[0].path.parent
    images = [_named(path, folder, number, value) for number, value in enumerate(found[image], 1)]
    return ImageTable(images, side_by_side(found, labels), Counter())


def is_folder_of_images(path: Path) -> bool:
    """Whether a path is a folder, other than one that `datasets` saved."""
    return path.is_dir() and not is_saved_dataset(path)


def files_left_out(paths: Iterable[Path]) -> Iterator[str]:
    """Which other files lie in folders of images, in words with counts: for their owner's eyes alone."""
    for path in paths:
        if is_folder_of_images(path) and (left_out := _in_folder(path, None).left_out):
            kinds = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in sorted(left_out.items()))
            yield f"{path}: files that are not images are left out: {kinds}"


def room_for(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """An array of float32 for prepared images; a large one lies in a nameless file, which disappears with it."""
    if 4 * prod(shape) <= LARGE_BYTES:
        return np.empty(shape, np.float32)
    with TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def _in_folder(folder: Path, max_rows: int | None) -> ImageTable:
    """Every image below a folder; its label is the name of the folder in `folder` that holds it, at any depth."""
    found: list[tuple[Path, str]] = []
    left_out: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if any(part.startswith(".") for part in below.parts) or path.name.lower() in SYSTEM_FILES or path.is_dir():
            continue
        if path.suffix.lower() not in ENDINGS:
            left_out[path.suffix.lower()] += 1
        elif len(below.parts) == 1:
            raise DataError(
                f"{path}: lies beside the folders of the labels, so it has no label",
                hint=f"images lie in {folder}/LABEL/, or a table names them and their labels",
            )
        else:
            found.append((path, below.parts[0]))
    if not found:
        raise DataError(f"{folder}: holds no images ({', '.join(ENDINGS)})", hint=f"images lie in {folder}/LABEL/")
    if max_rows is not None and max_rows < len(found):
        drawn = np.sort(np.random.default_rng(0).choice(len(found), max_rows, replace=False))
        found = [found[index] for index in drawn]
    return ImageTable([ImageFile(str(path), path) for path, _ in found], [label for _, label in found], left_out)


def _named(table: Path, folder: Path, row: int, value: Any) -> ImageFile:
    """The image that a cell of a table names, or holds."""
    where = f"{table}: row {row}"
    if isinstance(value, dict):  # as `datasets` saves an image
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return ImageFile(where, value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: its image is {type(value).__name__}, not a path", hint="name the file of the image")
    place = folder / value
    if Path(value).is_absolute() or not place.resolve().is_relative_to(folder.resolve()):  # check: images-lie-beside
        raise DataError(
            f"{where}: its image lies outside the table's folder", hint=f"name images by their paths from {folder}"
        )
    if not place.is_file():
        raise DataError(f"{where}: there is no such image", hint=f"paths of images are relative to {folder}")
    return ImageFile(f"{where} ({value})", place)


def _in_eight_bits(image: "Image.Image") -> "Image.Image":
    if image.mode in SIXTEEN_BIT:  # Pillow would cut every number off at 255
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("has no range that all its readers agree on")
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def prepared(
    image: "Image.Image", shape: tuple[int, int, int], processor: "BaseImageProcessor | None"
) -> NDArray[np.float32]:
    """An image for a model that takes `shape`, (channels, height, width): by the base's image processor, or fitted."""
    return as_array(image, *shape) if processor is None else processed(processor, image, shape)


def processed(
    processor: "BaseImageProcessor", pixels: "Image.Image", shape: tuple[int, int, int]
) -> NDArray[np.float32]:
    """What the base's image processor makes of an image. Raises ModelError if that is not what its model takes."""
    try:
        given = processor(images=[pixels.convert("L" if shape[0] == 1 else "RGB")], return_tensors="np")
        found: NDArray[np.float32] = np.asarray(given["pixel_values"], np.float32)[0]
    except Exception as error:  # a configuration can ask the library for anything
        raise ModelError(
            f"the base's image processor cannot prepare an image: {first_line(error)}", hint=PREPARES_OTHERWISE
        ) from None
    if found.shape != shape:
        raise ModelError(
            f"the base's image processor makes images of {found.shape}, and its model takes {shape}",
            hint=PREPARES_OTHERWISE,
        )
    return found


def as_array(image: "Image.Image", channels: int, height: int, width: int) -> NDArray[np.float32]:
    """The image for a model whose base says nothing of it: (channels, height, width), numbers from 0 to 1."""
    fitted = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(fitted, np.float32).reshape(height, width, -1).transpose(2, 0, 1)
    return pixels / np.float32(255)
