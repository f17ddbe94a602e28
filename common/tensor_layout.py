"""Named tensors to one flat vector and back.

A sum knows nothing about tensors: it adds flat vectors. A layout fixes, for all parties alike, where each tensor lies
and in which ring (integers of how many bits) the vectors are added. Symmetric matrices travel as their upper triangle,
row by row. A vector is cut into parts that are small enough for one message.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Reversible
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from common.errors import LocalProtocolError
from common.mapped import pieces

BAND = 64  # columns of a matrix that are mirrored together: from 32 to 128 all take as long
PART_BYTES = 64_000_000  # the most that one message carries: larger ones cost memory and time in each Flower process

Packing = Literal["full", "symmetric"]
RingBits = Literal[64, 32]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a layout. The packing `symmetric` keeps the d (d + 1) / 2 upper entries of a (d, d) matrix.

    `bound` is the largest absolute value that one owner may add; the fixed-point encoding relies on it. It is infinite
    if the tensor is never summed. `product_of` names the Gram, an earlier tensor, that this one is a product with.
    `noise`: the standard deviation of what each owner adds to hide single rows (common/privacy/noise.py); less by the
    root of two off a symmetric matrix's diagonal.
    """

    name: str
    shape: tuple[int, ...]
    bound: float
    packing: Packing = "full"
    product_of: str = ""
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not self.name:
            raise LocalProtocolError("layout: a tensor has no name")
        if any(length < 1 for length in self.shape):
            raise LocalProtocolError(f"layout: {self.name} has shape {self.shape}; every length must be at least 1")
        if not self.bound > 0:
            raise LocalProtocolError(f"layout: {self.name} has bound {self.bound}; it must be positive")
        if self.packing == "symmetric" and (len(self.shape) != 2 or self.shape[0] != self.shape[1]):
            raise LocalProtocolError(f"layout: {self.name} has shape {self.shape}; a symmetric matrix is square")

    @property
    def size(self) -> int:
        """How many numbers of it travel."""
        if self.packing == "symmetric":
            return self.shape[0] * (self.shape[0] + 1) // 2
        return prod(self.shape)


