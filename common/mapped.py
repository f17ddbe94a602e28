"""Arrays that are mapped from a file: only the pieces in use take memory."""

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

PIECE_NUMBERS = 1 << 20
SMALL_BYTES = 1 << 23  # a file that is not worth the time to read it again


def release(array: NDArray) -> None:
    """Free the memory of the file that `array` is mapped from, unless it is small. What was written stays in the file.

    Use it only for mappings that are shared with the file (numpy.memmap's modes r, r+ and w+); a private mapping would
    lose what was written. An array in memory is left alone.
    """
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base  # type: ignore[assignment]
    if isinstance(owner, mmap.mmap) and len(owner) > SMALL_BYTES:
        owner.madvise(mmap.MADV_DONTNEED)


Each = TypeVar("Each")


def releasing(each: Iterable[Each], array: NDArray) -> Iterator[Each]:
    """Yield the same items as `each`, and free the memory of `array` after each."""
    for one in each:
        yield one
        release(array)


def pieces(array: NDArray) -> Iterator[NDArray]:
    """Yield a flat array in pieces, and free the memory of each before the next."""
    for start in range(0, len(array), PIECE_NUMBERS):
        yield array[start : start + PIECE_NUMBERS]
        release(array)


def copy_of(array: NDArray) -> NDArray:
    """Copy an array to memory, reading no more than one piece of the mapped file at a time."""
    if array.size <= PIECE_NUMBERS:
        copy = np.array(array)
        release(array)
        return copy
    copy = np.empty(array.size, array.dtype)
    start = 0
    for piece in pieces(array.reshape(-1)):
        copy[start : start + len(piece)] = piece
        start += len(piece)
    return copy.reshape(array.shape)


def is_within(array: NDArray, bound: float) -> bool:
    """Whether all numbers are at most `bound` in size; NaN is not."""
    return all(bool((np.abs(piece) <= bound).all()) for piece in pieces(array))


def sha256_of(array: NDArray) -> str:
    """SHA-256 of the array's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces(array):
        digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest()
