"""rows^T rows, added to float64 sums at half the work of a full product: BLAS computes the upper triangle alone.

torch offers no such product, SciPy's BLAS does, and needs less time for it than torch for blocks of the upper triangle.
"""

from collections.abc import Iterable

import numpy as np
import torch
from scipy.linalg.blas import ssyrk
from threadpoolctl import ThreadpoolController
from torch import Tensor

ROWS_AT_ONCE = 256  # of a matrix: few enough for a core's cache


class SymmetricProducts:
    """Room for one product of each size, used again and again: fresh memory costs more than what is written there."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._products = {size: np.zeros((size, size), dtype=np.float32, order="F") for size in sizes}
        self._blas = ThreadpoolController().select(user_api="blas")

    def add(self, matrix: Tensor, rows: Tensor, times: int = 1) -> None:
        """matrix += times * rows^T rows, in the upper triangle; what is below means nothing until `mirror_upper`.

        `matrix` (d, d) float64, `rows` (n, d) float32. As many threads as torch has, so that the last bits depend on
        one setting alone.
        """
        if not len(rows):
            return
        features = rows.contiguous().numpy().T  # (d, n) in Fortran's order of memory
        with self._blas.limit(limits=torch.get_num_threads()):
            lower = ssyrk(times, features, beta=0, c=self._products[len(matrix)], lower=True, overwrite_c=True)
        upper = torch.from_numpy(lower.T)  # (d, d) float32
        for start in range(0, len(matrix), ROWS_AT_ONCE):
            band = slice(start, start + ROWS_AT_ONCE)
            matrix[band, start:] += upper[band, start:]


def mirror_upper(matrix: Tensor) -> None:
    """Make a (d, d) matrix symmetric, in place: below the diagonal stands what is above."""
    for start in range(0, len(matrix), ROWS_AT_ONCE):
        end = start + ROWS_AT_ONCE
        square = matrix[start:end, start:end]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[end:, start:end] = matrix[start:end, end:].T