@dataclass(frozen=True)
class TensorLayout:
    """An ordered list of named tensors. Two layouts have the same digest exactly if they are equal.

    Numbers are summed modulo 2^ring_bits. Whatever holds a vector in fixed point, on the wire or in memory, takes the
    type of its numbers from here.
    """

    entries: tuple[TensorEntry, ...]
    ring_bits: RingBits = 64

    def __post_init__(self) -> None:
        if len({entry.name for entry in self.entries}) != len(self.entries):
            raise LocalProtocolError("layout: duplicate tensor name")

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(entry.size for entry in self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self._slices

    @property
    def dtype(self) -> np.dtype:
        """The type of the vector's numbers in fixed point, as they travel: little-endian and unsigned."""
        return np.dtype(f"<u{self.ring_bits // 8}")

    @property
    def num_bytes(self) -> int:
        """The size of the vector in fixed point."""
        return self.size * self.dtype.itemsize

    @cached_property
    def _slices(self) -> dict[str, tuple[TensorEntry, slice]]:
        slices = {}
        start = 0
        for entry in self.entries:
            slices[entry.name] = (entry, slice(start, start + entry.size))
            start += entry.size
        return slices

    def positions(self) -> Reversible[tuple[TensorEntry, slice]]:
        """Every tensor, in order, with its slice of the flat vector."""
        return self._slices.values()

    def to_json(self) -> list[Any]:
        """The ring, then every field of each entry, in order."""
        return [
            self.ring_bits,
            *(
                [each.name, [*each.shape], each.bound, each.packing, each.product_of, each.noise]
                for each in self.entries
            ),
        ]

    @classmethod
    def from_json(cls, description: list[Any]) -> "TensorLayout":
        """Raises ValueError, TypeError or LocalProtocolError unless `to_json` would write exactly this."""
        ring_bits, *entries = description
        layout = cls(
            tuple(
                TensorEntry(
                    name=name, shape=tuple(shape), bound=bound, packing=packing, product_of=product_of, noise=noise
                )
                for name, shape, bound, packing, product_of, noise in entries
            ),
            ring_bits,
        )
        if ring_bits not in get_args(RingBits) or layout.to_json() != description:  # check: layouts-are-read-exactly
            raise ValueError("not a layout that was written")
        return layout

    def digest(self) -> str:
        """SHA-256 of `to_json`, in hexadecimal."""
        description = self.to_json()  # check: layout-digest-covers-the-ring
        canonical = json.dumps(description, separators=(",", ":"), ensure_ascii=False).encode()
        return hashlib.sha256(b"amalgram layout v4\n" + canonical).hexdigest()

    def flatten(self, tensors: Iterable[tuple[str, NDArray]], vector: NDArray) -> None:
        """Write every tensor into `vector` (size,), in the layout's order, so that a generator need hold only one.

        Raises LocalProtocolError if a tensor is missing, unexpected, out of order or of another shape, or if the vector
        has another length.
        """
        self._check_length(vector)
        vector = np.asarray(vector)  # a memmap takes long to slice
        produced = iter(tensors)
        for entry, position in self._slices.values():
            name, tensor = next(produced, ("nothing", np.empty(0)))
            if name != entry.name or tensor.shape != entry.shape:
                raise LocalProtocolError(
                    f"layout: expected {entry.name} of shape {entry.shape}, got {name} of shape {tensor.shape}"
                )
            if entry.packing == "symmetric":
                _pack(tensor, vector[position])
            else:
                _copy(tensor.reshape(-1), vector[position])
        extra = next(produced, None)
        if extra is not None:
            raise LocalProtocolError(f"layout: unexpected tensor {extra[0]} after the last one")

    def read(self, vector: NDArray, name: str) -> NDArray:
        """The tensor `name` of a flat vector: a view, unless it has to be unpacked."""
        self._check_length(vector)
        if name not in self._slices:
            raise LocalProtocolError(f"layout: there is no tensor {name}")
        entry, position = self._slices[name]
        if entry.packing == "symmetric":
            return _unpack(vector[position], entry.shape[0])
        return vector[position].reshape(entry.shape)

    def bound(self, name: str) -> float:
        """The largest absolute value that one owner may add to the tensor `name`."""
        return self._slices[name][0].bound

    def entry(self, name: str) -> TensorEntry:
        """What is known of the tensor `name`."""
        return self._slices[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._slices[name][0].shape

    def unflatten(self, vector: NDArray) -> Iterator[tuple[str, NDArray]]:
        """Yield every (name, tensor), in order."""
        for entry in self.entries:
            yield entry.name, self.read(vector, entry.name)

    def part_slices(self, bytes_per_number: int, part_bytes: int = PART_BYTES) -> list[slice]:
        """Where the flat vector is cut into parts: at least one, each of at most `part_bytes`."""
        step = max(1, part_bytes // bytes_per_number)
        return [slice(start, min(start + step, self.size)) for start in range(0, max(self.size, 1), step)]

    def _check_length(self, vector: NDArray) -> None:
        if vector.shape != (self.size,):
            raise LocalProtocolError(f"layout: the vector has shape {vector.shape}, the layout needs ({self.size},)")


def union(layouts: Iterable[TensorLayout]) -> TensorLayout:
    """All entries, in order of first appearance. An entry of the same name must be the same in every layout."""
    entries: dict[str, TensorEntry] = {}
    for layout in layouts:
        for entry in layout.entries:
            if entries.setdefault(entry.name, entry) != entry:
                raise LocalProtocolError(f"layout: {entry.name} has two different shapes, bounds or packings")
    return TensorLayout(tuple(entries.values()))


def _copy(numbers: NDArray, vector: NDArray) -> None:
    start = 0
    for piece in pieces(vector):
        piece[:] = numbers[start : start + len(piece)]
        start += len(piece)


def _pack(matrix: NDArray, packed: NDArray) -> None:
    # Row by row: index arrays for a (d, d) triangle would need more memory than the matrix.
    start = 0
    for row in range(len(matrix)):
        width = len(matrix) - row
        packed[start : start + width] = matrix[row, row:]
        start += width


@cache
def _below_diagonal(dimension: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.tril_indices(dimension, -1)


def _unpack(packed: NDArray, dimension: int) -> NDArray:
    packed = np.asarray(packed)  # a memmap takes long to slice
    matrix = np.empty((dimension, dimension), dtype=packed.dtype)
    start = 0
    for row in range(dimension):
        width = dimension - row
        matrix[row, row:] = packed[start : start + width]
        start += width
    for start in range(0, dimension, BAND):  # in bands, because a column is far apart in memory
        end = min(start + BAND, dimension)
        square, below = matrix[start:end, start:end], _below_diagonal(end - start)
        square[below] = square.T[below]
        matrix[end:, start:end] = matrix[start:end, end:].T
    return matrix
