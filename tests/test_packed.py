"""Corrections in fewer bytes (common/packed.py): nothing is lost, and no stream takes more memory than was agreed."""

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from common.errors import RemoteProtocolError
from common.packed import packed, unpacked


@given(numbers=arrays("<u4", st.integers(0, 70)).map(lambda words: words.view("<f4")), shift=st.integers(0, 24))
@settings(max_examples=100)
def test_every_float32_comes_back_bit_for_bit_and_none_takes_more_bytes(numbers: NDArray, shift: int) -> None:
    rounded = (numbers.view("<u4") >> shift << shift).view("<f4")
    payload = packed(rounded)
    assert payload.nbytes <= rounded.nbytes
    assert unpacked(payload, len(rounded)).tobytes() == rounded.tobytes()


def test_numbers_without_low_bits_take_about_as_many_bits_as_they_have() -> None:
    whole = np.random.default_rng(0).integers(-(2**11), 2**11, 20_000).astype("<f4")
    assert packed(whole).nbytes * 8 / len(whole) < 16  # 12, and what tells a number's exponent


def stream(content: bytes, rest: bytes = b"") -> NDArray:
    compressed = zlib.compress(content) + rest
    return np.frombuffer(compressed + bytes(-len(compressed) % 4), "<u4")


def test_244_a_stream_of_other_numbers_than_agreed_is_refused_and_takes_no_memory() -> None:
    """Among others a bomb: 100 million bytes of zeros in 100 kilobytes."""
    bomb = stream(bytes(100_000_000))
    tracemalloc.start()
    try:
        for payload in (bomb, stream(bytes(404)), stream(bytes(396)), stream(b""), stream(bytes(400), b"more")):
            with pytest.raises(RemoteProtocolError, match="does not hold exactly 100"):
                unpacked(payload, 100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    cut, damaged = packed(np.zeros(100, np.float32)).copy(), packed(np.zeros(100, np.float32)).copy()
    damaged[0] ^= 0xFFFF
    with pytest.raises(RemoteProtocolError, match="does not hold exactly 100"):
        unpacked(cut[:-1], 100)
    with pytest.raises(RemoteProtocolError, match="damaged"):
        unpacked(damaged, 100)
    with pytest.raises(RemoteProtocolError, match="there are 99, expected 100"):
        unpacked(np.zeros(99, np.float32), 100)
    with pytest.raises(RemoteProtocolError, match="uint64"):
        unpacked(np.zeros(100, "<u8"), 100)
