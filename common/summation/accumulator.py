"""One vector into which the owners' parts are folded as they arrive. It never holds an owner's upload.

An owner that is lost in the middle has some parts in already, so the upload begins again without it: the others send
the same parts once more, which tells nobody anything new.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from common.errors import RemoteProtocolError
from common.mapped import release
from common.summation import fixed_point
from common.tensor_layout import TensorLayout

Zeros = Callable[[int], NDArray[np.uint64]]  # a new vector of that many zeros, in memory or on a disk


def zeros_in_memory(size: int) -> NDArray[np.uint64]:
    return np.zeros(size, dtype="<u8")


class Accumulator:
    """`vector` (layout.size,) of the layout's ring is the sum of all parts folded, in the first bytes of `words`, where
    it can be decoded; `part` is the one being collected.
    """

    def __init__(self, layout: TensorLayout, zeros: Zeros) -> None:
        self.words = zeros(layout.size)
        self.vector = fixed_point.numbers(layout, self.words)
        self.slices = layout.part_slices(layout.dtype.itemsize)
        self.part = 0
        self._spoilt = False

    def fold(self, owner: str, part: int, payload: NDArray) -> None:
        """Add one owner's part. Raises RemoteProtocolError, and then nothing was added, unless it is the right one."""
        position = self.slices[self.part]
        expected = position.stop - position.start
        if part != self.part or payload.shape != (expected,) or payload.dtype != self.vector.dtype:
            raise RemoteProtocolError(
                f"sum: owner {owner} sent {payload.size} numbers of {payload.dtype} as part {part}; "
                f"part {self.part} has {expected} of {self.vector.dtype}"
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
