"""One owner's own vector in fixed point, read as the coordinator reads the total: tensor by tensor, as float64."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.mapped import release
from common.summation import fixed_point
from common.tensor_layout import TensorLayout


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """What one owner contributed to a sum over `owners` (summation.totals.SummedTensors).

    `encoded` (layout.size,): the very integers that it masked and sent.
    """

    layout: TensorLayout
    encoded: NDArray
    owners: tuple[str, ...]
    roster_size: int

    @property
    def num_owners(self) -> int:
        return len(self.owners)

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self._decoded(name, self.layout.read(self.encoded, name))

    def some_of(self, name: str, numbers: slice) -> NDArray[np.float64]:
        return self._decoded(name, self.layout.read(self.encoded, name).reshape(-1)[numbers])

    def _decoded(self, name: str, encoded: NDArray) -> NDArray[np.float64]:
        """A copy, after which what was read of a vector on the disk takes no memory."""
        decoded: NDArray[np.float64] = encoded.view(f"<i{encoded.itemsize}").astype(np.float64)
        release(self.encoded)
        decoded *= 0.5 ** self._bits(name)  # exact, by a power of two
        return decoded

    def rounding_error(self, name: str) -> float:
        return float(0.5 ** (self._bits(name) + 1))

    def diagonal_error(self, name: str) -> NDArray[np.float64]:
        return np.full(self.layout.shape(name)[0], self.rounding_error(name))

    def destroy(self) -> None:
        self.encoded[:] = 0

    def _bits(self, name: str) -> int:
        return fixed_point.fraction_bits(self.layout.bound(name), self.roster_size, self.layout.ring_bits)
