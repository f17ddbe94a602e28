"""Integers of several 64-bit words, modulo 2^(64 WORDS): the numbers of a check, which are summed exactly.

An array (numbers, WORDS) of uint64 holds one number a row, its lowest word first; negative ones as two's complement.
"""

import numpy as np
from numpy.typing import NDArray

WORDS = 4
BITS = 64 * WORDS

Wide = NDArray[np.uint64]  # (numbers, WORDS)


def add(first: Wide, second: Wide) -> Wide:
    """The sums of two arrays."""
    total = np.empty_like(first)
    carry = np.zeros(len(first), dtype="<u8")
    for word in range(WORDS):
        partial = first[:, word] + second[:, word]
        total[:, word] = partial + carry
        carry = ((partial < first[:, word]) | (total[:, word] < partial)).astype("<u8")  # never both
    return total


def subtract(first: Wide, second: Wide) -> Wide:
    """first - second."""
    return ~add(~first, second)


def to_words(number: int) -> list[int]:
    """The words of a number from -2^(BITS - 1) to 2^(BITS - 1) - 1. Raises OverflowError for any other."""
    content = number.to_bytes(8 * WORDS, "little", signed=True)
    return [int.from_bytes(content[start : start + 8], "little") for start in range(0, len(content), 8)]


def from_words(words: NDArray[np.uint64]) -> int:
    """The number that (WORDS,) words are."""
    return int.from_bytes(words.astype("<u8").tobytes(), "little", signed=True)
