"""One vector into which the owners' parts are folded as they arrive. It never holds an owner's upload.

An owner that is lost in the middle has some parts in already, so the upload begins again without it: the others send
the same parts once more, which tells nobody anything new.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from common.errors import RemoteProtocolError
from common.mapped import release
from common.tensor_layout import TensorLayout

BYTES_PER_NUMBER = 8
Zeros = Callable[[int], NDArray[np.uint64]]  # a new vector of that many zeros, in memory or on a disk


def zeros_in_memory(size: int) -> NDArray[np.uint64]:
    return np.zeros(size, dtype="<u8")


class Accumulator:
    """`vector` (layout.size,) uint64 is the sum modulo 2^64 of all parts folded; `part` is the one being collected."""

    def __init__(self, layout: TensorLayout, zeros: Zeros) -> None:
        self.vector = zeros(layout.size)
        self.slices = layout.part_slices(BYTES_PER_NUMBER)
        self.part = 0
        self._spoilt = False

    def fold(self, owner: str, part: int, payload: NDArray) -> None:
        """Add one owner's part. Raises RemoteProtocolError, and then nothing was added, unless it is the right one."""
        position = self.slices[self.part]
        expected = position.stop - position.start
        if part != self.part or payload.shape != (expected,) or payload.dtype != np.dtype("<u8"):
            raise RemoteProtocolError(
                f"sum: owner {owner} sent {payload.size} numbers of {payload.dtype} as part {part}; "
                f"part {self.part} has {expected} of uint64"
            )
        self.vector[position] += payload
        release(self.vector)

    def lose_owner(self) -> None:
        """An owner of whom earlier parts are in is gone: what was folded so far is of no use."""
        self._spoilt |= self.part > 0

    def advance(self) -> bool:
        """Go on to the next part, or begin again where an owner was lost midway; False when everything is in."""
        if self._spoilt:
            self.vector[:] = 0
            self.part, self._spoilt = 0, False
            return True
        self.part += 1
        return self.part < len(self.slices)
