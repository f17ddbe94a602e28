"""Float32 numbers in fewer bytes, without loss, where their low bits are mostly zero.

The first bytes of all numbers are written together, then all second ones, and so on, because bytes of one significance
are alike. zlib then needs few bits for each. Corrections travel like this (verification.steps_of). What does not get
smaller stays as it is, so a part of a vector never exceeds what one message holds.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from common.errors import RemoteProtocolError

FLOAT, WORD = np.dtype("<f4"), np.dtype("<u4")
LEVEL = 1  # the bytes are random except for how often each occurs, so no level finds more


def packed(numbers: NDArray[np.float32]) -> NDArray:
    """`numbers` (n,), float32, as zlib's stream in 32-bit words, zeros at its end; or as they are if these are fewer
    bytes.
    """
    planes = np.ascontiguousarray(numbers.astype(FLOAT, copy=False).view("u1").reshape(-1, FLOAT.itemsize).T)
    compressor = zlib.compressobj(LEVEL, strategy=zlib.Z_RLE)
    stream = compressor.compress(planes.data) + compressor.flush()
    stream += bytes(-len(stream) % WORD.itemsize)
    return np.frombuffer(stream, WORD) if len(stream) < numbers.nbytes else numbers


def unpacked(payload: NDArray, count: int) -> NDArray[np.float32]:
    """What `packed` was given, (count,). Takes memory for at most three times as many, whatever the stream says.

    Raises RemoteProtocolError unless there are exactly so many.
    """
    if payload.dtype == FLOAT:
        numbers = payload
    elif payload.dtype == WORD:
        numbers = _decompressed(payload, count)
    else:
        raise RemoteProtocolError(f"packed numbers: they are {payload.dtype.name}, neither float32 nor 32-bit words")
    if numbers.shape != (count,):  # check: packed-numbers-are-as-many
        raise RemoteProtocolError(f"packed numbers: there are {len(numbers)}, expected {count}")
    return numbers


def _decompressed(words: NDArray, count: int) -> NDArray[np.float32]:
    decompressor, size = zlib.decompressobj(), count * FLOAT.itemsize
    try:
        # One byte more than there should be: zero would mean without limit.
        content = decompressor.decompress(words.tobytes(), size + 1)  # check: packed-numbers-are-bounded
    except zlib.error:
        raise RemoteProtocolError("packed numbers: the stream is damaged") from None
    rest = decompressor.unused_data
    is_whole = decompressor.eof and len(content) == size and len(rest) < WORD.itemsize and not any(rest)
    if not is_whole:  # check: packed-streams-are-whole
        raise RemoteProtocolError(f"packed numbers: the stream does not hold exactly {count}")
    return np.ascontiguousarray(np.frombuffer(content, "u1").reshape(FLOAT.itemsize, count).T).view(FLOAT).reshape(-1)
