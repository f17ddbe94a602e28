"""Random numbers that nobody can foresee: from AES-128-CTR, under a key that the operating system draws for each call.

What noise hides is gone for whoever can draw the same noise, so no seed of an agreement has a part in it.
"""

import secrets

import numpy as np
from numpy.typing import NDArray

from common.summation import mask_stream


def uniform(size: int) -> NDArray[np.float64]:
    """(size,) numbers between 0 and 1, neither of them among these, in steps of 2^-52."""
    words = np.zeros(size, dtype="<u8")
    key = secrets.token_bytes(mask_stream.KEY_BYTES)  # check: noise-is-never-foreseen
    mask_stream.add_masks(words, [(key, 1)], 0)
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gaussian(size: int, scale: float) -> NDArray[np.float64]:
    """(size,) numbers with mean 0 and standard deviation `scale` (Box and Muller, 1958)."""
    pairs = (size + 1) // 2
    radii = scale * np.sqrt(-2 * np.log(uniform(pairs)))
    angles = 2 * np.pi * uniform(pairs)
    return np.concatenate([radii * np.cos(angles), radii * np.sin(angles)])[:size]
