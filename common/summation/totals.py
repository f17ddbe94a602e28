"""What a merge method reads of a total, whether it was summed in one round or in two (scaling.py)."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SummedTensors(Protocol):
    """Tensors by name, each the sum over `owners`, float64."""

    @property
    def owners(self) -> tuple[str, ...]: ...

    @property
    def num_owners(self) -> int: ...

    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> NDArray[np.float64]: ...

    def some_of(self, name: str, numbers: slice) -> NDArray[np.float64]:
        """Some numbers of a tensor that is not symmetric, row by row, (n,): for tensors that are large."""

    def rounding_error(self, name: str) -> float:
        """How far a number of tensor `name` can be from the sum of the owners' real numbers."""

    def diagonal_error(self, name: str) -> NDArray[np.float64]:
        """The same for each number on the diagonal of a symmetric tensor, (d,).

        Number [j, k] is off by at most the geometric mean of errors j and k.
        """

    def destroy(self) -> None:
        """Overwrite the sums."""
