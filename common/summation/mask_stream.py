"""Masks: AES-128-CTR keystreams, added to a vector modulo 2^64 or 2^32.

A stream can start at any byte: counter block = offset // 16. Parts can therefore be masked in any order and on any
number of cores. `cryptography` writes the keystream into a reused buffer (`update_into`) and releases the interpreter
lock meanwhile, so this runs at the speed of OpenSSL itself. One key makes one stream for one session. The same key must
never mask two vectors.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

KEY_BYTES = 16
BLOCK_BYTES = 16
# A multiple of the block size, small enough for chunk and keystream to stay in the second-level cache.
CHUNK_BYTES = 1 << 18

Mask = tuple[bytes, Literal[1, -1]]  # (key, sign)


def add_masks(values: NDArray, masks: Sequence[Mask], offset: int, threads: int | None = None) -> None:
    """Add every mask to `values` in place, modulo 2^64 or 2^32.

    `values` (n,), little-endian uint64 or uint32, begins at number `offset` of the whole vector.
    """
    chunk_numbers = CHUNK_BYTES // values.itemsize
    starts = range(0, len(values), chunk_numbers)
    workers = min(threads or os.cpu_count() or 1, len(starts))
    if workers <= 1:
        return _add_range(values, masks, offset)
    step = -(-len(starts) // workers) * chunk_numbers
    with ThreadPoolExecutor(workers) as pool:
        ranges = [(values[start : start + step], offset + start) for start in range(0, len(values), step)]
        list(pool.map(lambda piece: _add_range(piece[0], masks, piece[1]), ranges))
    return None


def _add_range(values: NDArray, masks: Sequence[Mask], offset: int) -> None:
    width, chunk_numbers = values.itemsize, CHUNK_BYTES // values.itemsize
    skipped = offset * width % BLOCK_BYTES  # a part need not begin at a block of the stream
    counter = (offset * width // BLOCK_BYTES).to_bytes(BLOCK_BYTES)
    streams = []
    for key, sign in masks:
        encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
        encryptor.update(bytes(skipped))
        streams.append((encryptor, np.add if sign > 0 else np.subtract))
    length = min(chunk_numbers, len(values))
    zeros = memoryview(bytes(length * width))
    buffer = bytearray(length * width)
    keystream = np.frombuffer(buffer, dtype=values.dtype)
    for start in range(0, len(values), chunk_numbers):
        chunk = values[start : start + chunk_numbers]
        for encryptor, combine in streams:
            encryptor.update_into(zeros[: len(chunk) * width], buffer)
            combine(chunk, keystream[: len(chunk)], out=chunk)  # check: masks-are-used-once
