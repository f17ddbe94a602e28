"""One vector to which the owners' parts are added as they arrive. It never holds a single owner's upload.

If an owner drops out in the middle, some of its parts are in the sum already. The upload then starts again without it.
The others send the same parts once more, which reveals nothing new.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from common.errors import RemoteProtocolError
from common.mapped import release
from common.summation import fixed_point
from common.tensor_layout import TensorLayout

Zeros = Callable[[int], NDArray[np.uint64]]  # makes a vector of that many zeros, in memory or on disk


def zeros_in_memory(size: int) -> NDArray[np.uint64]:
    return np.zeros(size, dtype="<u8")


class Accumulator:
    """The sum so far: `vector` (layout.size,) in the layout's ring. `part` is the part that is being collected.

    The vector lies in the first bytes of `words`, 64 bits for each number, so that it can be decoded in place.
    """

    def __init__(self, layout: TensorLayout, zeros: Zeros) -> None:
        self.words = zeros(layout.size)
        self.vector = fixed_point.numbers(layout, self.words)
        self.slices = layout.part_slices(layout.dtype.itemsize)
        self.part = 0
        self._must_restart = False

    def fold(self, owner: str, part: int, payload: NDArray) -> None:
        """Add one owner's part. Raises RemoteProtocolError, and adds nothing, unless it is the part expected now."""
        self.check(owner, part, payload)
        self.vector[self.slices[self.part]] += payload
        release(self.vector)

    def check(self, owner: str, part: int, payload: NDArray) -> None:
        """Raise RemoteProtocolError unless this is the part expected now."""
        position = self.slices[self.part]
        expected = position.stop - position.start
        if part != self.part or payload.shape != (expected,) or payload.dtype != self.vector.dtype:  # check: part-fits
            raise RemoteProtocolError(
                f"sum: owner {owner} sent {payload.size} {payload.dtype} numbers as part {part}, "
                f"but part {self.part} has {expected} {self.vector.dtype} numbers"
            )

    def drop_owner(self) -> None:
        """Start again, at the next `advance`, if parts of the owner that dropped out are in the sum."""
        self._must_restart |= self.part > 0

    def start_again(self) -> None:
        """Drop what was added, and collect the first part next."""
        self.vector[:] = 0
        self.part, self._must_restart = 0, False

    def advance(self) -> bool:
        """Move to the next part, or back to the first after an owner dropped out; False when every part is in."""
        if self._must_restart:
            self.start_again()
            return True
        self.part += 1
        return self.part < len(self.slices)
