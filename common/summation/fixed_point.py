"""Real numbers as integers modulo 2^w, so that sums are exact and do not depend on the order, masked or not.

A tensor with the public bound B is encoded as round(x * 2^f), negative numbers as two's complement. The number of
fraction bits f follows from B, the number of owners N and the ring. It is the largest for which no sum can wrap around:

    N * (B * 2^f + 1) <= 2^(w - 1)               (the 1 covers rounding)

The agreement and the layout fix the bounds and the ring, so every party computes the same f. A vector is encoded and
decoded in place, in 64-bit words; 32-bit integers take the first half of them.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from math import inf

import numpy as np
from numpy.typing import NDArray

from common.errors import FalseTotal, NumericalError, RemoteProtocolError, SettingsError
from common.mapped import release
from common.tensor_layout import RingBits, TensorEntry, TensorLayout

MAX_FRACTION_BITS = 128
CHUNK_NUMBERS = 1 << 20


@lru_cache(maxsize=1 << 12)  # exact fractions take long, and every tensor of every vector asks
def fraction_bits(bound: float, num_owners: int, ring_bits: RingBits = 64) -> int:
    """f for one tensor. Raises SettingsError if not even whole numbers fit."""
    if bound == inf:
        raise SettingsError("a tensor without a bound cannot be summed")
    room = Fraction(2) ** (ring_bits - 1) / num_owners - 1
    ratio = room / Fraction(bound)
    if ratio < 1:
        raise SettingsError(
            f"bound {bound:g}: the sum over {num_owners} owners could exceed 2^{ring_bits - 1}, "
            f"the largest possible bound is {float(room):g}"
        )
    bits = int(ratio).bit_length() - 1  # 2^bits <= ratio < 2^(bits + 1)  # check: no-sum-wraps-around
    return min(bits, MAX_FRACTION_BITS)


def check_layout(layout: TensorLayout, num_owners: int) -> None:
    """Prove that no sum of this layout can wrap around. Raises SettingsError, naming the tensor."""
    for entry in layout.entries:
        try:
            fraction_bits(entry.bound, num_owners, layout.ring_bits)
        except SettingsError as error:
            raise SettingsError(f"{entry.name}: {error.message}", hint="change [bounds] in the agreement") from None


def numbers(layout: TensorLayout, words: NDArray) -> NDArray:
    """The layout's vector in fixed point, (layout.size,), as a view of the first bytes of as many 64-bit words."""
    return words.view(layout.dtype)[: layout.size]


def encode(layout: TensorLayout, vector: NDArray[np.float64], num_owners: int) -> NDArray:
    """Encode (layout.size,) float64 in place and return the integers as they travel.

    Raises NumericalError, naming the tensor, at the first value that is not finite or is outside its bound. The vector
    is then partly overwritten, and nothing has left.
    """
    for entry, position in layout.positions():
        _encode_tensor(layout, vector, entry, position, num_owners)
    return numbers(layout, vector)


def flatten_encoded(
    layout: TensorLayout, tensors: Iterable[tuple[str, NDArray]], vector: NDArray[np.float64], num_owners: int
) -> NDArray:
    """`layout.flatten`, then `encode`, of a vector that lies on the disk: each tensor is encoded as soon as it is
    written, so that no number is written to the disk and read again in between.
    """

    def encoding() -> Iterator[tuple[str, NDArray]]:
        positions = iter(layout.positions())
        for each in tensors:
            yield each
            _encode_tensor(layout, vector, *next(positions), num_owners)  # `flatten` has written it where it belongs

    layout.flatten(encoding(), vector)
    return numbers(layout, vector)


def _encode_tensor(
    layout: TensorLayout, vector: NDArray[np.float64], entry: TensorEntry, position: slice, num_owners: int
) -> None:
    """Encode one tensor of a vector, after all before it: an integer is never longer than the number it overwrites."""
    signed = numbers(layout, vector).view(f"<i{layout.dtype.itemsize}")
    unit = 2.0 ** fraction_bits(entry.bound, num_owners, layout.ring_bits)
    for start in range(position.start, position.stop, CHUNK_NUMBERS):
        chunk = vector[start : min(start + CHUNK_NUMBERS, position.stop)]
        # Negated, so that NaN fails too.
        if not max(chunk.max(initial=0.0), -chunk.min(initial=0.0)) <= entry.bound:  # check: values-are-within-bounds
            raise _out_of_bound(entry, chunk)
        scaled = chunk * unit  # exact, by a power of two
        signed[start : start + len(chunk)] = np.rint(scaled, out=scaled)
        release(vector)


def decode(layout: TensorLayout, words: NDArray[np.uint64], num_owners: int, num_summed: int) -> NDArray[np.float64]:
    """Decode the sum in `words`, over `num_summed` of the `num_owners` owners, in place; returns it as float64.

    Raises FalseTotal if a number is larger than that many honest owners can make it.
    """
    signed, decoded = numbers(layout, words).view(f"<i{layout.dtype.itemsize}"), words.view("<f8")
    for entry, position in reversed(layout.positions()):
        bits = fraction_bits(entry.bound, num_owners, layout.ring_bits)
        largest = num_summed * _largest(entry, bits)
        for start in reversed(range(position.start, position.stop, CHUNK_NUMBERS)):  # see `encode`
            chunk = signed[start : min(start + CHUNK_NUMBERS, position.stop)]
            if _exceeds(chunk, largest):  # check: total-is-in-bounds
                raise FalseTotal(
                    f"sum: {entry.name} exceeds {num_summed} owners times the bound {entry.bound:g}: an owner sent a "
                    "false vector, and the sum hides who it was. Nothing was published",
                    hint="owners contribute once: find out together, then make a new agreement; if this machine may be "
                    "at fault, run the same command again",
                )
            decoded[start : start + len(chunk)] = chunk.astype(np.float64) * 0.5**bits
            release(words)
    return decoded


def check_one(layout: TensorLayout, position: slice, part: NDArray, owner: str, num_owners: int) -> None:
    """Raise RemoteProtocolError if one owner's encoded numbers at `position` of a vector exceed their bounds."""
    signed = part.view(f"<i{part.itemsize}")
    for entry, whole in layout.positions():
        chunk = signed[max(whole.start - position.start, 0) : max(whole.stop - position.start, 0)]
        largest = _largest(entry, fraction_bits(entry.bound, num_owners, layout.ring_bits)) if len(chunk) else 0
        if _exceeds(chunk, largest):  # check: plain-part-is-in-bounds
            raise RemoteProtocolError(
                f"sum: owner {owner} sent a value of {entry.name} beyond the agreed bound {entry.bound:g}"
            )


def _largest(entry: TensorEntry, bits: int) -> int:
    """The largest integer that one number within the bound can become."""
    return int(Fraction(entry.bound) * 2**bits) + 1


def _exceeds(chunk: NDArray, largest: int) -> bool:
    return int(chunk.max(initial=0)) > largest or int(chunk.min(initial=0)) < -largest


def _out_of_bound(entry: TensorEntry, chunk: NDArray[np.float64]) -> NumericalError:
    finite = np.isfinite(chunk)
    if not finite.all():
        return NumericalError(
            f"{entry.name}: {chunk[~finite][0]} is not a finite number; nothing has left",
            hint="check the model and the rows",
        )
    worst = chunk[np.abs(chunk).argmax()]
    return NumericalError(
        f"{entry.name}: value {worst:g} is outside the agreed bound {entry.bound:g}; nothing has left",
        hint="a larger bound needs a new agreement: see its [bounds]",
    )
