"""Real numbers as integers modulo 2^64, so that sums are exact and the same in any order, masked or not.

A tensor with the public bound B is encoded as round(x * 2^f), negative numbers as two's complement. The number of
fraction bits f follows from B and the number of owners N alone: the largest for which no sum can wrap around,

    N * (B * 2^f + 1) <= 2^63                    (the 1 covers rounding)

Bounds stand in the agreement (`common/agreement.py`) and in the layout, so every party computes the same f.
"""

from fractions import Fraction
from math import inf

import numpy as np
from numpy.typing import NDArray

from common.errors import NumericalError, SettingsError
from common.mapped import release
from common.tensor_layout import TensorEntry, TensorLayout

RING_BITS = 64
MAX_FRACTION_BITS = 128
CHUNK_NUMBERS = 1 << 20


def fraction_bits(bound: float, num_owners: int) -> int:
    """f for one tensor. Raises SettingsError where not even whole numbers fit."""
    if bound == inf:
        raise SettingsError("a tensor without a bound cannot be summed")
    room = Fraction(2) ** (RING_BITS - 1) / num_owners - 1
    ratio = room / Fraction(bound)
    if ratio < 1:
        raise SettingsError(
            f"bound {bound:g}: the sum over {num_owners} owners could pass 2^63; the largest bound is {float(room):g}"
        )
    bits = int(ratio).bit_length() - 1  # 2^bits <= ratio < 2^(bits + 1)
    return min(bits, MAX_FRACTION_BITS)


def check_layout(layout: TensorLayout, num_owners: int) -> None:
    """Prove that no sum of this layout can wrap around. Raises SettingsError, naming the tensor."""
    for entry in layout.entries:
        try:
            fraction_bits(entry.bound, num_owners)
        except SettingsError as error:
            raise SettingsError(f"{entry.name}: {error}; see [bounds] of the agreement") from None


def encode(layout: TensorLayout, vector: NDArray[np.float64], num_owners: int) -> NDArray[np.uint64]:
    """Encode (layout.size,) float64 in place; the same memory is returned as uint64.

    Raises NumericalError, naming the tensor, at the first value that is not finite or outside its bound; the vector is
    then of no use, and nothing has left.
    """
    encoded = vector.view("<i8")
    for entry, position in layout.positions():
        bits = fraction_bits(entry.bound, num_owners)
        for start in range(position.start, position.stop, CHUNK_NUMBERS):
            chunk = vector[start : min(start + CHUNK_NUMBERS, position.stop)]
            # The negation makes a value that is no number fail too.
            if not np.abs(chunk).max(initial=0.0) <= entry.bound:
                raise NumericalError(_out_of_bound(entry, chunk))
            encoded[start : start + len(chunk)] = np.rint(np.ldexp(chunk, bits))
        release(vector)
    return vector.view("<u8")


def decode(layout: TensorLayout, total: NDArray[np.uint64], num_owners: int, num_summed: int) -> NDArray[np.float64]:
    """Decode a sum over `num_summed` of the `num_owners` owners in place; the same memory is returned as float64.

    Raises NumericalError if a number is larger than that many honest owners can make it.
    """
    signed, decoded = total.view("<i8"), total.view("<f8")
    for entry, position in layout.positions():
        bits = fraction_bits(entry.bound, num_owners)
        largest = num_summed * (int(Fraction(entry.bound) * 2**bits) + 1)
        for start in range(position.start, position.stop, CHUNK_NUMBERS):
            chunk = signed[start : min(start + CHUNK_NUMBERS, position.stop)]
            if int(chunk.max(initial=0)) > largest or int(chunk.min(initial=0)) < -largest:
                raise NumericalError(
                    f"sum: {entry.name} exceeds {num_summed} owners times the bound {entry.bound:g}; an owner sent "
                    "another vector than it should, or masks did not cancel. Nothing was published"
                )
            decoded[start : start + len(chunk)] = np.ldexp(chunk.astype(np.float64), -bits)
        release(total)
    return decoded


def _out_of_bound(entry: TensorEntry, chunk: NDArray[np.float64]) -> str:
    finite = np.isfinite(chunk)
    if not finite.all():
        return f"{entry.name}: {chunk[~finite][0]} is not a finite number; nothing has left. Look at the model and rows"
    worst = chunk[np.abs(chunk).argmax()]
    return (
        f"{entry.name}: value {worst:g} is outside the agreed bound {entry.bound:g}; nothing has left. "
        "The agreement's [bounds] decide; a larger bound needs a new agreement"
    )
