"""Arrays that are mapped from a file: they take memory only while, and where, they are in use."""

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

PIECE_NUMBERS = 1 << 20


def release(array: NDArray) -> None:
    """Give back the memory of the file that `array` is mapped from; what was written stays in the file.

    For mappings that are shared with the file (numpy.memmap's modes r, r+ and w+): a private one would lose what was
    written. Does nothing to an array in memory.
    """
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base  # type: ignore[assignment]
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


Each = TypeVar("Each")


def releasing(each: Iterable[Each], array: NDArray) -> Iterator[Each]:
    """The same as `each`; whenever the next one is asked for, the memory of `array` is given back."""
    for one in each:
        yield one
        release(array)


def pieces(array: NDArray) -> Iterator[NDArray]:
    """A flat array in pieces; the memory of each is given back when the next one is asked for."""
    for start in range(0, len(array), PIECE_NUMBERS):
        yield array[start : start + PIECE_NUMBERS]
        release(array)


def copy_of(array: NDArray) -> NDArray:
    """A copy in memory; of the mapped file no more than a piece is there at a time."""
    copy = np.empty(array.size, array.dtype)
    start = 0
    for piece in pieces(array.reshape(-1)):
        copy[start : start + len(piece)] = piece
        start += len(piece)
    return copy.reshape(array.shape)


def is_finite(array: NDArray) -> bool:
    return all(bool(np.isfinite(piece).all()) for piece in pieces(array))


def sha256_of(array: NDArray) -> str:
    """Of the array's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces(array):
        digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest()
